"""Which ops and parameters each pipeline stage has."""

from __future__ import annotations

from dataclasses import dataclass

from opgraph.graph import Op, OpGraph
from planner.layout import accumulates

LOSS = "<loss>"  # the module path that the tracer gives to what runs outside the model
OWN_CHECKPOINTS = (
    "the model checkpoints itself, which stages made of its modules lose; leave its checkpoints out and add recompute "
    "to the plan"
)


@dataclass(frozen=True, slots=True)
class StageOps:
    """One stage of the traced step, in execution order. `parameters` in the order of the model; `sends` the forward
    tensors that it hands to the next stage, its own and those that it passes on."""

    index: int
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    parameters: tuple[str, ...]
    sends: tuple[int, ...]


def within(module: str, path: str) -> bool:
    """Whether `module` is `path` or lies inside it."""
    return module == path or module.startswith(path + ".") or path == ""


def stage_ops(graph: OpGraph, cuts: tuple[str, ...]) -> tuple[StageOps, ...]:
    """The stages that begin at the module paths `cuts`. ValueError for a cut that forward never reaches, in order."""
    if cuts and recomputes(graph):
        raise ValueError(f"no pipeline: {OWN_CHECKPOINTS}")
    stage_of = _forward_stages(graph, cuts)
    count = len(cuts) + 1
    forward: list[list[Op]] = [[] for _ in range(count)]
    constants, needs = _constants(graph)
    for op in graph.ops:
        if op.phase == "forward" and op.id not in constants:
            forward[stage_of[op.id]].append(op)
    for s in range(count):
        forward[s] = _with_constants(graph, forward[s], constants, needs)
    backward = _backward_stages(graph, stage_of, count)
    # the whole model holds what nothing reads, too; a stage is made of the modules that it calls
    parameters = [_used_parameters(graph, ops) for ops in forward] if count > 1 else [tuple(graph.parameters)]
    sends = _crossing(graph, stage_of, constants, count)
    _check_sent(graph, cuts, sends)
    return tuple(StageOps(s, tuple(forward[s]), tuple(backward[s]), parameters[s], sends[s]) for s in range(count))


def recomputes(graph: OpGraph) -> bool:
    """Whether the model itself computes parts of its forward pass again while it goes backward."""
    return any(op.phase == "recompute" for op in graph.ops)


def shared_parameters(stages: tuple[StageOps, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(parameter, stages that use it) for parameters of more than one stage."""
    users: dict[str, list[int]] = {}
    for stage in stages:
        for name in stage.parameters:
            users.setdefault(name, []).append(stage.index)
    return tuple((name, tuple(at)) for name, at in sorted(users.items()) if len(at) > 1)


def saved_tensors(graph: OpGraph) -> dict[int, int]:
    """By forward op, how many tensors it saves for its backward: what that reads of the forward pass."""
    if "saved tensors" not in graph.memo:
        there = {t for op in graph.ops if op.phase == "forward" for t in op.outputs}
        kept = {graph.tensors[t].storage for t in there}
        kept |= {t.storage for t in graph.tensors if t.role in ("parameter", "input", "buffer")}
        reads: dict[int, set[int]] = {}
        for op in graph.ops:
            if op.phase == "backward" and op.forward >= 0 and not op.is_view:
                reads.setdefault(op.forward, set()).update({graph.tensors[t].storage for t in op.inputs} & kept)
        graph.memo["saved tensors"] = {op: len(read) for op, read in reads.items()}
    found: dict[int, int] = graph.memo["saved tensors"]
    return found


def is_deep(graph: OpGraph, op: Op) -> bool:
    """Whether an op of a Linear reads an input of more than two dimensions."""
    return any(len(graph.tensors[t].shape) > 2 for t in op.inputs)


def _forward_stages(graph: OpGraph, cuts: tuple[str, ...]) -> dict[int, int]:
    stage, stage_of = 0, {}
    for op in graph.ops:
        if op.phase != "forward":
            continue
        if stage < len(cuts) and within(op.module, cuts[stage]):
            stage += 1
        stage_of[op.id] = stage
    if stage < len(cuts):
        raise ValueError(
            f"cut {cuts[stage]!r} is never reached in forward after the cuts before it; "
            "give module paths of the model in execution order"
        )
    return stage_of


def _constants(graph: OpGraph) -> tuple[set[int], dict[int, int]]:
    """Forward ops that depend on no input and no parameter (position ids, masks, what is made of buffers), and who
    makes each tensor."""
    made_by: dict[int, int] = {}
    constant: set[int] = set()
    given = {t.id for t in graph.tensors if t.role == "buffer"}
    for op in graph.ops:
        if op.phase != "forward":
            break
        if not op.mutates and all(t in given or made_by.get(t, -1) in constant for t in op.inputs):
            constant.add(op.id)
        for t in op.outputs:
            made_by.setdefault(t, op.id)
    return constant, made_by


def _with_constants(graph: OpGraph, ops: list[Op], constants: set[int], made_by: dict[int, int]) -> list[Op]:
    """Every stage makes the constants that it needs itself."""
    needed: set[int] = set()
    pending = [made_by.get(t, -1) for op in ops for t in op.inputs]
    while pending:
        maker = pending.pop()
        if maker in constants and maker not in needed:
            needed.add(maker)
            pending.extend(made_by.get(t, -1) for t in graph.ops[maker].inputs)
    return sorted([*ops, *(graph.ops[i] for i in needed)], key=lambda op: op.id)


def _backward_stages(graph: OpGraph, stage_of: dict[int, int], count: int) -> list[list[Op]]:
    """A backward op runs where its forward op ran; a gradient's last step where the op before it ran. Sums of
    gradients from different stages (tied weights) are messages in a pipeline, not ops."""
    backward: list[list[Op]] = [[] for _ in range(count)]
    made_at: dict[int, int] = {}
    here = count - 1
    for op in graph.ops:
        if op.phase not in ("backward", "recompute"):
            continue
        sources = [made_at[t] for t in op.inputs if t in made_at]
        here = stage_of.get(op.forward, max(sources, default=here))
        if accumulates(op) and op.forward >= 0 and len(set(sources)) > 1 and _is_parameter_sum(graph, op):
            for t in op.outputs:
                made_at[t] = here
            continue
        backward[here].append(op)
        for t in op.outputs:
            made_at[t] = here
    return backward


def _is_parameter_sum(graph: OpGraph, op: Op) -> bool:
    shape = graph.tensors[op.outputs[0]].shape
    return any(t.shape == shape for t in graph.parameters.values())


def _used_parameters(graph: OpGraph, ops: list[Op]) -> tuple[str, ...]:
    """In the order of first use, as a stage's module registers what it calls (all of them: the model's own order)."""
    by_storage = {t.storage: name for name, t in graph.parameters.items()}
    used = dict.fromkeys(
        by_storage[s] for op in ops for t in op.inputs if (s := graph.tensors[t].storage) in by_storage
    )
    return tuple(graph.parameters) if len(used) == len(graph.parameters) else tuple(used)


def _crossing(graph: OpGraph, stage_of: dict[int, int], constants: set[int], count: int) -> list[tuple[int, ...]]:
    """Tensors that each stage sends on: made at or before it, used after it. A view that a later stage makes again of
    what it got (a transpose and back) is its own."""
    home: dict[int, int] = {t.id: 0 for t in graph.tensors if t.role == "input"}
    crossing: dict[int, list[tuple[int, int]]] = {}  # tensor -> (stage that made it, stage that uses it)
    for op in graph.ops:
        if op.phase != "forward" or op.id in constants:
            continue
        here = stage_of[op.id]
        for t in op.inputs:
            if t in home and not (op.module == LOSS and graph.tensors[t].role == "input"):  # the last rank has targets
                crossing.setdefault(t, []).append((home[t], here))
        for t in op.outputs:
            if t not in op.inputs:
                home[t] = here
            home.setdefault(t, here)
    order = {t: i for i, t in enumerate(home)}
    sent = [{t for t, uses in crossing.items() if any(made <= s < used for made, used in uses)} for s in range(count)]
    return [tuple(sorted(tensors, key=order.__getitem__)) for tensors in sent]


def _check_sent(graph: OpGraph, cuts: tuple[str, ...], sends: list[tuple[int, ...]]) -> None:
    """ValueError where integers would cross a cut, as execution refuses it (`planner.split`)."""
    for cut, tensors in zip(cuts, sends):
        for t in (graph.tensors[i] for i in tensors):
            if not t.dtype.startswith(("float", "bfloat", "complex")):
                raise ValueError(
                    f"cut at {cut!r} would have to send an integer tensor ({t.dtype}, shape {t.shape}), which has no "
                    "gradient; cut elsewhere or compute it in the later stage"
                )
