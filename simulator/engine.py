"""`simulate`: the timeline of a program. `replay`: the same where the order on every resource is known beforehand."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np

from simulator.order import Floats, Ints
from simulator.program import Program
from simulator.reference import replay_reference, shared_pool, simulate_reference
from simulator.timeline import Timeline, timeline_of

Engine = Literal["compiled", "reference"]


def simulate(program: Program, engine: Engine = "compiled") -> Timeline:
    """Runs the program; resources serve ready tasks by (ready time, task id).

    The compiled engine and the plain-Python reference give the same timeline; without a working numba the
    compiled one warns and is the reference.
    """
    kernels = _kernels(engine)
    if kernels is None:
        return timeline_of(program, *simulate_reference(program))
    if _shares(program):
        return _simulate_shared(kernels, program)
    graph = (program.resource, program.succ_ptr, program.succ, program.indegree)
    start, done = kernels.run_fifo(program.duration, *graph, _capacity(program), _running(program))
    assert done == len(program)
    return timeline_of(program, start, start + program.duration)


def replay(program: Program, duration: Floats | None = None, engine: Engine = "compiled") -> Timeline:
    """One pass over the tasks in id order, without events, where every resource runs its tasks in id order.

    Equals `simulate` wherever the edges leave a resource no other order. Needs task ids in topological order,
    capacities of 1 and no shared pools. `duration` f8[n] (seconds) stands in for the program's own.
    """
    if duration is not None:
        program = _with_duration(program, duration)
    wide = [item for item in program.resources if item.capacity != 1]
    if wide:
        raise ValueError(f"resource {wide[0].name} has capacity {wide[0].capacity}; replay needs 1, use simulate")
    if _shares(program):
        raise ValueError("the program shares pools, so durations depend on each other; use simulate instead of replay")
    kernels = _kernels(engine)
    if kernels is None:
        start, ascending = replay_reference(program, program.duration)
    else:
        graph = (program.succ_ptr, program.succ)
        start, ascending = kernels.run_in_order(program.duration, program.resource, *graph, len(program.resources))
    if not ascending:
        raise ValueError("an edge leads to a lower task id; replay needs ids in topological order, use simulate")
    return timeline_of(program, start, start + program.duration)


def _with_duration(program: Program, duration: Floats) -> Program:
    seconds = np.array(duration, np.float64)
    if seconds.shape != program.duration.shape:
        raise ValueError(f"durations of shape {seconds.shape} are given for {len(program)} tasks; give one per task")
    if not bool((np.isfinite(seconds) & (seconds >= 0)).all()):
        raise ValueError("a duration is not a finite number of seconds of 0 or more")
    seconds.setflags(write=False)
    return replace(program, duration=seconds)


@cache
def _compiled() -> ModuleType | None:
    """The compiled loops, or None where numba is missing or broken."""
    try:
        from simulator import kernels

        empty = np.zeros(0, np.int32)
        kernels.run_in_order(np.zeros(0), empty, np.zeros(1, np.int32), empty, 0)  # compiles, or shows that it cannot
    except Exception as error:
        text = f"numba does not work here ({error!r}); simulation uses the slow reference engine"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return None
    return kernels


def _kernels(engine: str) -> ModuleType | None:
    if engine not in ("compiled", "reference"):
        raise ValueError(f"there is no engine {engine!r}; use 'compiled' or 'reference'")
    return _compiled() if engine == "compiled" else None


def _shares(program: Program) -> bool:
    """Whether any task shares a pool."""
    if all(item.pool < 0 for item in program.resources):
        return False
    return bool((shared_pool(program) < len(program.pools)).any())


def _capacity(program: Program) -> Ints:
    """Capacity of each resource, i4[resources + 1]; the last one, which index -1 finds, serves all tasks at once."""
    return np.array([*(min(item.capacity, len(program)) for item in program.resources), len(program)], np.int32)


def _running(program: Program) -> int:
    """Bound of the number of tasks that run at once."""
    servers = sum(item.capacity for item in program.resources)
    return min(len(program), servers + int((program.resource < 0).sum()))


def _simulate_shared(kernels: ModuleType, program: Program) -> Timeline:
    pool = shared_pool(program)
    cores = np.array([*(item.capacity for item in program.pools), np.inf])
    # A pool's heap holds no more tasks than it has, nor than its resources have servers.
    tasks = np.bincount(pool, minlength=cores.size)
    servers = np.zeros(cores.size, np.int64)
    for item in program.resources:
        servers[item.pool] += item.capacity
    servers[-1] = _running(program)
    slots = np.concatenate([[0], np.cumsum(np.minimum(tasks, servers))])
    graph = (program.resource, program.succ_ptr, program.succ, program.indegree)
    start, finish, done = kernels.run_shared(
        program.duration, *graph, _capacity(program), program.demand, pool, cores, slots
    )
    assert done == len(program)
    return timeline_of(program, start, finish)
