"""What gloo takes on an emulated network, from its rate alone: gloo's own order of messages as flows on the wires.

Every pair of ranks has one connection, and a word of readiness ("I expect your message i") goes on it behind whatever
was written to it before (pair.cc: one queue, `tx_`, a connection). Data go when the word of who receives them is there.

How ranks enter: the barrier before (barrier.cc: rounds of distance 1, 2, 4 ...) lets the rank that comes to it last go
one message later than the others, who leave together: its last partner sends to it only on its word. So when the last
one enters, the words of the others are there, and its own reach them a message later. Which rank it is, is open: the
mean over all (of those who receive, where only they wait for data).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, log2
from statistics import fmean

import numpy as np

from simulator.flow_collectives import Road, Roads
from simulator.flows import FlowBuilder
from validation.emulate_bucket import through_buckets
from validation.emulate_net import BURST, PAYLOAD, Network

MIB = 2**20
# Bytes of one connection that wait at a port before a word of another, at most: its window, and what TCP small queues
# let it put there (1 ms of its pacing rate, tcp_small_queue_check of Linux). `ss -ti` showed windows of 107 to 152
# segments (6 connections, cubic and BBR, star at 200 Mbit/s; paced at 0.5 Gbit/s and more): 138 in the middle.
# The state of the kernel, not a time.
HELD = 138 * 1448.0


def seconds(network: Network, kind: str, nbytes: float, rate: float, latency: float) -> float:
    """rate: bytes/s of a host's wire. latency: seconds of a message of a few bytes, one way, measured once a network.

    Repetitions follow each other, with a barrier between: the buckets hold what they saved since their last data.
    """
    late = range(network.ranks) if kind not in ("send", "broadcast") else range(1, network.ranks)
    times = [_once(network, kind, nbytes, rate, latency, r) for r in (late if kind != "send" else [0])]
    return max(fmean(times), latency)


def _once(network: Network, kind: str, nbytes: float, rate: float, latency: float, late: int) -> float:
    """Seconds from a rank's entry to its last bytes, of the slowest rank, when `late` enters last."""
    road, links = wires(network, rate * PAYLOAD, latency)
    builder, ranks = FlowBuilder(), range(network.ranks)
    entry = [latency if r == late and kind != "send" else 0.0 for r in ranks]
    got = _flows(builder, kind, nbytes, ranks, road, entry, rate * PAYLOAD)
    flows, burst = builder.build(), BURST * PAYLOAD
    finish, tokens = through_buckets(flows, links, burst, np.full(links.size, burst))
    # To the next repetition: lg P rounds of the barrier, each a word and a message; a send: the way back.
    idle = 2 * hops("barrier", network.ranks) * latency + (float(finish.max()) if kind == "send" else 0.0)
    finish, _ = through_buckets(flows, links, burst, np.minimum(tokens + links * idle, burst))
    return max(float(finish[flow]) - entry[r] for r in ranks for flow in got[r])


def _flows(
    builder: FlowBuilder,
    kind: str,
    nbytes: float,
    ranks: Sequence[int],
    road: Roads,
    entry: Sequence[float],
    rate: float,
) -> list[list[int]]:
    """Adds the flows of a collective; returns those that each rank waits for. entry: when each enters, seconds."""
    entered = [builder.flow(0.0, (), start=at) for at in entry]
    match kind:
        case "send":  # rank r to r + P/2, as `emulate_rank.operation` does
            half = len(ranks) // 2
            sent = [_data(builder, nbytes, road(ranks[r], ranks[r + half]), [entered[r]]) for r in range(half)]
            return [[]] * half + [[flow] for flow in sent]
        case "all_to_all":
            return gloo_all_to_all(builder, nbytes, ranks, road, entered, int(np.argmax(entry)))
        case "broadcast":
            return gloo_broadcast(builder, nbytes, ranks, road, entered)
        case "all_gather":
            late = int(np.argmax(entry))
            return gloo_ring(builder, nbytes / (2 * len(ranks)), 2, ranks, road, entered, rate, late)
    return gloo_all_reduce(builder, nbytes, ranks, road, entered, rate)


def _data(builder: FlowBuilder, nbytes: float, way: Road, after: Sequence[int]) -> int:
    return builder.flow(nbytes, way.links, after, latency=way.latency, cap=way.cap)


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


def gloo_all_reduce(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, entered: Sequence[int], rate: float
) -> list[list[int]]:
    """Segments of up to 1 MiB, two or more a rank, twice around; reduce_scatter is the same, whole (allreduce.cc)."""
    each = max(ceil(nbytes / MIB / len(ranks)), 2)
    segment = nbytes / (each * len(ranks))
    summed = gloo_ring(builder, segment, each, ranks, road, entered, rate)
    again = [builder.flow(0.0, (), flows) for flows in summed]
    return gloo_ring(builder, segment, each, ranks, road, again, rate)


def gloo_ring(
    builder: FlowBuilder,
    segment: float,
    each: int,
    ranks: Sequence[int],
    road: Roads,
    entered: Sequence[int],
    rate: float,
    late: int = -1,
) -> list[list[int]]:
    """(P - 1) * each segments from every rank to the next, on one connection one after the other, two on their way.

    Segment i is sent when segment i - 2 came in from the rank before (all that it may carry on has come by then), and
    when the rank after has said that it expects it, which it does when its own segment i - 2 came in. Of two ranks,
    that word waits behind segment i - 1 on their only connection; of more, it goes on another connection than the data
    of its rank, and waits for what these `HELD` at the port. all_gather posts sends before it says what it expects: of
    two ranks, the first words of the one that enters `late` too wait behind its data. rate: bytes/s of a port.
    Source: allreduce.cc, allgather.cc, pair.cc of gloo 5898507.
    """
    size = len(ranks)
    sent: list[list[int]] = [[] for _ in ranks]
    arrived: list[list[int]] = [[] for _ in ranks]  # at the next rank, by sender
    for i in range((size - 1) * each):
        said = []
        for r in range(size):
            teller = (r + 1) % size
            way = road(ranks[teller], ranks[r])
            written = i >= 2 or teller == late  # data of the rank that says it were written before
            queue = min(segment, HELD) / rate if written and size > 2 and _shared(road, ranks, teller) else 0.0
            behind = [arrived[r][i - 2]] if i >= 2 else [entered[teller]]
            behind += [sent[teller][i - 1]] if i >= 2 and size == 2 else []
            said.append(builder.flow(0.0, (), behind, latency=way.latency + queue))
        for k in range(size):
            r = (late + k) % size
            after = [*sent[r][-1:], said[r], arrived[r - 1][i - 2] if i >= 2 else entered[r]]
            after += [sent[late][i]] if size == 2 and i < 2 and late >= 0 and r != late else []
            way = road(ranks[r], ranks[(r + 1) % size])
            sent[r].append(builder.flow(segment, way.links, after, cap=way.cap))
        for r in range(size):
            way = road(ranks[r], ranks[(r + 1) % size])
            arrived[r].append(builder.flow(0.0, (), [sent[r][i]], latency=way.latency))
    return [[arrived[r - 1][-1]] for r in range(size)]


def _shared(road: Roads, ranks: Sequence[int], r: int) -> bool:
    """Whether data of a ring leave by the port that the word of rank r to the rank before leaves by."""
    size = len(ranks)
    port = road(ranks[r], ranks[r - 1]).links[:1]
    return bool(port) and any(road(ranks[q], ranks[(q + 1) % size]).links[:1] == port for q in range(size))


def gloo_broadcast(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, entered: Sequence[int]
) -> list[list[int]]:
    """Binomial tree, to all children at once; every rank says on entry that it expects its message (broadcast.cc)."""
    size = len(ranks)
    have, step = list(entered), 1
    got: list[list[int]] = [[] for _ in ranks]
    while step < size:
        for v in range(min(step, size - step)):
            child = v + step
            word = builder.flow(0.0, (), [entered[child]], latency=road(ranks[child], ranks[v]).latency)
            have[child] = _data(builder, nbytes, road(ranks[v], ranks[child]), [have[v], word])
            got[child] = [have[child]]
        step *= 2
    return got


def gloo_all_to_all(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, entered: Sequence[int], late: int
) -> list[list[int]]:
    """Every pair: rank r posts for i = 1, 2, ... a send to r + i and a receive from r - i. All but the `late` one find
    nobody ready, so all their words go at once. The late one finds all ready and writes its data at once; where its
    receive is posted after that (its peer at most P/2 further), its word waits behind these data (alltoall.cc).
    """
    size = len(ranks)
    got: list[list[int]] = [[] for _ in ranks]
    for k in range(size):
        a = (late + k) % size
        for b in (r for r in range(size) if r != a):
            if b == late and 2 * ((a - late) % size) <= size:
                word = got[a][0]  # the first that a waits for is what the late one sends to it
            else:
                word = builder.flow(0.0, (), [entered[b]], latency=road(ranks[b], ranks[a]).latency)
            got[b].append(_data(builder, nbytes / size, road(ranks[a], ranks[b]), [entered[a], word]))
    return got
