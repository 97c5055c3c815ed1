"""Flows that share links: what finishes when, under max-min fair sharing. Exact, from event to event.

A flow moves `size` bytes over all links of its path at once, at one rate. Rates are max-min fair at every instant: no
flow can be faster without a flow that is no faster becoming slower (progressive filling, Bertsekas and Gallager, Data
Networks, 6.5.2). They change only when a flow starts or ends. A flow starts when all flows that it comes after have
arrived, and arrives `latency` seconds after its last byte has left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf, isfinite
from types import ModuleType
from typing import Literal

import numpy as np

from simulator.flow_reference import flow_reference, share_reference
from simulator.order import Floats, Ints

Engine = Literal["compiled", "reference"]


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """n flows: size f8[n] bytes; start f8[n], the earliest instant, seconds; latency f8[n], seconds; cap f8[n], most
    bytes/s (inf: none). Flow i takes the links path[path_ptr[i] : path_ptr[i + 1]], and the flows
    succ[succ_ptr[i] : succ_ptr[i + 1]] wait for it; indegree i4[n]: how many flows each waits for."""

    size: Floats
    start: Floats
    latency: Floats
    cap: Floats
    path_ptr: Ints
    path: Ints
    succ_ptr: Ints
    succ: Ints
    indegree: Ints

    def __len__(self) -> int:
        return self.size.size


@dataclass(frozen=True, slots=True, eq=False)
class FlowTimes:
    """start f8[n]: when each flow could start; finish f8[n]: when its last byte arrived. Seconds."""

    start: Floats
    finish: Floats

    @property
    def makespan(self) -> float:
        return float(self.finish.max()) if self.finish.size else 0.0


@dataclass(slots=True)
class FlowBuilder:
    """Collects flows; ids count from 0.

    >>> builder = FlowBuilder()
    >>> long, short = builder.flow(3e9, [0]), builder.flow(1e9, [0])
    >>> simulate_flows(builder.build(), [1e9]).finish.tolist()  # half the link each, then all of it
    [4.0, 2.0]
    """

    _size: list[float] = field(default_factory=list)
    _start: list[float] = field(default_factory=list)
    _latency: list[float] = field(default_factory=list)
    _cap: list[float] = field(default_factory=list)
    _paths: list[tuple[int, ...]] = field(default_factory=list)
    _after: list[tuple[int, ...]] = field(default_factory=list)

    def flow(
        self,
        size: float,
        path: Iterable[int],
        after: Iterable[int] = (),
        start: float = 0.0,
        latency: float = 0.0,
        cap: float = inf,
    ) -> int:
        """Adds a flow of `size` bytes that waits for the flows `after` and for the instant `start`; returns its id."""
        i, after, path = len(self._size), tuple(after), tuple(path)
        if not (isfinite(size) and size >= 0 and isfinite(start) and start >= 0 and isfinite(latency) and latency >= 0):
            raise ValueError(
                f"flow {i}: size {size}, start {start} or latency {latency} is no finite number of 0 or more"
            )
        if not cap > 0:
            raise ValueError(f"flow {i}: its cap is {cap} bytes/s; it must exceed 0")
        if any(not 0 <= j < i for j in after):
            raise ValueError(
                f"flow {i} waits for a flow that is not there yet; add flows in an order that they can run in"
            )
        self._size.append(float(size))
        self._start.append(float(start))
        self._latency.append(float(latency))
        self._cap.append(float(cap))
        self._paths.append(tuple(dict.fromkeys(path)))
        self._after.append(tuple(dict.fromkeys(after)))
        return i

    def build(self) -> Flows:
        n = len(self._size)
        pairs = np.array([(j, i) for i, after in enumerate(self._after) for j in after], np.int32).reshape(-1, 2)
        order = np.argsort(pairs[:, 0], kind="stable")
        return Flows(
            np.array(self._size),
            np.array(self._start),
            np.array(self._latency),
            np.array(self._cap),
            _pointers([len(p) for p in self._paths]),
            np.array([link for p in self._paths for link in p], np.int32),
            _pointers(np.bincount(pairs[:, 0], minlength=n).tolist()),
            pairs[order, 1].astype(np.int32),
            np.array([len(a) for a in self._after], np.int32),
        )


def _pointers(counts: Sequence[int]) -> Ints:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int32)


def simulate_flows(flows: Flows, capacity: Sequence[float] | Floats, engine: Engine = "compiled") -> FlowTimes:
    """When every flow starts and arrives. capacity: bytes/s of each link (inf: never the bottleneck)."""
    rates = _checked(flows, capacity)
    kernels = _compiled() if engine == "compiled" else None
    if kernels is None:
        start, finish, done = flow_reference(flows, rates)
    else:
        sharing = (flows.size, flows.start, flows.latency, flows.cap, flows.path_ptr, flows.path)
        start, finish, done = kernels.run_flows(*sharing, flows.succ_ptr, flows.succ, flows.indegree, rates)
    assert done == len(flows), "flows wait for each other in a circle"
    return FlowTimes(start, finish)


def share(flows: Flows, capacity: Sequence[float] | Floats, engine: Engine = "compiled") -> Floats:
    """Max-min fair rates f8[n], bytes/s, of all flows at one instant at which all of them run."""
    rates = _checked(flows, capacity)
    kernels = _compiled() if engine == "compiled" else None
    if kernels is None:
        return share_reference(flows, rates)
    return kernels.share_all(flows.cap, flows.path_ptr, flows.path, rates)


def _checked(flows: Flows, capacity: Sequence[float] | Floats) -> Floats:
    rates = np.ascontiguousarray(capacity, np.float64)
    if not bool((rates > 0).all()):
        raise ValueError("a link has no bandwidth; give every link more than 0 bytes/s")
    if flows.path.size and not 0 <= int(flows.path.min()) <= int(flows.path.max()) < rates.size:
        raise ValueError(f"a path names link {int(flows.path.max())}, but only {rates.size} links are given")
    return rates


@cache
def _compiled() -> ModuleType | None:
    """The compiled loops, or None where numba is missing."""
    try:
        from simulator import flow_kernels
    except ImportError:
        return None
    return flow_kernels
