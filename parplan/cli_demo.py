"""`parplan demo`: calibrates this machine, then predicts and executes plans of two small models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parplan.arguments import Json
from parplan.cli_validate import finish, reported
from parplan.console import remark

if TYPE_CHECKING:
    from planner.search import Ranked, SearchResult
    from validation.study import Study

# (model, global batch, plans by number of ranks). Real shapes, but smaller: a step takes 0.1 to 0.3 s.
MODELS: tuple[tuple[str, int, dict[int, int]], ...] = (
    ("gpt2:layers=4,hidden=256,heads=4,ffn=1024,vocab=4096,seq=64", 8, {2: 8, 4: 3}),
    ("alexnet:image=128,hidden=1024,classes=100,dropout=0", 12, {2: 6, 4: 3}),
)
ABOUT = (
    "GPT-2 and AlexNet of real shape but smaller (4 layers of 256 over 64 tokens; pictures of 128, a classifier of "
    "1024), so that minutes suffice"
)
CALIBRATION_SECONDS = 88.0
DAY = 86400.0
SLOWEST = 1.6  # times the fastest plan's step: slower ones would take most of the demo's time


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("reports/demo"),
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Calibrate even if it was done today.")] = False,
    json: Json = False,
) -> None:
    """Calibrate this machine, predict plans of two small models, run them, and compare. Takes about seven minutes.

    Example: parplan demo --out reports/demo
    """

    def studies(progress: Any, keep: Any) -> list[Study]:
        from validation.measure import Options
        from validation.study import validate

        options = Options(min_steps=20, max_seconds=3, timeout_seconds=90)
        where = _calibrated(progress, recalibrate)
        progress(f"Models: {ABOUT}.", 0.0)
        return [
            validate(model, where, batch, tuple(counts), 1, options, progress, _picker(counts), keep)
            for model, batch, counts in MODELS
        ]

    began = time.monotonic()
    made, data = reported(out, "Parplan demo: predicted and measured step time and memory", studies)
    remark(f"{ABOUT}; {time.monotonic() - began:.0f} s in all")
    finish(made, data, out, json)


def _calibrated(progress: Any, again: bool) -> Any:
    """This machine's cluster, calibrated within the last day."""
    from costmodels.cluster import local_cluster
    from costmodels.device import local_path

    path = local_path()
    if not again and path.is_file() and time.time() - path.stat().st_mtime < DAY:
        try:
            return local_cluster()
        except ValueError:  # written by another version
            progress("the calibration of this machine cannot be read; measuring again", 0.0)
    from validation.calibrate import calibrate

    calibrate(None, CALIBRATION_SECONDS, lambda what, fraction: progress(f"calibrating: {what}", fraction))
    return local_cluster()


def _picker(counts: dict[int, int]) -> Any:
    """Plans to execute: on two ranks some of every family, on four ranks those that split two axes.

    The fastest first, then from each family in turn the plan whose predicted time lies farthest from those chosen:
    plans that take the same time say nothing about whether the order of plans is right.
    """

    def choose(result: SearchResult, ranks: int) -> Sequence[Ranked]:
        from validation.compare import family

        groups: dict[str, list[Ranked]] = {}
        for ranked in result.plans:
            kind = family(ranked.plan)
            if ranks > 2 and kind == "two axes":
                kind += "".join(axis for axis in ("pp", "dp", "tp") if getattr(ranked.plan, axis) > 1)
            if ranks <= 2 or kind.startswith("two axes"):
                groups.setdefault(kind, []).append(ranked)
        return spread(list(groups.values()), counts[ranks])

    return choose


def spread(groups: list[list[Ranked]], count: int) -> list[Ranked]:
    """Up to `count` plans, taken from the groups in turn; see `_picker`. Slow plans (`SLOWEST`) only where a group has
    no other."""
    chosen: list[Ranked] = []
    waiting = [list(group) for group in groups]
    while len(chosen) < count and any(waiting):
        for group in filter(None, waiting):
            if len(chosen) == count:
                break
            times = [r.prediction.step_seconds for r in chosen]
            quick = [r for r in group if not times or r.prediction.step_seconds <= SLOWEST * min(times)] or group[:1]
            best = max(quick, key=lambda r: _apart(r, times))
            chosen.append(best)
            group.remove(best)
    return chosen


def _apart(ranked: Ranked, times: list[float]) -> float:
    """Distance of a plan's predicted time to the nearest of `times`, as a logarithm."""
    return min((abs(math.log(ranked.prediction.step_seconds / t)) for t in times), default=0.0)
