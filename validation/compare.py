"""Predicted beside measured: one `Comparison` per executed plan, and what a set of them says about the predictions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from planner.plan import ParallelPlan
from validation.measure import Measurement

if TYPE_CHECKING:
    from planner.predict import Prediction

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One plan: what was predicted, and what running it gave. Seconds, bytes, fractions.

    predicted_before: the step time written down before the plan ran, at the machine's pace of that moment.
    predicted_seconds, interval: the same prediction at the pace that the anchor benchmark showed between the plan's
    steps (`Measurement.pace`); equal to predicted_before where there is no anchor.

    status: "ok", or "failed" where no time was measured (`reason` says why; measured values are nan or empty).
    interval: the predicted step time lies in it. peaks: by rank. p10, p90: of the measured steps.
    disturbed: steps not counted because the machine was busy with something else.
    shares: parts of the predicted time by source of its prices. unpriced: ops that only the roofline prices.
    """

    model: str
    plan: ParallelPlan
    status: Literal["ok", "failed"]
    reason: str
    predicted_seconds: float
    interval: tuple[float, float]
    measured_seconds: float
    predicted_peaks: tuple[int, ...]
    measured_peaks: tuple[int, ...]
    measured_p10: float = NAN
    measured_p90: float = NAN
    steps: int = 0
    steady: bool = True
    disturbed: int = 0
    loss_error: float = NAN
    gradient_error: float = NAN
    load: tuple[float, float] = (NAN, NAN)
    shares: tuple[tuple[str, float], ...] = ()
    breakdown: tuple[tuple[str, float], ...] = ()
    unpriced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    predicted_before: float = NAN

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def error(self) -> float:
        """Signed error of the step time: predicted / measured - 1."""
        return self.predicted_seconds / self.measured_seconds - 1 if self.ok else NAN

    @property
    def error_before(self) -> float:
        """Signed error of what was written down before, with whatever the machine's pace did since."""
        return self.predicted_before / self.measured_seconds - 1 if self.ok else NAN

    @property
    def comparable_seconds(self) -> float:
        """The measured step time brought to the pace of predicted_before, at which plans can be ranked."""
        known = self.predicted_before == self.predicted_before
        return self.measured_seconds * (self.predicted_before / self.predicted_seconds if known else 1.0)

    @property
    def covered(self) -> bool:
        """Whether the measured time lies in the predicted interval."""
        return self.interval[0] <= self.measured_seconds <= self.interval[1]

    @property
    def peak_rank(self) -> int:
        """The rank whose peak memory is shown: where prediction and measurement differ most, or the fullest."""
        errors = self.memory_errors or self.predicted_peaks
        return max(range(len(errors)), key=lambda rank: abs(errors[rank]), default=0)

    @property
    def predicted_peak_bytes(self) -> int:
        """Of `peak_rank`."""
        return self.predicted_peaks[self.peak_rank] if self.predicted_peaks else 0

    @property
    def measured_peak_bytes(self) -> int:
        """Of `peak_rank`; 0 where it was not measured."""
        return self.measured_peaks[self.peak_rank] if self.memory_errors else 0

    @property
    def memory_errors(self) -> tuple[float, ...]:
        """Signed errors of the peak memory by rank; empty where it was not measured."""
        if len(self.predicted_peaks) != len(self.measured_peaks):
            return ()
        return tuple(p / m - 1 for p, m in zip(self.predicted_peaks, self.measured_peaks))

    @property
    def memory_error(self) -> float:
        """Of `peak_rank`: the largest of `memory_errors` in size, with its sign."""
        return self.memory_errors[self.peak_rank] if self.memory_errors else NAN


@dataclass(frozen=True, slots=True)
class Summary:
    """How good a set of predictions was. Fractions; nan where the runs cannot say.

    runs, failed: executed plans, and those of them without a measured time.
    median_error, worst_error: of |error|; median_error_before: of |error_before|. bias: mean signed error.
    spearman: rank correlation of predicted and measured times (at one pace), the lowest over the models.
    top1_regret: how much slower than the fastest executed plan the one predicted fastest is, the highest over models.
    memory_median_error, memory_worst_error: of |memory error| of every rank of every plan.
    coverage: share of the plans whose measured time lies in the predicted interval.
    """

    runs: int
    failed: int
    median_error: float
    worst_error: float
    bias: float
    spearman: float
    top1_regret: float
    memory_median_error: float
    memory_worst_error: float
    coverage: float
    median_error_before: float = NAN


def compare(model: str, prediction: Prediction, measurement: Measurement, before: float = NAN) -> Comparison:
    """Puts a prediction beside the measurement of the same plan; `before`: the step time predicted before it ran."""
    assert prediction.plan == measurement.plan, "prediction and measurement are of different plans"
    timed = measurement.status == "ok" and measurement.median_seconds > 0
    reason = measurement.reason or ("" if timed else "no step was timed")
    return Comparison(
        model, prediction.plan, "ok" if timed else "failed", reason,
        predicted_seconds=prediction.step_seconds,
        interval=(prediction.interval[0], prediction.interval[1]),
        measured_seconds=measurement.median_seconds if timed else NAN,
        predicted_peaks=tuple(prediction.peak_bytes),
        measured_peaks=measurement.peak_bytes,
        measured_p10=measurement.p10_seconds, measured_p90=measurement.p90_seconds, steps=measurement.steps,
        steady=measurement.steady or not timed,
        disturbed=measurement.disturbed,
        loss_error=measurement.loss_error, gradient_error=measurement.gradient_error, load=measurement.load,
        shares=tuple(prediction.shares.items()), breakdown=tuple(prediction.breakdown.items()),
        unpriced=tuple(prediction.unpriced), notes=(*prediction.notes, *measurement.notes),
        predicted_before=prediction.step_seconds if before != before else before,
    )  # fmt: skip


def summarise(comparisons: Iterable[Comparison]) -> Summary:
    """The summary of all runs; ranks are correlated and regrets taken within each model."""
    runs = list(comparisons)
    good = [c for c in runs if c.ok]
    errors = [c.error for c in good]
    memory = [abs(e) for c in good for e in c.memory_errors]
    models = [[c for c in good if c.model == name] for name in dict.fromkeys(c.model for c in good)]
    return Summary(
        runs=len(runs),
        failed=len(runs) - len(good),
        median_error=_median([abs(e) for e in errors]),
        worst_error=max(map(abs, errors), default=NAN),
        bias=statistics.fmean(errors) if errors else NAN,
        spearman=min(_numbers(spearman(m) for m in models), default=NAN),
        top1_regret=max(_numbers(top1_regret(m) for m in models), default=NAN),
        memory_median_error=_median(memory),
        memory_worst_error=max(memory, default=NAN),
        coverage=statistics.fmean(c.covered for c in good) if good else NAN,
        median_error_before=_median([abs(c.error_before) for c in good if c.error_before == c.error_before]),
    )


def spearman(runs: Sequence[Comparison]) -> float:
    """Rank correlation of predicted and measured times; nan for fewer than two plans or where all tie."""
    predicted, measured = [_first(c) for c in runs], [c.comparable_seconds for c in runs]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return NAN
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, measured).statistic)


def top1_regret(runs: Sequence[Comparison]) -> float:
    """Measured time of the plan predicted fastest / that of the plan measured fastest - 1; nan without runs."""
    if not runs:
        return NAN
    chosen = min(runs, key=_first)
    return chosen.comparable_seconds / min(c.comparable_seconds for c in runs) - 1


def _first(c: Comparison) -> float:
    """What ranked the plan."""
    return c.predicted_before if c.predicted_before == c.predicted_before else c.predicted_seconds


def family(plan: ParallelPlan) -> str:
    """The kind of plan, as plots and tables group them."""
    axes = [axis for axis in ("pp", "dp", "tp") if getattr(plan, axis) > 1]
    if len(axes) > 1:
        return "two axes" if len(axes) == 2 else "three axes"
    match axes:
        case ["dp"]:
            return plan.data_parallel
        case ["pp"]:
            return f"pp {plan.schedule}"
    return axes[0] if axes else "single"


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else NAN


def _numbers(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]
