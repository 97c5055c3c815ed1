"""Cumulated curves over the forward ops, of which the costs of every pipeline stage are differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from costmodels.context import per_op
from costmodels.ops import price_many
from opgraph.graph import Tensor
from planner.group_prices import quickest
from planner.host_thread import host_costs
from planner.layout import propagate
from planner.op_costs import host_seconds, op_seconds
from planner.plan import ParallelPlan
from planner.script import copy_work
from planner.step_costs import StepCosts, uses_of

Floats = NDArray[np.float64]

@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Per forward op: what runs or lives with it, at one micro-batch size and one tensor-parallel layout.

    forward, backward: seconds, host time and tensor-parallel messages among them; cold f8[2, n]: what of these emptied
    caches cost; moved f8[2, n]: bytes that ops move; messages f8[2, n]: these of forward and backward. host f8[2, n]:
    seconds in which a host thread issues them; least_host: the least.
    params: bytes of parameters; trained: of those that get gradients, which are `tensors` in number.
    bytes: of every storage. reads: bytes of the smallest view of a storage that forward reads.
    """

    forward: Floats
    backward: Floats
    cold: Floats
    moved: Floats
    messages: Floats
    demand: float
    copies: Floats
    sums: Floats
    transient: Floats
    params: Floats
    trained: Floats
    tensors: Floats
    held: Floats
    bytes: Floats
    reads: Floats
    host: Floats
    least_host: Floats


def curves(costs: StepCosts, plan: ParallelPlan) -> Curves:
    """Curves of the plan's micro-batch and shardings; the same object for plans that share them."""
    inside = costs.cluster.devices_per_node % plan.tp == 0  # then groups of one stage share nothing
    key = ("curves", plan.micro_batch, 1 if inside else plan.dp, plan.tp, plan.shardings)
    if key not in costs.cache:
        costs.cache[key] = _curves(costs, plan)
    found: Curves = costs.cache[key]
    return found


def _curves(costs: StepCosts, plan: ParallelPlan) -> Curves:
    graph, n, place = costs.graph, costs.forward_ops, costs.place
    layout = propagate(graph, plan)
    seconds, hot, traffic = op_seconds(costs, layout, plan.micro_batch)
    after = np.array([op.phase not in ("forward", "optimizer") for op in graph.ops])
    before = np.arange(len(graph.ops)) < n
    (messages, sends), demand = np.zeros((2, 2, n)), 1.0
    issue, least = host_seconds(costs, layout)
    thread = host_costs(costs.cluster, costs.running)
    step = plan.micro_batch - graph.batch
    for reduction in layout.reductions:
        nbytes = float(_at(graph.tensors[reduction.tensor], step).bytes)
        price = quickest(costs.cluster, plan, "tp", "all_reduce", nbytes)
        messages[int(reduction.after >= n), place[reduction.after]] += price.seconds
        sends[int(reduction.after >= n), place[reduction.after]] += thread.message if thread else 0.0
        demand = min(demand, price.demand)
    whole = {graph.tensors[i].storage for i, p in enumerate(layout.placements) if p >= 0}
    sizes = [max(0, s.bytes + step * s.bytes_per_batch) / (plan.tp if s.id in whole else 1) for s in graph.storages]
    nbytes_of = np.array(sizes, float)
    params, trained, tensors, held, copies, sums = np.zeros((6, n))
    uses, _ = uses_of(costs)
    learning = {graph.parameters[name].storage for name, _ in graph.gradient_ops}
    for s in graph.storages:
        if s.role in ("parameter", "buffer") and s.id in uses:
            at = uses[s.id][0]
            (params if s.role == "parameter" else held)[at] += nbytes_of[s.id]
            if s.id in learning:
                trained[at] += nbytes_of[s.id]
                moved, added = _runtime_copies(costs, nbytes_of[s.id])
                copies[at], sums[at], tensors[at] = copies[at] + moved, sums[at] + added, tensors[at] + 1
    reads = nbytes_of.copy()
    for t in {i for op in graph.ops[:n] for i in op.inputs}:
        tensor = _at(graph.tensors[t], step)
        reads[tensor.storage] = min(reads[tensor.storage], tensor.bytes)

    def along(which: NDArray[np.bool_], weights: Floats = seconds) -> Floats:
        return np.bincount(place[which], weights=weights[which], minlength=n)[:n].astype(np.float64)

    host, least_host = (np.array([along(w, x) for w in (before, after)]) + sends for x in (issue, least))
    cold, traffic = (np.array([along(w, x) for w in (before, after)]) for x in (seconds - hot, traffic))
    return Curves(
        along(before) + messages[0], along(after) + messages[1], cold, traffic, messages, demand, copies, sums,
        _transient(costs, nbytes_of), params, trained, tensors, held, nbytes_of, reads, host, least_host,
    )  # fmt: skip


def _runtime_copies(costs: StepCosts, nbytes: float) -> tuple[float, float]:
    """Seconds of copying a float32 gradient of `nbytes` into and out of a bucket, and of adding it to another."""
    elements, device = round(nbytes / 4), costs.cluster.device
    names = ("aten.mul.out", "aten.copy_.default", "aten.add_.Tensor")
    shapes = [copy_work(name, elements, "float32", "backward", "").shape for name in names]
    mul, copy, add = (p.seconds + per_op(device, "backward") for p in price_many(device, shapes))
    return mul + copy, add


def _transient(costs: StepCosts, nbytes: Floats) -> Floats:
    """Per forward op: most bytes of tensors that neither backward nor the optimizer waits for, while it or its backward
    runs."""
    graph, n = costs.graph, costs.forward_ops
    if "short" not in costs.cache:
        end = next((op.id for op in graph.ops if op.phase == "optimizer"), len(graph.ops))
        rows = [s for s in graph.storages if s.birth >= 0 and s.death < (n if s.birth < n else end)]
        costs.cache["short"] = tuple(np.array([getattr(s, f) for s in rows], int) for f in ("id", "birth", "death"))
    ids, born, death = costs.cache["short"]
    live = np.zeros(len(graph.ops) + 1)
    np.add.at(live, born, nbytes[ids])
    np.add.at(live, np.maximum(death, born) + 1, -nbytes[ids])
    most = np.zeros(n)
    np.maximum.at(most, costs.place, np.cumsum(live)[:-1])
    return most


def _at(t: Tensor, step: int) -> Tensor:
    """The tensor with `step` more samples; only its bytes are right."""
    if not any(t.per_batch):
        return t
    return replace(t, shape=tuple(max(0, a + b * step) for a, b in zip(t.shape, t.per_batch)))
