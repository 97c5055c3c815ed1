"""Textbook collectives in Hockney's model: a message of s bytes takes alpha + s * beta seconds.

Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005; gamma (the
reduction's seconds per byte) is left out: it overlaps on devices. NCCL uses none of them; they are here to compare with
and to price other runtimes: `collective_price(..., algorithm="rabenseifner")`.
"""

from __future__ import annotations

from math import ceil, inf, log2

from costmodels.nccl_fabric import Group

# algorithm -> the collectives that it computes
KINDS = {
    "recursive_doubling": ("all_reduce",),
    "recursive_halving": ("all_gather", "reduce_scatter", "all_reduce"),
    "rabenseifner": ("all_gather", "reduce_scatter", "all_reduce"),
    "binomial": ("broadcast", "reduce"),
    "hierarchical": ("all_reduce",),
}
ALGORITHMS = tuple(KINDS)


def algorithms(kind: str) -> tuple[str, ...]:
    """Those that compute this collective."""
    return tuple(name for name, kinds in KINDS.items() if kind in kinds)


def recursive_doubling(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """All_reduce: log2(P) rounds in which pairs exchange whole buffers; two more where P is no power of two."""
    rounds = _rounds(ranks)
    return rounds * (alpha + nbytes * beta)


def recursive_halving(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """Reduce_scatter (or, run backwards, all_gather): log2(P) rounds, (P - 1) / P of the buffer in all."""
    return _rounds(ranks) * alpha + (ranks - 1) / ranks * nbytes * beta


def rabenseifner(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """All_reduce: recursive halving, then recursive doubling of the parts."""
    return 2 * recursive_halving(nbytes, ranks, alpha, beta)


def binomial(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """Broadcast or reduce: a binomial tree of whole messages."""
    return ceil(log2(ranks)) * (alpha + nbytes * beta)


def ring(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """Reduce_scatter or all_gather by a ring; an all_reduce is two of them."""
    return (ranks - 1) * alpha + (ranks - 1) / ranks * nbytes * beta


def hierarchical(
    nbytes: float, hosts: int, per_host: int, inside: tuple[float, float], net: tuple[float, float]
) -> float:
    """All_reduce: reduce_scatter in each host, all_reduce of each part between hosts, all_gather in each host.

    inside, net: (alpha, beta); beta of `net` is that of one device's share of the NICs."""
    if per_host == 1:
        return 2 * ring(nbytes, hosts, *net)
    local = 2 * ring(nbytes, per_host, *inside)
    return local + (2 * ring(nbytes / per_host, hosts, *net) if hosts > 1 else 0.0)


def _rounds(ranks: int) -> int:
    whole = ranks & (ranks - 1) == 0
    return ranks.bit_length() - 1 + (0 if whole else 2)


def on_group(
    algorithm: str, kind: str, nbytes: float, group: Group, slower: float = 1.0, across: float = 1.0
) -> float:
    """Seconds on a placed group, with alpha from NCCL's Simple protocol and the rates of the data sheets; slower,
    across: how many times longer bytes take than by those inside a node, and between nodes.

    Flat algorithms feel the slowest link of the group in every round."""
    from costmodels.nccl_tuner import CROSSING, HOP, US, ring_rate

    each = group.across / group.per_domain if group.domains > 1 else inf
    above = max((1 / (rate / below) for below, rate in group.uplinks), default=0.0)  # a rank's share of the uplinks
    inside = (HOP[group.wires]["ring"][2] * US + group.hop, slower / ring_rate(group))
    net = (CROSSING["ring"][2] * US + group.crossing, max(across / each, above))
    alpha, beta = max(inside, net) if group.hosts > 1 else inside
    beta = max(inside[1], net[1])
    places = (group.ranks, group.domains, group.per_domain)
    return seconds(algorithm, kind, nbytes, places, (alpha, beta), inside, net)


def seconds(
    algorithm: str, kind: str, nbytes: float, places: tuple[int, int, int], flat: tuple[float, float],
    inside: tuple[float, float], net: tuple[float, float],
) -> float:  # fmt: skip
    """Seconds by name. places: ranks, hosts, ranks of a host. flat, inside, net: (alpha, beta) of the slowest link, of
    those of a host, and of one rank's share of those between hosts."""
    if kind not in KINDS.get(algorithm, ()):
        raise ValueError(f"{algorithm} is no algorithm of {kind}; leave the algorithm out, or choose another")
    ranks, hosts, per_host = places
    if algorithm == "hierarchical":
        return hierarchical(nbytes, hosts, per_host, inside, net)
    if algorithm == "recursive_doubling":
        return recursive_doubling(nbytes, ranks, *flat)
    if algorithm == "binomial":
        return binomial(nbytes, ranks, *flat)
    return (2 if kind == "all_reduce" else 1) * recursive_halving(nbytes, ranks, *flat)
