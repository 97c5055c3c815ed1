"""Comparisons and summaries, against values computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from planner.plan import ParallelPlan
from validation.compare import Comparison, compare, family, spearman, summarise, top1_regret
from validation.measure import Measurement, failed

PLAN = ParallelPlan(global_batch=8, dp=2)


def run(predicted: float, measured: float, model: str = "m", interval=(0.0, 9.0), peaks=((10,), (10,))) -> Comparison:
    status = "ok" if measured == measured else "failed"
    return Comparison(model, PLAN, status, "", predicted, interval, measured, *peaks)


def test_errors_of_one_run():
    c = run(1.1, 1.0, interval=(0.9, 1.2), peaks=((110, 80), (100, 100)))
    assert c.error == pytest.approx(0.1) and c.covered
    assert (c.peak_rank, c.predicted_peak_bytes, c.measured_peak_bytes) == (1, 80, 100)
    assert c.memory_errors == pytest.approx((0.1, -0.2)) and c.memory_error == pytest.approx(-0.2)


def test_the_peaks_shown_are_those_of_the_error_shown():
    for peaks in (((100, 95), (100, 90)), ((100, 95), (110, 95)), ((7, 9), (8, 9))):
        c = run(1.0, 1.0, peaks=peaks)
        assert c.memory_error == pytest.approx(c.predicted_peak_bytes / c.measured_peak_bytes - 1)
        assert abs(c.memory_error) == max(map(abs, c.memory_errors)) > 0


def test_plans_are_ranked_at_one_pace():
    # the second ran while the machine took 1.5 times as long: 3.0 s measured are 2.0 s at the pace of the predictions
    calm = replace(run(2.2, 2.1), predicted_before=2.2)
    slow = replace(run(3.0, 3.0), predicted_before=2.0)
    assert slow.error == 0.0 and slow.error_before == pytest.approx(-1 / 3)
    assert slow.comparable_seconds == pytest.approx(2.0) and calm.comparable_seconds == pytest.approx(2.1)
    assert spearman([calm, slow]) == pytest.approx(1.0) and top1_regret([calm, slow]) == 0.0
    assert run(1.0, 2.0).comparable_seconds == 2.0  # no anchor: as measured


def test_memory_that_was_not_measured_has_no_error():
    c = run(1.0, 1.0, peaks=((10, 11), ()))
    assert (c.peak_rank, c.predicted_peak_bytes) == (1, 11)
    assert c.measured_peak_bytes == 0 and c.memory_errors == () and math.isnan(c.memory_error)


def test_summary_of_one_model():
    # errors: +10 %, -20 %, 0; order predicted 1, 2, 3; order measured 1, 3, 2 (of 1.0, 2.5, 2.2)
    runs = [
        run(1.1, 1.0, interval=(1.05, 1.2), peaks=((100,), (100,))),
        run(2.0, 2.5, interval=(1.9, 2.6), peaks=((90,), (100,))),
        run(2.2, 2.2, peaks=((103,), (100,))),
    ]
    s = summarise(runs)
    assert (s.runs, s.failed) == (3, 0)
    assert s.median_error == pytest.approx(0.1) and s.worst_error == pytest.approx(0.2)
    assert s.bias == pytest.approx((0.1 - 0.2 + 0.0) / 3)
    assert s.spearman == pytest.approx(0.5)  # 1 - 6 * (0 + 1 + 1) / (3 * 8)
    assert s.top1_regret == 0
    assert s.memory_median_error == pytest.approx(0.03) and s.memory_worst_error == pytest.approx(0.1)
    assert s.coverage == pytest.approx(2 / 3)


def test_regret_is_what_the_choice_costs():
    assert top1_regret([run(1.0, 1.5), run(1.2, 1.2), run(3.0, 2.0)]) == pytest.approx(0.25)


def test_models_are_ranked_apart():
    # Each model is ranked perfectly; together they would not be.
    runs = [run(1, 10, "a"), run(2, 20, "a"), run(3, 3, "b"), run(4, 4, "b"), run(9, 9, "c")]
    assert summarise(runs).spearman == pytest.approx(1.0)
    worse = [*runs, run(1, 5, "b")]
    assert summarise(worse).spearman == pytest.approx(spearman(worse[2:4] + worse[5:]))
    assert summarise(worse).top1_regret == pytest.approx(5 / 3 - 1)


def test_failed_runs_are_counted_and_nothing_else():
    s = summarise([run(1.0, math.nan), run(1.0, 0.8)])
    assert (s.runs, s.failed) == (2, 1) and s.median_error == pytest.approx(0.25)
    assert math.isnan(s.spearman) and s.top1_regret == 0
    none = summarise([])
    assert none.runs == 0 and math.isnan(none.median_error) and math.isnan(none.coverage)


def test_compare_takes_prediction_and_measurement_of_one_plan():
    prediction = SimpleNamespace(
        plan=PLAN, step_seconds=0.2, interval=(0.1, 0.3), peak_bytes=(5, 6), shares={"measured": 1.0},
        breakdown={"compute": 0.2}, unpriced=(), notes=("a",),
    )  # fmt: skip
    good = Measurement(PLAN, "ok", median_seconds=0.25, steps=20, block_medians=(0.25, 0.25), peak_bytes=(5, 5))
    c = compare("m", prediction, good)
    assert c.ok and c.error == pytest.approx(-0.2) and c.measured_peaks == (5, 5) and c.notes == ("a",)
    c = compare("m", prediction, failed(PLAN, "rank 1 died"))
    assert not c.ok and c.reason == "rank 1 died" and math.isnan(c.error) and math.isnan(c.measured_seconds)
    with pytest.raises(AssertionError):
        compare("m", prediction, failed(ParallelPlan(global_batch=8), ""))


def test_families():
    pairs = {
        "single": {}, "ddp": {"dp": 2}, "fsdp": {"dp": 2, "data_parallel": "fsdp"},
        "tp": {"tp": 2, "shardings": (("a", "colwise"),)}, "pp gpipe": {"pp": 2, "cuts": ("a",), "schedule": "gpipe"},
        "two axes": {"pp": 2, "dp": 2, "cuts": ("a",)},
    }  # fmt: skip
    for name, degrees in pairs.items():
        assert family(ParallelPlan(global_batch=8, **degrees)) == name
