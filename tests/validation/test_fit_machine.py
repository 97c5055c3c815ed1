"""Machines measured by others: reading their op tables, and pricing by them."""

from __future__ import annotations

import pytest

from costmodels.device import load_device, on_machine
from costmodels.ops import OpShape, price
from validation.fit_machine import main, products

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


def test_a_machine_replaces_the_products_of_its_device_only() -> None:
    plain = load_device("b200")
    slower = on_machine(plain, "b200-simumax")
    m, n, k = 4096, 8192, 8192
    sizes = 2 * m * n * k, 2 * (m + n) * k, 2 * m * n
    shape = OpShape("aten.mm", "forward", ((m, k), (k, n)), ((m, n),), "bfloat16", *sizes)
    assert 1.2 < price(slower, shape).seconds / price(plain, shape).seconds < 1.6
    assert slower.kernels["attention"] == plain.kernels["attention"]
    with pytest.raises(ValueError, match="no measured machine"):
        on_machine(plain, "nowhere")


def test_a_file_of_something_else_is_named(tmp_path, capsys) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert main(["--config", str(path), "--device", "b200", "--name", "x"]) == 2
    assert "no system file" in capsys.readouterr().err
