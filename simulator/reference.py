"""The event engine in plain Python: slower, easier to check, and with the same timelines bit for bit.

The rules stand in `simulator.kernels`; sums and divisions happen in the same order here, so rounding agrees too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

import numpy as np

from simulator.order import Floats, Ints
from simulator.program import Program


@dataclass(slots=True)
class _Pool:
    """Running tasks that share `cores`, in a heap by virtual finish time; `next` is the instant of the first one's."""

    cores: float
    running: list[tuple[float, int]] = field(default_factory=list)
    load: float = 0.0
    rate: float = 1.0
    time: float = 0.0
    work: float = 0.0
    next: float = inf

    def virtual(self, now: float) -> float:
        return self.work + self.rate * (now - self.time)

    def schedule(self, now: float) -> None:
        """Notes when the first task completes, if the rate stays."""
        self.next = max(now, self.time + (self.running[0][0] - self.work) / self.rate) if self.running else inf

    def settle(self, now: float) -> None:
        """Takes the rate of the present load; an empty pool starts afresh."""
        if not self.running:
            self.load, self.rate, self.time, self.work = 0.0, 1.0, 0.0, 0.0
        else:
            rate = 1.0 if self.load <= self.cores else self.cores / self.load
            if rate != self.rate:
                self.work, self.time, self.rate = self.virtual(now), now, rate
        self.schedule(now)


@dataclass(slots=True)
class _Run:
    """A simulation under way."""

    duration: list[float]
    resource: list[int]
    demand: list[float]
    pool: list[int]
    pools: list[_Pool]
    free: list[int]
    queues: list[deque[int]]
    start: list[float]
    finish: list[float]
    changed: set[int] = field(default_factory=set)

    def begin(self, task: int, now: float) -> None:
        pool = self.pools[self.pool[task]]
        self.start[task] = now
        heappush(pool.running, (pool.virtual(now) + self.duration[task], task))
        pool.load += self.demand[task]
        self.changed.add(self.pool[task])

    def start_or_queue(self, task: int, now: float) -> None:
        r = self.resource[task]
        if self.free[r] > 0:
            self.free[r] -= 1
            self.begin(task, now)
        else:
            self.queues[r].append(task)

    def complete_first(self, p: int, now: float) -> int:
        """The first task of pool p ends; its server goes on with the task that has waited longest."""
        _, task = heappop(self.pools[p].running)
        self.pools[p].load -= self.demand[task]
        self.changed.add(p)
        self.finish[task] = now
        r = self.resource[task]
        if self.queues[r]:
            follower = self.queues[r].popleft()
            self.begin(follower, now)
            self.pools[self.pool[follower]].schedule(now)
        else:
            self.free[r] += 1
        self.pools[p].schedule(now)
        return task

    def settle(self, now: float) -> None:
        for p in self.changed:
            self.pools[p].settle(now)
        self.changed.clear()


def shared_pool(program: Program) -> Ints:
    """Pool in which each task shares cores, i4[n]; len(pools) for the tasks that do not."""
    of_resource = np.array([*(item.pool for item in program.resources), -1], np.int32)
    pool = of_resource[program.resource]
    alone = (pool < 0) | (program.demand == 0) | (program.duration == 0)
    return np.where(alone, np.int32(len(program.pools)), pool)


def simulate_reference(program: Program) -> tuple[Floats, Floats]:
    """(start f8[n], finish f8[n]) in seconds."""
    n = len(program)
    run = _Run(
        duration=program.duration.tolist(),
        resource=program.resource.tolist(),  # -1 is the last entry of `free` and `queues`
        demand=program.demand.tolist(),
        pool=shared_pool(program).tolist(),
        pools=[*(_Pool(item.capacity) for item in program.pools), _Pool(inf)],
        free=[*(item.capacity for item in program.resources), n],
        queues=[deque() for _ in range(len(program.resources) + 1)],
        start=[0.0] * n,
        finish=[0.0] * n,
    )
    rows, succ, waiting = program.succ_ptr.tolist(), program.succ.tolist(), program.indegree.tolist()
    ready = [i for i in range(n) if waiting[i] == 0]
    now, done = 0.0, 0
    while True:
        for task in sorted(ready):
            run.start_or_queue(task, now)
        run.settle(now)
        now, ready = min(pool.next for pool in run.pools), []
        if now == inf:
            break
        while (p := _due(run.pools, now)) is not None:
            task = run.complete_first(p, now)
            done += 1
            for other in succ[rows[task] : rows[task + 1]]:
                waiting[other] -= 1
                if waiting[other] == 0:
                    ready.append(other)
    assert done == n
    return np.array(run.start), np.array(run.finish)


def _due(pools: Sequence[_Pool], now: float) -> int | None:
    """The first pool in which a task ends now."""
    return next((p for p, pool in enumerate(pools) if pool.next == now), None)


def replay_reference(program: Program, duration: Floats) -> tuple[Floats, bool]:
    """(start f8[n], whether every edge ascends): tasks in id order, each resource one at a time."""
    seconds, resource = duration.tolist(), program.resource.tolist()
    rows, succ = program.succ_ptr.tolist(), program.succ.tolist()
    start, free_at = [0.0] * len(program), [0.0] * len(program.resources)
    ascending = True
    for i, r in enumerate(resource):
        if r >= 0:
            start[i] = max(start[i], free_at[r])
            free_at[r] = start[i] + seconds[i]
        ends = start[i] + seconds[i]
        for other in succ[rows[i] : rows[i + 1]]:
            ascending = ascending and other > i
            start[other] = max(start[other], ends)
    return np.array(start), ascending
