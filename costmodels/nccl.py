"""The time of a NCCL (or RCCL) collective: the best of its algorithms and protocols, as NCCL's tuner chooses.

A price is read from a curve over sizes that is computed once for each kind and placement; the curve never falls, and
never lies below what the wires of the data sheet allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, floor, log2
from typing import TYPE_CHECKING

import numpy as np

from costmodels import hockney
from costmodels.nccl_fabric import Group, across_of
from costmodels.nccl_law import TERMS, Laws, combine, curve, factors, shipped, terms
from costmodels.nccl_tuner import RING_SHARE, Candidate, candidates, chosen

if TYPE_CHECKING:
    from costmodels.cluster import Cluster

STEPS = 2  # points of a curve for each doubling of the size
SIZES = 2.0 ** (np.arange(0, 40 * STEPS + 1) / STEPS)  # 1 byte to 1 TiB
ALGORITHMS = ("ring", "tree", "nvls", "nvls_tree", "pat", "pairwise", "p2p")


@dataclass(frozen=True, slots=True)
class Curve:
    """ln(seconds) at SIZES, and the (algorithm, protocol) of each."""

    seconds: np.ndarray
    ways: tuple[tuple[str, str], ...]

    def at(self, nbytes: float) -> tuple[float, str, str]:
        """Seconds, algorithm and protocol; log-log between two sizes, at constant bandwidth beyond the last."""
        place = min(max(log2(max(nbytes, 1.0)) * STEPS, 0.0), len(SIZES) - 1.0)
        low = min(floor(place), len(SIZES) - 2)
        share = place - low
        value = float(self.seconds[low]) * (1 - share) + float(self.seconds[low + 1]) * share
        beyond = max(nbytes / float(SIZES[-1]), 1.0)
        return exp(value) * beyond, *self.ways[round(place)]


def price(
    cluster: Cluster, kind: str, nbytes: float, group: Group, laws: Laws | None = None, algorithm: str = ""
) -> tuple[float, str, str]:
    """Seconds, algorithm and protocol. group: where the ranks lie (`nccl_fabric.group_of`). laws: by default the
    catalogue's. algorithm: only this one ("ring", "tree", "nvls", ...), as NCCL_ALGO sets it, or a textbook one of
    `costmodels.hockney`."""
    if algorithm in hockney.ALGORITHMS:
        way = Candidate("ring", "Simple", 0.0, 0.0, 0.0, 0, 0.0, 0.0)
        by = dict(zip(TERMS, factors(laws or shipped(), group, kind, way), strict=True))
        took = hockney.on_group(algorithm, kind, nbytes, group, 1 / by["inside"], 1 / by["across"])
        return took, algorithm, "Simple"
    if _over_sockets(group):
        return *_sockets(cluster, kind, nbytes, group, algorithm), "sockets"
    line = _shipped_curve(group, kind, algorithm) if laws is None else curve_of(laws, group, kind, algorithm)
    return line.at(0.0 if kind == "barrier" else nbytes)


def algorithms(group: Group, kind: str) -> tuple[str, ...]:
    """Those that NCCL has for `kind` on the group."""
    if _over_sockets(group):
        both = kind in ("all_reduce", "barrier")
        return ("ring", "tree") if both else ({"all_to_all": "pairwise", "send": "p2p"}.get(kind, "ring"),)
    return tuple(dict.fromkeys(way.algorithm for way in candidates(group, kind)))


def _over_sockets(group: Group) -> bool:
    return group.network == "ethernet" and group.hosts > 1


@lru_cache(maxsize=4096)
def _shipped_curve(group: Group, kind: str, algorithm: str) -> Curve:
    return curve_of(shipped(), group, kind, algorithm)


def curve_of(laws: Laws, group: Group, kind: str, algorithm: str = "") -> Curve:
    """The seconds of the best way at every size."""
    ways = _allowed(candidates(group, kind), algorithm)
    factor = curve(laws, group, kind, SIZES, algorithm)
    times = np.array([_seconds(laws, group, kind, way) * factor for way in ways])
    times = np.maximum(times, np.array([_wire(way) for way in ways]))
    times = np.where(chosen(kind, ways, SIZES), times, np.inf)
    best = times.argmin(axis=0)
    seconds = np.maximum.accumulate(times[best, np.arange(len(SIZES))])
    return Curve(np.log(seconds), tuple((ways[i].algorithm, ways[i].protocol) for i in best.tolist()))


def _allowed(ways: list[Candidate], algorithm: str) -> list[Candidate]:
    """The ways of one algorithm; nvls means nvls_tree between hosts. All where NCCL could not obey."""
    if algorithm and algorithm not in ALGORITHMS:
        known = ", ".join((*ALGORITHMS, *hockney.ALGORITHMS))
        raise ValueError(f"'{algorithm}' is no known algorithm; use one of {known}")
    wanted = [way for way in ways if algorithm in (way.algorithm, way.algorithm.removesuffix("_tree"))]
    return wanted if algorithm and wanted else ways


def _seconds(laws: Laws, group: Group, kind: str, way: Candidate) -> np.ndarray:
    return np.asarray(combine(SIZES, terms(way), factors(laws, group, kind, way), group.crossing))


def _wire(way: Candidate) -> np.ndarray:
    """Seconds that the data sheet's rates need: rings and trees are counted at RING_SHARE of them."""
    share = 1.0 if way.algorithm.startswith("nvls") else RING_SHARE
    return np.asarray(SIZES * max(way.inside * share, way.across))


def _sockets(cluster: Cluster, kind: str, nbytes: float, group: Group, algorithm: str) -> tuple[float, str]:
    """Seconds and algorithm over TCP between hosts, with what the group gets of the ports beside its likes
    (`costmodels.sharing`). Inside the hosts the ring passes every device, at the rate and after the hops that a group
    of one host has (no sweep over sockets with several devices a host is known)."""
    from costmodels import gloo

    link, alone = cluster.inter, across_of(cluster, group.per_host, 1)
    if group.across < alone:
        link = replace(link, bandwidth=link.bandwidth * group.across / alone)
    outside, way = gloo.nccl_sockets(kind, nbytes, group.hosts, group.ranks, link, algorithm)
    if group.per_host == 1 or kind == "send":
        return outside, way
    inner = replace(group, ranks=group.per_host, hosts=1, domains=1, across=0.0, crossing=0.0, uplinks=(), leaving=0.0)
    least = price(cluster, kind, float(SIZES[0]), inner)[0]
    moving = price(cluster, kind, nbytes, inner)[0] - least
    more = {"broadcast": 1.0, "reduce": 1.0, "all_to_all": group.per_host / group.ranks}.get(
        kind, (1 - 1 / group.ranks) / (1 - 1 / group.per_host)
    )
    rounds = group.hosts if kind != "all_to_all" else 1
    return max(outside, more * moving) + rounds * least, way
