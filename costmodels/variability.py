"""The slowest of many equal GPUs: what a synchronous step waits for.

GPUs of one model differ by the clock that a power limit allows a chip, so products, convolutions and attention differ
and what waits for memory or links does not. How much was measured of single GPUs, as the standard deviation of the time
of long products over its median, and stands in the device files with its source (`Device.spread`): 1.03 % of 232 B200
under five minutes of bfloat16 products each, 0.7 to 1.7 % of 8 or 16 A100, H100, V100 and MI100. SPREAD is the root
mean square of those and of 128 RTX PRO 6000 (0.66 %), and stands for models that nobody measured. Nodes of B200 and
RTX PRO 6000 differ about as much as the means of independent GPUs would, and the slowest of a node's eight is as slow
as the law says: 1.47 % beside 1.46, 0.96 beside 0.94 (`python -m validation.fit_spread`, reports/spread). A
published study of V100, MI60 and Quadro RTX 5000 (Sinha et al., SC 2022, arXiv:2208.11035, abstract) found a variation
of 8 %: 1.5 % of standard deviation, if those are the whiskers of a box plot (from memory). Its outliers (up to 1.5
times the median) and sick machines are not in it: a job that runs well has dropped them.

Cores of one machine differ from moment to moment, by what else runs on their physical core or on the host: of ranks
that meet in every step all wait for the slowest, by a share of their work that does not depend on how often they meet
(`validation.calibrate_gloo`). `parplan calibrate` measures it ("skew" of `Device.host`: the standard deviation of
normal draws whose highest is as much above their mean); all that a core does takes so much longer.

ASSUMPTIONS: GPUs of other models spread as these do; op tables were measured on a middling one; every device of a job
holds up every other in each step (in a pipeline the slowest stage sets the pace).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import hypot
from statistics import NormalDist

import numpy as np

from costmodels.cluster import Cluster
from costmodels.device import rescale

SPREAD = 0.0105
NOTE = "products, convolutions and attention take what they take on the"


@cache
def highest_of(count: int) -> float:
    """The expected highest of `count` draws from a standard normal distribution, by integrating its density.

    >>> round(highest_of(8), 2)
    1.42
    """
    if count < 2:
        return 0.0
    normal, x = NormalDist(), np.linspace(0.0, 8.0, 1601)
    lower, upper = (np.array([normal.cdf(s * v) for v in x.tolist()]) ** count for s in (-1, 1))
    return float(np.trapezoid(1 - upper - lower, x))


def slowest_of(count: int, spread: float = SPREAD) -> float:
    """How many times as long the slowest of `count` equal GPUs takes for a product as the median one; 1 for one.
    spread: standard deviation of that time, relative."""
    return 1 + spread * highest_of(count)


def synchronous(cluster: Cluster, count: int) -> Cluster:
    """The cluster as a job on `count` of its devices feels it, each step as slow as the slowest of them. Of GPUs the
    spread itself joins what is unsure about a step (`Device.step_error`). Accelerators that are no GPUs stay as they
    are."""
    count = min(count, cluster.size)
    if cluster.cores and cluster.device.host.get("skew"):
        return _unequal_cores(cluster, min(count, cluster.cores))
    spread = cluster.device.spread or SPREAD
    slowest = slowest_of(count, spread)
    if cluster.device.kind != "gpu" or cluster.device.slowest == slowest:
        return cluster
    if ("slowest", count) not in cluster.cache:
        before = cluster.device
        error = before.step_error if before.slowest > 1 else hypot(before.step_error, spread)
        device = replace(before, slowest=slowest, step_error=error, cache={})
        notes = tuple(n for n in cluster.notes if not n.startswith(NOTE))
        if count > 1:
            notes = (*notes, f"{NOTE} slowest of {count} GPUs: {slowest - 1:.1%} more than a middling one")
        cluster.cache["slowest", count] = replace(cluster, device=device, notes=notes)
    found: Cluster = cluster.cache["slowest", count]
    return found


def _unequal_cores(cluster: Cluster, count: int) -> Cluster:
    """Cores of which `count` work at once; the result, which is as slow as the slowest of them, has no skew left."""
    if ("slowest", count) not in cluster.cache:
        longer = 1 + cluster.device.host["skew"] * highest_of(count)
        slower = rescale(cluster.device, longer)
        host = {k: v for k, v in slower.host.items() if k != "skew"}
        device = replace(slower, host=host, notes=cluster.device.notes, cache={})
        said = (f"work takes {longer - 1:.1%} longer on the slowest of {count} cores",) * (count > 1)
        notes = (*cluster.notes, *said)
        cluster.cache["slowest", count] = replace(cluster, device=device, notes=notes, cache={})
    found: Cluster = cluster.cache["slowest", count]
    return found
