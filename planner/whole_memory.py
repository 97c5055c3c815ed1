"""Memory of a step of `planner.whole_step`: the fullest stage at the end of forward."""

from __future__ import annotations

from collections.abc import Sequence

from opgraph.graph import OpGraph
from planner.folded_memory import Memory
from planner.plan import ParallelPlan
from planner.stages import StageOps, stage_ops, within


def whole_memory(graph: OpGraph, plan: ParallelPlan, divided: Sequence[str] = ()) -> Memory:
    """By category on a rank of the fullest stage of `graph`, which is at the plan's micro-batch. divided: modules whose
    parameters are divided over the dp ranks. Variables that a server keeps are counted: the rank has copies."""
    stages = stage_ops(graph, plan.cuts)
    found = []
    for stage in stages:
        sizes = (graph.parameters[n].bytes // (plan.dp if is_divided(n, divided) else 1) for n in stage.parameters)
        rests = sum(sizes)
        found.append(Memory(rests, rests, rests, _activations(graph, plan, stages, stage), 0))
    return max(found, key=lambda m: m.allocated)


def is_divided(parameter: str, divided: Sequence[str]) -> bool:
    return any(within(parameter.rpartition(".")[0], path) for path in divided)


def _activations(graph: OpGraph, plan: ParallelPlan, stages: Sequence[StageOps], stage: StageOps) -> int:
    """GPipe runs all forwards before the first backward, so what enters a stage is there for every micro-batch; what
    the stage makes of it too, unless backward makes that again. Without a pipeline a micro-batch is done before the
    next one begins."""
    end = max((op.id for op in graph.ops if op.phase == "forward"), default=0)
    own = {op.id for op in stage.forward}
    made = sum(s.bytes for s in graph.storages if s.role == "activation" and s.birth in own and end < s.death)
    entering = {graph.tensors[t].storage for t in stages[stage.index - 1].sends} if stage.index else set()
    read = {graph.tensors[t] for op in stage.forward for t in op.inputs}
    entering |= {t.storage for t in read if t.role == "input"}
    enters = sum(graph.storages[s].bytes for s in entering)
    if plan.recompute:
        return plan.micro_batches * enters + made
    return (plan.micro_batches if plan.pp > 1 else 1) * (enters + made)
