"""Formulas of torch.distributed over TCP: gloo's collectives as torch's CPU backend runs them, NCCL's over sockets.

Source of the algorithms: gloo 70dc360, shared/facts/communication.md A2. EMPIRICAL constants come from published
sweeps (github BinhangYuan/tc_cluster_setting, AWS p3.2xlarge, TCP shaped to 1 to 5 Gbit/s and 1 to 10 ms); the errors
of each formula on them are in `reports/collectives`, where what a constant was taken from is called "in sample"
(`validation.collective_tcp.TAKEN_FROM`).
"""

from __future__ import annotations

from math import ceil, floor, log, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from costmodels.cluster import Link

MIB = 2**20
LATENCY_SHARE = 0.75  # of the one-way latency paid per segment of an all_reduce: EMPIRICAL, 24 points of 4 and 16 nodes
REDUCE_LATENCY_SHARE = 0.3  # the same for the reduce_scatter half of a reduce: EMPIRICAL, 12 points of 8 and 16 nodes
COPY_BANDWIDTH = 1e10  # bytes/s of the copy after reduce_scatter's all_reduce: ASSUMPTION
INITIAL_WINDOW = 14600  # bytes, ten segments of 1460: RFC 6928
# NCCL over sockets: share of a shaped link's rate, 6 points of all_reduce on 8 nodes; slow starts of a broadcast or
# reduce for each doubling of the ranks, 12 points of broadcast on 16 and reduce on 4 nodes: EMPIRICAL
SOCKET_SHARE, SOCKET_STARTS = 0.97, 1.7
# bytes/s up to which that share was measured, and the share of faster links: that of RDMA (`costmodels.nccl_law`,
# "across"), as sockets reach no more: ASSUMPTION
SOCKETS_MEASURED, FAST_SHARE = 1.25e9, 0.9
RINGS = ("all_reduce", "reduce_scatter", "all_gather")
NCCL_FLOWS = 4  # sockets of a connection: shared/facts/communication.md A2, 5 to 8 MB of window together
SOCKET_BUFFER = 4 * MIB  # bytes that an all_reduce ring may have under way: NCCL's Simple buffer (A1)


def seconds(
    kind: str, nbytes: float, ranks: int, link: Link, per_node: int = 1, inside: Link | None = None
) -> float:
    """Seconds of one collective among `ranks` ranks on a full-duplex link; no other traffic.

    per_node: ranks that share each end of `link`, neighbours in the group's order; inside: the link among them. A ring
    leaves a node by one flow whatever lies on it; where every rank sends to others than its neighbour, the flows of a
    node share its port. Several flows on parallel links collide (`Link.ecmp`), one alone does not. A ring is as slow
    as its slowest hop, and nothing is done before the ranks of one node have done their part of it."""
    flow, port, latency = link.flow_rate(), link.bandwidth * link.ecmp, link.latency
    outside = max(ranks - per_node, 1)
    if inside and per_node > 1:
        if kind in RINGS:
            flow, latency = min(flow, inside.flow_rate()), max(latency, inside.latency)
        elif kind == "barrier":
            return seconds(kind, 0.0, per_node, inside) + ceil(log2(max(outside // per_node + 1, 2))) * 2 * latency
        elif kind in ("reduce", "all_to_all"):
            within = seconds(kind, nbytes * (per_node / ranks if kind == "all_to_all" else 1.0), per_node, inside)
            return max(within, seconds(kind, nbytes, ranks, link, per_node))
    if kind == "all_reduce":
        return all_reduce(nbytes, ranks, flow, latency)
    if kind == "reduce_scatter":  # the whole all_reduce, then a copy of the own part (pytorch PR 149869)
        return all_reduce(nbytes, ranks, flow, latency) + nbytes / ranks / COPY_BANDWIDTH
    if kind == "all_gather":  # ring of P - 1 steps in halves; sends are posted before receives, so a first half waits
        return (ranks - 1) * (nbytes / ranks / flow + latency) + nbytes / ranks / 2 / flow
    if kind == "broadcast":
        here = broadcast(nbytes, per_node, inside.bandwidth, inside.latency) if inside and per_node > 1 else 0.0
        return here + broadcast(nbytes, ceil(ranks / per_node), port / per_node, latency, min(flow, port / per_node))
    if kind == "reduce":
        return reduce(nbytes, ranks, port, latency, flow, per_node)
    if kind == "all_to_all":  # all sends are posted before all receives: the last to enter writes while others wait
        moved = per_node * outside / max(ranks - 1, 1) * nbytes
        return moved / min(port, per_node * outside * flow) + latency
    if kind == "send":
        return nbytes / flow + max(slow_start(nbytes, flow, latency), latency)
    assert kind == "barrier", kind
    return ceil(log2(ranks)) * 2 * latency


def all_reduce(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """2 (segments - segments / P) segment / B + 2 (segments - segments / P + 2) 0.75 L: the two further steps of each
    half carry no bytes (on 2 ranks they would be as many again as those that do).

    segments = bytes / 1 MiB rounded up to a multiple of P, 2 P or more. One more group of P segments makes the last
    steps shorter, so the plain formula falls a little there; the price is its running maximum.
    """
    return 2 * _half_ring(nbytes, ranks, bandwidth, LATENCY_SHARE * latency)


def reduce(nbytes: float, ranks: int, port: float, latency: float, flow: float = 0.0, per_node: int = 1) -> float:
    """The reduce_scatter half of an all_reduce, then all parts to the root at once, whose port those of other nodes
    share."""
    flow, outside = flow or port, max(ranks - per_node, 1)
    gather = outside / ranks * nbytes / min(port, outside * flow)
    return _half_ring(nbytes, ranks, flow, REDUCE_LATENCY_SHARE * latency) + gather + latency


def _half_ring(nbytes: float, ranks: int, bandwidth: float, wait: float) -> float:
    groups = max(ceil(nbytes / MIB / ranks), 2)
    full = floor(nbytes / MIB / ranks)
    here = _ring(nbytes, groups * ranks, ranks, bandwidth, wait)
    before = _ring(full * ranks * MIB, full * ranks, ranks, bandwidth, wait) if full >= 2 else 0.0
    return max(here, before)


def _ring(nbytes: float, segments: int, ranks: int, bandwidth: float, wait: float) -> float:
    steps = segments - segments // ranks
    return steps * (nbytes / segments / bandwidth) + (steps + 2) * wait


def broadcast(nbytes: float, ranks: int, bandwidth: float, latency: float, flow: float = 0.0) -> float:
    """Binomial tree of the whole message: a rank sends to all its children at once, which share its port:
    lgP (lgP + 1) / 2 * S / B where a single flow could fill the port and P is a power of two, and one slow start per
    stage."""
    flow, stages = flow or bandwidth, children(ranks)
    moved = sum(nbytes / min(flow, bandwidth / count) for count in stages)
    return moved + len(stages) * max(slow_start(nbytes, flow, latency), latency)


def children(ranks: int) -> list[int]:
    """Of each rank on the longest way from the root of gloo's binomial tree, to how many it sends. Rank v sends to
    v + 2^j for all 2^j > v, so the first child of each (0, 1, 3, 7, ...) has most.

    >>> children(8), children(6), children(5)
    ([3, 2, 1], [3, 2], [3, 1])
    """
    found, rank = [], 0
    while ranks > 2 * rank + 1:  # its first child, 2 rank + 1, is one of the group
        found.append(sum(rank + 2**j < ranks for j in range(rank.bit_length(), ranks.bit_length())))
        rank = 2 * rank + 1
    return found


def slow_start(nbytes: float, bandwidth: float, latency: float) -> float:
    """Seconds that TCP loses until its window covers what is under way: one latency for each doubling from ten segments
    (RFC 6928) to bandwidth * latency, and one for the message itself. No constant is fitted; a message that ends before
    has doubled as often as it needs (ln 2 keeps the total from rising with the bandwidth)."""
    window = min(nbytes * log(2), bandwidth * latency)
    return latency * (1 + log2(max(window / INITIAL_WINDOW, 1.0)))


def nccl_sockets(
    kind: str, nbytes: float, hosts: int, ranks: int, link: Link, algorithm: str = ""
) -> tuple[float, str]:
    """Seconds and algorithm of a NCCL collective over TCP sockets between `hosts` of `ranks` ranks in all; algorithm:
    only this one of an all_reduce's, "ring" or "tree".

    Rings hide latency behind their chunks: a + b^2 / (a + b) of transfer a and latency b is b for small messages, a for
    large ones; so do double binary trees, which pass fewer hosts one after the other and carry more (no sweep of trees
    over sockets is known). Broadcast and reduce wait for slow starts instead."""
    ports = link.ports or max(ranks // hosts, 1)
    line = min(link.bandwidth * link.ecmp, NCCL_FLOWS * link.flow_rate())
    each = max(SOCKET_SHARE * min(line, SOCKETS_MEASURED), FAST_SHARE * line)
    rate, latency = each * ports, link.latency
    if kind in ("broadcast", "reduce"):
        starts = SOCKET_STARTS * log2(hosts)
        wait = max(starts * slow_start(nbytes / starts, link.bandwidth, latency), (hosts - 1) * latency)
        return nbytes / rate + wait, "ring"
    if kind == "send":
        return nbytes / each + slow_start(nbytes, link.bandwidth, latency), "p2p"
    share = (ranks - 1) / ranks
    if kind == "all_to_all":
        return _hidden((ranks / hosts) * (ranks - ranks / hosts) / ranks * nbytes / rate, latency), "pairwise"
    if kind not in ("all_reduce", "barrier"):
        return _hidden(share * nbytes / rate, (hosts - 1) * latency), "ring"
    if latency:
        rate = min(rate, SOCKET_BUFFER / (2 * latency) * ports)
    moved = 0.0 if kind == "barrier" else nbytes / rate
    ways = {
        "ring": _hidden(2 * share * moved, 2 * (hosts - 1) * latency),
        "tree": _hidden((1 if hosts == 2 else 2) * moved, 2 * ceil(log2(hosts)) * latency),
    }
    best = algorithm if algorithm in ways else min(ways, key=lambda way: ways[way])
    return ways[best], best


def _hidden(moved: float, waits: float) -> float:
    return moved + waits**2 / (moved + waits) if moved + waits else 0.0
