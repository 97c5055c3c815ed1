"""When the storages of a stage's traced step come and go, and how large they are on a rank: what `planner.memory`
replays in the order of the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from costmodels.workspace import reserve_bytes, workspace_bytes
from opgraph.graph import DTYPE_BYTES, Op, OpGraph
from planner.memory_sizes import gradient_owners, local_bytes, outputs, received
from planner.memory_strides import stage_strides
from planner.runtime import recomputed_ops
from planner.runtime_stage import Stage, is_kept
from planner.script import tensor_shape, tensor_strides
from planner.stages import LOSS, within


@dataclass(frozen=True, slots=True)
class Region:
    """A checkpointed region of one stage. first, last: the backward op before which its ops are run again, and the last
    one of its own. again: those ops. leaves: its last forward op, after which it forgets the storages `forgotten`.
    unneeded: storages made again that backward ignores. kept: those whose ops are not run again."""

    path: str
    first: int
    last: int
    again: list[Op]
    leaves: int
    forgotten: set[int]
    unneeded: list[int]
    kept: set[int]


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Storages that a stage makes in one micro-batch. sizes: bytes on a rank by storage. born, dies: by op, the
    storages that it makes and those that nobody needs after it. gradients: storage -> parameter, and by_parameter the
    other way; they die by no op. inside: bytes that an op takes inside itself. again: by backward op, the regions made
    again before it. ends: last backward op of a region -> the region. forgotten: last forward op of a region -> it.
    kept: storages that live until their region is made again, or is over."""

    sizes: dict[int, int] = field(default_factory=dict)
    born: dict[int, list[int]] = field(default_factory=dict)
    dies: dict[int, list[int]] = field(default_factory=dict)
    gradients: dict[int, str] = field(default_factory=dict)
    inside: dict[int, int] = field(default_factory=dict)
    by_parameter: dict[str, list[int]] = field(default_factory=dict)
    again: dict[int, list[Region]] = field(default_factory=dict)
    ends: dict[int, Region] = field(default_factory=dict)
    forgotten: dict[int, Region] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)


def lifetimes(stage: Stage, backend: str) -> Lifetimes:
    """Local sizes, births and deaths of the storages that this stage makes. backend: what ops take inside themselves is
    known for CPUs (gloo)."""
    found = Lifetimes()
    graph, layout = stage.graph, stage.layout
    mine = {op.id: i for i, op in enumerate((*stage.ops.forward, *stage.ops.backward))}
    uses: dict[int, int] = {}
    placed: dict[int, int] = {}
    for op in (*stage.ops.forward, *stage.ops.backward):
        for t in (*op.inputs, *op.outputs):
            s = graph.tensors[t].storage
            uses[s] = op.id
            if t in op.outputs:
                placed.setdefault(s, t)
    elsewhere = {graph.tensors[t].storage for t in received(stage)}
    owner = gradient_owners(stage)
    end = stage.ops.backward[-1].id if stage.ops.backward else stage.ops.forward[-1].id
    kept = {graph.tensors[t].storage for t in (*stage.ops.sends, *outputs(stage))}
    if stage.plan.pp * stage.plan.micro_batches == 1:  # of several losses the sum is kept, a number
        last = max(op.id for op in graph.ops if op.phase != "optimizer")
        kept |= {s.id for s in graph.storages if s.death > last}  # the loss: who runs the step has a name for it
    for storage in graph.storages:
        s = storage.id
        if storage.birth not in mine or s in elsewhere:
            continue
        found.sizes[s] = local_bytes(layout, storage.bytes, placed.get(s))
        found.born.setdefault(storage.birth, []).append(s)
        if s in owner:
            found.gradients[s] = owner[s]
            found.by_parameter.setdefault(owner[s], []).append(s)
            continue
        death = storage.death if storage.death in mine else uses.get(s, storage.birth)
        found.dies.setdefault(end if s in kept else death, []).append(s)
    if backend == "gloo":
        _look_inside(stage, found)
    for path in stage.recompute:
        if (region := _region(stage, path, found)) is not None:
            found.again.setdefault(region.first, []).append(region)
            found.ends[region.last] = region
            found.forgotten[region.leaves] = region
            found.kept.update(region.kept)
            _hold_inputs(stage, region, found)
    return found


def _hold_inputs(stage: Stage, region: Region, found: Lifetimes) -> None:
    """A checkpoint keeps what its region reads until it is made again, also where no backward op reads that."""
    graph, inside = stage.graph, {op.id for op in stage.ops.forward if within(op.module, region.path)}
    read = {graph.tensors[t].storage for op in stage.ops.forward if op.id in inside for t in op.inputs}
    held = {s for s in read if graph.storages[s].birth not in inside}
    for op in stage.ops.forward:
        dying = found.dies.get(op.id, [])
        if waiting := [s for s in dying if s in held]:
            found.dies[op.id] = [s for s in dying if s not in held]
            found.dies.setdefault(region.first, []).extend(waiting)


def _look_inside(stage: Stage, found: Lifetimes) -> None:
    """Scratch memory of ops on a CPU, and outputs whose size fake tensors do not know."""
    graph, layout, moved = stage.graph, stage.layout, stage_strides(stage)
    for op in (*stage.ops.forward, *stage.ops.backward):
        if op.is_view:
            continue
        ins, outs = (tuple(tensor_shape(graph, layout, t) for t in ts) for ts in (op.inputs, op.outputs))
        itemsize = DTYPE_BYTES[graph.tensors[op.inputs[0]].dtype] if op.inputs else 4
        strides = tuple(moved.get(t) or tensor_strides(graph, layout, t) for t in op.inputs)
        if size := workspace_bytes(op.name, ins, outs, op.args, itemsize, strides):
            found.inside[op.id] = size
        for i, t in enumerate(op.outputs):
            if size := reserve_bytes(op.name, i, ins, itemsize):
                found.sizes[graph.tensors[t].storage] = size


def _region(stage: Stage, path: str, found: Lifetimes) -> Region | None:
    """Where a checkpointed region ends in forward, what it forgets there, and where backward makes it again; None where
    the stage has no part of it."""
    ops = [op for op in stage.ops.forward if within(op.module, path)]
    backward = [op for op in stage.ops.backward if within(op.module, path) and op.module != LOSS]
    if not ops or not backward:
        return None
    first = backward[0].id
    again = recomputed_ops(stage, path)
    made = {s for op in again for s in found.born.get(op.id, ())}
    done = {op.id for op in (*stage.ops.forward, *stage.ops.backward) if op.id < first} - {op.id for op in again}
    unneeded = [s for op, storages in found.dies.items() if op in done for s in storages if s in made]
    kept = {s for op in ops if is_kept(stage.plan, op.name) for s in found.born.get(op.id, ())}
    forgotten = made - kept - _leaving(stage, path)
    return Region(path, first, backward[-1].id, again, ops[-1].id, forgotten, unneeded, kept)


def _leaving(stage: Stage, path: str) -> set[int]:
    graph = stage.graph
    return {
        graph.tensors[t].storage
        for op in stage.ops.forward if not within(op.module, path)
        for t in op.inputs
    } | {graph.tensors[t].storage for t in stage.ops.sends}  # fmt: skip


def optimizer_storages(graph: OpGraph) -> list[tuple[float, bool, int]]:
    """(when, made or freed, storage) of what optimizer ops make and free again, in order."""
    events = []
    for s in graph.storages:
        if s.birth >= 0 and graph.ops[s.birth].phase == "optimizer" and s.death < len(graph.ops):
            events += [(float(s.birth), True, s.id), (s.death + 0.5, False, s.id)]
    return sorted(events, key=lambda e: e[0])
