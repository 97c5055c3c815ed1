"""Formulas of gloo's collectives as torch's CPU backend runs them (source: gloo 70dc360, shared/facts/communication.md
A2, checked there on 241 published points; mean errors: all_reduce 1.7 %, broadcast 2.5 %, send <= 5 %)."""

from __future__ import annotations

from math import ceil, floor, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from costmodels.cluster import Link

MIB = 2**20
LATENCY_SHARE = 0.75  # of the one-way latency paid per segment, fitted on the 24 all_reduce points of A2
COPY_BANDWIDTH = 1e10  # bytes/s of the copy after reduce_scatter's all_reduce: ASSUMPTION


def seconds(kind: str, nbytes: float, ranks: int, link: Link) -> float:
    """Seconds of one collective among `ranks` equal ranks on a full-duplex link; no other traffic."""
    lanes, latency = link.bandwidth, link.latency
    if kind == "all_reduce":
        return all_reduce(nbytes, ranks, lanes, latency)
    if kind == "reduce_scatter":  # the whole all_reduce, then a copy of the own part (pytorch PR 149869)
        return all_reduce(nbytes, ranks, lanes, latency) + nbytes / ranks / COPY_BANDWIDTH
    if kind == "all_gather":  # ring of P - 1 steps
        return (ranks - 1) * (nbytes / ranks / lanes + latency)
    if kind == "broadcast":
        return broadcast(nbytes, ranks, lanes, latency)
    if kind == "all_to_all":  # all pairs posted at once
        return (ranks - 1) / ranks * nbytes / lanes + latency
    if kind == "send":
        return nbytes / lanes + latency
    assert kind == "barrier", kind
    return ceil(log2(ranks)) * 2 * latency


def all_reduce(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """steps * (segment / B + 0.75 L), steps = 2 (segments - segments / P + 2).

    segments = bytes / 1 MiB rounded up to a multiple of P, 2 P or more. One more group of P segments makes the last
    steps shorter, so the plain formula falls a little there; the price is its running maximum.
    """
    groups = max(ceil(nbytes / MIB / ranks), 2)
    full = floor(nbytes / MIB / ranks)
    here = _ring(nbytes, groups * ranks, ranks, bandwidth, latency)
    before = _ring(full * ranks * MIB, full * ranks, ranks, bandwidth, latency) if full >= 2 else 0.0
    return max(here, before)


def _ring(nbytes: float, segments: int, ranks: int, bandwidth: float, latency: float) -> float:
    steps = 2 * (segments - segments // ranks + 2)
    return steps * (nbytes / segments / bandwidth + LATENCY_SHARE * latency)


def broadcast(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Binomial tree of the whole message, sends to all children at once share the port: lgP (lgP + 1) / 2 * S / B."""
    depth = ceil(log2(ranks))
    return depth * (depth + 1) / 2 * nbytes / bandwidth + depth * latency
