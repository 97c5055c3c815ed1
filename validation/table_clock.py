"""How steady the clock was while a table of eager products was measured: what no law of shapes can say.

Rows of a table stand in the order in which they were measured, and some of them must take equal time per step of k:
those of one kernel whose blocks all run at once, one on a unit (or two). Their paces show the board's clock alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.device import load_device
from validation.fit_gemm_law import EAGER_K_STEP, Array, Mask
from validation.tables_gemm import Table

LEAST_K = 200  # elements of k from which the steps, not the prologue, make the time
LAUNCH_SHARE = 0.5  # of a table's least time that is launch; fits give 16 of 32 us on T4 and 28 of 48 us on V100
NEAR, FAR = 10, 300  # rows of the file that count as near, and as far apart
LEAST_ROWS = 30
LEAST_TIMES = 2.0  # of a table's least time, so that the launch is the lesser part of a row


def paces(table: Table, inside: Mask, tile: str) -> tuple[NDArray[np.intp], Array]:
    """Positions in the table, and seconds per step of k over their median, of the rows of `inside` whose kernel has
    this tile and puts at most one block on each unit, or at most two (each kind over its own median)."""
    rows, columns = (int(x) for x in tile.split("x"))
    b, m, n, k = table.dims.T
    deepest = np.ceil(b * np.ceil(m / rows) * np.ceil(n / columns) / load_device(table.device).units)
    launch = LAUNCH_SHARE * table.seconds.min()
    pace = (table.seconds - launch) / np.ceil(k / EAGER_K_STEP)
    use = inside & (k >= LEAST_K) & (np.array(table.tiles) == tile) & (deepest <= 2)
    use &= table.seconds >= LEAST_TIMES * table.seconds.min()
    for blocks in (1, 2):
        same = use & (deepest == blocks)
        if same.any():
            pace[same] /= np.median(pace[same])
    return np.flatnonzero(use), pace[use]


def clock_scores(table: Table, inside: Mask) -> list[dict[str, Any]]:
    """Per tile that a table names: quantiles of the paces of the rows of `inside`, and mean distance (ln) of pairs near
    each other in the file and far apart. A tile with fewer than `LEAST_ROWS` such rows says nothing."""
    scores = []
    for tile in sorted(set(table.tiles) - {""}):
        at, pace = paces(table, inside, tile)
        if len(at) < LEAST_ROWS:
            continue
        first, second = np.triu_indices(len(at), 1)
        apart, distance = at[second] - at[first], abs(np.log(pace[first] / pace[second]))
        low, high = np.quantile(pace, (0.1, 0.9))
        near, far = (float(distance[pairs].mean()) for pairs in (apart <= NEAR, apart >= FAR))
        scores.append({"device": table.device, "section": table.section, "campaign": table.campaign, "tile": tile,
                       "n": len(at), "p10": float(low), "p90": float(high), "near": near, "far": far})  # fmt: skip
    return scores
