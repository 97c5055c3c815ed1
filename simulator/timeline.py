"""`Timeline`: when every task ran, and what that says: breakdown per rank, critical path, utilisation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.order import Floats, predecessors
from simulator.program import Program

COMMUNICATION = ("communication", "link")
HOST = "host"


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """start, finish f8[n]: seconds from the program's begin. makespan: the last finish, 0 for an empty program."""

    program: Program
    start: Floats
    finish: Floats
    makespan: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where one rank's step goes, in seconds; the four parts sum to the makespan.

    compute: a task of a compute resource of the rank is running.
    exposed_communication: only communication or link tasks of the rank are.
    bubble: neither: the rank waits for others, before its first task, between two, or after its last. Of a pipeline
    with equal stages this is the (p - 1) / (m + p - 1) of warm-up and drain.
    host: neither, because the rank's host thread has not issued the next work yet (see `host_waits`).
    """

    compute: float
    exposed_communication: float
    bubble: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.exposed_communication + self.bubble + self.host


def timeline_of(program: Program, start: Floats, finish: Floats) -> Timeline:
    """The timeline with these times, its arrays read-only."""
    start.setflags(write=False)
    finish.setflags(write=False)
    return Timeline(program, start, finish, float(finish.max(initial=0.0)))


def breakdown(timeline: Timeline) -> dict[int, Breakdown]:
    """Breakdown of every rank that has a task or a resource, by rank."""
    program = timeline.program
    ranks = {int(rank) for rank in np.unique(program.rank)} | {item.rank for item in program.resources}
    order = np.lexsort((timeline.start, program.rank))  # by rank, then start: each rank is one slice
    bounds = np.searchsorted(program.rank[order], np.array([sorted(ranks), sorted(ranks)]) + np.array([[0], [1]]))
    parts = {}
    waits = host_waits(timeline)
    for rank, low, high in zip(sorted(ranks), *bounds):
        if rank >= 0:
            parts[rank] = _breakdown(timeline, order[low:high], waits.get(rank))
    return parts


def host_waits(timeline: Timeline) -> dict[int, tuple[Floats, Floats]]:
    """When the ranks wait for their host threads: (start, finish) of every wait in order of start, by rank.

    A task of category "host" on a rank, without resource, joins a rank's own work with what its host thread does for
    it. The wait begins where the rank's own work ended (its other dependencies) and lasts until the join.
    """
    program = timeline.program
    if HOST not in program.categories:
        return {}
    named = program.category == program.categories.index(HOST)
    kinds = np.array([*(item.kind for item in program.resources), "none"])[program.resource]
    joins = named & (program.resource < 0) & (program.rank >= 0)
    issues = named & ~joins | (kinds == HOST)
    pointer, before = predecessors(program.succ_ptr, program.succ)
    found: dict[int, list[tuple[float, float]]] = {}
    for join in np.flatnonzero(joins).tolist():
        own = before[pointer[join] : pointer[join + 1]]
        own = own[~issues[own]]
        begun = float(timeline.finish[own].max(initial=0.0))
        if begun < timeline.start[join]:
            found.setdefault(int(program.rank[join]), []).append((begun, float(timeline.start[join])))
    return {r: (np.array(sorted(w))[:, 0], np.array(sorted(w))[:, 1]) for r, w in found.items()}


def _breakdown(
    timeline: Timeline, tasks: npt.NDArray[np.int64], waits: tuple[Floats, Floats] | None = None
) -> Breakdown:
    """Breakdown of one rank from its tasks in order of start, and its waits for the host."""
    program = timeline.program
    # The last row serves resource -1: such a task is a delay, neither computation nor communication.
    kinds = np.array([*(item.kind for item in program.resources), "none"])[program.resource[tasks]]
    computing = kinds == "compute"
    start, finish = timeline.start[tasks], timeline.finish[tasks]
    busy = computing | np.isin(kinds, COMMUNICATION)
    compute = covered(start[computing], finish[computing])
    either = covered(start[busy], finish[busy])
    held = either
    if waits is not None:
        spans = np.concatenate([start[busy], waits[0]]), np.concatenate([finish[busy], waits[1]])
        in_order = np.argsort(spans[0], kind="stable")
        held = covered(spans[0][in_order], spans[1][in_order])
    return Breakdown(compute, max(0.0, either - compute), max(0.0, timeline.makespan - held), max(0.0, held - either))


def covered(start: Floats, finish: Floats) -> float:
    """Length of the union of intervals that are sorted by start."""
    if not start.size:
        return 0.0
    reach = np.maximum.accumulate(finish)
    first = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]]))
    last = np.append(first[1:] - 1, start.size - 1)
    return float((reach[last] - start[first]).sum())


def overall(breakdowns: Mapping[int, Breakdown]) -> Breakdown:
    """Mean over the ranks."""
    if not breakdowns:
        raise ValueError("there is no rank to take a mean over; give tasks or resources a rank")
    rows = [(b.compute, b.exposed_communication, b.bubble, b.host) for b in breakdowns.values()]
    return Breakdown(*(float(mean) for mean in np.mean(rows, axis=0)))


def utilisation(timeline: Timeline) -> dict[str, float]:
    """Busy fraction (0 to 1) of each resource's servers, by resource name."""
    program = timeline.program
    used = program.resource >= 0
    seconds = (timeline.finish - timeline.start)[used]
    busy = np.bincount(program.resource[used], seconds, minlength=len(program.resources))
    scale = timeline.makespan or 1.0
    return {item.name: float(busy[r]) / (item.capacity * scale) for r, item in enumerate(program.resources)}


def critical_path(timeline: Timeline) -> list[int]:
    """Tasks, first to last, each of which began the moment the one before it ended: from time 0 to the makespan.

    The one before is a dependency where one ended just then, and otherwise a task that freed a server.
    """
    if not len(timeline.program):
        return []
    pointer, before = predecessors(timeline.program.succ_ptr, timeline.program.succ)
    by_resource = np.lexsort((timeline.start, timeline.finish, timeline.program.resource))
    starts = np.searchsorted(timeline.program.resource[by_resource], np.arange(-1, len(timeline.program.resources) + 1))
    task: int | None = int(np.argmax(timeline.finish))
    path: list[int] = []
    while task is not None:
        path.append(task)
        r = int(timeline.program.resource[task]) + 1
        queue = by_resource[starts[r] : starts[r + 1]]
        dependencies = before[pointer[task] : pointer[task + 1]]
        task = _explains(timeline, task, dependencies, queue)
    return path[::-1]


def _explains(
    timeline: Timeline, task: int, dependencies: npt.NDArray[np.int32], queue: npt.NDArray[np.int64]
) -> int | None:
    """The task whose end let `task` start; None if it started at 0. `queue`: its resource's tasks by finish, start."""
    begun = timeline.start[task]
    if begun == 0:
        return None
    exact = dependencies[timeline.finish[dependencies] == begun]
    if exact.size:
        return int(exact[0])
    # A task that itself began earlier comes first; among tasks of zero length, ids ascend (`replay` keeps that order).
    low = bisect_left(queue, begun, key=lambda other: timeline.finish[other])
    for other in queue[low:]:
        if timeline.start[other] < begun or other < task:
            assert timeline.finish[other] == begun, f"nothing explains why task {task} starts at {begun}"
            return int(other)
    raise AssertionError(f"nothing explains why task {task} starts at {begun}")
