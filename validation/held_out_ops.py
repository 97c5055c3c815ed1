"""Ops of whole models, timed in place on this machine, beside the prices that its calibration gives them.

The models are none that calibration measures, and nothing is fitted to them.
"""

from __future__ import annotations

import os
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.device import Device, rescale
from costmodels.families import FREE, base_name, family
from costmodels.ops import OpShape, price, signature
from costmodels.price import Price
from costmodels.signature import Signature, written
from validation.anchor import Beat, joined, over
from validation.calibrate import MOST_RANKS, run_ranks
from validation.environment import available_cores
from validation.pace import since_calibration

Progress = Callable[[str, float], None]
LAUNCHES = 3  # the same op of the same model differs by 3 to 9 % in the mean between two launches (reports/README.md)
BRIEF_OP = 2e-5  # seconds: shorter ops are scored apart, their time is mostly the call
SHARE_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class OpRow:
    """One distinct op of one model's step. count: how often the step runs it. predicted, measured: seconds of one call
    at one pace, medians over its calls. source: of the price ("measured": calibration has seen this very op, so it is
    not held out)."""

    model: str
    op: str
    family: str
    phase: str
    shapes: str
    dtype: str
    count: int
    predicted: float
    source: str
    expected_error: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def held_out(self) -> bool:
        return self.source != "measured"


@dataclass(frozen=True, slots=True)
class OpScore:
    """Errors of a group of ops. mean, median: of the absolute relative errors of distinct ops. weighted: the mean by
    the seconds that the ops take in their steps. bias: summed predicted over summed measured seconds - 1.
    share: of the step's seconds that all groups together have."""

    group: str
    n: int
    mean: float
    median: float
    weighted: float
    bias: float
    share: float


def time_workloads(
    workloads: Sequence[tuple[str, int]],
    seconds: float,
    progress: Progress = lambda what, fraction: None,
    launches: int = LAUNCHES,
) -> list[dict[str, Any]]:
    """Times every op of the workloads (spec, batch), one thread per rank with all cores busy, as calibration does, in
    so many launches of all ranks one after the other.

    Returns one result per rank: "reference" and "parts" (seconds of the anchor, and of its parts, to whose pace all
    times were brought), and by workload the op shapes in order with the median seconds of each.
    """

    def part(number: int) -> Progress:
        return lambda what, fraction: progress(what, (number + fraction) / launches)

    found = [_launched(workloads, seconds / launches, part(i)) for i in range(launches)]
    return [pooled(same) for same in zip(*found)]


def pooled(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One rank's results of several launches: of every op the median over these, at the pace of the first."""
    from validation.calibrate_record import part_of

    first = results[0]
    paces = [over(Beat(**first["parts"]), Beat(**r["parts"]))._asdict() for r in results]
    steps: dict[str, list[tuple[OpShape, float]]] = {}
    for model in first["steps"]:
        alike = [(r["steps"][model], pace) for r, pace in zip(results, paces) if model in r["steps"]]
        steps[model] = [
            (shape, statistics.median(ops[i][1] * pace[part_of(shape)] for ops, pace in alike))
            for i, (shape, _) in enumerate(first["steps"][model])
        ]
    return {**first, "steps": steps}


def _launched(workloads: Sequence[tuple[str, int]], seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """The results of all ranks of one launch."""
    ranks = max(min(available_cores(), MOST_RANKS), 2)
    with tempfile.TemporaryDirectory(prefix="parplan-held-out-") as folder:
        job = {
            "ranks": ranks, "store": str(Path(folder) / "store"), "anchor": 40, "kinds": [], "runtime": False,
            "models": [], "room": True, "workloads": [list(w) for w in workloads], "least_rounds": 5,
            "until": time.time() + seconds, "timeout": SHARE_TIMEOUT,
        }  # fmt: skip
        return run_ranks(job, Path(folder), progress)


def op_rows(device: Device, results: Sequence[dict[str, Any]]) -> list[OpRow]:
    """Every distinct op that costs something, of every workload, with its price at the pace of the measurement."""
    now = joined(statistics.median, [Beat(**r["parts"]) for r in results])
    at_pace = rescale(device, *since_calibration(device, now))
    rows: list[OpRow] = []
    for model in results[0]["steps"]:
        calls: dict[Signature, list[float]] = {}
        prices: dict[Signature, list[Price]] = {}
        shapes: dict[Signature, OpShape] = {}
        for result in results:
            for shape, seconds in result["steps"].get(model, ()):
                shapes.setdefault(signature(shape), shape)
                calls.setdefault(signature(shape), []).append(seconds)
                prices.setdefault(signature(shape), []).append(price(at_pace, shape))
        counts = Counter(signature(shape) for shape, _ in results[0]["steps"][model])
        for key, shape in shapes.items():
            if family(shape.name) in FREE:
                continue
            known = prices[key][0]
            rows.append(
                OpRow(
                    model, base_name(shape.name), family(shape.name), shape.phase, written(key).partition("|")[2],
                    shape.dtype, counts[key], statistics.median(p.seconds for p in prices[key]), known.source,
                    known.error, statistics.median(calls[key]),
                )
            )  # fmt: skip
    return rows


def scores(rows: Iterable[OpRow], group: Callable[[OpRow], str]) -> list[OpScore]:
    """Errors by group, largest share first."""
    rows = list(rows)
    everything = sum(r.count * r.measured for r in rows) or 1.0
    groups: dict[str, list[OpRow]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    found = [score(name, members, everything) for name, members in groups.items()]
    return sorted(found, key=lambda s: -s.share)


def score(name: str, rows: Sequence[OpRow], everything: float) -> OpScore:
    """Errors of these rows; `everything` are the seconds that shares refer to."""
    errors = np.abs([r.error for r in rows])
    weights = np.array([r.count * r.measured for r in rows])
    predicted = sum(r.count * r.predicted for r in rows)
    return OpScore(
        name, len(rows), float(errors.mean()), float(np.median(errors)), float(np.average(errors, weights=weights)),
        predicted / float(weights.sum()) - 1, float(weights.sum()) / everything,
    )  # fmt: skip


def summary(rows: Sequence[OpRow]) -> list[OpScore]:
    """All held-out ops, those of `BRIEF_OP` seconds and more, the shorter ones, and those calibration had seen."""
    everything = sum(r.count * r.measured for r in rows) or 1.0
    held = [r for r in rows if r.held_out]
    groups = {
        "held out, all": held,
        f"held out, {BRIEF_OP * 1e6:.0f} us and longer": [r for r in held if r.measured >= BRIEF_OP],
        "held out, shorter": [r for r in held if r.measured < BRIEF_OP],
        "seen in calibration": [r for r in rows if not r.held_out],
    }
    return [score(name, members, everything) for name, members in groups.items() if members]


def save(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Keeps a measurement, so that laws can be compared on it again (`load`)."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(list(results)))
    os.replace(part, path)


def load(path: Path) -> list[dict[str, Any]]:
    """What `save` kept. A pickle runs code when it is opened: open only your own."""
    rows: list[dict[str, Any]] = pickle.loads(path.read_bytes())
    return rows
