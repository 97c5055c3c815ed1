"""Do blocks 1 and 2 of the short graph do the same? (for `opgraph.unfold`)"""

from __future__ import annotations

from typing import Any

from opgraph.graph import Op, OpGraph, Ref, Tensor
from opgraph.segments import BlockOf, Renamed, Things, need


def check(
    graph: OpGraph, ops: Things, tensors: Things, storages: Things, block_of: BlockOf, renamed: Renamed
) -> None:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Ref) and isinstance(b, Ref):
            return tensors.same(a.tensor, b.tensor)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
        return type(a) is type(b) and bool(a == b)

    def together(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return len(a) == len(b) and all(tensors.same(x, y) for x, y in zip(a, b))

    def moments(a: int, b: int) -> bool:
        ends = (-1, len(graph.ops))
        return a == b if a in ends or b in ends else ops.same(a, b)

    for op in graph.ops:
        block, owner = block_of(op.module), ops.owner[op.id]
        need(block is None or block == owner, f"op {op.id} of a block runs elsewhere")
    for i, j in ops.pair():
        a, b = graph.ops[i], graph.ops[j]
        need(_facts(a) == _facts(b), f"op {i} is not like op {j}")
        need(a.module == b.module or renamed(a.module, 1) == b.module, f"op {i} is of another module than op {j}")
        need(together(a.inputs, b.inputs) and together(a.outputs, b.outputs), f"op {i} has other tensors than op {j}")
        need(together(a.mutates, b.mutates) and moments(a.forward, b.forward), f"op {i} has other links than op {j}")
        need(alike(a.args, b.args) and alike(a.kwargs, b.kwargs), f"op {i} has other arguments than op {j}")
    for i, j in tensors.pair():
        s, t = graph.tensors[i], graph.tensors[j]
        need(renamed(s.name, 1) == t.name, f"tensor {i} is named unlike {j}")
        need(_look(s) == _look(t) and storages.same(s.storage, t.storage), f"tensor {i} is not like tensor {j}")
    for i, j in storages.pair():
        p, q = graph.storages[i], graph.storages[j]
        need((p.bytes, p.bytes_per_batch, p.role) == (q.bytes, q.bytes_per_batch, q.role), "storages differ")
        need(moments(p.birth, q.birth) and moments(p.death, q.death), f"storage {i} does not live like storage {j}")


def _facts(op: Op) -> tuple[Any, ...]:
    return op.name, op.phase, op.flops, op.is_view, op.flops_per_batch, op.args_per_batch


def _look(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.strides, t.dtype, t.role, t.per_batch, t.strides_per_batch
