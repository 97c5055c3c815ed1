"""Tensor parallelism of a whole step: placements of every tensor, and the messages that torch's runtime sends.

`parallelize_module` makes a sharded Linear a DTensor island: at its border partial sums become whole. So a rowwise
output is all-reduced when forward leaves the module, and the gradient of a colwise input when backward leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opgraph.graph import Op, OpGraph
from planner.plan import ParallelPlan
from planner.rules import PARTIAL, REPLICATE, Placed, ShardingError, local_shape, place


@dataclass(frozen=True, slots=True)
class Reduction:
    """An all-reduce over the tensor-parallel axis: after op `after`, of tensor `tensor`."""

    after: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Layout:
    """placements: of every tensor of the graph, by id. reductions: in the order in which the step sends them."""

    parts: int
    placements: tuple[int, ...]
    reductions: tuple[Reduction, ...]


def propagate(graph: OpGraph, plan: ParallelPlan) -> Layout:
    """Placements under the plan's shardings. Raises ShardingError, naming op and module, where they are not legal."""
    placements = [REPLICATE] * len(graph.tensors)
    if plan.tp == 1:
        return Layout(1, tuple(placements), ())
    style = plan.style
    _place_parameters(graph, plan, placements)
    reductions: list[Reduction] = []
    islands: set[int] = set()  # storages that left a DTensor island: autograd forbids changing them in place
    for run in _runs(graph):
        for op in run:
            if op.phase != "optimizer":
                _place_op(graph, op, placements, plan.tp)
                _check_in_place(graph, op, islands)
        if run[0].module in style and not accumulates(run[0]):
            _reduce_border(graph, run, placements, reductions)
            if run[0].phase == "forward":
                islands.add(graph.tensors[(run[-1].outputs or run[-1].mutates)[0]].storage)
        else:
            _no_partials(graph, run, placements)
    for name, tensor in graph.parameters.items():
        _check_gradient(graph, name, placements[tensor.id], placements)
    return Layout(plan.tp, tuple(placements), tuple(reductions))


def _place_parameters(graph: OpGraph, plan: ParallelPlan, placements: list[int]) -> None:
    style = plan.style
    tables = {graph.tensors[op.inputs[0]].storage for op in graph.ops if op.name == "aten.embedding.default"}
    by_module: dict[str, list[str]] = {}
    for name in graph.parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for path in style:
        if path not in by_module:
            raise ShardingError(f"sharding {path!r} names no module with parameters of {graph.name}")
        for name in by_module[path]:
            tensor = graph.parameters[name]
            if style[path] == "rowwise" and tensor.storage not in tables:
                placement = 1 if len(tensor.shape) == 2 else REPLICATE
            else:  # a Linear's columns, an embedding's rows
                placement = 0
            try:
                local_shape(tensor.shape, placement, plan.tp)
            except ShardingError as error:
                raise ShardingError(f"{style[path]} sharding of {path!r} with tp = {plan.tp}: {error}") from None
            placements[tensor.id] = placement
    # every view of the same storage that looks the same is the same parameter
    same = {(t.storage, t.shape, t.strides): placements[t.id] for t in graph.parameters.values()}
    for t in graph.tensors:
        if t.role == "parameter":
            placements[t.id] = same.get((t.storage, t.shape, t.strides), placements[t.id])


def _runs(graph: OpGraph) -> list[list[Op]]:
    """Consecutive ops of one module and phase. Autograd adds up the gradients of a value that several modules read
    after it has left each of them, so such an `add` belongs to no module."""
    runs: list[list[Op]] = []
    last: tuple[str, str, bool] | None = None
    for op in graph.ops:
        key = (op.module, op.phase, accumulates(op))
        if key == last:
            runs[-1].append(op)
        else:
            runs.append([op])
        last = key
    return runs


def accumulates(op: Op) -> bool:
    """Whether autograd's engine makes this `add` to sum the gradients of one value."""
    return op.phase == "backward" and op.name == "aten.add.Tensor" and len(op.inputs) == 2


def adds_bias(graph: OpGraph, op: Op) -> bool:
    """Whether a forward op adds the bias of its Linear to the product, as torch does apart from it where the rows of
    the input do not lie side by side (sequences whose samples are not the outer dim)."""
    bias = graph.parameters.get(f"{op.module}.bias")
    if op.phase != "forward" or op.name != "aten.add.Tensor" or len(op.inputs) != 2 or bias is None:
        return False
    return graph.tensors[op.inputs[1]].shape == bias.shape and len(graph.tensors[op.inputs[0]].shape) > 1


def _place_op(graph: OpGraph, op: Op, placements: list[int], parts: int) -> None:
    ins: list[Placed] = [(graph.tensors[t].shape, placements[t]) for t in op.inputs]
    outs = [t for t in op.outputs if t not in op.inputs]
    try:
        found = place(op.name, ins, [graph.tensors[t].shape for t in outs], op.args, parts)
        for t, placement in zip(outs, found):
            local_shape(graph.tensors[t].shape, placement, parts)
            placements[t] = placement
    except ShardingError as error:
        raise ShardingError(f"tensor parallelism does not reach through '{op.module}' ({op.phase}): {error}") from None


def _check_in_place(graph: OpGraph, op: Op, islands: set[int]) -> None:
    if op.phase == "forward" and any(graph.tensors[t].storage in islands for t in op.mutates):
        raise ShardingError(
            f"'{op.module}' changes the output of a sharded module in place ({op.name}), which autograd forbids; "
            "make it out of place (inplace=False)"
        )


def _reduce_border(graph: OpGraph, run: list[Op], placements: list[int], reductions: list[Reduction]) -> None:
    """All-reduces what leaves a sharded module as partial sums: the last view of each such value."""
    partial: dict[int, int] = {}
    for op in run:
        for t in op.outputs:
            if placements[t] == PARTIAL:
                partial[graph.tensors[t].storage] = t
    cast = {  # autocast's backward casts partial sums inside the island: only what it makes of them leaves
        graph.tensors[t].storage for op in run if not op.is_view for t in op.inputs
        if placements[t] == PARTIAL and any(placements[made] == PARTIAL for made in op.outputs)
    }  # fmt: skip
    reductions.extend(Reduction(run[-1].id, tensor) for storage, tensor in partial.items() if storage not in cast)
    reduced = set(partial)
    for op in run:
        for t in op.outputs:
            if graph.tensors[t].storage in reduced and placements[t] == PARTIAL:
                placements[t] = REPLICATE


def _no_partials(graph: OpGraph, run: list[Op], placements: list[int]) -> None:
    for op in run:
        for t in op.outputs:
            if placements[t] == PARTIAL:
                raise ShardingError(
                    f"'{op.module}' ({op.phase}) would leave {op.name} as partial sums, which no sharded module reduces"
                )


def _check_gradient(graph: OpGraph, name: str, placement: int, placements: list[int]) -> None:
    last = dict(graph.gradient_ops).get(name)
    if last is None or graph.ops[last].phase != "backward":
        return
    for t in graph.ops[last].inputs[:1]:
        if placements[t] != placement and graph.tensors[t].shape == graph.parameters[name].shape:
            raise ShardingError(f"the gradient of {name} lies differently from the parameter")
