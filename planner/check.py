"""Lowering against the dry run: every message and every local op of a rank, one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from opgraph.graph import OpGraph
from planner.apply_record import Collective, LocalOp
from planner.layout import propagate
from planner.plan import ParallelPlan
from planner.runtime import stage_script
from planner.runtime_stage import prepare
from planner.script import Item, Message, Transfer, Work
from planner.stages import shared_parameters, stage_ops

MessageKey = tuple[str, int, tuple[int, ...], str]  # kind, bytes, ranks, phase
OpKey = tuple[str, str, tuple[tuple[int, ...], ...]]  # name, phase, input shapes


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where lowering and dry run of one rank differ. Messages in order; ops as multisets."""

    rank: int
    messages: tuple[tuple[MessageKey | None, MessageKey | None], ...]  # (lowered, dry run), None where missing
    only_lowered: tuple[tuple[OpKey, int], ...]
    only_dry_run: tuple[tuple[OpKey, int], ...]

    def __bool__(self) -> bool:
        return bool(self.messages or self.only_lowered or self.only_dry_run)


def lowered_script(graph: OpGraph, plan: ParallelPlan, rank: int) -> list[Item]:
    """What lowering says that a rank does."""
    graph = graph.at_batch(plan.micro_batch)
    stages = stage_ops(graph, plan.cuts)
    at = plan.coordinates(rank)
    stage = prepare(graph, plan, propagate(graph, plan), stages, at["pp"])
    return stage_script(stage, at["dp"])


def lowered_messages(graph: OpGraph, plan: ParallelPlan, rank: int) -> list[MessageKey]:
    """A rank's messages in program order. Both ends of a transfer count, as the dry run records them."""
    shared = dict(shared_parameters(stage_ops(graph, plan.cuts)))
    stride = plan.dp * plan.tp
    found: list[MessageKey] = []
    for item in lowered_script(graph, plan, rank):
        if isinstance(item, Message):
            ranks = plan.group(rank, item.axis)
            if item.key.startswith("tied "):
                ranks = tuple(rank % stride + s * stride for s in shared[item.key.removeprefix("tied ")])
            if item.root >= 0:
                ranks = (ranks[item.root], *(r for i, r in enumerate(ranks) if i != item.root))
            found.append((item.kind, item.bytes, ranks, item.phase))
        elif isinstance(item, Transfer):
            ends = (item.source * stride + rank % stride, item.target * stride + rank % stride)
            found += [("send" if ends[0] == rank else "recv", size, ends, item.phase) for size in item.bytes]
    return found


def compare(graph: OpGraph, plan: ParallelPlan, rank: int, records: tuple[LocalOp | Collective, ...]) -> Mismatch:
    """Empty (false) where lowering and dry run agree, message for message and op for op."""
    lowered = lowered_messages(graph, plan, rank)
    dry: list[MessageKey] = [(r.kind, r.bytes, r.ranks, r.phase) for r in records if isinstance(r, Collective)]
    length = max(len(lowered), len(dry))
    pairs = [(lowered[i] if i < len(lowered) else None, dry[i] if i < len(dry) else None) for i in range(length)]
    works: list[OpKey] = [
        (w.shape.name, w.phase, w.shape.in_shapes) for w in _compute(lowered_script(graph, plan, rank))
    ]
    recorded: list[OpKey] = [(r.name, r.phase, r.in_shapes) for r in records if isinstance(r, LocalOp) and _counts(r)]
    ours, theirs = Counter(_keys(works)), Counter(_keys(recorded))
    return Mismatch(
        rank,
        tuple((a, b) for a, b in pairs if a != b),
        tuple((ours - theirs).items()),
        tuple((theirs - ours).items()),
    )


_RUNTIME = {"aten.mul.out", "aten.copy_.default", "aten.add_.Tensor"}


def _keys(ops: list[OpKey]) -> list[OpKey]:
    """Keys of all ops; the optimizer's list ops of one name are one op (FSDP with tensor parallelism splits them)."""
    keys = [_op_key(*op) for op in ops if op[1] != "optimizer"]
    lists: dict[str, list[tuple[int, ...]]] = {}
    for name, phase, shapes in ops:
        if phase == "optimizer":
            lists.setdefault(name, []).extend(s for s in shapes if s != ())
    return keys + [(name, "optimizer", tuple(sorted(shapes))) for name, shapes in lists.items()]


def _op_key(name: str, phase: str, shapes: tuple[tuple[int, ...], ...]) -> OpKey:
    if name.startswith("fsdp.") or name in _RUNTIME:
        return (name, phase, ())  # lowering knows their elements, not the shapes that the runtime gives them
    return (name, phase, shapes)


def _compute(items: list[Item]) -> list[Work]:
    return [i for i in items if isinstance(i, Work) and not i.is_view and not _trivial(i.shape.name, i.shape.in_shapes)]


def _counts(op: LocalOp) -> bool:
    return not _trivial(op.name, op.in_shapes)


def _trivial(name: str, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Views, empty allocations and arithmetic on scalars: no work to compare."""
    from costmodels.families import FREE, family

    return family(name) in FREE or all(s == () for s in shapes)
