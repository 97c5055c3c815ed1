"""The step of one stage as torch's runtimes run it: traced ops, and what DDP, FSDP, checkpoints, tensor parallelism,
pipeline schedules and the optimizer add, in program order.

Read from torch 2.13 by dry runs (tests/planner/test_lowering.py holds the two together).
"""

from __future__ import annotations

from collections.abc import Iterator

from opgraph.graph import Op, Phase
from planner.early_stop import until_saved
from planner.layout import adds_bias
from planner.offload import down_at_once, up, waits
from planner.offload_activations import Crossing
from planner.orders import stage_order
from planner.runtime_data import LocalParameter, Unit, ddp_buckets, padded, zero1_owners
from planner.runtime_fsdp import FsdpBackward, gather, gather_root, scatter, unit_of
from planner.runtime_optimizer import optimizer_work, scaling_axes
from planner.runtime_stage import Stage, is_kept
from planner.script import Host, Item, Message, Transfer, Wait, copies_nothing, copy_work, rephased, tensor_bytes
from planner.stages import LOSS, is_deep, saved_tensors, shared_parameters, within


def stage_script(stage: Stage, dp_index: int = 0) -> list[Item]:
    """Everything that a rank of this stage does in one step; `dp_index` matters to ZeRO-1's and FSDP's own part."""
    return [item for segment in stage_segments(stage, dp_index) for item in segment]


def stage_segments(stage: Stage, dp_index: int = 0) -> list[tuple[Item, ...]]:
    """The script in pieces, one an action; actions that do the same share one tuple, so that it is priced once."""
    plan, segments = stage.plan, list[tuple[Item, ...]]()
    last = plan.micro_batches - 1
    stage.gathered.clear()
    for action in stage_order(plan.schedule, stage.ops.index, plan.pp, plan.micro_batches):
        if action.kind in ("F", "B"):
            segments.append(_remembered(stage, action.kind, action.micro == 0, action.micro == last))
        else:
            segments.append(tuple(_transfers(stage, action.kind, action.transfers)))
    if plan.pp > 1:
        segments.append((*_loss_sum(stage), *_reduce_after_pipeline(stage), *_tied(stage)))
    segments.append(tuple(_update(stage, dp_index)))
    return segments


def forward_script(stage: Stage) -> list[Item]:
    """One forward pass alone, as inference runs it on one stage."""
    training = ("ddp_step", "pp_action")
    return [item for item in _forward(stage) if not isinstance(item, Host) or item.kind not in training]


def _remembered(stage: Stage, kind: str, first: bool, last: bool) -> tuple[Item, ...]:
    """Forward or backward of one micro-batch. It depends on which FSDP units are whole, and leaves some whole."""
    before = frozenset(stage.gathered)
    key = (kind, before) if kind == "F" else (kind, first, last, before)
    if key not in stage.segments:
        items = tuple(_forward(stage) if kind == "F" else _backward(stage, first, last))
        stage.segments[key] = (items, frozenset(stage.gathered))
    items, after = stage.segments[key]
    stage.gathered.clear()
    stage.gathered.update(after)
    return items


def _loss_sum(stage: Stage) -> Iterator[Item]:
    if stage.ops.index == stage.plan.pp - 1:
        yield copy_work("aten.sum.default", stage.plan.micro_batches, "float32", "forward", LOSS)


# -- forward ------------------------------------------------------------------------------------------------


def _forward(stage: Stage) -> Iterator[Item]:
    plan = stage.plan
    if plan.pp > 1:
        yield Host("pp_action", 1, "forward")
    if plan.dp > 1 and not plan.fully_sharded:
        yield Host("ddp_step", 1, "forward")
    yield from gather_root(stage, "forward")
    current: Unit | None = None
    crossing = Crossing(stage)
    for op in stage.ops.forward:
        yield from crossing.sends(op)
        unit = unit_of(stage, op)
        if unit is not current:
            yield from _leave(stage, current)
            if unit is not None:
                yield Host("fsdp_unit_forward", 1, "forward")
                yield from gather(stage, unit, "forward", op.module)
            current = unit
        yield from _forward_op(stage, op, "forward")
    yield from _leave(stage, current)
    yield from _checkpoints(stage)
    yield from _sharded_linears(stage, "forward")


def _leave(stage: Stage, unit: Unit | None) -> Iterator[Item]:
    if unit is not None and stage.plan.data_parallel == "fsdp":
        stage.gathered.discard(unit.path)  # reshard_after_forward frees the whole parameters
    yield from ()


def _checkpoints(stage: Stage) -> Iterator[Item]:
    if stage.recompute:
        yield Host("checkpoint_forward", len(stage.recompute), "forward")
        saved = sum(_saved_in(stage, path) for path in stage.recompute)
        yield Host("checkpoint_saved_forward", saved, "forward")


def _saved_in(stage: Stage, path: str) -> int:
    """Tensors that the ops of a module save for backward."""
    saves = saved_tensors(stage.graph)
    return sum(saves.get(op.id, 0) for op in stage.ops.forward if within(op.module, path))


def _sharded_linears(stage: Stage, phase: Phase) -> Iterator[Item]:
    """What DTensor adds to the sharded Linears; those with inputs of more than two dimensions view them as two."""
    if stage.plan.tp == 1:
        return
    sharded = [op for op in stage.ops.forward if op.module in stage.plan.style]
    yield Host(f"dtensor_linear_{phase}", len({op.module for op in sharded}), phase)
    yield Host(f"dtensor_view_{phase}", len({op.module for op in sharded if is_deep(stage.graph, op)}), phase)


def _forward_op(stage: Stage, op: Op, phase: Phase) -> Iterator[Item]:
    apart = adds_bias(stage.graph, op)
    if (apart or op.name == "aten.addmm.default") and stage.plan.style.get(op.module) == "rowwise":
        # every rank adds its part of the bias, so that the all-reduce adds it once
        bias = stage.graph.tensors[op.inputs[1 if apart else 0]]
        yield copy_work("aten.div.Tensor", bias.numel, bias.dtype, phase, op.module)
    if not copies_nothing(stage.graph, stage.layout, op):
        yield stage.work(op, phase)
    yield from _reduced(stage, op, phase)


def _reduced(stage: Stage, op: Op, phase: Phase) -> Iterator[Item]:
    for reduction in stage.reductions.get(op.id, ()):
        size = tensor_bytes(stage.graph, stage.layout, reduction.tensor)
        yield Message("all_reduce", size, "tp", phase, op.module)


# -- backward -----------------------------------------------------------------------------------------------


def _backward(stage: Stage, first: bool, last: bool) -> Iterator[Item]:
    plan = stage.plan
    if plan.pp > 1:
        yield Host("pp_action", 1, "backward")
    ddp = plan.dp > 1 and not plan.fully_sharded
    buckets = _Buckets(stage) if ddp and last else None
    ready = {op: name for name, op in stage.ready.items()}
    recomputed: set[str] = set()
    units, crossing = FsdpBackward(stage, last), Crossing(stage)
    for i, op in enumerate(stage.ops.backward):
        yield from units.before(op)
        yield from crossing.loads(op)
        yield from _recompute(stage, op, recomputed)
        if not copies_nothing(stage.graph, stage.layout, op):
            yield stage.work(op)
        yield from _reduced(stage, op, "backward")
        if op.id in ready:
            parameter = stage.parameters[ready[op.id]]
            if not first:
                yield copy_work("aten.add_.Tensor", parameter.numel, parameter.dtype, "backward", op.module)
            if buckets is not None:
                yield from buckets.add(parameter, op.module)
        yield from units.after(i)
    if buckets is not None:
        yield from buckets.finish()
    yield from units.finish()
    yield from _sharded_linears(stage, "backward")


def _recompute(stage: Stage, op: Op, done: set[str]) -> Iterator[Item]:
    for path in stage.recompute:
        if path in done or not within(op.module, path) or op.module == LOSS:
            continue
        done.add(path)
        yield Host("checkpoint_backward", 1, "recompute")
        yield Host("checkpoint_saved_backward", _saved_in(stage, path), "recompute")
        items: list[Item] = []
        for again in recomputed_ops(stage, path):
            kept = is_kept(stage.plan, again.name)
            items += _reduced(stage, again, "recompute") if kept else _forward_op(stage, again, "recompute")
        yield from rephased(items, "recompute")


def recomputed_ops(stage: Stage, path: str) -> list[Op]:
    """The forward ops of a region that a checkpoint runs again."""
    if path not in stage.recomputed:
        region = [op for op in stage.ops.forward if within(op.module, path)]
        stage.recomputed[path] = until_saved(stage.graph, region, stage.ops.forward, stage.ops.backward)
    return stage.recomputed[path]


class _Buckets:
    """DDP in the backward that reduces: copies gradients into buckets, sends full ones, copies back at the end."""

    def __init__(self, stage: Stage) -> None:
        order = [stage.parameters[name] for name in stage.ready]
        self.buckets = ddp_buckets(stage.plan, order)
        self.place = {p.name: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent = 0

    def add(self, parameter: LocalParameter, module: str) -> Iterator[Item]:
        yield Host("ddp_param", 1, "backward")
        yield copy_work("aten.mul.out", parameter.numel, parameter.dtype, "backward", module)
        self.missing[self.place[parameter.name]] -= 1
        while self.sent < len(self.buckets) and self.missing[self.sent] == 0:
            size = sum(p.bytes for p in self.buckets[self.sent])
            yield Host("ddp_bucket", 1, "backward")
            yield Message("all_reduce", size, "dp", "backward", module, key=f"bucket {self.sent}")
            self.sent += 1

    def finish(self) -> Iterator[Item]:
        for i, bucket in enumerate(self.buckets):
            yield Wait(f"bucket {i}")
            for p in bucket:
                yield copy_work("aten.copy_.default", p.numel, p.dtype, "backward", "")


# -- after the backwards ------------------------------------------------------------------------------------


def _transfers(stage: Stage, kind: str, transfers: tuple[tuple[int, int, int], ...]) -> Iterator[Item]:
    for i, (source, target, micro) in enumerate(transfers, start=1):
        sender = stage.stages[min(source, target)]  # gradients go back over what its activations crossed
        sizes = tuple(tensor_bytes(stage.graph, stage.layout, t) for t in sender.sends)
        phase: Phase = "forward" if source < target else "backward"
        if kind == "start":
            yield Transfer(source, target, micro, sizes, phase, more=i < len(transfers))
        else:
            yield Wait(f"{source}>{target}#{micro}")


def _reduce_after_pipeline(stage: Stage) -> Iterator[Item]:
    for unit in stage.units:
        yield from scatter(stage, unit)
        stage.gathered.discard(unit.path)


def _tied(stage: Stage) -> Iterator[Item]:
    for name, users in shared_parameters(stage.stages):
        if stage.ops.index in users:
            p = stage.parameters[name]
            size = p.bytes
            if stage.units:
                size = padded(p, stage.plan.dp) // stage.plan.dp * (p.bytes // max(p.numel, 1))
            yield Message("all_reduce", size, "pp", "backward", key=f"tied {name}", root=-1)
            yield Wait(f"tied {name}")


def _update(stage: Stage, dp_index: int) -> Iterator[Item]:
    plan = stage.plan
    owned = list(stage.parameters.values())
    zero1 = plan.dp > 1 and plan.data_parallel == "zero1"
    owners = zero1_owners(owned, plan.dp) if zero1 else []
    mine = owners[dp_index] if zero1 else owned
    yield from waits(stage)
    yield from down_at_once(stage, mine)
    shard = dp_index if stage.units else None
    yield from optimizer_work(stage.graph, plan, {p.name: p for p in owned}, shard, unscales=True)
    for axis in scaling_axes(plan):
        yield Message("all_reduce", 4, axis, "optimizer")
    yield Host("optimizer_step", 1, "optimizer")
    yield Host("optimizer_param", len(mine), "optimizer")
    if stage.units:
        yield Host("fsdp_optimizer_param", len(mine), "optimizer")
    yield from optimizer_work(stage.graph, plan, {p.name: p for p in mine}, shard)
    yield from up(stage, mine)
    for root, parameters in enumerate(owners):
        if parameters:
            size = sum(p.bytes for p in parameters if p.name in stage.ready) or 4  # an empty bucket has one element
            yield Message("broadcast", size, "dp", "optimizer", key=f"owner {root}", root=root)
    for root, parameters in enumerate(owners):
        if parameters:
            yield Wait(f"owner {root}")
