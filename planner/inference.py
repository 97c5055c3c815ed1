"""Inference: seconds to the first token and per token, the KV cache, and whether it fits.

The forward pass alone is lowered, priced and simulated as a training step is (tensor parallelism and host thread among
it; no autograd). ASSUMPTIONS: every replica runs its share of the batch as one static batch; the cache is allocated for
the whole context at once; logits are computed for every token of the prompt, as the model's forward does; choosing a
token and what servers do around a step costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from costmodels.cluster import Cluster
from costmodels.device import basis_of
from opgraph.graph import OpGraph
from planner.host_thread import Running, assumptions, host_costs, host_notes
from planner.inference_graph import cache_bytes, decode_items, no_decode, prefill_items
from planner.lower import lower_scripts, prepared_graph
from planner.memory import memory
from planner.plan import ParallelPlan
from planner.predict import check_size, interval_of, memory_per_rank
from planner.runtime import forward_script
from planner.runtime_stage import Stage, prepare
from planner.script import Item
from planner.tensor_parallel import explain_no_shardings, tp_shardings
from simulator import breakdown, overall, simulate

MOST = 2**20  # sequences; no search for the largest batch goes beyond


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of all replicas. seconds, with the interval of nine in ten; breakdown: as of a training step;
    shares: of the time by kind of price; flops: of all ranks; unpriced: ops that no model covers."""

    seconds: float
    interval: tuple[float, float]
    breakdown: dict[str, float]
    shares: dict[str, float]
    flops: int
    unpriced: tuple[str, ...]

    @property
    def host_bound(self) -> bool:
        """Whether most of the pass is waiting for the host thread."""
        return self.breakdown["host"] > 0.5 * self.seconds


@dataclass(frozen=True, slots=True)
class Inference:
    """prefill: of all prompts. decode: one token a sequence at the mean context; last: at the longest one; both None
    where the model is no decoder, and `no_decode` says why. kv_cache_bytes: of all sequences at the longest context,
    over all ranks; cache_per_rank: of it on one. peak_bytes, memory_bytes: of a rank. largest_batch: sequences over all
    replicas that fit with all prompts in one pass (0: not even one each); largest_decode_batch: that fit where prompts
    pass one by one, as servers do (0: no decode)."""

    plan: ParallelPlan
    batch: int
    prompt: int
    generate: int
    prefill: Pass
    decode: Pass | None
    last: Pass | None
    no_decode: str
    kv_cache_bytes: int
    cache_per_rank: int
    parameter_bytes: int
    peak_bytes: int
    memory_bytes: int
    fits: bool
    largest_batch: int
    largest_decode_batch: int
    notes: tuple[str, ...]
    assumed: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all sequences a second while decoding at the mean context; 0 without decode."""
        return self.batch / self.decode.seconds if self.decode else 0.0

    @property
    def request_seconds(self) -> float:
        """Until all sequences are done: the prompt gives the first token, every further one is a decode step."""
        return self.prefill.seconds + max(self.generate - 1, 0) * (self.decode.seconds if self.decode else 0.0)


def infer(
    prompt_graph: OpGraph, token_graph: OpGraph | None, cluster: Cluster, *, batch: int, prompt: int, generate: int,
    tp: int = 1, dp: int = 1, compiled: bool = False, cuda_graphs: bool = False,
) -> Inference:  # fmt: skip
    """Predicts `batch` sequences of `prompt` tokens that grow by `generate` tokens, on dp replicas of tp ranks.

    prompt_graph: the traced forward (`inference_graph.trace_forward`) at the prompt's length; token_graph: at a length
    of 1. ValueError with one sentence where numbers, plan and model do not fit together.
    """
    if batch % dp:
        raise ValueError(f"{batch} sequences do not divide over {dp} replicas; use a multiple of {dp}")
    shardings = tp_shardings(prompt_graph, tp) if tp > 1 else ()
    if tp > 1 and not shardings:
        raise ValueError(f"tp = {tp} is not possible: {explain_no_shardings(prompt_graph, tp)}")
    running = Running(cuda_graphs, autograd=False, compiled=compiled)
    plan = ParallelPlan(batch, dp=dp, tp=tp, shardings=shardings)
    check_size(plan, cluster)
    why = no_decode(prompt_graph)
    context = prompt + generate
    stage = stage_of(prompt_graph, plan)
    items = forward_script(stage)
    decode = last = None
    if not why and token_graph is not None and generate > 0:
        single = stage_of(token_graph, plan)
        tokens = forward_script(single)
        decode, last = (
            _simulated(decode_items(tokens, n, single.graph), single, plan, cluster, running)
            for n in (prompt + (generate + 1) // 2, context)
        )
    prefill = _simulated(prefill_items(items) if not why else items, stage, plan, cluster, running)
    need = _need(prompt_graph, plan, cluster, 0 if why else context)
    capacity = memory_per_rank(cluster, plan)
    decoding = _need(token_graph, plan, cluster, context) if decode and token_graph is not None else None
    peak, cache = need(plan.micro_batch)
    waits = [p.breakdown["host"] / p.seconds for p in (prefill, decode) if p is not None and p.seconds]
    said = host_notes(max(waits, default=0.0), host_costs(cluster, running))
    notes = (*prompt_graph.notes, *cluster.notes, *basis_of(cluster.device), *said)
    return Inference(
        plan=plan, batch=batch, prompt=prompt, generate=generate, prefill=prefill, decode=decode, last=last,
        no_decode=why, kv_cache_bytes=cache * plan.world_size, cache_per_rank=cache,
        parameter_bytes=sum(p.bytes for p in stage.parameters.values()), peak_bytes=peak, memory_bytes=capacity,
        fits=peak <= capacity, largest_batch=dp * _largest(need, capacity),
        largest_decode_batch=dp * _largest(decoding, capacity) if decoding and need(1)[0] <= capacity else 0,
        notes=tuple(dict.fromkeys(notes)), assumed=assumptions(running),
    )  # fmt: skip


def stage_of(graph: OpGraph, plan: ParallelPlan) -> Stage:
    step, layout, stages = prepared_graph(graph, plan)
    return prepare(step, plan, layout, stages, 0)


def _simulated(items: list[Item], stage: Stage, plan: ParallelPlan, cluster: Cluster, running: Running) -> Pass:
    lowered = lower_scripts([[[tuple(items)]]], (stage,), plan, cluster, running)
    timeline = simulate(lowered.program)
    seconds = timeline.makespan
    parts = asdict(overall(breakdown(timeline)))
    total = sum(lowered.seconds_by_source.values()) or 1.0
    return Pass(
        seconds=seconds,
        interval=interval_of(seconds, parts["host"] / seconds if seconds else 0.0, lowered, cluster),
        breakdown=parts,
        shares={k: v / total for k, v in sorted(lowered.seconds_by_source.items())},
        flops=lowered.flops,
        unpriced=lowered.unpriced,
    )


def _need(graph: OpGraph, plan: ParallelPlan, cluster: Cluster, context: int) -> Callable[[int], tuple[int, int]]:
    """Peak bytes of a rank, and those of its cache, by sequences a replica (which placements do not depend
    on)."""
    known: dict[int, tuple[int, int]] = {}
    step, layout, stages = prepared_graph(graph, plan)
    cache = cache_bytes(forward_script(prepare(step, plan, layout, stages, 0)), context) // plan.micro_batch

    def need(sequences: int) -> tuple[int, int]:
        if sequences not in known:
            one = replace(plan, global_batch=sequences, dp=1)
            stage = prepare(graph.at_batch(sequences), one, layout, stages, 0)
            peak = max(m.peak for m in memory((stage,), one, cluster.backend))
            known[sequences] = peak + cache * sequences, cache * sequences
        return known[sequences]

    return need


def _largest(need: Callable[[int], tuple[int, int]], capacity: int) -> int:
    """Most sequences a replica whose need is within the capacity: steps along the last slope until one does not fit,
    then halves what is between."""
    low, at_low = 1, need(1)[0]
    if at_low > capacity:
        return 0
    high = 2
    while need(high)[0] <= capacity:
        slope = max((need(high)[0] - at_low) // (high - low), 1)
        low, at_low = high, need(high)[0]
        high = min(high + max((capacity - at_low) // slope, 1), MOST)
        if low == MOST:
            return MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle)[0] <= capacity else (low, middle)
    return low
