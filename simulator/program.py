"""`Program`: tasks with dependencies on resources, in flat arrays; `ProgramBuilder` makes one task by task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from simulator.order import Floats, Ints, Shorts, compressed_rows, find_cycle

Kind = Literal["compute", "communication", "link", "host"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Resource:
    """Serves up to `capacity` tasks at once, first come first served. `pool` and `rank` are -1 where there is none."""

    name: str
    capacity: int = 1
    pool: int = -1
    rank: int = -1
    kind: Kind = "compute"


@dataclass(frozen=True, slots=True)
class Pool:
    """Processor sharing: running tasks with demands d_i (cores) progress at rate min(1, capacity / sum d_i)."""

    name: str
    capacity: float


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """n tasks and their dependencies; every array is read-only.

    duration f8[n]: seconds at full rate.
    resource i4[n]: index into `resources`; -1: starts as soon as it is ready.
    demand f8[n]: cores of its resource's pool that a task keeps busy; 0: neither slowed by the pool nor loading it.
    category i2[n]: index into `categories`.
    rank i4[n]: whose time this is; -1: nobody's.
    succ_ptr i4[n + 1], succ i4[edges]: successors of task i are succ[succ_ptr[i]:succ_ptr[i + 1]].
    indegree i4[n]: number of dependencies.
    """

    duration: Floats
    resource: Ints
    demand: Floats
    category: Shorts
    rank: Ints
    succ_ptr: Ints
    succ: Ints
    indegree: Ints
    labels: Sequence[str]
    categories: tuple[str, ...]
    resources: tuple[Resource, ...]
    pools: tuple[Pool, ...]

    def __len__(self) -> int:
        return self.duration.size


@dataclass(frozen=True, slots=True)
class NumberedLabels(Sequence[str]):
    """Labels "task 0", "task 1", ... of a synthetic program, made when asked for."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        numbers = range(self.size)[index]
        return f"task {numbers}" if isinstance(numbers, int) else tuple(f"task {i}" for i in numbers)


@dataclass(slots=True)
class ProgramBuilder:
    """Collects pools, resources and tasks; ids count up from 0. `build` checks everything at once."""

    _pools: list[Pool] = field(default_factory=list)
    _resources: list[Resource] = field(default_factory=list)
    _labels: list[str] = field(default_factory=list)
    _categories: dict[str, int] = field(default_factory=dict)
    _tasks: list[tuple[float, int, float, int, int]] = field(default_factory=list)
    _edges: list[tuple[int, int]] = field(default_factory=list)

    def pool(self, name: str, capacity: float) -> int:
        """Id of a new pool of `capacity` cores."""
        self._pools.append(Pool(name, capacity))
        return len(self._pools) - 1

    def resource(self, name: str, capacity: int = 1, pool: int = -1, rank: int = -1, kind: Kind = "compute") -> int:
        """Id of a new FIFO resource."""
        self._resources.append(Resource(name, capacity, pool, rank, kind))
        return len(self._resources) - 1

    def task(
        self,
        label: str,
        category: str,
        duration: float,
        resource: int = -1,
        deps: Iterable[int] = (),
        demand: float = 1.0,
        rank: int = -1,
    ) -> int:
        """Id of a new task of `duration` seconds that starts after `deps`. Its rank defaults to its resource's."""
        task = len(self._tasks)
        if rank == -1 and 0 <= resource < len(self._resources):
            rank = self._resources[resource].rank
        kind = self._categories.setdefault(category, len(self._categories))
        self._tasks.append((duration, resource, demand, kind, rank))
        self._labels.append(label)
        self._edges.extend((int(before), task) for before in deps)
        return task

    def edge(self, before: int, after: int) -> None:
        """Task `after` starts only when `before` has finished."""
        self._edges.append((before, after))

    def build(self) -> Program:
        """The program; ValueError where a number, an id or a cycle makes no sense."""
        duration, resource, demand, category, rank = np.array(self._tasks, np.float64).reshape(-1, 5).T
        edges = np.array(self._edges, np.int64).reshape(-1, 2).T
        return program_from_arrays(
            duration,
            edges[0],
            edges[1],
            resource=resource.astype(np.int64),
            demand=demand,
            category=category.astype(np.int64),
            rank=rank.astype(np.int64),
            labels=tuple(self._labels),
            categories=tuple(self._categories),
            resources=self._resources,
            pools=self._pools,
        )


def program_from_arrays(
    duration: npt.ArrayLike,
    source: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    resource: npt.ArrayLike = -1,
    demand: npt.ArrayLike = 1.0,
    category: npt.ArrayLike = 0,
    rank: npt.ArrayLike = -1,
    labels: Sequence[str] | None = None,
    categories: Sequence[str] = ("task",),
    resources: Sequence[Resource] = (),
    pools: Sequence[Pool] = (),
) -> Program:
    """A checked program from task arrays [n] (or one value for all) and edge arrays [edges], source before target."""
    seconds = np.array(duration, np.float64).ravel()
    n = seconds.size
    named = NumberedLabels(n) if labels is None else labels
    if len(named) != n:
        raise ValueError(f"{len(named)} labels are given for {n} tasks; give one label per task")
    _check_resources(resources, pools)
    _check_numbers("duration", seconds, named)
    cores = _column(demand, n, np.float64)
    _check_numbers("demand", cores, named)
    before, after = np.asarray(source).ravel(), np.asarray(target).ravel()
    if before.size != after.size:
        raise ValueError(f"{before.size} edge sources are given for {after.size} targets; give as many of both")
    _check_ids("edge", np.concatenate([before, after]), 0, n, "tasks")
    indices = _column(resource, n, np.int64), _column(category, n, np.int64), _column(rank, n, np.int64)
    _check_ids("task", indices[0], -1, len(resources), "resources")
    _check_ids("task", indices[1], 0, len(categories), "categories")
    _check_ids("task", indices[2], -1, 2**31 - 1, "ranks")
    succ_ptr, succ = compressed_rows(before.astype(np.int32), after.astype(np.int32), n)
    if cycle := find_cycle(succ_ptr, succ):
        raise ValueError(f"tasks wait for each other in a cycle: {_cycle_text(cycle, named)}; remove an edge")
    arrays = (
        seconds,
        indices[0].astype(np.int32),
        cores,
        indices[1].astype(np.int16),
        indices[2].astype(np.int32),
        succ_ptr,
        succ,
        np.bincount(succ, minlength=n).astype(np.int32),
    )
    for array in arrays:
        array.setflags(write=False)
    return Program(*arrays, named, tuple(categories), tuple(resources), tuple(pools))


def _column(values: npt.ArrayLike, n: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    array = np.asarray(values, dtype)
    if array.ndim and array.shape != (n,):
        raise ValueError(f"an array of shape {array.shape} is given for {n} tasks; give one value per task")
    return np.array(np.broadcast_to(array, n))


def _check_numbers(what: str, values: Floats, labels: Sequence[str]) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        task = int(bad[0])
        raise ValueError(f"{what} of task {task} ({labels[task]}) is {values[task]}; it must be finite and 0 or more")


def _check_ids(what: str, ids: npt.NDArray[Any], low: int, end: int, items: str) -> None:
    bad = ids[(ids < low) | (ids >= end)]
    if bad.size:
        raise ValueError(f"{what} names number {int(bad[0])} of {end} {items}; ids run from {low} to {end - 1}")


def _check_resources(resources: Sequence[Resource], pools: Sequence[Pool]) -> None:
    for pool in pools:
        if not pool.capacity > 0:
            raise ValueError(f"pool {pool.name} has capacity {pool.capacity}; it needs more than 0 cores")
    for item in resources:
        if item.capacity != int(item.capacity) or not 1 <= item.capacity < 2**31:
            raise ValueError(f"resource {item.name} has capacity {item.capacity}; it needs a whole number of 1 or more")
        if not -1 <= item.pool < len(pools):
            raise ValueError(f"resource {item.name} is in pool {item.pool}, but there are {len(pools)} pools")
        if item.kind not in KINDS:
            raise ValueError(f"resource {item.name} is of kind {item.kind!r}; use one of {', '.join(KINDS)}")


def _cycle_text(cycle: Sequence[int], labels: Sequence[str]) -> str:
    shown = [f"{labels[i]} (task {i})" for i in cycle[:6]]
    if len(cycle) > 6:
        shown.append(f"... {len(cycle) - 6} more")
    return " -> ".join([*shown, f"{labels[cycle[0]]} (task {cycle[0]})"])
