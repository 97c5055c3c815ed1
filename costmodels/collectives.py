"""The time of a collective on a cluster: measured tables first, then the formulas of gloo or NCCL.

`bytes` as nccl-tests counts them: the whole gathered buffer for all_gather and reduce_scatter, one rank's buffer for
the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np

from costmodels import gloo, nccl
from costmodels.cluster import Cluster
from costmodels.ops import Source

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "all_to_all", "barrier")
FORMULA_ERROR = 0.25  # gloo formulas with an assumed loopback, NCCL ring with data-sheet links: ASSUMPTION


@dataclass(frozen=True, slots=True)
class CollectivePrice:
    """Seconds of one collective, host cores that each rank keeps busy meanwhile (0 on GPUs), where the number comes
    from, and the expected relative error."""

    seconds: float
    demand: float
    source: Source
    error: float


def collective_price(cluster: Cluster, kind: str, bytes: float, ranks: tuple[int, ...]) -> CollectivePrice:
    """The time of one collective among `ranks` when nothing else uses their links; cached on the cluster."""
    key = (kind, bytes, ranks)
    known = cluster.cache.get(key)
    if known is None:
        known = cluster.cache[key] = _price(cluster, kind, float(bytes), ranks)
    return known


def _price(cluster: Cluster, kind: str, nbytes: float, ranks: tuple[int, ...]) -> CollectivePrice:
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is no known collective; use one of {', '.join(KINDS)}")
    if nbytes < 0:
        raise ValueError(f"a {kind} of {nbytes:g} bytes; the size must be 0 or more")
    if len(set(ranks)) < 2:
        return CollectivePrice(0.0, 0.0, "measured", 0.0)
    if cluster.backend == "nccl":
        return CollectivePrice(nccl.seconds(cluster, kind, nbytes, ranks), 0.0, "roofline", FORMULA_ERROR)
    one_node = len({cluster.node_of(r) for r in ranks}) == 1
    size = len(set(ranks))
    link = cluster.intra if one_node else cluster.inter
    by_formula = gloo.seconds(kind, nbytes, size, link)
    sizes = [n for k, n in cluster.curves if k == kind] if one_node else []
    if not sizes:
        return CollectivePrice(by_formula, 1.0 if one_node else 0.3, "roofline", FORMULA_ERROR)
    nearest = min(sizes, key=lambda n: (abs(log(n / size)), -n))
    seconds, demand, inside = _interpolated(cluster, kind, nearest, nbytes)
    error = next(t.error for t in cluster.tables if (t.kind, t.ranks) == (kind, nearest))
    if nearest != size:
        # Scaled at the table's sizes only, so that the steps of the formula cannot make the price fall.
        seconds *= _size_ratio(kind, size, nearest)
        return CollectivePrice(seconds, min(demand, 1.0), "extrapolated", 2 * error)
    return CollectivePrice(seconds, demand, "interpolated" if inside else "extrapolated", error * (1 if inside else 2))


def _interpolated(cluster: Cluster, kind: str, size: int, nbytes: float) -> tuple[float, float, bool]:
    """Log-log between the table's points; below the first its time, above the last its bandwidth."""
    x, y, demand = cluster.curves[kind, size]
    at = log(max(nbytes, 1.0))
    seconds = exp(float(np.interp(at, x, y))) * exp(max(at - float(x[-1]), 0.0))
    return seconds, float(np.interp(at, x, demand)), float(x[0]) <= at <= float(x[-1])


def _size_ratio(kind: str, size: int, nearest: int) -> float:
    """How a ring (binomial tree for broadcast) of `size` ranks compares with one of `nearest` ranks that share the same
    cores: per-rank traffic times ranks, since loopback traffic is paid in host cores."""
    return 1.0 if kind == "send" else (size - 1) / (nearest - 1)
