"""Collectives as flows, for groups that share links with each other. A group alone comes out at its closed form.

Every function adds flows to a builder and returns, for each rank in order, the flows after which that rank is done;
pass them as `after` to what comes next. `road(a, b)` tells the way from rank a to rank b. Sizes as nccl-tests counts
them: the gathered buffer of all_gather and reduce_scatter, one rank's buffer of the others. Closed forms for P ranks,
S bytes, roads of bandwidth B and latency L that nobody shares are in each docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from simulator.flows import FlowBuilder

Done = list[list[int]]


class Road(NamedTuple):
    """links: ids of the links passed. latency: seconds, one way. cap: most bytes/s of one flow."""

    links: Sequence[int]
    latency: float = 0.0
    cap: float = float("inf")


Roads = Callable[[int, int], Road]


def collective(
    builder: FlowBuilder, kind: str, nbytes: float, ranks: Sequence[int], road: Roads, backend: str = "nccl"
) -> Done:
    """The flows of one collective as the backend moves them: rings, and gloo's own forms of the others."""
    size = len(ranks)
    if size < 2:
        return [[] for _ in ranks]
    match kind:
        case "all_reduce":
            return ring(builder, nbytes, ranks, road, 2 * (size - 1))
        case "reduce_scatter":  # gloo does a whole all_reduce (pytorch PR 149869)
            return ring(builder, nbytes, ranks, road, (2 if backend == "gloo" else 1) * (size - 1))
        case "all_gather":
            return ring(builder, nbytes, ranks, road, size - 1)
        case "broadcast" if backend == "gloo":
            return broadcast(builder, nbytes, ranks, road, at_once=True)
        case "broadcast":
            return chain(builder, nbytes, ranks, road)
        case "reduce" if backend == "gloo":
            return gathered(builder, nbytes, ranks, road, ring(builder, nbytes, ranks, road, size - 1))
        case "reduce":
            done = chain(builder, nbytes, ranks[::-1], road)
            return done[::-1]
        case "barrier":
            return ring(builder, 0.0, ranks, road, 2 * (size - 1))
        case "all_to_all":
            return all_to_all(builder, nbytes, ranks, road)
        case "send":
            sent = _flow(builder, nbytes, ranks[0], ranks[1], road, ())
            return [[sent], [sent]]
    raise ValueError(
        f"'{kind}' has no form as flows; use all_reduce, reduce_scatter, all_gather, broadcast, reduce, all_to_all, "
        "send, barrier"
    )


def ring(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, steps: int, after: Done | None = None
) -> Done:
    """`steps` rounds in which every rank sends 1/P of the bytes to the next: steps * (S / P / B + L)."""
    size = len(ranks)
    last = after or [[] for _ in ranks]
    for _ in range(steps):
        # A rank sends on what it received in the round before, after its own send of that round.
        begin = [last[r] + last[r - 1] for r in range(size)]
        last = [[_flow(builder, nbytes / size, ranks[r], ranks[(r + 1) % size], road, begin[r])] for r in range(size)]
    return [last[r] + last[r - 1] for r in range(size)]


def broadcast(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, at_once: bool, after: Done | None = None
) -> Done:
    """Binomial tree of the whole message from ranks[0].

    One child after the other (`at_once` False): ceil(lg P) (S / B + L). To all children at once, as gloo does: the
    sends share the port of the sender, lg P (lg P + 1) / 2 S / B + lg P L for P a power of two.
    """
    size = len(ranks)
    done: Done = [list(d) for d in (after or [[] for _ in ranks])]
    sent: Done = [[] for _ in ranks]
    step = 1
    while step < size:
        for v in range(min(step, size - step)):
            begin = done[v] + ([] if at_once else sent[v])
            flow = _flow(builder, nbytes, ranks[v], ranks[v + step], road, begin)
            sent[v].append(flow)
            done[v + step].append(flow)
        step *= 2
    return [d + s for d, s in zip(done, sent)]


def chain(builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads) -> Done:
    """From the first rank to the last, every rank passing on what it has got so far, as NCCL's ring broadcasts, and, in
    the other direction, reduces: S / B + (P - 1) L."""
    done: Done = [[] for _ in ranks]
    late = 0.0
    for r in range(len(ranks) - 1):
        way = road(ranks[r], ranks[r + 1])
        late += way.latency
        flow = builder.flow(nbytes, way.links, latency=late, cap=way.cap)
        done[r].append(flow)
        done[r + 1].append(flow)
    return done


def gathered(builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, after: Done) -> Done:
    """The parts of all ranks to the first at once, whose port they share: (P - 1) / P S / B + L."""
    size = len(ranks)
    flows = [_flow(builder, nbytes / size, ranks[r], ranks[0], road, after[r]) for r in range(1, size)]
    return [flows, *([flow] for flow in flows)]


def tree_all_reduce(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, after: Done | None = None
) -> Done:
    """Binomial reduce to ranks[0], then broadcast, whole messages: 2 ceil(lg P) (S / B + L)."""
    size = len(ranks)
    done: Done = [list(d) for d in (after or [[] for _ in ranks])]
    step = 1
    while step < size:
        step *= 2
    while step > 1:
        step //= 2
        for v in range(min(step, size - step)):
            done[v] = [_flow(builder, nbytes, ranks[v + step], ranks[v], road, done[v + step] + done[v])]
    return broadcast(builder, nbytes, ranks, road, at_once=False, after=[done[0]] + [[] for _ in ranks[1:]])


def halving_doubling(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, after: Done | None = None
) -> Done:
    """Rabenseifner's all-reduce for P a power of two: 2 lg P L + 2 (P - 1) / P S / B."""
    size = len(ranks)
    if size & (size - 1):
        raise ValueError(f"recursive halving and doubling needs a power of two of ranks, not {size}; use a ring")
    halves = [size >> k for k in range(1, size.bit_length())]
    done: Done = [list(d) for d in (after or [[] for _ in ranks])]
    for distance in [*halves, *reversed(halves)]:
        share = nbytes * distance / size
        flows = [
            _flow(builder, share, ranks[r], ranks[r ^ distance], road, done[r] + done[r ^ distance])
            for r in range(size)
        ]
        done = [[flows[r], flows[r ^ distance]] for r in range(size)]
    return done


def all_to_all(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, after: Done | None = None
) -> Done:
    """Every pair at once, as gloo and NCCL post them: (P - 1) / P S / B + L."""
    size = len(ranks)
    begin = after or [[] for _ in ranks]
    done: Done = [[] for _ in ranks]
    for distance in range(1, size):
        for r in range(size):
            to = (r + distance) % size
            flow = _flow(builder, nbytes / size, ranks[r], ranks[to], road, begin[r])
            done[r].append(flow)
            done[to].append(flow)
    return done


def _flow(builder: FlowBuilder, nbytes: float, a: int, b: int, road: Roads, after: Sequence[int]) -> int:
    way = road(a, b)
    return builder.flow(nbytes, way.links, after, latency=way.latency, cap=way.cap)
