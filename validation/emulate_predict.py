"""What gloo takes on an emulated network, from its rate alone: gloo's own order of messages as flows on the wires."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import ceil, inf, log2
from statistics import fmean

import numpy as np

from simulator.flow_collectives import Road, Roads, broadcast
from simulator.flows import FlowBuilder, simulate_flows
from validation.emulate_net import BURST, PAYLOAD, Network

MIB = 2**20


def seconds(network: Network, kind: str, nbytes: float, rate: float, latency: float) -> float:
    """rate: bytes/s of a host's wire. latency: seconds of a message of a few bytes, one way, measured once a network.

    The first `BURST` bytes that a port sends pass its bucket at once; they are taken off the time at the end, at the
    rate of the slowest wire, never below the latency. Ranks never enter a collective together; the mean over the orders
    in which they may come.
    """
    road, links = wires(network, rate * PAYLOAD, latency)
    ranks = range(network.ranks)
    times = []
    for order in permutations(ranks) if kind == "all_to_all" else [(r,) for r in ranks]:
        builder = FlowBuilder()
        _flows(builder, kind, nbytes, ranks, road, order)
        times.append(simulate_flows(builder.build(), links).makespan)
    return max(fmean(times) - BURST * PAYLOAD / float(links.min()), latency)


def _flows(
    builder: FlowBuilder, kind: str, nbytes: float, ranks: Sequence[int], road: Roads, order: Sequence[int]
) -> None:
    match kind:
        case "send":  # rank r to r + P/2, as `emulate_rank.operation` does
            half = len(ranks) // 2
            for r in range(half):
                way = road(ranks[r], ranks[r + half])
                builder.flow(nbytes, way.links, latency=way.latency, cap=way.cap)
        case "all_to_all":
            gloo_all_to_all(builder, nbytes, ranks, road, order)
        case "broadcast":
            broadcast(builder, nbytes, ranks, road, at_once=True)
        case _:
            gloo_rings(builder, kind, nbytes, ranks, road, order[-1])


def hops(kind: str, ranks: int) -> int:
    """Messages one after another in a collective: rings pass P - 1 times around, or twice that, trees lg P levels."""
    if kind in ("all_reduce", "reduce_scatter"):
        return 2 * (ranks - 1)
    if kind == "all_gather":
        return ranks - 1
    return ceil(log2(ranks)) if kind in ("broadcast", "barrier") else 1


def wires(network: Network, rate: float, latency: float) -> tuple[Roads, np.ndarray]:
    """Links: the way out of and into every host, then out of and into every bridge. Ranks of one host meet no wire."""
    hosts, each = len(network.bridges), network.ranks_per_host
    bridges = max(network.bridges) + 1
    capacity = np.array([rate] * 2 * hosts + [rate * network.trunk] * 2 * bridges)

    def road(a: int, b: int) -> Road:
        x, y = a // each, b // each
        if x == y:
            return Road((), latency, inf)
        up, down = network.bridges[x], network.bridges[y]
        trunk = () if up == down else (2 * (hosts + up), 2 * (hosts + down) + 1)
        return Road((2 * x, *trunk, 2 * y + 1), latency)

    return road, capacity


def gloo_rings(builder: FlowBuilder, kind: str, nbytes: float, ranks: Sequence[int], road: Roads, late: int) -> None:
    """all_reduce (segments of up to 1 MiB, two or more a rank, twice around), reduce_scatter (the same, whole) and
    all_gather (two halves of a rank's part). Source: allreduce.cc, allgather.cc of gloo 5898507."""
    size = len(ranks)
    if kind == "all_gather":
        gloo_ring(builder, nbytes / (2 * size), 2, ranks, road, [[] for _ in ranks], late)
        return
    each = max(ceil(nbytes / MIB / size), 2)
    begin: list[list[int]] = [[] for _ in ranks]
    for _ in range(2):
        begin = gloo_ring(builder, nbytes / (each * size), each, ranks, road, begin)


def gloo_ring(
    builder: FlowBuilder,
    segment: float,
    each: int,
    ranks: Sequence[int],
    road: Roads,
    begin: list[list[int]],
    late: int | None = None,
) -> list[list[int]]:
    """(P - 1) * each segments from every rank to the next, on one connection one after the other, two on their way.

    Segment i is sent when segment i - 2 came in from the rank before (all that it may carry on has come by then), and
    when the rank after has said that it expects it, which it does when its own segment i - 2 came in; the word waits on
    its wire behind the data that is being sent there, segment i - 1. all_gather posts sends before it says what it
    expects: of the rank that enters `late` the first words too wait behind its data.
    """
    size = len(ranks)
    sent: list[list[int]] = [[] for _ in ranks]
    arrived: list[list[int]] = [[] for _ in ranks]  # at the next rank, by sender
    expected: list[list[int]] = [[] for _ in ranks]
    before = [_in_front(road, ranks, r) for r in range(size)]
    turn = list(range(size)) if late is None else [(late + k) % size for k in range(size)]
    for i in range((size - 1) * each):
        if i >= 2:
            for r in range(size):
                word = [arrived[r][i - 2], *(sent[q][i - 1] for q in before[r])]
                expected[r].append(builder.flow(0.0, (), word, latency=road(ranks[(r + 1) % size], ranks[r]).latency))
        for r in turn:
            way = road(ranks[r], ranks[(r + 1) % size])
            after = [*sent[r][-1:], *(begin[r] if i < 2 else [])]
            if i >= 2:
                after += [arrived[r - 1][i - 2], expected[r][i - 2]]
            elif late is not None and (r + 1) % size == late and late in before[r]:
                after.append(sent[late][i])
            sent[r].append(builder.flow(segment, way.links, after, cap=way.cap))
        for r in range(size):
            way = road(ranks[r], ranks[(r + 1) % size])
            arrived[r].append(builder.flow(0.0, (), [sent[r][i]], latency=way.latency))
    return [[arrived[r - 1][-1], arrived[r][-1]] for r in range(size)]


def _in_front(road: Roads, ranks: Sequence[int], r: int) -> list[int]:
    """The senders whose data leave by the same port as the word of the rank after r to r."""
    size = len(ranks)
    ports = road(ranks[(r + 1) % size], ranks[r]).links[:1]
    return [q for q in range(size) if ports and road(ranks[q], ranks[(q + 1) % size]).links[:1] == ports]


def gloo_all_to_all(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, order: Sequence[int]
) -> None:
    """Every pair, but not all at once: rank r posts for i = 1, 2, ... a send to r + i and a receive from r - i. Of two
    ranks the one that comes later finds the other ready, and writes its data at once; where its receive is posted
    after that (its peer at most P/2 further), the other hears of it only behind this data, and sends then. `order`:
    who enters when. Source: alltoall.cc of gloo 5898507.
    """
    size = len(ranks)
    place = {rank: at for at, rank in enumerate(order)}
    for early in range(size):
        for later in (r for r in range(size) if place[ranks[r]] > place[ranks[early]]):
            there, back = road(ranks[later], ranks[early]), road(ranks[early], ranks[later])
            first = builder.flow(nbytes / size, there.links, latency=there.latency, cap=there.cap)
            waits = [first] if 2 * ((early - later) % size) <= size else []
            builder.flow(nbytes / size, back.links, waits, latency=back.latency, cap=back.cap)
