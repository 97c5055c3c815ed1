"""The proof catches plans that compute something else, and says what it assumed."""

from __future__ import annotations

import pytest

from planner.plan import ParallelPlan
from validation.launch import run_plans
from validation.measure import Options

pytestmark = pytest.mark.executed
PROOF = Options(memory=False, measure=False, timeout_seconds=60)
DP = ParallelPlan(global_batch=8, dp=2)


def test_ranks_with_other_weights_are_caught():
    (m,) = run_plans("tests.validation.workloads:disagreeing", [DP], Options(timeout_seconds=60))
    assert m.status == "failed" and "differs from the single-device step" in m.reason
    assert m.steps == 0 and m.peak_bytes == ()  # never timed


def test_loss_that_is_no_mean_is_caught():
    (m,) = run_plans("tests.validation.workloads:wrong_mean", [DP], PROOF)
    assert m.status == "failed" and m.reason.startswith("the loss differs")


def test_batch_statistics_and_dropout_are_said():
    plans = [
        DP,
        ParallelPlan(global_batch=8, dp=2, micro_batches=2),
        ParallelPlan(global_batch=8, pp=2, cuts=("3",), micro_batches=2, schedule="gpipe"),
        ParallelPlan(global_batch=8, dp=2, data_parallel="fsdp"),
    ]
    for m in run_plans("tests.validation.workloads:batch_statistics", plans, PROOF):
        assert (m.status, m.reason) == ("ok", "")
        assert any("dropout of 1 module(s)" in note for note in m.notes)
        assert any("batch statistics" in note for note in m.notes)


@pytest.mark.parametrize("kind, status", [("slightly", "ok"), ("badly", "failed")])
def test_kernels_that_round_otherwise_on_small_batches(kind, status):
    """A gradient that jumps between batch sizes on one device too is forgiven if small, and said."""
    plan = ParallelPlan(global_batch=8, dp=2, micro_batches=4)
    (m,) = run_plans(f"tests.validation.workloads:{kind}_kinked", [plan], PROOF)
    assert m.status == status
    said = m.notes if status == "ok" else [m.reason]
    assert any("differs from the single-device step" in text for text in said)
