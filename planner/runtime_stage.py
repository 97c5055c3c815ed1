"""What is known about one pipeline stage while its script is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from costmodels.families import family
from opgraph.graph import Op, OpGraph, Phase
from planner.layout import Layout, Reduction
from planner.plan import Kept, ParallelPlan
from planner.runtime_data import LocalParameter, Unit, fsdp_units, gradient_order, local_parameters
from planner.script import Item, Work, local_work
from planner.stages import StageOps, within

KEPT: dict[Kept, tuple[str, ...]] = {"products": ("gemm", "conv"), "attention": ("attention",)}  # families of ops


@dataclass(slots=True)
class Stage:
    """What is known about a stage while its script is written; `gathered` are the FSDP units that are whole now,
    `fetched` those whose shards are on their way from the host; crossing: what `planner.offload` found out."""

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
    fetched: set[str] = field(default_factory=set)
    crossing: dict[str, Any] = field(default_factory=dict)
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
    recompute = plan.recomputed(index, there)
    _check_kept(graph, plan, ops, recompute)
    return Stage(
        graph, plan, layout, ops, stages, parameters, gradient_order(graph, ops),
        fsdp_units(plan, ops, parameters) if plan.fully_sharded else [], recompute, reductions,
    )  # fmt: skip


def is_kept(plan: ParallelPlan, op: str) -> bool:
    """Whether a recomputed module keeps the outputs of this op (`recompute_keeps`)."""
    return any(family(op) in KEPT[kind] for kind in plan.recompute_keeps)


def _check_kept(graph: OpGraph, plan: ParallelPlan, ops: StageOps, recompute: tuple[str, ...]) -> None:
    """torch keeps no output that a later op changes in place."""
    kept: set[int] = set()
    for op in ops.forward if plan.recompute_keeps else ():
        if not any(within(op.module, path) for path in recompute):
            continue
        if any(graph.tensors[t].storage in kept for t in op.mutates):
            raise ValueError(
                f"recompute_keeps {', '.join(plan.recompute_keeps)} cannot keep an output that {op.name} in "
                f"{op.module!r} changes in place; make that op out of place, or leave recompute_keeps out"
            )
        if is_kept(plan, op.name):
            kept.update(graph.tensors[t].storage for t in op.outputs)
