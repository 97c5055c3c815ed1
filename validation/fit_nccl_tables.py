"""Fits what published tables of one node say of NCCL: `python -m validation.fit_nccl_tables FOLDER`.

First the multipliers of `costmodels.nccl_law`, by the same fit as published sweeps (`validation.fit_collectives`), then
for each family, class of collective and number of ranks a smooth curve of what is left. Both are committed
(catalogue/collectives/nccl_tables.toml), the tables are not; the fit of the sweeps starts from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from costmodels import tomlfile as toml
from costmodels.nccl_law import BANDS, TABLES, Laws, Line, class_of, laws_data
from validation.fit_collectives import Points, points_of, predict, prior, solve, subset
from validation.tables_gemm import WHEEL, download
from validation.tables_nccl import table_sweeps

# Gaussian process of what is left of one family, class and number of ranks: spread, length in log2 bytes, spread of a
# system or collective as a whole, noise of a point.
LEFT = {"spread": 0.3, "length": 1.0, "sweep": 0.07, "noise": 0.05}
# Share of each prior's spread here: the curves take what the multipliers leave, and multipliers far from their priors
# did worse beyond the tables' sizes and between hosts (of 1, 0.3 and 0.1 the best on sweeps left out one by one).
TIGHT = 0.3
# What one node cannot say, and what it says of its server: how fast PCIe is hangs on switches and sockets more than on
# the device, so all of that goes into the curves, which hold for one node only.
NOT_SAID = ("common.crossing", "common.across", "network.", "all_to_all.", "family.rtx-pcie5.", "family.ada-pcie.")


def fit_tables(points: Points, use: np.ndarray) -> Laws:
    """The laws that the points of `use` (a mask) say."""
    part = subset(points, use)
    priors = np.array([prior(name) for name in points.parameters]) * (1, TIGHT)
    said = np.array([not name.startswith(NOT_SAID) for name in points.parameters])
    found = np.where(said, solve(part, priors), priors[:, 0])
    left = np.log(part.seconds) - predict(part, found)
    values = {n: float(np.exp(v)) for n, v, ok in zip(points.parameters, found, said, strict=True) if ok}
    tables: dict[tuple[str, str], dict[int, Line]] = {}
    place = [(g.family, class_of(s.kind), g.ranks) for g, s in zip(points.groups, points.setups, strict=True)]
    for family, kind, ranks in dict.fromkeys(place):
        mine = np.array([place[i] == (family, kind, ranks) for i in part.owner.tolist()])
        line = smooth(np.log2(part.sizes[mine]), left[mine], part.owner[mine])
        tables.setdefault((family, kind), {})[ranks] = line
    return Laws(values, rows=int(use.sum()), tables=tables)


def smooth(x: np.ndarray, left: np.ndarray, owner: np.ndarray) -> Line:
    """The curve of what is left over log2 of bytes, shrunk to 0 where points are few or disagree."""
    knots = np.arange(np.ceil(x.min()), np.floor(x.max()) + 1)
    same = owner[:, None] == owner[None]
    inner = _near(x[:, None] - x[None]) + same * LEFT["sweep"] ** 2 + LEFT["noise"] ** 2 * np.eye(len(x))
    return knots, _near(knots[:, None] - x[None]) @ np.linalg.solve(inner, left)


def _near(distance: np.ndarray) -> np.ndarray:
    return np.asarray(LEFT["spread"] ** 2 * np.exp(-((distance / LEFT["length"]) ** 2) / 2))


def errors_of(points: Points, laws: Laws, use: np.ndarray) -> dict[str, dict[str, Any]]:
    """Mean absolute relative error and number of points of `use` by family and band."""
    from validation.collective_score import bands_of, score

    errors = np.concatenate([score(s, laws).errors for s in points.sweeps])
    families = np.array([g.family for g in points.groups])[points.owner]
    found = {}
    for family in (*dict.fromkeys(families.tolist()), "all"):
        mine = use & ((families == family) | (family == "all"))
        bands = bands_of(points.sizes[mine], errors[mine])
        found[family] = {"n": int(mine.sum())} | {k: round(float(np.abs(e).mean()), 4) for k, e in bands.items()}
    return found


def tables_data(laws: Laws, errors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of nccl_tables.toml."""
    data = laws_data(laws)
    data.pop("error"), data.pop("curve")
    source = {"data": f"{WHEEL} (Apache-2.0), nccl_perf tables, by validation.fit_nccl_tables; all EMPIRICAL"}
    rows = [
        {"family": f, "collective": c, "ranks": n, "first": x[0], "factor": np.exp(y).round(4).tolist()}
        for (f, c), lines in laws.tables.items()
        for n, (x, y) in lines.items()
    ]
    return data | source | {"held_out": errors, "table": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a fit to half of the sizes on the other half, fits all, writes nccl_tables.toml."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {WHEEL} is unpacked")
    parser.add_argument("--download", action="store_true", help="fetch and unpack it there first (82 MB)")
    given = parser.parse_args(arguments)
    points = points_of(table_sweeps(download(given.folder) if given.download else given.folder), Laws())
    away = np.round(np.log2(points.sizes)) % 2 == 1  # every second size: each lies between two that are fitted
    errors = errors_of(points, fit_tables(points, ~away), away)
    laws = fit_tables(points, np.ones(len(points.sizes), bool))
    toml.write_toml(TABLES, tables_data(laws, errors))
    print(f"{len(points.sizes)} points of {len(points.sweeps)} sweeps; sizes that the fit did not see:")
    for family, row in errors.items():
        print(f"{family:12s} {row['n']:5d}  " + "  ".join(f"{b} {row[b]:.1%}" for b in BANDS))


if __name__ == "__main__":
    main()
