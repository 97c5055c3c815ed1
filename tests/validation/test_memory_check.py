"""Peak memory of executed plans is what was predicted; the report keeps what it is given."""

from __future__ import annotations

import pytest
import torch

from opgraph.batch import trace_workload
from opgraph.models import load_workload
from opgraph.workload import Workload, adamw
from planner.plan import ParallelPlan
from validation.launch import run_plans
from validation.measure import Options
from validation.memory_check import MODELS, Row, check, earlier, plans_of, predicted, write


def test_plans_of_every_family() -> None:
    for spec in MODELS:
        workload = load_workload(spec)
        plans = plans_of(workload)
        labels = [p.label for p in plans]
        assert labels[:5] == ["single", "dp2 ddp", "dp2 ddp recompute", "dp2 fsdp", "dp2 fsdp recompute"]
        assert all(set(p.cuts) <= set(workload.blocks) for p in plans) and len(set(plans)) == len(plans)


def test_the_report_says_what_happened(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = [
        Row("a", "single", "ok", (100 * 2**20,), (101 * 2**20,), 100 / 101 - 1, commit="abc"),
        Row("a", "dp2 ddp", "ok", (10, 20), (10, 40), -0.5),
        Row("b", "single", "failed", (5,), (), 0.0, "rank 0 died"),
    ]
    write(rows, tmp_path, "a command")
    text = (tmp_path / "report.md").read_text()
    assert "2 plans of 1 models (1 failed or refused)" in text and "worst 50.00%, 1 of 2 within 1 %" in text
    assert "failed: rank 0 died" in text and "-50.00%" in text and "`a command`" in text
    assert earlier(tmp_path) == rows and earlier(tmp_path / "none") == []
    assert "rank 0 died" in (tmp_path / "memory.csv").read_text()


class Kept(torch.nn.Module):
    """A layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle = torch.nn.Linear(64, 64), torch.nn.Linear(64, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out


def kept() -> Workload:
    batch = lambda n: ((torch.randn(n, 64),), (torch.randn(n, 64),))  # noqa: E731
    return Workload("kept", Kept, batch, torch.nn.functional.mse_loss, adamw, 64)


@pytest.mark.executed
def test_idle_parameters_and_a_loss_in_the_block_of_its_elements_are_held() -> None:
    plans = [ParallelPlan(64), ParallelPlan(64, micro_batches=2), ParallelPlan(64, dp=2, data_parallel="fsdp")]
    expected = [predicted(trace_workload(kept(), accelerator=False), plan) for plan in plans]
    found = run_plans("tests.validation.test_memory_check:kept", plans, Options(measure=False))
    for bytes_, measured in zip(expected, found, strict=True):
        assert measured.status == "ok", measured.reason
        assert bytes_ == pytest.approx(measured.peak_bytes, rel=0.005)


@pytest.mark.executed
def test_executed_plans_use_what_was_predicted() -> None:
    """Convolutions with scratch memory, checkpoints, shards, a pipeline: within 1 %."""
    rows = check("lenet5:batch=16")
    assert "single recompute keep-products" in {r.plan for r in rows}  # kept convolutions take no scratch again
    assert [r.reason for r in rows if r.status != "ok"] == []
    assert max(abs(r.error) for r in rows) <= 0.01, [(r.plan, r.error) for r in rows]
