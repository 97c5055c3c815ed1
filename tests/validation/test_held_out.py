"""Held-out ops and steps: arithmetic on known times, what is counted, one tiny measurement. No times are asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from costmodels.device import Device, Law
from costmodels.ops import OpShape, signature
from validation.held_out import WORKLOADS, markdown, read_workloads, title_of
from validation.held_out_ops import load, op_rows, pooled, save, score, scores, summary, time_workloads


def relu(n: int) -> OpShape:
    return OpShape("aten.relu.default", "forward", ((n,),), ((n,),), "float32", 0, 4 * n, 4 * n)


PARTS = {"products": 0.003, "convolutions": 0.002, "passes": 0.004, "calls": 0.001}
VIEW = OpShape("aten.view.default", "forward", ((8,),), ((2, 4),), "float32", 0, 0, 0)


def device(seen: OpShape | None = None) -> Device:
    law = Law("relu/float32", "stream", (0.0, 0, 0, 0, 0, 0, 1e-9, 0.0, 0.0, 0.0), (0,), (1e9,), 0.1, 9)
    samples = {signature(seen): 3e-5} if seen else {}
    return Device(
        "core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws={law.key: law}, samples=samples,
        host={"anchor_in_rank": 0.01, **{f"anchor_{part}": seconds for part, seconds in PARTS.items()}},
    )  # fmt: skip


def test_rows_are_distinct_ops_at_the_pace_of_the_measurement() -> None:
    """The anchor's passes over memory took twice as long as in calibration, so every price of an op that passes over
    memory is twice that of its law."""
    steps = {"net": [(relu(1000), 1e-5), (relu(1000), 3e-5), (VIEW, 1.0), (relu(5000), 1e-4)]}
    other = {"net": [(relu(1000), 2e-5), (relu(1000), 2e-5), (VIEW, 1.0), (relu(5000), 1e-4)]}
    results = [{"parts": {**PARTS, "passes": 0.008}, "steps": s} for s in (steps, other)]
    small, large = op_rows(device(), results)
    assert (small.count, small.measured, large.count, large.measured) == (2, 2e-5, 1, 1e-4)
    assert small.predicted == pytest.approx(2 * 8e-6) and large.predicted == pytest.approx(2 * 4e-5)
    assert small.error == pytest.approx(-0.2) and small.held_out


def test_an_op_that_calibration_measured_is_not_held_out() -> None:
    pace = {"parts": PARTS}
    results = [{**pace, "steps": {"net": [(relu(1000), 1e-5), (relu(2000), 1e-5)]}}]
    rows = op_rows(device(seen=relu(1000)), results)
    assert [r.held_out for r in rows] == [False, True]
    assert {s.group: s.n for s in summary(rows)} == {
        "held out, all": 1, "held out, shorter": 1, "seen in calibration": 1,
    }  # fmt: skip


def test_scores_by_hand() -> None:
    steps = {"net": [(relu(1000), 1e-5), (relu(10000), 1e-4), (relu(10000), 1e-4)]}
    results = [{"parts": PARTS, "steps": steps}]
    rows = op_rows(device(), results)
    (found,) = scores(rows, lambda r: r.family)
    assert found.group == "pointwise" and found.n == 2 and found.share == pytest.approx(1.0)
    assert found.mean == pytest.approx(0.2) and found.bias == pytest.approx(-0.2)
    assert score("half", rows[1:], 2 * rows[1].measured * 2).share == pytest.approx(0.5)


def test_reports_show_every_error() -> None:
    rows = op_rows(device(), [{"parts": PARTS, "steps": {"net": [(relu(10000), 1e-4)]}}])
    text = markdown((), rows, {"command": "x"})
    assert "| net | relu | forward | 10000\\|10000 | 1 | 80 | 100 | -20.0% | interpolated |" in text


def test_the_workloads_are_whole_models_of_five_kinds() -> None:
    assert {title_of(spec) for spec, _ in WORKLOADS} == {"GPT-2", "ResNet-50", "BERT", "LSTM", "MoE"}
    assert read_workloads(["gpt2:layers=2,seq=128@4"]) == (("gpt2:layers=2,seq=128", 4),)


@pytest.mark.parametrize("text", ["gpt2", "gpt2@0", "gpt2@x", "@4"])
def test_a_workload_needs_a_batch(text: str) -> None:
    with pytest.raises(ValueError, match="MODEL@BATCH"):
        read_workloads([text])


def test_a_machine_without_calibration_is_told_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "validation.held_out", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "parplan calibrate" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report").exists()


def test_launches_are_pooled_at_the_pace_of_the_first() -> None:
    """A product goes by the anchor's products; the second launch was twice as slow in these, the third as disturbed."""
    product = OpShape("aten.mm.default", "forward", ((8, 8), (8, 8)), ((8, 8),), "float32", 1024, 512, 256)

    def launch(products: float, seconds: float) -> dict[str, Any]:
        parts = {"products": products, "convolutions": 1.0, "passes": 1.0, "calls": 1.0}
        return {"reference": products, "parts": parts, "steps": {"model": [(product, seconds)]}}

    found = pooled([launch(1.0, 10.0), launch(2.0, 24.0), launch(1.0, 90.0)])
    assert found["steps"]["model"] == [(product, 12.0)] and found["reference"] == 1.0


@pytest.mark.executed
def test_ops_of_a_workload_are_timed_on_all_ranks(tmp_path: Path) -> None:
    results = time_workloads((("mlp:layers=1,hidden=32,ffn=64,features=16", 4),), 0.0, launches=1)
    (steps,) = {tuple(r["steps"]) for r in results}
    assert len(results) >= 2 and all(seconds >= 0 for r in results for _, seconds in r["steps"][steps[0]])
    save(tmp_path / "ops", results)
    assert load(tmp_path / "ops")[0]["reference"] == results[0]["reference"]
    assert any(shape.name.startswith("aten._fused_adamw") for shape, _ in results[0]["steps"][steps[0]])
