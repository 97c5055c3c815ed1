"""How the tensors of a pipeline stage lie in memory where that differs from the traced step: what a stage receives is
contiguous, however the stage before had it (process groups send nothing else), and ops carry that on."""

from __future__ import annotations

from typing import Any

from opgraph.graph import Op, Ref
from planner.runtime_stage import Stage
from planner.script import tensor_shape, tensor_strides

Strides = tuple[int, ...]


def stage_strides(stage: Stage) -> dict[int, Strides]:
    """Strides, in elements, of those tensors of a stage that lie otherwise than in the traced step."""
    if stage.plan.pp == 1:
        return {}
    found: dict[int, Strides] = {}
    made: set[int] = set()
    for op in (*stage.ops.forward, *stage.ops.backward):
        for t in op.inputs:
            tensor = stage.graph.tensors[t]
            if t not in made and tensor.role in ("activation", "gradient") and t not in found:
                contiguous = _contiguous_strides(tensor_shape(stage.graph, stage.layout, t))
                if contiguous != tensor_strides(stage.graph, stage.layout, t):
                    found[t] = contiguous
            made.add(t)
        made.update(op.outputs)
        if any(t in found for t in op.inputs):
            found.update(_carried_on(stage, op, found))
    return found


def _contiguous_strides(shape: tuple[int, ...]) -> Strides:
    strides, running = list[int](), 1
    for n in reversed(shape):
        strides.append(running)
        running *= max(1, n)
    return tuple(reversed(strides))


def _carried_on(stage: Stage, op: Op, known: dict[int, Strides]) -> dict[int, Strides]:
    """Output strides of an op whose inputs lie otherwise, as torch's shape functions give them; none where the op does
    not run so (a view of what is contiguous no more)."""
    import torch
    from torch.utils._pytree import tree_leaves

    graph, layout = stage.graph, stage.layout
    try:
        args = _replayed(op.args, stage, known)
        kwargs = {k: _replayed(v, stage, known) for k, v in op.kwargs}
        if "device" in kwargs:
            kwargs["device"] = "meta"
        namespace, name, overload = op.name.split(".")
        result = getattr(getattr(getattr(torch.ops, namespace), name), overload)(*args, **kwargs)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError):
        return {}
    tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    if op.mutates or len(tensors) != len(op.outputs):
        return {}
    return {
        t: tuple(r.stride())
        for t, r in zip(op.outputs, tensors)
        if tuple(r.stride()) != tensor_strides(graph, layout, t)
    }


def _replayed(value: Any, stage: Stage, known: dict[int, Strides]) -> Any:
    """An op's recorded argument with meta tensors for references."""
    import torch

    if isinstance(value, Ref):
        t = value.tensor
        shape = tensor_shape(stage.graph, stage.layout, t)
        strides = known.get(t) or tensor_strides(stage.graph, stage.layout, t)
        dtype = getattr(torch, stage.graph.tensors[t].dtype)
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if isinstance(value, tuple):
        return [_replayed(v, stage, known) for v in value]
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value
