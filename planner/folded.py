"""Folded prediction: a plan of any size for a model of equal blocks, every part lowered, priced and simulated once.

The same trace, placement rules, prices and event engine as `planner.lower`; what runs equally often and alike is one
part, and ranks that do the same are one rank. Training software that fuses, overlaps or launches differently is a
`Software`. Besides vpp, cp, ep and sequence parallelism this is how thousands of devices are predicted in milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import hypot, sqrt

from costmodels.cluster import Cluster
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from planner.folded_events import replayed
from planner.folded_local import local_step
from planner.folded_memory import Memory, memory_of
from planner.folded_model import Chunk, FoldedModel, chunks_of
from planner.folded_parts import parts_of
from planner.folded_pieces import pieces
from planner.folded_step import Context, Tally, program_of
from planner.plan import ParallelPlan
from planner.predict import NINE_IN_TEN, STEP_ERROR
from planner.software import Software
from planner.stages import within
from simulator import breakdown, overall, simulate

# What sustained work on tensor cores loses to the power limit against tables of short measurements: between nothing and
# 15 % (B200, 100 kernels in a row: 1450 to 1237 TFLOP/s, flashinfer pull request 2899; A100, products of random numbers
# and of zeros: 257 and 295, thonking.ai "Strangely, matrix multiplications"; H100 with and without a warm-up: 794 and
# 813, stas00/ml-engineering pull request 59). How the tables' sources warmed up is not known, so nothing is added to a
# step; its interval reaches as much further up as a share that is spread evenly over that range deviates from 0 (rms).
SUSTAINED = 0.15 / sqrt(3)
TENSOR_CORES = ("gemm", "attention", "attention_backward")


@dataclass(frozen=True, slots=True)
class FoldedPrediction:
    """Seconds and bytes of one step. device: device seconds by kind of work, messages beside it included, of the stage
    whose device is busiest, which decides the step. shares: of these by source of the price. interval: nine in ten
    should lie inside; its errors are those of that stage. memory: of the fullest stage by category.
    allocated_bytes, reserved_bytes: peaks of the replayed step in torch's caching allocator; without a replay the sum
    of the categories, and 0."""

    step_seconds: float
    interval: tuple[float, float]
    memory: Memory
    breakdown: dict[str, float]
    device: dict[str, float]
    shares: dict[str, float]
    tasks: int
    allocated_bytes: int = 0
    reserved_bytes: int = 0


def predict_folded(
    model: FoldedModel, plan: ParallelPlan, cluster: Cluster, software: Software, replay: bool = False
) -> FoldedPrediction:
    """Predicts one step; `replay`: with the allocator's events of the fullest stage. A step in fp8 runs in bf16 on a
    device without. ValueError with one sentence where plan and model do not fit."""
    if plan.world_size > cluster.size:
        raise ValueError(f"the plan needs {plan.world_size} devices, but {cluster.name} has {cluster.size}")
    if plan.recompute_keeps:
        raise ValueError("folded steps keep no single ops of recomputed modules; recompute paths of modules instead")
    if plan.precision == "fp8" and "float8_e4m3fn" not in cluster.device.peak_flops:
        plan = replace(plan, precision="bf16")  # no library casts for products that the device does not have
    if plan.offload:
        raise ValueError("folded steps keep everything on the device; use parplan simulate for a plan with offload")
    cluster = synchronous(in_precision(cluster, plan.precision), plan.world_size)
    context = context_of(model, plan, cluster, software)
    timeline = simulate(program_of(context))
    step = timeline.makespan
    stages = breakdown(timeline)
    tally = context.at(max(range(plan.pp), key=lambda s: stages[s].compute)).tally
    total = sum(tally.sources.values()) or 1.0
    spread = NINE_IN_TEN * hypot(sqrt(sum(e * e for e in tally.errors.values())) / total, STEP_ERROR)
    slower = NINE_IN_TEN * SUSTAINED * _on_tensor_cores(tally.seconds, plan) / total
    memories = [memory_of(context.at(s), s) for s in range(plan.pp)]
    fullest = max(range(plan.pp), key=lambda s: memories[s].allocated)
    allocated, reserved = memories[fullest].allocated, 0
    if replay:
        allocated, reserved = replayed(context.at(fullest), fullest, memories[fullest])
    return FoldedPrediction(
        step_seconds=step,
        interval=(step * max(0.0, 1 - spread), step * (1 + hypot(spread, slower))),
        memory=memories[fullest],
        breakdown=asdict(overall(stages)),
        device={k: v for k, v in sorted(tally.seconds.items(), key=lambda item: -item[1])},
        shares={k: v / total for k, v in sorted(tally.sources.items())},
        tasks=len(timeline.program),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
    )


def context_of(model: FoldedModel, plan: ParallelPlan, cluster: Cluster, software: Software) -> Context:
    """Everything that a step's program is made from, and each stage's own."""
    local, found = local_step(model.graph, plan, model.seq, model.vocab, software.vocab_parallel), pieces(model.graph)
    chunks = chunks_of(model, plan)
    shares = recomputed_shares(plan, software, chunks)
    own = {share: replace(software, recompute_share=share) for share in shares or (software.recompute_share,)}
    parts = {share: parts_of(local, found, own[share], cluster) for share in own}
    first = next(iter(own))  # of the first stage
    context = Context(parts[first], plan, own[first], cluster, chunks)
    losses = {share: context.losses if share == first else {} for share in own}
    context.stages = tuple(
        replace(context, parts=parts[s], software=own[s], losses=losses[s], tally=Tally())
        for s in shares or (first,) * plan.pp
    )
    return context


def recomputed_shares(plan: ParallelPlan, software: Software, chunks: list[Chunk]) -> tuple[float, ...]:
    """Of every stage, the share of its recomputed modules that runs again: from `recompute_first` of the plan, whose
    `recompute` then names the modules of all blocks, else what the software states; empty where one share holds for
    all. ValueError where a stage is to recompute more modules than it has."""
    if not plan.recompute_first:
        return software.recompute_shares if len(software.recompute_shares) == plan.pp else ()
    each, several = sum(within(path, "blocks.1") for path in plan.recompute), len(plan.recompute_first) > 1
    if not each:
        raise ValueError("recompute_first counts modules of every block, but recompute names none of blocks.1")
    shares = []
    for stage in range(plan.pp):
        there = each * sum(c.count("block") + c.count("block0") for c in chunks[stage :: plan.pp])
        first = plan.recompute_first[stage if several else 0]
        if several and first > there:
            raise ValueError(
                f"recompute_first asks for {first} modules of stage {stage}, which has {there} of those that recompute "
                "names; give at most so many"
            )
        shares.append(min(first / there, 1.0) if there else 0.0)
    return tuple(shares)


def _on_tensor_cores(seconds: dict[str, float], plan: ParallelPlan) -> float:
    """Seconds of products and attention that run on tensor cores."""
    return 0.0 if plan.precision == "fp32" else sum(seconds.get(name, 0.0) for name in TENSOR_CORES)
