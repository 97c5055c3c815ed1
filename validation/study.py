"""A validation study: search, predict, keep the predictions, then execute the same plans, and compare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodels.cluster import Cluster
from costmodels.device import rescale
from planner.plan import Precision
from validation.anchor import anchor_on_cores
from validation.compare import Comparison, compare
from validation.launch import run_plans
from validation.measure import Measurement, Options

if TYPE_CHECKING:
    from planner.search import Ranked, SearchResult

Progress = Callable[[str, float], None]
STEADY = 1.1  # a machine whose anchor time changes by more than this factor was disturbed
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

    anchor_before, anchor_after: the machine's anchor time before the predictions and after the runs, as a ratio to that
    of its calibration (nan where there is none). Predictions use the first; the second shows how the machine drifted.
    """

    model: str
    cluster: str
    device: str
    global_batch: int
    comparisons: tuple[Comparison, ...]
    searches: tuple[SearchNote, ...]
    anchor_before: float
    anchor_after: float
    predicted_at: str
    executed_at: str
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def drift(self) -> float:
        """How many times slower the machine became while the plans ran; nan where that was not measured."""
        return self.anchor_after / self.anchor_before

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
    `keep(model, predictions)` is called before anything is executed.
    """
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from planner.search import search

    began = time.monotonic()
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    _check(cluster, ranks, count, torchrun)
    ratio = 1.0
    if cluster.device.anchor_seconds and not torchrun:  # under torchrun all ranks must predict the same
        progress("anchor: how fast is this machine now", 0.0)
        ratio = anchor_ratio(cluster)
        cluster = replace(cluster, device=rescale(cluster.device, ratio), cache={})
    progress(f"tracing {model}", 0.02)
    workload = load_workload(model)
    graph = trace_workload(workload, precision=precision)
    chosen: list[Ranked] = []
    searches = []
    for world in ranks:
        progress(f"searching plans for {world} rank{'s' * (world > 1)}", 0.05)
        result = search(workload, graph, cluster, global_batch, devices=world, precision=precision)
        chosen += (choose or _diverse(count))(result, world)
        searches.append(_note(result, world))
    if not chosen:
        raise ValueError(f"the search found plans of {model}, but none of them was chosen; choose other ranks")
    predictions = [ranked.prediction for ranked in chosen]
    predicted_at = _now()
    keep(model, predictions)
    done: list[Measurement] = []

    def measured(m: Measurement) -> None:
        done.append(m)
        predicted = next(p for p in predictions if p.plan == m.plan)
        progress(outcome(compare(model, predicted, m)), 0.1 + 0.88 * len(done) / len(predictions))

    progress(f"executing {len(predictions)} plans", 0.1)
    executed_at = _now()
    options = replace(options or Options(), backend=cluster.backend)
    measurements = run_plans(model, [p.plan for p in predictions], options, measured)
    after = anchor_ratio(cluster) * ratio if cluster.device.anchor_seconds and not torchrun else float("nan")
    return Study(
        model, cluster.name, cluster.device.name, global_batch,
        tuple(compare(model, p, m) for p, m in zip(predictions, measurements)), tuple(searches),
        ratio if cluster.device.anchor_seconds else float("nan"), after, predicted_at, executed_at,
        time.monotonic() - began, cluster.device.notes,
    )  # fmt: skip


def drift_warning(study: Study) -> str:
    """A sentence where the machine became slower or faster while the plans ran; empty where it did not."""
    if not (study.drift > STEADY or study.drift < 1 / STEADY):
        return ""
    return (
        f"this machine took {study.drift:.2f} times as long for the same work after the runs as before the "
        "predictions: something else ran on it, and the errors of the step times contain that; "
        "repeat this on a quiet machine"
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


def anchor_ratio(cluster: Cluster) -> float:
    """Median anchor time of one process per core, all at once, over that of the device's calibration."""
    return anchor_on_cores(cluster.cores) / cluster.device.anchor_seconds


def predictions_path(folder: Path, model: str) -> Path:
    """Where the predictions for `model` are kept in a report."""
    name = "".join(c if c.isalnum() else "-" for c in model.split("/")[-1].partition(":")[0])
    return folder / f"predictions-{name}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
