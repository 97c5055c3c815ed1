"""Inference through pipeline stages: where a model is cut, the scripts of passes in flight, and their seconds.

A pass goes through all stages, with a message between two. While a pipeline decodes, the last stage hands the chosen
tokens to the first, which begins the micro-batch's next pass with them; other micro-batches fill the time between.
ASSUMPTION: a stage asks for what it needs when it comes to it, as servers with one loop per worker do, and a send does
not hold up the stage that sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from costmodels.cluster import Cluster
from opgraph.graph import OpGraph
from planner.host_thread import Running
from planner.lower import Lowered, lower_scripts
from planner.plan import ParallelPlan
from planner.runtime_stage import Stage
from planner.script import Item, Transfer, Wait, tensor_bytes, transfer_key
from planner.space import balanced_cuts, counted, cut_candidates, uncut_by_tp
from planner.step_costs import step_costs
from simulator import Timeline, simulate

TOKEN = 8  # bytes of a token's id
ROUNDS = (2, 4)  # decoded tokens a sequence of the two simulations whose difference is the steady state


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one pass of all sequences, and the simulation of `passes` of them that they come from."""

    seconds: float
    lowered: Lowered
    timeline: Timeline
    passes: int


def stage_cuts(graph: OpGraph, cluster: Cluster, running: Running, plan: ParallelPlan, pp: int) -> tuple[str, ...]:
    """Where the forward pass is cut into pp stages: as training plans are, so that the slowest stage is fastest. plan:
    the same without a pipeline."""
    if pp == 1:
        return ()
    costs = step_costs(graph, cluster, running)
    candidates = uncut_by_tp(costs, cut_candidates(costs), plan)
    cuts = balanced_cuts(costs, plan, candidates, pp)
    if cuts is None:
        places = counted(len(candidates), "place")
        raise ValueError(f"pp = {pp} needs {counted(pp - 1, 'cut')}, but {graph.name} has {places} to cut")
    return cuts


def timed(
    forwards: Sequence[Sequence[Item]], stages: tuple[Stage, ...], plan: ParallelPlan, cluster: Cluster,
    running: Running, decodes: bool,
) -> Timed:  # fmt: skip
    """One pass of all micro-batches: from the first start to the last end, or, where they decode, from one token to the
    next. forwards: what each stage does in a pass of one micro-batch."""
    fixed = [tuple(items) for items in forwards]

    def run(rounds: int) -> tuple[Lowered, Timeline]:
        scripts = [[list(_passes(i, fixed[i], stages, plan, rounds, decodes))] for i in range(plan.pp)]
        lowered = lower_scripts(scripts, stages, plan, cluster, running)
        return lowered, simulate(lowered.program)

    if not decodes or plan.micro_batches == 1:
        lowered, timeline = run(1)
        return Timed(timeline.makespan, lowered, timeline, 1)
    few, many = ROUNDS
    _, short = run(few)
    lowered, timeline = run(many)
    return Timed((timeline.makespan - short.makespan) / (many - few), lowered, timeline, many)


def _passes(
    index: int, forward: tuple[Item, ...], stages: tuple[Stage, ...], plan: ParallelPlan, rounds: int, decodes: bool
) -> Iterator[tuple[Item, ...]]:
    """The script of one stage: `rounds` passes of every micro-batch."""
    last, m = plan.pp - 1, plan.micro_batches
    chosen = (TOKEN * plan.micro_batch,)
    for p in range(rounds * m):
        if index > 0:
            yield _received(Transfer(index - 1, index, p, _sizes(stages[index - 1]), "forward"))
        elif decodes and last and p >= m:
            yield _received(Transfer(last, 0, p - m, chosen, "forward"))
        yield forward
        if index < last:
            yield (Transfer(index, index + 1, p, _sizes(stages[index]), "forward"),)
        elif decodes and last:
            yield (Transfer(last, 0, p, chosen, "forward"),)
    if decodes and last and index == 0:
        for p in range((rounds - 1) * m, rounds * m):
            yield _received(Transfer(last, 0, p, chosen, "forward"))


def _received(transfer: Transfer) -> tuple[Item, ...]:
    return transfer, Wait(transfer_key(transfer))


def _sizes(stage: Stage) -> tuple[int, ...]:
    return tuple(tensor_bytes(stage.graph, stage.layout, t) for t in stage.ops.sends)


def gradient_buffers(stage: Stage) -> int:
    """Bytes that the memory of a training stage holds for gradients from the stage after it, and inference does not."""
    later = stage.ops.index + 1 < stage.plan.pp
    return sum(stage.graph.tensors[t].bytes for t in stage.ops.sends) if later else 0
