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
SOCKET_BUFFER = 4 * MIB  # bytes that an all_reduce ring may have under way: NCCL's Simple buffer (A1)


def seconds(kind: str, nbytes: float, ranks: int, link: Link) -> float:
    """Seconds of one collective among `ranks` equal ranks on a full-duplex link; no other traffic."""
    flow, port, latency = link.flow_rate(), link.bandwidth, link.latency
    if kind == "all_reduce":
        return all_reduce(nbytes, ranks, flow, latency)
    if kind == "reduce_scatter":  # the whole all_reduce, then a copy of the own part (pytorch PR 149869)
        return all_reduce(nbytes, ranks, flow, latency) + nbytes / ranks / COPY_BANDWIDTH
    if kind == "all_gather":  # ring of P - 1 steps in halves; sends are posted before receives, so a first half waits
        return (ranks - 1) * (nbytes / ranks / flow + latency) + nbytes / ranks / 2 / flow
    if kind == "broadcast":
        return broadcast(nbytes, ranks, port, latency, flow)
    if kind == "reduce":
        return reduce(nbytes, ranks, port, latency, flow)
    if kind == "all_to_all":  # all sends are posted before all receives: the last to enter writes while others wait
        return nbytes / min(port, (ranks - 1) * flow) + latency
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


def reduce(nbytes: float, ranks: int, port: float, latency: float, flow: float = 0.0) -> float:
    """The reduce_scatter half of an all_reduce, then all parts to the root at once, whose port they share."""
    flow = flow or port
    gather = (ranks - 1) / ranks * nbytes / min(port, (ranks - 1) * flow)
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
    """Binomial tree of the whole message: in stage k a rank sends to k children at once, which share its port:
    lgP (lgP + 1) / 2 * S / B where a single flow could fill the port, and one slow start per stage."""
    depth, flow = ceil(log2(ranks)), flow or bandwidth
    moved = sum(nbytes / min(flow, bandwidth / children) for children in range(1, depth + 1))
    return moved + depth * max(slow_start(nbytes, flow, latency), latency)


def slow_start(nbytes: float, bandwidth: float, latency: float) -> float:
    """Seconds that TCP loses until its window covers what is under way: one latency for each doubling from ten segments
    (RFC 6928) to bandwidth * latency, and one for the message itself. No constant is fitted; a message that ends before
    has doubled as often as it needs (ln 2 keeps the total from rising with the bandwidth)."""
    window = min(nbytes * log(2), bandwidth * latency)
    return latency * (1 + log2(max(window / INITIAL_WINDOW, 1.0)))


def nccl_sockets(kind: str, nbytes: float, hosts: int, ranks: int, link: Link) -> float:
    """Seconds of a NCCL collective whose ring passes TCP sockets between `hosts` of `ranks` ranks in all.

    Rings hide latency behind their chunks: a + b^2 / (a + b) of transfer a and latency b is b for small messages, a for
    large ones. Broadcast and reduce wait for slow starts instead."""
    ports = link.ports or max(ranks // hosts, 1)
    rate, latency = SOCKET_SHARE * link.bandwidth * ports, link.latency
    if kind in ("broadcast", "reduce"):
        starts = SOCKET_STARTS * log2(hosts)
        return nbytes / rate + max(starts * slow_start(nbytes / starts, link.bandwidth, latency), (hosts - 1) * latency)
    if kind == "send":
        return nbytes / (SOCKET_SHARE * link.bandwidth) + slow_start(nbytes, link.bandwidth, latency)
    share = (ranks - 1) / ranks
    factor, steps = {"all_reduce": (2 * share, 2 * (hosts - 1)), "barrier": (0.0, 2 * (hosts - 1))}.get(
        kind, (share, hosts - 1)
    )
    if kind == "all_to_all":
        factor, steps = (ranks / hosts) * (ranks - ranks / hosts) / ranks, 1
    if latency and kind == "all_reduce":
        rate = min(rate, SOCKET_BUFFER / (2 * latency) * ports)
    moved, waits = factor * nbytes / rate, steps * latency
    return moved + waits**2 / (moved + waits) if moved + waits else 0.0
