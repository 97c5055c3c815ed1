"""Failing, dying and hanging ranks are reported, the rest goes on, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from planner.plan import ParallelPlan
from tests.validation.workloads import DIES, HANGS, RAISES
from validation.launch import World, run_plans
from validation.measure import Options

pytestmark = pytest.mark.executed
ROOT = Path(__file__).parents[2]
QUICK = Options(memory=False, measure=False, timeout_seconds=120)  # seconds that no plan needs on busy cores
HANGING = ParallelPlan(global_batch=HANGS, dp=2)


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "validation.worker" in " ".join(p.cmdline())]


def test_failing_ranks_are_reported_and_the_rest_goes_on():
    plans = [ParallelPlan(global_batch=n, dp=2) for n in (RAISES, 8, DIES, 4)]
    seen = []
    results = run_plans("tests.validation.workloads:moody", plans, QUICK, seen.append)
    assert [m.status for m in results] == ["failed", "ok", "failed", "ok"]
    assert results[0].reason == "rank 1 raised RuntimeError: no data for rank 1"
    assert results[2].reason == "rank 1 died (exit code 7)"
    assert [m.plan for m in results] == plans and len(seen) == 4
    assert workers() == []


def test_ranks_that_take_too_long_are_killed():
    (m,) = run_plans("tests.validation.workloads:moody", [HANGING], replace(QUICK, timeout_seconds=8))
    assert m.status == "failed" and m.reason.endswith("did not finish within 8 s") and "1" in m.reason
    assert workers() == []


def test_ranks_that_wait_for_each_other_are_seen_and_given_up(monkeypatch):
    monkeypatch.setattr("validation.launch.LOOK", 0.5)
    monkeypatch.setattr("validation.launch.STUCK", 4.0)
    said = []
    plans = [HANGING, ParallelPlan(global_batch=8, dp=2)]
    m, after = run_plans("tests.validation.workloads:moody", plans, QUICK, waiting=said.append)
    assert m.status == "failed" and "computed nothing for" in m.reason and "wait for each other" in m.reason
    assert said and said[0].startswith("waiting for rank(s) 0, 1 of dp2 ddp on 2 for ")
    assert after.status == "ok"


def test_only_ranks_that_fail_are_heard(capfd):
    plans = [ParallelPlan(global_batch=n, dp=2) for n in (8, RAISES)]
    run_plans("tests.validation.workloads:chatty", plans, QUICK)
    heard = capfd.readouterr().err
    assert "Traceback" in heard and heard.count("a page") == 1  # that of the failed rank, of its second plan


def test_unknown_model_is_a_failed_plan():
    (result,) = run_plans("no-such-model", [ParallelPlan(global_batch=8)], QUICK)
    assert result.status == "failed" and "no-such-model" in result.reason


def test_measurement_of_a_plan():
    options = Options(min_steps=20, max_seconds=5)
    one, two = run_plans(
        "tests.planner.models:mlp", [ParallelPlan(global_batch=8), ParallelPlan(global_batch=8, dp=2)], options
    )
    for m, ranks in ((one, 1), (two, 2)):
        assert m.status == "ok" and m.steps >= 20 and len(m.block_medians) == 2
        assert 0 < m.p10_seconds <= m.median_seconds <= m.p90_seconds < 1
        assert m.cv >= 0 and m.load[0] >= 0 and m.gradient_error < 1e-4
        assert len(m.peak_bytes) == ranks
    parameters = 4 * (16 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 8 + 8)
    assert 4 * parameters < one.peak_bytes[0] < 5 * parameters
    assert 5 * parameters < two.peak_bytes[0] < 6 * parameters  # and the buckets


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_plan_leaves_no_thread_behind(tmp_path):
    options = replace(QUICK, prove=True)
    world = World(2, "tests.planner.models:mlp", options, str(tmp_path))
    try:
        counts = []
        for _ in range(3):
            assert world.run(ParallelPlan(global_batch=8, dp=2, data_parallel="fsdp")).status == "ok"
            counts.append([len(list(Path(f"/proc/{rank.pid}/task").iterdir())) for rank in world._ranks])
    finally:
        world.stop()
    assert counts[2] == counts[1]  # the first makes threads that stay (autograd's)


PARENT = """
from planner.plan import ParallelPlan
from validation.launch import World, run_plans
from validation.measure import Options
from tests.validation.workloads import HANGS
run_plans("tests.validation.workloads:moody", [ParallelPlan(global_batch=HANGS, dp=2)], Options(timeout_seconds=300))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_when_the_parent_ends(how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stderr=subprocess.DEVNULL)
    process = psutil.Process(parent.pid)
    wait_for(lambda: len(process.children(recursive=True)) == 2)
    time.sleep(3)
    ranks = process.children(recursive=True)
    parent.send_signal(how)
    parent.wait(20)
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks))


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


INSIDE = """
import os
from planner.plan import ParallelPlan
from validation.launch import World, run_plans
from validation.measure import Options
ddp = ParallelPlan(global_batch=8, dp=2)
plans = [ParallelPlan(global_batch=8, dp=2, data_parallel="fsdp"), ParallelPlan(global_batch=8), ddp]
for m in run_plans("tests.planner.models:mlp", plans, Options(measure=False)):
    if os.environ["RANK"] == "0":
        print("RESULT", m.plan.label, m.status, m.reason, len(m.peak_bytes), flush=True)
"""


def test_inside_torchrun(tmp_path):
    script = tmp_path / "inside.py"
    script.write_text(INSIDE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(script)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines == [
        "RESULT dp2 fsdp ok  2",
        "RESULT single failed the plan needs 1 ranks, torchrun started 2 0",
        "RESULT dp2 ddp ok  2",
    ], done.stderr[-2000:]
