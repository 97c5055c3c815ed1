"""Flows through token buckets: what `simulator.flows` does, where every link lets a burst pass that it saved up."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import inf

import numpy as np

from simulator.flow_reference import fill, paths_of
from simulator.flows import Flows
from simulator.order import Floats

AT_ONCE = 1e12  # bytes/s of a link whose bucket holds tokens: so fast that the rates of wires do not matter beside it
EMPTY = 1e-3  # bytes; fewer tokens than this are rounding
ROUNDING = 1 + 1e-14  # instants this near to each other are one


def through_buckets(
    flows: Flows, capacity: Sequence[float] | Floats, burst: float, tokens: Floats
) -> tuple[Floats, Floats]:
    """(finish f8[n], seconds; tokens f8[links] left at the end, bytes). A link passes at most its tokens and what its
    capacity (bytes/s) gives; tokens that are not used are saved up to `burst` bytes (tc-tbf(8)). Sharing is max-min
    fair at every instant. tokens: what every bucket holds at the start."""
    paths, caps, wires = paths_of(flows), flows.cap.tolist(), np.asarray(capacity, np.float64)
    waiting, left = flows.indegree.tolist(), flows.size.tolist()
    finish, tokens, used, now = np.zeros(len(flows)), tokens.copy(), np.zeros(wires.size), 0.0
    events = [(float(flows.start[i]), i, False) for i in range(len(flows)) if waiting[i] == 0]  # (when, flow, arrives)
    heapq.heapify(events)
    rates: dict[int, float] = {}
    while events or rates:
        drained = {i: now + left[i] / rate if left[i] else now for i, rate in rates.items()}
        falls = (tokens > 0) & (used > wires)
        dry = np.where(falls, now + tokens / np.where(falls, used - wires, 1.0), inf)
        then = min([*drained.values(), float(dry.min(initial=inf)), *[event[0] for event in events[:1]]])
        tokens = np.clip(tokens + (wires - used) * (then - now), 0.0, burst)
        tokens[(tokens < EMPTY) | (dry <= then * ROUNDING)] = 0.0
        for i, rate in rates.items():
            left[i] = max(left[i] - rate * (then - now), 0.0) if rate < inf else 0.0
        now = then
        for i in [i for i, end in drained.items() if end <= now * ROUNDING]:
            del rates[i]
            heapq.heappush(events, (now + float(flows.latency[i]), i, True))
        running = set(rates) | _due(events, now, flows, waiting, finish)
        rates = fill(running, paths, caps, np.where(tokens > 0, AT_ONCE, wires).tolist())
        used[:] = 0.0
        for i, rate in rates.items():
            used[paths[i]] += rate
    return finish, tokens


def _due(
    events: list[tuple[float, int, bool]], now: float, flows: Flows, waiting: list[int], finish: Floats
) -> set[int]:
    """Takes from the heap what happens by now: notes arrivals, returns the flows that start."""
    starts = set()
    while events and events[0][0] <= now:
        _, i, arrives = heapq.heappop(events)
        if not arrives:
            starts.add(i)
            continue
        finish[i] = now
        for j in flows.succ[flows.succ_ptr[i] : flows.succ_ptr[i + 1]].tolist():
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(events, (max(now, float(flows.start[j])), j, False))
    return starts
