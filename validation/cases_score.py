"""How far predictions of published runs are from what was measured, per set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from validation.cases_run import Outcome


@dataclass(frozen=True, slots=True)
class Score:
    """Errors are fractions. n: scored rows. mape, median: of absolute errors. worst: the signed error that is largest
    in size. bias: mean signed error. spearman: rank correlation of predicted and measured seconds. coverage: share of
    measured steps inside their interval. unpredicted: rows with a reason. allocated, reserved: mean absolute errors of
    memory and how many rows publish it."""

    n: int
    mape: float | None
    median: float | None
    worst: float | None
    bias: float | None
    spearman: float | None
    coverage: float | None
    unpredicted: int
    unscored: int
    allocated: float | None
    allocated_n: int
    reserved: float | None
    reserved_n: int


def score(outcomes: Sequence[Outcome]) -> Score:
    """One set's score."""
    used = [o for o in outcomes if o.error is not None and o.case.scored]
    errors = [o.error for o in used if o.error is not None]
    sizes = [abs(e) for e in errors]
    allocated = [abs(o.allocated_error) for o in outcomes if o.allocated_error is not None]
    reserved = [abs(o.reserved_error) for o in outcomes if o.reserved_error is not None]
    inside = [o.inside for o in used if o.inside is not None]
    return Score(
        n=len(errors),
        mape=fmean(sizes) if sizes else None,
        median=median(sizes) if sizes else None,
        worst=max(errors, key=abs) if errors else None,
        bias=fmean(errors) if errors else None,
        spearman=_spearman(used),
        coverage=fmean(inside) if inside else None,
        unpredicted=sum(bool(o.reason) for o in outcomes),
        unscored=sum(not o.case.scored for o in outcomes),
        allocated=fmean(allocated) if allocated else None,
        allocated_n=len(allocated),
        reserved=fmean(reserved) if reserved else None,
        reserved_n=len(reserved),
    )


def _spearman(outcomes: Sequence[Outcome]) -> float | None:
    if len(outcomes) < 3:
        return None
    from scipy.stats import spearmanr

    predicted, measured = [o.predicted_seconds or 0.0 for o in outcomes], [o.measured_seconds or 0.0 for o in outcomes]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Scores by set, in the order in which sets appear."""
    sets: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        sets.setdefault(outcome.case.set, []).append(outcome)
    return {name: score(members) for name, members in sets.items()}


def case_data(o: Outcome) -> dict[str, Any]:
    """The JSON of one row."""
    data: dict[str, Any] = {
        "case_id": o.case.id, "set": o.case.set, "predicted_seconds": o.predicted_seconds,
        "measured_seconds": o.measured_seconds, "error": o.error, "interval": o.interval, "scored": o.case.scored,
        "plan": o.plan, "software": o.software, "predicted_allocated_bytes": o.allocated_bytes,
        "allocated_error": o.allocated_error, "predicted_reserved_bytes": o.reserved_bytes,
        "reserved_error": o.reserved_error, "device_seconds": o.parts, "shares": o.shares, "notes": o.notes,
    }  # fmt: skip
    return data | {"reason": o.reason} if o.reason else data
