"""Finds what can be sharded: Megatron pairs of Linear modules, from the dataflow of any traced graph.

A Linear can be split by rows if what it reads comes, through ops that work on parts, from Linears that can be split
by columns. Nothing here knows attention or MLPs: q, k, v before an output projection, gate and up before down, and
one fully connected layer before another are found by the same walk.
"""

from __future__ import annotations

from dataclasses import replace

from opgraph.graph import Op, OpGraph
from planner.layout import adds_bias, propagate
from planner.plan import ParallelPlan, Sharding
from planner.rules import REPLICATE, Placed, ShardingError, local_shape, place

LONGEST_WALK = 400  # ops between two Linears; a walk that grows longer has left the block


def tp_shardings(graph: OpGraph, tp: int) -> tuple[tuple[str, Sharding], ...]:
    """All colwise/rowwise pairs that are legal for this graph and degree, in execution order; empty if none.

    A Linear takes part in one pair only: the first found in execution order.
    """
    linears = _linears(graph)
    producer = {t: op for op in graph.ops if op.phase == "forward" for t in op.outputs if t not in op.inputs}
    owner = {linears[path][1]: path for path in linears}
    users = _users(graph)
    style: dict[str, Sharding] = {}
    for path, (source, _) in linears.items():
        columns = _columns(graph, path, source, producer, owner, style, tp, users)
        if columns:
            style.update(dict.fromkeys(columns, "colwise"))
            style[path] = "rowwise"
    return _legal(graph, tuple((p, style[p]) for p in linears if p in style), tp)


def explain_no_shardings(graph: OpGraph, tp: int) -> str:
    """Why `tp_shardings` found nothing, in one sentence."""
    linears = _linears(graph)
    if len(linears) < 2:
        return (
            "a tensor-parallel pair needs two Linear modules inside the model, each called once and with a weight of "
            f"its own, and the model has {'one' if linears else 'none'}"
        )
    return f"no pair of the {len(linears)} Linear modules works on {tp} equal parts of what lies between them"


def _linears(graph: OpGraph) -> dict[str, tuple[int, int]]:
    """Module path -> (tensor it reads, tensor it returns) of the modules that are a Linear called once."""
    weights = {n.rpartition(".")[0] for n, t in graph.parameters.items() if n.endswith(".weight") and len(t.shape) == 2}
    calls: dict[str, list[Op]] = {}
    for op in graph.ops:
        if op.phase == "forward" and op.module in weights:
            calls.setdefault(op.module, []).append(op)
    found = {}
    for path, ops in calls.items():
        products = [op for op in ops if op.name.split(".")[1] in ("mm", "addmm")]
        if len(products) == 1 and all(_moves(op) or op is products[0] or adds_bias(graph, op) for op in ops):
            reads = products[0].inputs[-2]
            found[path] = (_first_read(ops, reads), ops[-1].outputs[0])
    return found


def _moves(op: Op) -> bool:
    """A view, a cast, as autocast puts before each product, or the copy that puts rows side by side."""
    return op.is_view or op.name in ("aten._to_copy.default", "aten.clone.default")


def _first_read(ops: list[Op], tensor: int) -> int:
    """Follows views and casts inside the module back to what it was called with."""
    for op in reversed(ops):
        if _moves(op) and tensor in op.outputs:
            tensor = op.inputs[0]
    return tensor


def _users(graph: OpGraph) -> dict[int, list[Op]]:
    users: dict[int, list[Op]] = {}
    for op in graph.ops:
        if op.phase == "forward":
            for t in op.inputs:
                users.setdefault(t, []).append(op)
    return users


def _columns(
    graph: OpGraph,
    path: str,
    source: int,
    producer: dict[int, Op],
    owner: dict[int, str],
    taken: dict[str, Sharding],
    tp: int,
    users: dict[int, list[Op]],
) -> tuple[str, ...]:
    """The Linears that must be split by columns so that `path` can be split by rows; empty where that cannot be."""
    region: dict[int, Op] = {}
    columns: dict[str, int] = {}
    pending, seen = [source], set()
    while pending:
        tensor = pending.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if tensor in owner:
            if owner[tensor] in taken:
                return ()
            columns[owner[tensor]] = tensor
            continue
        op = producer.get(tensor)
        if op is None:
            continue
        region[op.id] = op
        if len(region) > LONGEST_WALK:
            return ()
        pending.extend(op.inputs)
    if not columns or not _carries(graph, sorted(region.values(), key=lambda o: o.id), columns, source, tp):
        return ()
    inside = set(region) | {op.id for op in graph.ops if op.module == path and op.phase == "forward"}
    outside = (op for t in columns.values() for op in users.get(t, []) if op.id not in inside)
    return () if any(not _harmless(op, users) for op in outside) else tuple(columns)


def _harmless(op: Op, users: dict[int, list[Op]]) -> bool:
    """A view of a column output that only autograd keeps."""
    return op.is_view and not any(users.get(t) for t in op.outputs if t not in op.inputs)


def _carries(graph: OpGraph, region: list[Op], columns: dict[str, int], source: int, tp: int) -> bool:
    """Whether column parts of `columns` arrive at `source` as parts of its last dim."""
    placed = {t: len(graph.tensors[t].shape) - 1 for t in columns.values()}
    try:
        for t, dim in placed.items():
            local_shape(graph.tensors[t].shape, dim, tp)
        for op in region:
            ins: list[Placed] = [(graph.tensors[t].shape, placed.get(t, REPLICATE)) for t in op.inputs]
            outs = [t for t in op.outputs if t not in placed]
            for t, p in zip(outs, place(op.name, ins, [graph.tensors[t].shape for t in outs], op.args, tp)):
                local_shape(graph.tensors[t].shape, p, tp)
                placed[t] = p
    except ShardingError:
        return False
    return placed.get(source, REPLICATE) == len(graph.tensors[source].shape) - 1


def _legal(graph: OpGraph, shardings: tuple[tuple[str, Sharding], ...], tp: int) -> tuple[tuple[str, Sharding], ...]:
    """The pairs that the whole step (backward too) accepts: all of them, or those that work one pair at a time."""
    if not shardings:
        return ()
    plan = ParallelPlan(global_batch=1, tp=tp, shardings=shardings)
    try:
        propagate(graph, plan)
        return shardings
    except ShardingError:
        kept: tuple[tuple[str, Sharding], ...] = ()
        for end in (i for i, (_, s) in enumerate(shardings) if s == "rowwise"):
            start = max((i + 1 for i, (_, s) in enumerate(shardings[:end]) if s == "rowwise"), default=0)
            pair = shardings[start : end + 1]
            try:
                propagate(graph, replace(plan, shardings=(*kept, *pair)))
                kept = (*kept, *pair)
            except ShardingError:
                continue
        return kept
