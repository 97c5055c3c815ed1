"""What fully_shard adds to a step: units gathered before they are used, freed after, their gradients scattered.

Read from torch 2.13 (torch/distributed/fsdp/_fully_shard) and held to it by the dry run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from opgraph.graph import Op, Phase
from planner.offload import down, fetch
from planner.runtime_data import Unit, padded
from planner.runtime_stage import Stage
from planner.script import Host, Item, Message, Wait, copy_work
from planner.stages import LOSS, within


def unit_of(stage: Stage, op: Op) -> Unit | None:
    """The innermost unit that an op's module lies in; None for the root's own ops."""
    known = stage.unit_of_module
    if op.module not in known:
        found = [u for u in stage.units if u.path and within(op.module, u.path)]
        known[op.module] = max(found, key=lambda u: len(u.path), default=None)
    return known[op.module]


def gather_root(stage: Stage, phase: Phase) -> Iterator[Item]:
    if stage.units:
        yield Host(f"fsdp_unit_{phase}", 1, phase)
        yield from gather(stage, stage.units[0], phase, "")


def gather(stage: Stage, unit: Unit, phase: Phase, module: str) -> Iterator[Item]:
    if unit.path in stage.gathered or not unit.parameters:
        return
    yield from _start_gather(stage, unit, phase, module)
    yield from _finish_gather(stage, unit, phase, module)
    if phase == "forward":  # the host thread runs ahead: the next unit's copy starts as soon as this one is whole
        after = stage.units.index(unit) + 1
        if after < len(stage.units) and stage.units[after].path not in stage.gathered:
            yield from fetch(stage, stage.units[after], phase)


def _start_gather(stage: Stage, unit: Unit, phase: Phase, module: str) -> Iterator[Item]:
    dp = stage.plan.dp
    share = sum(padded(p, dp) for p in unit.parameters) // dp
    yield Host(f"fsdp_param_{phase}", len(unit.parameters), phase)
    yield copy_work("fsdp.all_gather_copy_in.default", share, unit.parameters[0].dtype, phase, module)
    yield from fetch(stage, unit, phase)
    stage.fetched.discard(unit.path)
    key, after = f"gather {unit.path}", f"fetch {unit.path}" if "parameters" in stage.plan.offload else ""
    yield Message("all_gather", unit.gathered_bytes(dp), "dp", phase, module, key=key, after=after)
    stage.gathered.add(unit.path)


def _finish_gather(stage: Stage, unit: Unit, phase: Phase, module: str) -> Iterator[Item]:
    whole = sum(padded(p, stage.plan.dp) for p in unit.parameters)
    yield Wait(f"gather {unit.path}")
    yield copy_work("fsdp.split_with_sizes_copy.default", whole, unit.parameters[0].dtype, phase, module)


def trained(stage: Stage, unit: Unit) -> Unit:
    """The unit with those of its parameters alone that get gradients (`FSDPParamGroup.post_backward`)."""
    return replace(unit, parameters=tuple(p for p in unit.parameters if p.name in stage.ready))


def scatter(stage: Stage, unit: Unit) -> Iterator[Item]:
    unit = trained(stage, unit)
    if not unit.parameters:
        return
    dp = stage.plan.dp
    whole = sum(padded(p, dp) for p in unit.parameters)
    yield Host("fsdp_param_backward", len(unit.parameters), "backward")
    yield copy_work("fsdp.chunk_cat.default", whole, unit.parameters[0].dtype, "backward", unit.path)
    yield Message("reduce_scatter", unit.gathered_bytes(dp), "dp", "backward", unit.path, key=f"scatter {unit.path}")
    yield from down(stage, unit)


class FsdpBackward:
    """fully_shard in backward: gathers units again, one ahead; frees and reduces each when its backward is over."""

    def __init__(self, stage: Stage, last: bool) -> None:
        self.stage, self.last = stage, last
        self.entered: set[str] = set()
        self.started: set[str] = set()
        ends: dict[str, tuple[int, Unit]] = {}
        self.unhooked = without_gradient_input(stage)
        for i, op in enumerate(stage.ops.backward):
            if (unit := unit_of(stage, op)) is not None:
                ends[unit.path] = (i, unit)
        self.end = dict(ends.values())

    def before(self, op: Op) -> Iterator[Item]:
        stage = self.stage
        if not stage.units:
            return
        if "" not in self.entered and op.module != LOSS:
            self.entered.add("")
            yield Host("fsdp_unit_backward", 1, "backward")
            yield from gather(stage, stage.units[0], "backward", op.module)
            if stage.units[0].parameters:
                yield from self._prefetch(len(stage.units), op.module)
        unit = unit_of(stage, op)
        if unit is None or unit.path in self.entered:
            return
        self.entered.add(unit.path)
        yield Host("fsdp_unit_backward", 1, "backward")
        if unit.path not in stage.gathered and unit.parameters:
            yield from _start_gather(stage, unit, "backward", op.module)
            self.started.add(unit.path)
        if unit.path in self.started:
            yield from _finish_gather(stage, unit, "backward", op.module)
        yield from self._prefetch(stage.units.index(unit), op.module)

    def _prefetch(self, index: int, module: str) -> Iterator[Item]:
        stage = self.stage
        if index - 1 < 1 or stage.units[index - 1].path in stage.gathered:
            return
        unit = stage.units[index - 1]
        if unit.parameters:
            yield from _start_gather(stage, unit, "backward", module)
            self.started.add(unit.path)

    def after(self, i: int) -> Iterator[Item]:
        unit = self.end.get(i)
        if unit is None or self.stage.plan.pp > 1 or unit.path in self.unhooked:
            return
        self._reshard(unit)
        if self.last:
            yield from scatter(self.stage, unit)

    def _reshard(self, unit: Unit) -> None:
        if self.last or self.stage.plan.data_parallel == "fsdp":
            self.stage.gathered.discard(unit.path)

    def finish(self) -> Iterator[Item]:
        if self.stage.plan.pp > 1:
            return
        for unit in self.stage.units:
            if unit.path == "" or unit.path in self.unhooked:
                self._reshard(unit)
                if self.last:
                    yield from scatter(self.stage, unit)


def without_gradient_input(stage: Stage) -> set[str]:
    """Units that read nothing that needs a gradient (the first layer of a CNN): FSDP learns that their backward is
    over only when the whole backward is, after the root."""
    needing = {t.id for t in stage.graph.tensors if t.role == "parameter"}
    received = stage.stages[stage.ops.index - 1].sends if stage.ops.index else ()
    needing |= set(received)
    made_in: dict[int, str] = {}
    entered: dict[str, bool] = {}
    for op in stage.ops.forward:
        unit = unit_of(stage, op)
        path = unit.path if unit else ""
        outside = [
            t for t in op.inputs
            if t in needing and stage.graph.tensors[t].role != "parameter" and made_in.get(t) != path
        ]  # fmt: skip
        if unit is not None:
            entered[path] = entered.get(path, False) or bool(outside)
        if any(t in needing for t in op.inputs):
            needing |= set(op.outputs)
        made_in |= dict.fromkeys(op.outputs, path)
    return {path for path, needs in entered.items() if not needs}
