"""How the rate of a GPU falls with its power limit: the exponent `POWER` of `costmodels.power`.

    python -m validation.fit_power --traces FOLDER [--json]

FOLDER holds a CSV for each GPU in the form of the Zeus project's traces (Apache-2.0): dataset, network, batch_size,
optimizer, power_limit (W), time_per_epoch (s), average_power (W). A run is one training at all limits. The highest
limit of a file is taken as the GPU's TDP; what a run draws there is its free power. Each lower limit of a run makes a
pair with it, whose exponent e solves time / free time = (free power / limit) ** e.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

RUN = ("dataset", "network", "batch_size", "optimizer")
NUMBERS = ("power_limit", "time_per_epoch", "average_power")
LEAST_DRAW = 0.8  # of the TDP that a run draws when free: others are bound by something else than the GPU's cores
SHARES = (0.6, 0.9)  # of the free power that a limit leaves: below, clocks reach their floor; above, noise rules

Run = dict[float, tuple[float, float]]  # power limit -> mean seconds of an epoch, mean W


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.fit_power", description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder with a CSV of power limits for each GPU")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = fit(options.traces)
    except (ValueError, OSError) as error:
        print(f"fit_power: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'GPU':12} {'runs':>5} {'pairs':>6} {'median':>7} {'p10':>6} {'p90':>6}")
    for row in found:
        print(f"{row['gpu']:12} {row['runs']:5} {row['pairs']:6}", *(_cell(row[k]) for k in ("median", "p10", "p90")))
    return 0


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>6}"


def fit(folder: Path) -> list[dict[str, Any]]:
    """For each file, and last for all of them: gpu (the file's name), runs, pairs, and median, p10 and p90 of the
    pairs' exponents (None where there is no pair)."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"{folder}: no .csv file; give a folder with a trace of power limits for each GPU")
    traces = {path.stem: read_runs(path) for path in files}
    found = {gpu: list(exponents(runs)) for gpu, runs in traces.items()}
    rows = [_row(gpu, len(traces[gpu]), mine) for gpu, mine in found.items()]
    return [*rows, _row("all", sum(map(len, traces.values())), [e for mine in found.values() for e in mine])]


def read_runs(path: Path) -> list[Run]:
    """The runs of one GPU."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := {*RUN, *NUMBERS} - set(rows[0] if rows else ()):
        raise ValueError(f"{path.name}: columns {', '.join(sorted(missing))} are missing, or the file has no rows")
    runs: dict[tuple[str, ...], dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        try:
            limit, seconds, power = (float(row[k]) for k in NUMBERS)
        except (TypeError, ValueError):
            raise ValueError(f"{path.name}: {', '.join(NUMBERS)} must be numbers in every row") from None
        runs[tuple(row[k] for k in RUN)][limit].append((seconds, power))
    return [{limit: _mean(trials) for limit, trials in run.items()} for run in runs.values()]


def _mean(trials: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(t for t, _ in trials), fmean(p for _, p in trials)


def exponents(runs: Sequence[Run]) -> Iterator[float]:
    """One for each pair of a run's free power and a limit between `SHARES` of it."""
    tdp = max((limit for run in runs for limit in run), default=0.0)
    for run in runs:
        free_seconds, free = run.get(tdp, (0.0, 0.0))
        if free < LEAST_DRAW * tdp:
            continue
        for limit, (seconds, _) in run.items():
            if SHARES[0] <= limit / free <= SHARES[1]:
                yield log(seconds / free_seconds) / log(free / limit)


def _row(gpu: str, runs: int, found: Sequence[float]) -> dict[str, Any]:
    tenths = quantiles(found, n=10, method="inclusive") if len(found) > 1 else list(found) * 9
    low, middle, high = (tenths[0], tenths[4], tenths[8]) if tenths else (None, None, None)
    return {"gpu": gpu, "runs": runs, "pairs": len(found), "median": middle, "p10": low, "p90": high}


if __name__ == "__main__":
    sys.exit(main())
