"""The machine's pace: samples, what is usual among them, clusters at a pace, and steps that do not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.cluster import Cluster, CollectiveTable, load_cluster
from costmodels.variability import highest_of, synchronous
from planner.plan import ParallelPlan
from validation.anchor import NEVER, Anchors, Beat
from validation.measure import DISTURBED, beside, pace_of_steps, undisturbed
from validation.pace import NEAR, Pace, pace_of, since_calibration, usual
from validation.study import feels_slowest, felt

DEVICE = load_cluster("dgx-h100").device


class Fixed:
    """Anchors whose samples are known."""

    def __init__(self, *seconds: float) -> None:
        self.waiting = list(seconds)

    def seconds(self, repeats: int) -> float:
        return self.waiting.pop(0)


def cluster() -> Cluster:
    one = load_cluster("dgx-h100")
    table = CollectiveTable("all_reduce", 2, (1e3, 1e6), (1e-3, 4e-3), (0.5, 0.5))
    return replace(one, device=replace(one.device, anchor_seconds=0.010), cores=2, tables=(table,), cache={})


def test_a_burst_does_not_move_what_is_usual():
    pace = Pace(cluster(), Fixed(0.011, 0.011, 0.016, 0.011, 0.017))
    assert [round(pace.sample(), 6) for _ in range(5)] == pytest.approx([1.1] * 5)


def test_a_lasting_change_does():
    pace = Pace(cluster(), Fixed(*[0.010] * 4, *[0.013] * NEAR))
    assert [pace.sample() for _ in range(4 + NEAR)][-1] == pytest.approx(1.3)


def test_everything_takes_longer_at_a_slow_pace():
    slow = Pace(cluster(), Fixed()).at(2.0)
    assert slow.tables[0].seconds == (2e-3, 8e-3) and slow.device.anchor_seconds == pytest.approx(0.020)


def test_the_slowest_of_cores_is_as_slow_as_it_was_measured():
    """What cores differ by is in a pace of the slowest already, so a job on them is no slower still."""
    one = replace(cluster(), device=replace(cluster().device, host={"skew": 0.1}))
    assert synchronous(Pace(one, Fixed()).at(2.0, slowest=True), 2).device.anchor_seconds == pytest.approx(0.020)
    both = synchronous(Pace(one, Fixed()).at(2.0), 2).device.anchor_seconds
    assert both == pytest.approx(0.020 * (1 + 0.1 * highest_of(2)))


def test_messages_of_real_links_do_not_follow_the_host():
    slow = Pace(replace(cluster(), cores=0), Fixed()).at(2.0)
    assert slow.tables[0].seconds == (1e-3, 4e-3)


def test_nothing_is_known_without_a_calibration(monkeypatch):
    plain = load_cluster("dgx-h100")
    with pace_of(plain) as pace:
        assert pace.sample() == 1.0 and pace.at(1.0) is plain and not pace.ratios
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pace_of(cluster()) as pace:  # ranks of torchrun must all predict the same
        assert pace.anchors is None


def test_blocks_beside_a_burst_do_not_count():
    # paces before the first block and after each of four
    assert undisturbed([1.0, 1.0, 1.6, 1.0, 1.0]) == [True, False, False, True]
    assert undisturbed([1.5, 1.5, 1.5]) == [True, True]  # nothing else is known


@given(st.lists(st.floats(0.5, 3.0), min_size=2, max_size=12))
def test_a_pace_near_the_usual_counts(paces: list[float]):
    kept = undisturbed(paces)
    assert len(kept) == len(paces) - 1
    for good, pair in zip(kept, pairwise(paces)):
        assert good == (max(pair) <= DISTURBED * usual(paces))


def test_the_pace_that_a_step_feels():
    data, pipe = ParallelPlan(8, dp=2), ParallelPlan(8, pp=2, dp=2, cuts=("h.1",), micro_batches=2)
    fast, slow = Beat(0.4, 0.3, 0.2, 0.1), Beat(0.4, 0.4, 0.4, 0.2)
    assert pace_of_steps(data, [fast, list(fast)], list(slow)) == slow  # who waits for the slowest at every moment
    stages = [pipe.coordinates(r)["pp"] for r in range(4)]
    found = pace_of_steps(pipe, [slow if s == 0 else fast for s in stages], slow)
    assert found == pytest.approx((0.4, 0.35, 0.3, 0.15)) and found.whole == pytest.approx(1.2)  # stages work in turn
    assert pace_of_steps(pipe, [slow, fast, NEVER, NEVER], slow) == slow  # more ranks than cores
    assert beside([fast, fast, slow, slow], [True, False, False]) == fast
    assert beside([fast, fast, slow], None) == pytest.approx((0.4, 0.325, 0.25, 0.125))


def test_who_feels_the_slowest_rank_at_every_moment():
    """Their pace contains how cores differ; that of a pipeline with a core for each rank does not."""
    data, pipe = ParallelPlan(8, dp=4), ParallelPlan(8, pp=2, dp=2, cuts=("h.1",), micro_batches=2)
    assert feels_slowest(data, 4) and feels_slowest(pipe, 2) and not feels_slowest(pipe, 4)


def test_a_pace_is_told_by_its_parts():
    host = {"anchor_in_rank": 2.0, "op_forward": 1.0}
    parts = {"anchor_products": 0.5, "anchor_convolutions": 0.5, "anchor_passes": 0.5, "anchor_calls": 0.5}
    whole, found = since_calibration(replace(DEVICE, host=host | parts), Beat(2.0, 0.5, 0.25, 1.25))
    assert whole == 2.0 and found == {"products": 4.0, "convolutions": 2.0, "passes": 0.5, "calls": 2.5}
    assert since_calibration(replace(DEVICE, host=host), Beat(2.0, 1.0, 0.25, 0.75)) == (2.0, {})  # an older file
    assert since_calibration(replace(DEVICE, host=host), NEVER) == (0.0, {})
    assert since_calibration(DEVICE, Beat(1.0, 1.0, 1.0, 1.0)) == (0.0, {})


def test_a_pipeline_feels_what_its_stages_do_at_once():
    pipe = ParallelPlan(8, pp=2, cuts=("h.1",), micro_batches=2)
    predicted = SimpleNamespace(plan=pipe, step_seconds=1.0, breakdown={"compute": 0.75})
    busy, alone = Beat(2.0, 1.0, 3.0, 4.0), Beat(1.0, 1.0, 0.0, 1.0)
    run = SimpleNamespace(pace=busy, pace_alone=alone)
    # At once half of the step: two thirds of the computing.
    assert felt(predicted, run, 2) == pytest.approx((1 + 2 / 3, 1.0, 2.0, 3.0))
    predicted.breakdown["compute"] = 0.4  # never at once
    assert felt(predicted, run, 2) == alone
    assert felt(predicted, run, 1) == busy  # ranks share cores
    predicted.plan = ParallelPlan(8, dp=2)
    assert felt(predicted, run, 2) == busy


def test_anchor_processes_answer_and_end():
    with Anchors(2) as anchors:
        first, second = anchors.seconds(3), anchors.seconds(3)
        pids = [p.pid for p in anchors._processes]
    assert 1e-4 < first < 10 and 1e-4 < second < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with Anchors(1, cpu_clock=True) as alone:
        assert 1e-4 < alone.seconds(2) < 10


def test_a_dead_anchor_process_is_said():
    with Anchors(1) as anchors:
        os.kill(anchors._processes[0].pid, signal.SIGKILL)
        anchors._processes[0].wait()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            anchors.seconds(1)


def test_anchor_processes_end_with_their_parent():
    code = (
        "import os, sys\nfrom validation.anchor import Anchors\na = Anchors(1)\n"
        "print(a._processes[0].pid, flush=True)\nos._exit(0)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    pid = int(out)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the anchor process outlived its parent")
