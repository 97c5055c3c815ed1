"""The plain form of `simulator.flow_kernels`: every event shares all links anew. Slow, short, the one to believe."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from simulator.order import Floats

if TYPE_CHECKING:
    from simulator.flows import Flows


def share_reference(flows: Flows, capacity: Floats) -> Floats:
    """Max-min fair rates of all flows at once, by progressive filling."""
    rates = fill(range(len(flows)), paths_of(flows), flows.cap.tolist(), capacity.tolist())
    return np.array([rates[i] for i in range(len(flows))])


def paths_of(flows: Flows) -> list[list[int]]:
    ends = flows.path_ptr.tolist()
    path = flows.path.tolist()
    return [path[a:b] for a, b in pairwise(ends)]


def fill(
    active: Sequence[int] | set[int], paths: list[list[int]], cap: list[float], capacity: list[float]
) -> dict[int, float]:
    """Raises all rates together; whoever meets its cap or a full link stops there."""
    rates: dict[int, float] = {}
    left = {link: capacity[link] for i in active for link in paths[i]}
    on: dict[int, set[int]] = {link: set() for link in left}
    for i in active:
        for link in paths[i]:
            on[link].add(i)
    open_flows = set(active)
    while open_flows:
        level, stops = min(((cap[i], {i}) for i in open_flows), key=lambda pair: pair[0])
        for link in left:
            if on[link] and left[link] / len(on[link]) < level:
                level, stops = left[link] / len(on[link]), set(on[link])
        for i in stops:
            rates[i] = level
            open_flows.remove(i)
            for link in paths[i]:
                on[link].remove(i)
                left[link] = max(left[link] - level, 0.0)
    return rates


def flow_reference(flows: Flows, capacity: Floats) -> tuple[Floats, Floats, int]:
    """(start, finish, flows that finished), as `flow_kernels.run_flows`."""
    n, paths, cap, links = len(flows), paths_of(flows), flows.cap.tolist(), capacity.tolist()
    start, finish = np.zeros(n), np.zeros(n)
    waiting, left, rates = flows.indegree.tolist(), flows.size.tolist(), dict[int, float]()
    coming = [(float(flows.start[i]), i) for i in range(n) if waiting[i] == 0]
    heapq.heapify(coming)
    arriving: list[tuple[float, int]] = []
    now, done = 0.0, 0
    while coming or arriving or rates:
        drained = min((now + left[i] / rate if left[i] else now for i, rate in rates.items()), default=inf)
        event = min(drained, coming[0][0] if coming else inf, arriving[0][0] if arriving else inf)
        # Rounding must not leave a flow a few bytes short of its end at the instant at which it ends.
        ended = [i for i, r in rates.items() if now + (left[i] / r if left[i] else 0.0) <= event * (1 + 1e-14)]
        for i, rate in rates.items():
            left[i] = max(left[i] - rate * (event - now), 0.0) if rate < inf else 0.0
        now = event
        for i in ended:
            del rates[i]
            heapq.heappush(arriving, (now + float(flows.latency[i]), i))
        while arriving and arriving[0][0] <= now:
            i = heapq.heappop(arriving)[1]
            finish[i] = now
            done += 1
            for j in flows.succ[flows.succ_ptr[i] : flows.succ_ptr[i + 1]].tolist():
                waiting[j] -= 1
                if waiting[j] == 0:
                    heapq.heappush(coming, (max(now, float(flows.start[j])), j))
        running = set(rates)
        while coming and coming[0][0] <= now:
            i = heapq.heappop(coming)[1]
            start[i] = now
            running.add(i)
        rates = fill(running, paths, cap, links)
    return start, finish, done
