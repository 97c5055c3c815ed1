"""What whole steps are off beyond the errors of their ops, by sets of published runs: `planner.predict.STEP_ERROR`.

    python -m validation.fit_step_error FOLDER [--json]

FOLDER holds what `parplan predict --cases` wrote (`cases.csv`, in folders below it too). The present `STEP_ERROR` is
taken out of every interval. Then, for each set, the least error is found with which nine in ten rows of the *other*
sets lie inside, in the mean over sets, and the set is scored with that: no set widens its own intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from planner.predict import NINE_IN_TEN, STEP_ERROR

Array = NDArray[np.float64]
WANTED = 0.9
GRID = np.arange(0.0, 0.3001, 0.005)
COLUMNS = ("set", "predicted_seconds", "measured_seconds", "low", "high", "scored")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m validation.fit_step_error", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what parplan predict --cases wrote")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.folder)
        found = by_set(rows)
    except (ValueError, OSError) as error:
        print(f"fit_step_error: {error}", file=sys.stderr)
        return 2
    everything = least(rows, list(rows))
    if options.json:
        print(json.dumps({"all": everything, "sets": found}, indent=1))
        return 0
    print(f"{'set':24} {'rows':>5} {'inside without':>15} {'others ask for':>15} {'inside with that':>17}")
    for row in found:
        print(f"{row['set']:24} {row['rows']:5} {row['without']:15.0%} {row['others']:15.3f} {row['inside']:17.0%}")
    mean = [float(np.mean([row[key] for row in found])) for key in ("without", "inside")]
    print(f"{'mean of sets':24} {'':5} {mean[0]:15.0%} {everything:15.3f} {mean[1]:17.0%}")
    return 0


def read(folder: Path) -> dict[str, Array]:
    """By set, a row each: measured / predicted - 1, and the relative widths of its interval below and above without
    `STEP_ERROR`, in standard deviations."""
    files = sorted(folder.rglob("cases.csv"))
    if not files:
        raise ValueError(f"{folder}: there is no cases.csv; give the folder that parplan predict --cases --out wrote")
    table = pd.concat([pd.read_csv(file) for file in files])
    if missing := set(COLUMNS) - set(table.columns):
        raise ValueError(f"{folder}: columns {', '.join(sorted(missing))} are missing from cases.csv")
    table = table[table.scored.astype(bool)].dropna(subset=["measured_seconds", "predicted_seconds", "low", "high"])
    sides = [1 - table.low / table.predicted_seconds, table.high / table.predicted_seconds - 1]
    if (narrow := float(min(side.min() for side in sides) / NINE_IN_TEN)) < STEP_ERROR * 0.999:
        raise ValueError(
            f"{folder}: an interval is {narrow:.3f} standard deviations wide, less than STEP_ERROR = {STEP_ERROR}; "
            f"write cases.csv with the present code first (parplan predict --cases)"
        )
    widths = [np.sqrt(np.maximum((side / NINE_IN_TEN) ** 2 - STEP_ERROR**2, 0.0)) for side in sides]
    frame = np.column_stack([table.measured_seconds / table.predicted_seconds - 1, *widths]).astype(float)
    return {name: frame[(table["set"] == name).to_numpy()] for name in dict.fromkeys(table["set"])}


def inside(rows: Array, error: float) -> float:
    """Share of the rows of a set that lie inside intervals with this error of whole steps."""
    low, high = (NINE_IN_TEN * np.hypot(rows[:, i], error) for i in (1, 2))
    return float(((rows[:, 0] >= -np.minimum(low, 1.0)) & (rows[:, 0] <= high)).mean())


def least(rows: Mapping[str, Array], names: Sequence[str]) -> float:
    """The least error with which `WANTED` of the rows of these sets lie inside, in the mean over sets; the largest that
    is tried where none does."""
    for error in GRID.tolist():
        if np.mean([inside(rows[name], error) for name in names]) >= WANTED:
            return float(error)
    return float(GRID[-1])


def by_set(rows: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Each set scored with the error that the others ask for."""
    if len(rows) < 2:
        raise ValueError("one set has no others to be scored with; give results of several sets")
    found = []
    for name, own in rows.items():
        others = least(rows, [n for n in rows if n != name])
        found.append({"set": name, "rows": len(own), "without": inside(own, 0.0), "others": others,
                      "inside": inside(own, others)})  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
