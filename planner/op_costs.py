"""Seconds of every op at the local shapes of one rank, equal ops priced once; seconds of optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.context import per_op, price_with_host
from costmodels.features import BYTES, FORMS, features, touched
from costmodels.ops import OpShape, law_of, price_many, roofline_seconds, shape_of, variant_of
from opgraph.flops import flops_of
from opgraph.graph import Op, OpGraph, Ref, Tensor
from planner.compiled import vanishes
from planner.host_thread import host_costs
from planner.host_thread import op_seconds as issue_seconds
from planner.layout import Layout, accumulates
from planner.script import copies_nothing, local_strides
from planner.step_costs import StepCosts, varying_storages

Floats = NDArray[np.float64]
VIEW, LEFT_OUT = -1, -2

def op_seconds(costs: StepCosts, layout: Layout, batch: int) -> tuple[Floats, Floats, Floats]:
    """Seconds of every op but the optimizer's at the local shapes of one rank, in the order of the trace, what each
    takes at least, whatever runs before it, and the bytes that it moves. Views cost their host time only."""
    compact, placed, kind = _classes(costs, layout)
    at = compact.at_batch(batch)
    tensors = tuple(_local(t, p, layout.parts) for t, p in zip(at.tensors, placed))
    ops = at.ops
    if layout.parts > 1:
        ops = tuple(_with_flops(op, tensors) for op in at.ops)
    at = replace(at, tensors=tensors, ops=ops)
    device = costs.cluster.device
    shapes = [shape_of(at, op) for op in at.ops]
    phases = [op.phase for op in costs.graph.ops]
    fewest = np.array([per_op(device, phase) for phase in phases])
    own = fewest.copy()
    least = np.array([p.seconds for p in price_many(device, shapes)] + [0.0, 0.0])[kind]
    moved = np.array([float(touched(shape)) for shape in shapes] + [0.0, 0.0])[kind]
    seconds = least
    if device.laws:
        seconds, priced = np.zeros(len(kind)), np.flatnonzero(kind >= 0)
        prices, beside = price_with_host(device, [shapes[k] for k in kind[priced]], [phases[i] for i in priced])
        seconds[priced], own[priced] = [p.seconds for p in prices], beside
    if costs.running.compiled:  # what is fused is left out: a bound, and an estimate of what no fusion changes
        kept = np.array([not vanishes(op.name) for op in costs.graph.ops])
        seconds, least, own, fewest = seconds * kept, least * kept, own * kept, fewest * kept
    usual, hot = (np.where(kind == LEFT_OUT, 0.0, x) for x in (seconds + own, least + fewest))
    return usual, hot, moved


def host_seconds(costs: StepCosts, layout: Layout) -> tuple[Floats, Floats]:
    """Seconds that the host thread pays to issue every op but the optimizer's, with entering modules: as the trace
    enters them, and once a module and phase, which is the least. Zeros where prices contain the host."""
    found, least = np.zeros((2, len(costs.graph.ops)))
    host = host_costs(costs.cluster, costs.running)
    if host is None:
        return found, least
    _, _, kind = _classes(costs, layout)
    before, seen = "", set[tuple[str, str]]()
    for op in costs.graph.ops:
        if kind[op.id] != LEFT_OUT:
            fused = costs.running.compiled and vanishes(op.name)
            issue = 0.0 if fused else issue_seconds(host, op.name, op.phase, op.is_view)
            found[op.id] = issue + host.module * (op.module != before)
            least[op.id] = issue + host.module * ((op.phase, op.module) not in seen)
            seen.add((op.phase, op.module))
            before = op.module
    return found, least


def _with_flops(op: Op, tensors: tuple[Tensor, ...]) -> Op:
    if not op.flops:
        return op
    ins, outs = ([tensors[i] for i in side] for side in (op.inputs, op.outputs))
    return replace(op, flops=flops_of(op.name, ins, outs or ins, op))


def _local(t: Tensor, placement: int, parts: int) -> Tensor:
    """The part of a tensor that one of `parts` ranks holds; strides of dims outside the split one shrink with it."""
    if placement < 0 or parts == 1:
        return t
    shape = tuple(n // parts if d == placement else n for d, n in enumerate(t.shape))
    return replace(t, shape=shape, strides=tuple(local_strides(t.shape, t.strides, shape)))


def _classes(costs: StepCosts, layout: Layout) -> tuple[OpGraph, tuple[int, ...], NDArray[np.int64]]:
    """A graph of one op per class of equal ops, placements of its tensors, and the class of every op: VIEW costs its
    host time only, LEFT_OUT nothing."""
    key = ("classes", layout)
    if key in costs.cache:
        found: tuple[OpGraph, tuple[int, ...], NDArray[np.int64]] = costs.cache[key]
        return found
    graph = costs.graph
    looks: dict[Any, int] = {}
    look = [
        looks.setdefault((t.shape, t.per_batch, t.strides, t.dtype, p), len(looks))
        for t, p in zip(graph.tensors, layout.placements)
    ]
    numbers: dict[Any, int] = {}
    kind = np.full(len(graph.ops), LEFT_OUT, np.int64)
    ops, tensors, placed = list[Op](), list[Tensor](), list[int]()
    free = _uncertain(costs)
    for op in graph.ops:
        if op.phase == "optimizer" or op.id in free or copies_nothing(graph, layout, op):
            continue
        if op.is_view:
            kind[op.id] = VIEW
            continue
        ids = (*op.inputs, *op.outputs, *op.mutates)
        like = (
            op.name, op.phase, len(op.inputs), len(op.outputs), tuple(look[i] for i in ids),
            tuple(ids.index(i) for i in ids), _plain(op.args) if op.flops else (),
            variant_of(op.name, op.args, op.kwargs),
        )  # fmt: skip
        kind[op.id] = numbers.setdefault(like, len(numbers))
        if kind[op.id] == len(ops):
            new = {i: len(tensors) + k for k, i in enumerate(dict.fromkeys(ids))}
            tensors += [replace(graph.tensors[i], id=j) for i, j in new.items()]
            placed += [layout.placements[i] for i in new]
            sides = ([new[i] for i in side] for side in (op.inputs, op.outputs, op.mutates))
            ins, outs, mutated = map(tuple, sides)
            ops.append(replace(op, id=len(ops), inputs=ins, outputs=outs, mutates=mutated))
    compact = replace(graph, ops=tuple(ops), tensors=tuple(tensors), storages=(), gradient_ops=())
    costs.cache[key] = compact, tuple(placed), kind
    return costs.cache[key][0], costs.cache[key][1], costs.cache[key][2]


def _uncertain(costs: StepCosts) -> set[int]:
    """Ops that a stage may not run: forward ops on constants (other stages repeat them), and sums of a parameter's
    gradients (messages where the uses lie in different stages)."""
    graph, varying = costs.graph, varying_storages(costs)
    shapes = {t.shape for t in graph.parameters.values()}
    constant = {
        op.id
        for op in graph.ops[: costs.forward_ops]
        if not varying & {graph.tensors[t].storage for t in (*op.inputs, *op.outputs)}
    }
    sums = {op.id for op in graph.ops if accumulates(op) and graph.tensors[op.outputs[0]].shape in shapes}
    return constant | sums


def _plain(value: Any) -> Any:
    """Arguments without the tensors among them."""
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return None if isinstance(value, Ref) else value


def optimizer_seconds(costs: StepCosts, nbytes: Floats) -> Floats:
    """The least seconds of an optimizer step on `nbytes` of parameters: its ops at that share of their bytes."""
    return np.array([_optimizer(costs, float(n)) for n in nbytes])


def _optimizer(costs: StepCosts, nbytes: float) -> float:
    key = ("optimizer", nbytes)
    if key not in costs.cache:
        graph = costs.graph
        whole = sum(s.bytes for s in graph.storages if s.role == "parameter")
        shapes = [shape_of(graph, op) for op in graph.ops if op.phase == "optimizer" and not op.is_view]
        share = nbytes / whole if whole else 0.0
        if share >= 1:
            costs.cache[key] = sum(p.seconds for p in price_many(costs.cluster.device, shapes))
        else:
            costs.cache[key] = sum(_scaled(costs, s, share) for s in shapes) if share else 0.0
    return float(costs.cache[key])


def _scaled(costs: StepCosts, shape: OpShape, share: float) -> float:
    """Seconds of an op on a share of its tensors, however many of them that are: bytes only."""
    device = costs.cluster.device
    part = replace(shape, bytes_read=int(share * shape.bytes_read), bytes_written=int(share * shape.bytes_written))
    law = law_of(device, shape)
    if law is None:
        whole = price_many(device, [shape])[0]
        # Kernel laws go by shapes: no part costs less than its share of the whole, because every op has a floor.
        return roofline_seconds(device, part) if whole.source == "roofline" else share * whole.seconds
    return sum(
        c * f
        for name, c, f in zip(FORMS[law.form], law.coefficients, features(part, law.form))
        if name == "one" or name.startswith(BYTES)
    )
