"""What is known about one pipeline stage while its script is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opgraph.graph import Op, OpGraph, Phase
from planner.layout import Layout, Reduction
from planner.plan import ParallelPlan
from planner.runtime_data import LocalParameter, Unit, fsdp_units, gradient_order, local_parameters
from planner.script import Item, Work, local_work
from planner.stages import StageOps, within


@dataclass(slots=True)
class Stage:
    """What is known about a stage while its script is written; `gathered` are the FSDP units that are whole now."""

    graph: OpGraph
    plan: ParallelPlan
    layout: Layout
    ops: StageOps
    stages: tuple[StageOps, ...]
    parameters: dict[str, LocalParameter]
    ready: dict[str, int]
    units: list[Unit]
    recompute: tuple[str, ...]
    reductions: dict[int, list[Reduction]]
    works: dict[tuple[int, Phase], Work] = field(default_factory=dict)
    gathered: set[str] = field(default_factory=set)
    unit_of_module: dict[str, Unit | None] = field(default_factory=dict)
    recomputed: dict[str, list[Op]] = field(default_factory=dict)
    segments: dict[Any, tuple[tuple[Item, ...], frozenset[str]]] = field(default_factory=dict)

    def work(self, op: Op, phase: Phase | None = None) -> Work:
        key = (op.id, phase or op.phase)
        if key not in self.works:
            self.works[key] = local_work(self.graph, self.layout, op, phase)
        return self.works[key]


def prepare(graph: OpGraph, plan: ParallelPlan, layout: Layout, stages: tuple[StageOps, ...], index: int) -> Stage:
    ops = stages[index]
    parameters = local_parameters(graph, layout, ops.parameters)
    reductions: dict[int, list[Reduction]] = {}
    for reduction in layout.reductions:
        reductions.setdefault(reduction.after, []).append(reduction)
    there = [path for path in plan.recompute if any(within(op.module, path) for op in ops.forward)]
    return Stage(
        graph, plan, layout, ops, stages, parameters, gradient_order(graph, ops),
        fsdp_units(plan, ops, parameters) if plan.fully_sharded else [], plan.recomputed(index, there), reductions,
    )  # fmt: skip
