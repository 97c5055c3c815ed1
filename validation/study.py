"""A validation study: search, predict, keep the predictions, then execute the same plans, and compare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodels.cluster import Cluster
from planner.plan import ParallelPlan, Precision
from validation.anchor import NEVER, Beat
from validation.compare import Comparison, compare
from validation.launch import run_plans
from validation.measure import Measurement, Options
from validation.pace import Pace, pace_of, since_calibration

if TYPE_CHECKING:
    from opgraph.graph import OpGraph
    from planner.predict import Prediction
    from planner.search import Ranked, SearchResult

Progress = Callable[[str, float], None]
STEADY = 1.2  # a machine whose anchor time varies by more than this factor was disturbed
Choose = Callable[["SearchResult", int], "Sequence[Ranked]"]


@dataclass(frozen=True, slots=True)
class SearchNote:
    """What the search for one world size did. rejected: (family, reason, how many plans)."""

    ranks: int
    considered: int
    infeasible: int
    ranked: int
    seconds: float
    rejected: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class Study:
    """Everything about one model: its comparisons, how they came about, and when (UTC).

    anchors: the machine's anchor time as a ratio to that of its calibration: three samples before the search, then
    between the steps of each plan (empty where there is no calibration).
    """

    model: str
    cluster: str
    device: str
    global_batch: int
    comparisons: tuple[Comparison, ...]
    searches: tuple[SearchNote, ...]
    anchors: tuple[float, ...]
    predicted_at: str
    executed_at: str
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def drift(self) -> float:
        """The slowest over the fastest tenth of the anchor samples; nan where there are none."""
        if not self.anchors:
            return float("nan")
        low, high = np.percentile(self.anchors, (10, 90))
        return float(high / low)

    @property
    def failures(self) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if not c.ok)


def validate(
    model: str,
    cluster: Cluster,
    global_batch: int,
    ranks: Sequence[int] = (2, 4),
    count: int = 8,
    options: Options | None = None,
    progress: Progress = lambda what, fraction: None,
    choose: Choose | None = None,
    keep: Callable[[str, Sequence[Any]], None] = lambda model, predictions: None,
    precision: Precision = "fp32",
) -> Study:
    """Searches plans of `model` for each number of `ranks`, predicts `count` diverse ones of each, executes them.

    `model` is a spec of `opgraph.models.load_workload`. The cluster must be this machine, or (under torchrun) the one
    that runs this. `choose(result, ranks)` picks the plans to execute; by default `planner.search.diverse`.
    `keep(model, predictions)` is called before anything is executed. What is compared is the same prediction at the
    pace of the machine while the plan ran, as the anchor between its steps shows it; both are in the report.
    """
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from planner.search import search

    began = time.monotonic()
    _check(cluster, ranks, count, "RANK" in os.environ and "WORLD_SIZE" in os.environ)
    if cluster.device.anchor_seconds:
        progress("anchor: how fast is this machine now", 0.0)
    with pace_of(cluster) as pace:
        pace.sample()
        progress(f"tracing {model}", 0.02)
        workload = load_workload(model)
        graph = trace_workload(workload, precision=precision)
        pace.sample()
        at_first = pace.at(pace.sample())
        chosen: list[Ranked] = []
        searches = []
        for world in ranks:
            progress(f"searching plans for {world} rank{'s' * (world > 1)}", 0.05)
            result = search(
                workload, graph, at_first, global_batch, devices=world, precision=precision, offload="never"
            )  # most kinds of it are simulated only
            chosen += (choose or _diverse(count))(result, world)
            searches.append(_note(result, world))
        if not chosen:
            raise ValueError(f"the search found plans of {model}, but none of them was chosen; choose other ranks")
        predictions = [ranked.prediction for ranked in chosen]
        predicted_at = _now()
        keep(model, predictions)
        progress(f"executing {len(predictions)} plans", 0.1)
        executed_at = _now()
        options = replace(options or Options(), backend=cluster.backend)
        before = tuple(pace.ratios)
        comparisons, beside = _executed(model, graph, pace, predictions, options, progress)
        return Study(
            model, cluster.name, cluster.device.name, global_batch, comparisons, tuple(searches), before + beside,
            predicted_at, executed_at, time.monotonic() - began, at_first.device.notes,
        )  # fmt: skip


def _executed(
    model: str, graph: OpGraph, pace: Pace, predictions: Sequence[Prediction], options: Options, progress: Progress
) -> tuple[tuple[Comparison, ...], tuple[float, ...]]:
    """Runs the plans of the predictions; the comparisons at each plan's own pace, and those paces as ratios."""
    from planner.predict import predict

    done: dict[int, Comparison] = {}
    ratios: list[float] = []

    def measured(m: Measurement) -> None:
        i = next(i for i, p in enumerate(predictions) if p.plan == m.plan)
        own = predictions[i]
        ratio, parts = since_calibration(pace.cluster.device, felt(own, m, pace.cluster.cores))
        if pace.anchors is not None and ratio:
            ratios.append(ratio)
            own = predict(graph, own.plan, pace.at(ratio, parts, slowest=feels_slowest(own.plan, pace.cluster.cores)))
        done[i] = compare(model, own, m, predictions[i].step_seconds)
        progress(outcome(done[i]), 0.1 + 0.88 * len(done) / len(predictions))

    def waiting(what: str) -> None:
        progress(what, 0.1 + 0.88 * len(done) / len(predictions))

    run_plans(model, [p.plan for p in predictions], options, measured, waiting)
    return tuple(done[i] for i in range(len(predictions))), tuple(ratios)


def feels_slowest(plan: ParallelPlan, cores: int) -> bool:
    """Whether the pace that `felt` gives is of the slowest rank at every moment."""
    return plan.pp == 1 or plan.world_size > cores


def felt(p: Prediction, m: Measurement, cores: int) -> Beat:
    """The anchor that the plan's computing goes by: between that of one rank alone and of all at once.

    Stages of a pipeline compute at once for a part of their time only: of n ranks that are busy for a share u of the
    step, at least (n u - 1) / (n - 1) / u of it, if their idle times do not coincide.
    """
    ranks, share = p.plan.world_size, p.breakdown["compute"] / p.step_seconds
    if feels_slowest(p.plan, cores) or m.pace_alone == NEVER:
        return m.pace
    at_once = min(max((ranks * share - 1) / (ranks - 1) / share, 0.0), 1.0)
    return Beat(*(alone + (all_busy - alone) * at_once for alone, all_busy in zip(m.pace_alone, m.pace)))


def drift_warning(study: Study) -> str:
    """A sentence where the machine became slower or faster while the plans ran; empty where it did not."""
    if not (study.drift > STEADY or study.drift < 1 / STEADY):
        return ""
    return (
        f"the pace of this machine changed by a factor of {study.drift:.2f} (other work on it, or on its host); "
        "predictions were brought to the pace of each plan's steps, but a quiet machine is a better judge"
    )


def _check(cluster: Cluster, ranks: Sequence[int], count: int, torchrun: bool) -> None:
    if count < 1:
        raise ValueError(f"{count} plans cannot be validated; give 1 or more")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks {', '.join(map(str, ranks)) or '(none)'} cannot run; give numbers of 1 or more: 2,4")
    if torchrun and set(ranks) != {int(os.environ["WORLD_SIZE"])}:
        raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} ranks; give --ranks {os.environ['WORLD_SIZE']}")
    if cluster.cores:
        return
    if not torchrun:
        raise ValueError(
            f"plans cannot be executed on {cluster.name} from here: validate on --cluster local, "
            "or start this under torchrun on that cluster"
        )
    if max(ranks) > cluster.size:
        raise ValueError(f"{max(ranks)} ranks need {max(ranks)} devices, {cluster.name} has {cluster.size}")


def _note(result: SearchResult, ranks: int) -> SearchNote:
    rejected = tuple((r.label, r.reason, r.count) for r in result.rejected)
    return SearchNote(ranks, result.considered, result.infeasible, len(result.plans), result.seconds, rejected)


def _diverse(count: int) -> Choose:
    def choose(result: SearchResult, ranks: int) -> Sequence[Ranked]:
        from planner.search import diverse

        picked: Sequence[Ranked] = diverse(result, count)
        return picked

    return choose


def outcome(c: Comparison) -> str:
    """One line about one executed plan."""
    where = f"{c.plan.label} on {c.plan.world_size}"
    if not c.ok:
        return f"{where}: FAILED, {c.reason}"
    predicted, measured = c.predicted_seconds * 1e3, c.measured_seconds * 1e3
    return f"{where}: predicted {predicted:.1f} ms, measured {measured:.1f} ms ({c.error:+.1%})"


def predictions_path(folder: Path, model: str) -> Path:
    """Where the predictions for `model` are kept in a report."""
    name = "".join(c if c.isalnum() else "-" for c in model.split("/")[-1].partition(":")[0])
    return folder / f"predictions-{name}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
