"""The time of a collective on a cluster: measured tables first, then the formulas of gloo or NCCL.

`bytes` as nccl-tests counts them: the whole gathered buffer for all_gather and reduce_scatter, one rank's buffer for
the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, log
from typing import Any

import numpy as np

from costmodels import gloo, hockney, nccl, torus
from costmodels.cluster import LOOPBACK, Cluster, Link
from costmodels.mixed_nodes import seen_by
from costmodels.nccl_fabric import group_of
from costmodels.nccl_law import Laws, error_of, shipped
from costmodels.price import Source
from costmodels.sharing import Firsts, shared_group, slowed_by_likes

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send", "all_to_all", "barrier")
_SPELLED = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "broadcast": "broadcast",
    "bcast": "broadcast", "reduce": "reduce", "send": "send", "sendrecv": "send", "p2p": "send", "sendreceive": "send",
    "pointtopoint": "send", "alltoall": "all_to_all", "a2a": "all_to_all", "barrier": "barrier",
}  # fmt: skip
_AROUND = r"^nccl|(intotensor|tensor|base|single|perf)$"  # NCCL's prefix, torch's suffixes, nccl-tests' programs
BARRIER_BYTES = 4.0  # a barrier of torch's backends is an all_reduce of one number
FORMULA_ERROR = 0.25  # gloo formulas with an assumed loopback: ASSUMPTION


@dataclass(frozen=True, slots=True)
class CollectivePrice:
    """Seconds of one collective, host cores that each rank keeps busy meanwhile (0 on GPUs), where the number comes
    from, and the expected relative error. algorithm, protocol: which of the backend's were assumed ("measured": what
    a measured table contains)."""

    seconds: float
    demand: float
    source: Source
    error: float
    algorithm: str = ""
    protocol: str = ""


def kind_named(text: str) -> str:
    """The kind of `KINDS` that a usual spelling stands for; ValueError where there is none.

    >>> [kind_named(name) for name in ("AllReduce", "all-gather", "reduce_scatter_tensor", "sendrecv_perf", " a2a ")]
    ['all_reduce', 'all_gather', 'reduce_scatter', 'send', 'all_to_all']
    """
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    if found := _SPELLED.get(plain) or _SPELLED.get(re.sub(_AROUND, "", plain)):
        return found
    raise ValueError(f"'{text.strip()}' is no known collective; use one of {', '.join(KINDS)}")


def collective_price(
    cluster: Cluster,
    kind: str,
    bytes: float,
    ranks: Sequence[int],
    algorithm: str = "",
    laws: Laws | None = None,
    firsts: Firsts = (),
) -> CollectivePrice:
    """The time of one collective among `ranks` when nothing else uses their links; cached on the cluster.

    algorithm: only this one of `algorithms_of` (ValueError for others), as NCCL_ALGO sets it ("ring", "tree", "nvls",
    ...), or a textbook one of `costmodels.hockney`; by default the backend's own choice. laws: constants of NCCL, by
    default the catalogue's. firsts: first ranks of all groups of this form that do the same at the same time, this one
    among them: they share what lies between nodes (`costmodels.sharing`).
    """
    place = ("collectives", ranks if isinstance(ranks, tuple | range) else tuple(ranks), firsts)
    known = cluster.cache.get(place)  # long tuples of ranks are hashed once a call
    if known is None:
        known = cluster.cache[place] = {}
    if laws is not None:
        return _price(cluster, kind, float(bytes), ranks, algorithm, laws, known, firsts)
    key = (kind, bytes, algorithm)
    price: CollectivePrice | None = known.get(key)
    if price is None:
        price = known[key] = _price(cluster, kind, float(bytes), ranks, algorithm, None, known, firsts)
    return price


def algorithms_of(cluster: Cluster, kind: str, ranks: Sequence[int]) -> tuple[str, ...]:
    """What `collective_price` can be asked for: the backend's own algorithms for this collective, then textbook ones.
    NCCL's are those that the group's devices and network have ("nvls" may stand for nvls_tree). Textbook ones pass
    links from host to host, which a torus has not."""
    if cluster.fabric == "torus":
        return ("torus",)
    gloos = cluster.backend == "gloo"
    cluster, ranks, _ = seen_by(cluster, ranks)
    own = (_gloo_way(kind),) if gloos else nccl.algorithms(group_of(cluster, ranks), kind)
    return (*own, *hockney.algorithms(kind))


def _asked(cluster: Cluster, kind: str, ranks: Sequence[int], algorithm: str) -> str:
    """The algorithm that is asked for; empty where it is the only way of gloo or of a torus, so that what was measured
    of it counts. ValueError where the group has no such algorithm: another's price must not carry its name."""
    known = algorithms_of(cluster, kind, ranks)
    if algorithm not in known and f"{algorithm}_tree" not in known:
        what = "a torus" if cluster.fabric == "torus" else cluster.backend
        raise ValueError(
            f"{algorithm} is no algorithm of {kind} among {len(set(ranks))} ranks of {cluster.name} ({what}); "
            f"use {'one of ' if len(known) > 1 else ''}{', '.join(known)}, or leave it out"
        )
    only = cluster.fabric == "torus" or cluster.backend == "gloo"
    return "" if only and algorithm not in hockney.ALGORITHMS else algorithm


def _price(
    cluster: Cluster,
    kind: str,
    nbytes: float,
    ranks: Sequence[int],
    algorithm: str,
    laws: Laws | None,
    known: dict[Any, Any],
    firsts: Firsts = (),
) -> CollectivePrice:
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is no known collective; use one of {', '.join(KINDS)}")
    if nbytes < 0:
        raise ValueError(f"a {kind} of {nbytes:g} bytes; the size must be 0 or more")
    if kind == "barrier":
        nbytes = BARRIER_BYTES
    if len(ranks) < 2 or (len(ranks) < 64 and len(set(ranks)) < 2):
        return CollectivePrice(0.0, 0.0, "measured", 0.0)
    if cluster.groups:
        cluster, ranks, firsts = seen_by(cluster, ranks, firsts)
    if algorithm:
        algorithm = _asked(cluster, kind, ranks, algorithm)
    measured = None if algorithm or not cluster.tables else _measured(cluster, kind, nbytes, ranks)
    if measured is not None:
        return measured
    if cluster.fabric == "torus":
        took = torus.seconds(cluster, kind, nbytes, ranks, len(firsts) > 1)
        return CollectivePrice(took, 0.0, "roofline", torus.ERROR, "torus", "links")
    if cluster.backend == "nccl" and algorithm == "hierarchical" and kind == "all_reduce":
        return _by_levels(cluster, nbytes, ranks, laws)
    if cluster.backend == "nccl":
        name = "scattered group" if kind == "all_to_all" else "group"
        group = known.get(name)
        if group is None:
            group = known[name] = shared_group(cluster, group_of(cluster, ranks), kind, ranks, firsts)
        seconds, way, protocol = nccl.price(cluster, kind, nbytes, group, laws, algorithm)
        source: Source = "roofline" if way in hockney.ALGORITHMS else "interpolated"
        return CollectivePrice(seconds, 0.0, source, error_of(laws or shipped(), group, nbytes), way, protocol)
    members = set(ranks)
    nodes = {cluster.node_of(r) for r in members}
    one_node, inside = len(nodes) == 1, _inside(cluster)
    link = inside if one_node else cluster.inter
    if not one_node and (slower := slowed_by_likes(cluster, kind, ranks, firsts)) > 1:
        link = replace(link, bandwidth=link.bandwidth / slower)
    per_node = ceil(len(members) / len(nodes))
    if algorithm:
        by_formula = _textbook(cluster, algorithm, kind, nbytes, ranks, link)
    else:
        by_formula = gloo.seconds(kind, nbytes, len(members), link, *(() if one_node else (per_node, inside)))
    way = algorithm or _gloo_way(kind)
    return CollectivePrice(by_formula, 1.0 if one_node else 0.3, "roofline", FORMULA_ERROR, way, "tcp")


def _by_levels(cluster: Cluster, nbytes: float, ranks: Sequence[int], laws: Laws | None) -> CollectivePrice:
    """An all_reduce in two levels by NCCL's own collectives: reduce_scatter in each node, all_reduce of each part
    between the nodes, all of them at once, and all_gather in each node."""
    nodes: dict[int, list[int]] = {}
    for r in sorted(set(ranks)):
        nodes.setdefault(cluster.node_of(r), []).append(r)
    local = min(nodes.values(), key=len)
    heads, part = tuple(members[0] for members in nodes.values()), nbytes / len(local)
    phases = [collective_price(cluster, k, nbytes, tuple(local), laws=laws) for k in ("reduce_scatter", "all_gather")]
    if len(nodes) > 1:
        likes = tuple(nodes[cluster.node_of(heads[0])][: len(local)])
        phases.append(collective_price(cluster, "all_reduce", part, heads, laws=laws, firsts=likes))
    error = max(p.error for p in phases)
    return CollectivePrice(sum(p.seconds for p in phases), 0.0, "roofline", error, "hierarchical", "Simple")


def _inside(cluster: Cluster) -> Link:
    """What gloo moves messages of one node over: it knows no links of accelerators and goes over the host."""
    return cluster.intra if cluster.device.kind == "cpu" else LOOPBACK


def _textbook(cluster: Cluster, algorithm: str, kind: str, nbytes: float, ranks: Sequence[int], link: Link) -> float:
    """Over TCP: `link` is the slowest that the group uses; ranks of a node share its port between nodes."""
    size, nodes = len(set(ranks)), len({cluster.node_of(r) for r in ranks})
    per_node = ceil(size / nodes)
    inside = (_inside(cluster).latency, 1 / _inside(cluster).flow_rate())
    flat = (link.latency, 1 / link.flow_rate())
    net = (flat[0], flat[1] * per_node) if nodes > 1 else flat
    return hockney.seconds(algorithm, kind, nbytes, (size, nodes, per_node), flat, inside, net)


def _gloo_way(kind: str) -> str:
    """What gloo does; its reduce_scatter is a whole all_reduce."""
    ways = {"broadcast": "binomial", "all_to_all": "pairwise", "send": "p2p", "reduce": "ring_gather"}
    return ways.get(kind, "ring")


def _measured(cluster: Cluster, kind: str, nbytes: float, ranks: Sequence[int]) -> CollectivePrice | None:
    """The price by the tables; None where there is none of groups inside one node, or of groups just like this one
    over several."""
    members = set(ranks)
    size = len(members)
    nodes = len({cluster.node_of(r) for r in members})
    sizes = [n for k, n, m in cluster.curves if k == kind and m == nodes and (m == 1 or n == size)]
    if not sizes:
        return None
    nearest = min(sizes, key=lambda n: (abs(log(n / size)), -n))
    seconds, demand, inside = _interpolated(cluster, (kind, nearest, nodes), nbytes)
    error = next(t.error for t in cluster.tables if (t.kind, t.ranks, t.nodes) == (kind, nearest, nodes))
    if nearest != size:
        # Scaled at the table's sizes only, so that the steps of the formula cannot make the price fall.
        seconds *= _size_ratio(kind, size, nearest)
        return CollectivePrice(seconds, min(demand, 1.0), "extrapolated", 2 * error, "measured")
    source: Source = "interpolated" if inside else "extrapolated"
    return CollectivePrice(seconds, demand, source, error * (1 if inside else 2), "measured")


def _interpolated(cluster: Cluster, table: tuple[str, int, int], nbytes: float) -> tuple[float, float, bool]:
    """Log-log between the table's points; below the first its time, above the last its bandwidth."""
    x, y, demand = cluster.curves[table]
    at = log(max(nbytes, 1.0))
    seconds = exp(float(np.interp(at, x, y))) * exp(max(at - float(x[-1]), 0.0))
    return seconds, float(np.interp(at, x, demand)), float(x[0]) <= at <= float(x[-1])


def _size_ratio(kind: str, size: int, nearest: int) -> float:
    """How a ring (binomial tree for broadcast) of `size` ranks compares with one of `nearest` ranks that share the same
    cores: per-rank traffic times ranks, since loopback traffic is paid in host cores."""
    return 1.0 if kind == "send" else (size - 1) / (nearest - 1)
