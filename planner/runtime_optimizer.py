"""The optimizer's ops on the parameters that one rank updates, and in fp16 the pass that unscales gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, prod
from typing import Any

from costmodels.families import base_name
from costmodels.ops import OpShape
from opgraph.graph import DTYPE_BYTES, Op, OpGraph, Ref
from planner.plan import ParallelPlan
from planner.runtime_data import LocalParameter
from planner.script import Work

UNSCALE = "_amp_foreach_non_finite_check_and_unscale"


def scaling_axes(plan: ParallelPlan) -> tuple[str, ...]:
    """Axes along which ranks hold different gradients, and so tell each other in fp16 whether any has overflowed."""
    differ = {"tp": plan.tp > 1, "dp": plan.fully_sharded, "pp": plan.pp > 1}
    return tuple(axis for axis, there in differ.items() if there and plan.precision == "fp16")


def optimizer_work(
    graph: OpGraph, plan: ParallelPlan, mine: dict[str, LocalParameter], shard: int | None, unscales: bool = False
) -> Iterator[Work]:
    """The traced optimizer ops, restricted to the parameters `mine`; at the size of FSDP's shard `shard` of dim 0.
    unscales: those that come before the optimizer's own, in fp16, in place of them."""
    owners = _owners(graph)
    shares = {name: _share(plan, p, shard) for name, p in mine.items()}
    for op in graph.ops:
        if op.phase == "optimizer" and (base_name(op.name) == UNSCALE) == unscales:
            work = _restricted(graph, op, owners, shares)
            if work is not None:
                yield work


def _share(plan: ParallelPlan, p: LocalParameter, shard: int | None) -> tuple[int, ...]:
    """The shape of a shard of dim 0, as torch.chunk cuts it: the last ones may be smaller, or empty."""
    if shard is None or not p.shape:
        return p.shape
    rows = ceil(p.shape[0] / plan.dp)
    return (max(0, min(rows, p.shape[0] - shard * rows)), *p.shape[1:])


def _owners(graph: OpGraph) -> dict[int, str]:
    """Storage -> parameter that it belongs to: itself, its gradient, its optimizer state."""
    by_storage = {}
    for t in graph.tensors:
        if t.role in ("parameter", "optimizer_state") and t.name:
            by_storage[t.storage] = t.name
    for name, op in graph.gradient_ops:
        for tensor in graph.ops[op].outputs or graph.ops[op].inputs:
            by_storage.setdefault(graph.tensors[tensor].storage, name)
    return by_storage


def _restricted(graph: OpGraph, op: Op, owners: dict[int, str], shares: dict[str, tuple[int, ...]]) -> Work | None:
    lists = _tensor_lists(op.args)
    names = _names(graph, lists, owners)
    ins: list[tuple[int, ...]] = []
    outs: list[tuple[int, ...]] = []
    read = written = 0
    dtype = "float32"
    changed = set(op.mutates)
    for tensors in lists:
        for i, t in enumerate(tensors):
            name = names.get((len(tensors), i)) or owners.get(graph.tensors[t].storage, "")
            if name and name not in shares:
                continue
            tensor = graph.tensors[t]
            divided = name and tensor.numel > 1 and tensor.shape == graph.parameters[name].shape
            shape = shares[name] if divided else tensor.shape
            size = prod(shape) * DTYPE_BYTES[tensor.dtype]
            ins.append(shape)
            read += size
            dtype = tensor.dtype if tensor.numel > 1 else dtype
            if t in changed:
                written += size
    if not ins:
        return None
    for t in op.outputs:
        outs.append(graph.tensors[t].shape)
        written += graph.tensors[t].bytes
    whole = OpShape(op.name, "optimizer", tuple(ins), tuple(outs), dtype, 0, read, written)
    return Work(whole, "optimizer", op.module, op.is_view, op.id)


def _tensor_lists(args: Sequence[Any]) -> list[list[int]]:
    """The tensor arguments; the i-th entries of lists of one length belong to one parameter."""
    lists: list[list[int]] = []
    for arg in args:
        if isinstance(arg, Ref):
            lists.append([arg.tensor])
        elif isinstance(arg, tuple) and arg and all(isinstance(a, Ref) for a in arg):
            lists.append([a.tensor for a in arg])
    return lists


def _names(graph: OpGraph, lists: list[list[int]], owners: dict[int, str]) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    for tensors in lists:
        for i, t in enumerate(tensors):
            name = owners.get(graph.tensors[t].storage)
            if name:
                found.setdefault((len(tensors), i), name)
    return found
