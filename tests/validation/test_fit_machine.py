"""Machines measured by others: reading their op tables, and pricing by them."""

from __future__ import annotations

import numpy as np
import pytest

from costmodels.attention_law import calls_from, flash_seconds
from costmodels.cluster import machine_tables
from costmodels.device import load_device, on_machine
from costmodels.ops import OpShape, price
from validation.fit_machine import main, products
from validation.machine_tables import attention, collectives

CONFIG = {
    "accelerator": {
        "op": {
            "matmul": {
                "tflops": 1000.0,
                "accurate_efficient_factor": {
                    "b=1, m=64, k=128, n=256, layout=TN, accumulate=False, out_dtype=bf16": 0.5,
                    "b=1, m=64, k=128, n=256, layout=NN, accumulate=False, out_dtype=bf16": 0.25,
                },
            },
            "group_matmul": {
                "tflops": 1000.0,
                "accurate_efficient_factor": {"ng=4, M=8, N=16, K=32, stage=bwd_grad_w": 0.1},
            },
        }
    }
}


def test_seconds_are_flop_over_efficiency() -> None:
    single, grouped = products(CONFIG, "b200", "a machine")
    assert single.dims.tolist() == [[1, 64, 256, 128]]
    assert single.seconds[0] == pytest.approx(3 * 2 * 64 * 256 * 128 / 1e15)  # the median of twice and four times
    assert grouped.section == "bfloat16_batched" and grouped.dims.tolist() == [[4, 16, 32, 8]]


def test_a_machine_replaces_what_was_measured_on_it_only() -> None:
    plain = load_device("b200")
    slower = on_machine(plain, "b200-simumax")
    m, n, k = 4096, 8192, 8192
    sizes = 2 * m * n * k, 2 * (m + n) * k, 2 * m * n
    shape = OpShape("aten.mm", "forward", ((m, k), (k, n)), ((m, n),), "bfloat16", *sizes)
    assert 1.2 < price(slower, shape).seconds / price(plain, shape).seconds < 1.6
    assert slower.kernels["rowwise"] == plain.kernels["rowwise"]
    assert "collectives" not in slower.kernels
    with pytest.raises(ValueError, match="no measured machine"):
        on_machine(plain, "nowhere")


def test_a_file_of_something_else_is_named(tmp_path, capsys) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert main(["--config", str(path), "--device", "b200", "--name", "x"]) == 2
    assert "no system file" in capsys.readouterr().err


def test_collectives_follow_the_line_of_the_file() -> None:
    op = {"scale": 1, "offset": -1, "efficient_factor": 0.5, "latency_us": 10.0, "fixed_latency_us": 20.0,
          "fixed_latency_us_by_comm_num": {"2": 5.0}}  # fmt: skip
    ops = {"all_reduce": {**op, "scale": 2}, "all_gather": op, "reduce_scatter": op, "all2all": op}
    config = {"networks": {"high_intra_node": {"bandwidth": {"gbps": 100}, "op": ops}}}
    found = {(t["kind"], t["ranks"]): t for t in collectives(config)}
    assert len(found) == 12
    largest = found["all_gather", 8]
    assert largest["bytes"][-1] == 2**32
    # 7 hops of 10 us, 20 us, and 7/8 of 4 GiB at half of 100 GiB/s
    assert largest["seconds"][-1] == pytest.approx(90e-6 + 7 / 8 * 4 / 50)
    assert found["all_reduce", 8]["seconds"][-1] == pytest.approx(160e-6 + 2 * 7 / 8 * 4 / 50)
    assert found["all_to_all", 2]["seconds"][0] == pytest.approx(15e-6 + 1 / 2 / 1024 / 50, rel=1e-4)


def test_attention_of_a_machine_is_fitted_to_half_of_its_rows() -> None:
    device = load_device("b200")
    law = device.kernels["attention"]["bfloat16"]
    heads = np.array([4.0, 8, 16, 32, 64, 128] * 3)
    tokens = np.repeat([2048.0, 4096, 8192], 6)
    ops = {}
    for name, count, backward in (("sdp_fwd", 2, False), ("sdp_bwd", 5, True)):
        calls = calls_from(1, heads, heads, tokens, tokens, 128, 128, True, backward)
        seconds = 1.5 * flash_seconds(law, device, "bfloat16", calls)  # a machine that is slower throughout
        share = count * tokens**2 * heads * 256 / seconds / 1e15
        names = [f"batch=1, seq_len={t:.0f}, head_num={h:.0f}, kv_head_num={h:.0f}, qk_head_dim=128, v_head_dim=128"
                 for t, h in zip(tokens, heads)]  # fmt: skip
        ops[name] = {"tflops": 1000.0, "accurate_efficient_factor": dict(zip(names, share.tolist()))}
    sections, errors = attention({"accelerator": {"op": ops}}, device)
    assert max(errors.values()) < 0.03
    assert sections["bfloat16"]["rates"][0] < law["rates"][1]
    assert sections["bfloat16_backward"]["rows"] + sections["bfloat16_backward"]["held_out"] == 18


def test_a_machine_has_its_collectives_and_its_attention() -> None:
    tables = machine_tables("b200-simumax")
    assert {(t.kind, t.ranks) for t in tables} >= {("all_gather", 8), ("all_to_all", 4)}
    assert machine_tables("") == ()
    heads = ((1, 64, 4096, 128), (1, 8, 4096, 128), (1, 8, 4096, 128))
    forward = OpShape("aten._scaled_dot_product_cudnn_attention.default", "forward", heads, heads[:1], "bfloat16",
                      0, 0, 0, True)  # fmt: skip
    back = OpShape("aten._scaled_dot_product_cudnn_attention_backward.default", "backward", (heads[0], *heads),
                   heads[:1], "bfloat16", 0, 0, 0, True)  # fmt: skip
    machine = on_machine(load_device("b200"), "b200-simumax")
    # SimuMax's table: 0.280 and 0.837 ms
    assert price(machine, forward).seconds == pytest.approx(0.280e-3, rel=0.1)
    assert price(machine, back).seconds == pytest.approx(0.837e-3, rel=0.1)
