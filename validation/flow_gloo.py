"""gloo's all-reduce as flows on links, segment by segment, for large messages and many ranks.

`validation.emulate_ports` moves packets and knows queues; this is its cheap relative, where a queue is a delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from simulator.flow_collectives import Roads
from simulator.flows import FlowBuilder
from validation.emulate_ports import SEGMENT

MIB = 2**20
# Bytes of a connection on their way, at most: BBR keeps three bursts of 45 segments and 2 to 3 more for a rate that it
# takes for 0.5 Gbit/s or above (`bbr_quantization_budget`, `bbr_tso_segs_goal` of Linux). The state of a kernel, not a
# time; other controls hold more.
WINDOW = 138 * SEGMENT


def gloo_all_reduce(
    builder: FlowBuilder, nbytes: float, ranks: Sequence[int], road: Roads, entered: Sequence[int], rate: float
) -> list[list[int]]:
    """Segments of up to 1 MiB, two or more a rank, twice around (allreduce.cc of gloo 5898507). rate: bytes/s of a
    port. entered: flows after which each rank begins. Returns the flows that each rank waits for."""
    each = max(ceil(nbytes / MIB / len(ranks)), 2)
    segment = nbytes / (each * len(ranks))
    summed = _ring(builder, segment, each, ranks, road, entered, rate)
    again = [builder.flow(0.0, (), flows) for flows in summed]
    return _ring(builder, segment, each, ranks, road, again, rate)


def _ring(
    builder: FlowBuilder,
    segment: float,
    each: int,
    ranks: Sequence[int],
    road: Roads,
    entered: Sequence[int],
    rate: float,
) -> list[list[int]]:
    """(P - 1) * each segments from every rank to the next, on one connection one after the other, two on their way.

    Segment i is sent when segment i - 2 came in from the rank before (all that it may carry on has come by then), and
    when the rank after has said that it expects it, which it does when its own segment i - 2 came in. Of two ranks,
    that word waits behind segment i - 1 on their only connection; of more, it goes on another connection than the data
    of its rank, and waits for what these hold at the port, up to a window.
    """
    size = len(ranks)
    sent: list[list[int]] = [[] for _ in ranks]
    arrived: list[list[int]] = [[] for _ in ranks]  # at the next rank, by sender
    for i in range((size - 1) * each):
        said = []
        for r in range(size):
            teller = (r + 1) % size
            way = road(ranks[teller], ranks[r])
            queue = min(segment, WINDOW) / rate if i >= 2 and size > 2 and _shared(road, ranks, teller) else 0.0
            behind = [arrived[r][i - 2]] if i >= 2 else [entered[teller]]
            behind += [sent[teller][i - 1]] if i >= 2 and size == 2 else []
            said.append(builder.flow(0.0, (), behind, latency=way.latency + queue))
        for r in range(size):
            after = [*sent[r][-1:], said[r], arrived[r - 1][i - 2] if i >= 2 else entered[r]]
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
