"""Inference: seconds to the first token and per token, the KV cache, and whether it fits.

The forward pass alone is lowered, priced and simulated as a training step is (tensor parallelism and host thread among
it; no autograd). Stages of a pipeline take their micro-batches one behind the other (`planner.inference_pipeline`); of
experts those run that are chosen (`planner.inference_experts`). ASSUMPTIONS: every replica runs its share of the batch
as one static batch; the cache is allocated for the whole context at once; choosing a token and what servers do around
a step costs nothing. Of a prompt the last token's logits are computed, and tensor-parallel ranks share the vocabulary
(`planner.inference_head`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from costmodels.cluster import Cluster
from costmodels.device import basis_of
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from opgraph.graph import OpGraph
from planner.host_thread import Running, assumptions, host_costs, host_notes
from planner.inference_experts import chosen_experts
from planner.inference_graph import cache_bytes, decode_items, no_decode, prefill_items
from planner.inference_head import gathered, head_shardings, whole_parts, with_gathered
from planner.inference_pipeline import gradient_buffers, stage_cuts, timed
from planner.lower import prepared_graph
from planner.memory import memory
from planner.plan import ParallelPlan
from planner.predict import check_size, format_notes, interval_of, memory_per_rank
from planner.runtime import forward_script
from planner.runtime_stage import Stage, prepare
from planner.script import Item
from planner.space import check_devices
from planner.tensor_parallel import explain_no_shardings, tp_shardings
from simulator import breakdown, overall

HOST_BOUND = 0.05  # share of a pass: what is less is lost in the error of prices
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
    def host_share(self) -> float:
        """Share of the pass that would go if the host cost nothing: what ranks wait for their host threads, of the time
        in which they do not wait for other stages."""
        busy = self.seconds - self.breakdown["bubble"]
        return self.breakdown["host"] / busy if busy > 0 else 0.0

    @property
    def host_bound(self) -> bool:
        """Whether the pass would be shorter by more than `HOST_BOUND` of its time without the host's."""
        return self.host_share > HOST_BOUND


@dataclass(frozen=True, slots=True)
class Inference:
    """prefill: of all prompts. decode: one token a sequence at the mean context, from token to token where
    micro-batches fill a pipeline; last: at the longest one; both None where the model is no decoder, and `no_decode`
    says why. kv_cache_bytes: of all sequences at the longest context, over all ranks; cache_per_rank, parameter_bytes,
    peak_bytes: of the rank that holds most of it; memory_bytes: of a rank. largest_batch: sequences over all replicas
    that fit with all prompts in one pass (0: not even one each); largest_decode_batch: that fit where prompts pass one
    by one, as servers do (0: no decode)."""

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
    tp: int = 1, dp: int = 1, pp: int = 1, micro_batches: int = 1, compiled: bool = False, cuda_graphs: bool = False,
) -> Inference:  # fmt: skip
    """Predicts `batch` sequences of `prompt` tokens that grow by `generate` tokens, on dp replicas of tp x pp ranks.

    prompt_graph: the traced forward (`inference_graph.trace_forward`) at the prompt's length; token_graph: at a length
    of 1. micro_batches: into which a replica divides its sequences, so that stages of a pipeline work at once.
    ValueError with one sentence where numbers, plan and model do not fit together.
    """
    kind = cluster.device.kind
    prompt_graph, token_graph = prompt_graph.run_by(kind), token_graph and token_graph.run_by(kind)
    running = Running(cuda_graphs, autograd=False, compiled=compiled)
    plan = _plan(prompt_graph, cluster, running, batch, (pp, dp, tp), micro_batches)
    cluster = in_precision(cluster, prompt_graph.precision)
    cluster = synchronous(cluster, plan.world_size // plan.dp)  # replicas do not wait for each other
    why = no_decode(prompt_graph)
    context = prompt + generate
    stages = stages_of(prompt_graph, plan)
    forwards = [with_gathered(forward_script(stage), stage) for stage in stages]
    decode = last = None
    said = tuple[str, ...]()
    if not why and token_graph is not None and generate > 0:
        single = stages_of(token_graph, plan)
        tokens = [with_gathered(forward_script(stage), stage) for stage in single]
        (decode, said), (last, _) = (
            _simulated(
                [decode_items(t, n, s.graph) for t, s in zip(tokens, single)], single, plan, cluster, running, True
            )
            for n in (prompt + (generate + 1) // 2, context)
        )
    passes = [prefill_items(items) if not why else items for items in forwards]
    prefill, routed = _simulated(passes, stages, plan, cluster, running, False)
    need = _need(prompt_graph, plan, cluster, 0 if why else context)
    capacity = memory_per_rank(cluster, plan)
    decoding = _need(token_graph, plan, cluster, context) if decode and token_graph is not None else None
    peak, caches = need(batch // dp)
    waits = [p.breakdown["host"] / p.seconds for p in (prefill, decode) if p is not None and p.seconds]
    hosts = host_notes(max(waits, default=0.0), host_costs(cluster, running))
    said_of = (*whole_parts(prompt_graph, replace(plan, pp=1, cuts=())), *format_notes(prompt_graph, cluster.device))
    notes = (*prompt_graph.notes, *said_of, *cluster.notes, *basis_of(cluster.device), *hosts)
    return Inference(
        plan=plan, batch=batch, prompt=prompt, generate=generate, prefill=prefill, decode=decode, last=last,
        no_decode=why, kv_cache_bytes=sum(caches) * dp * tp, cache_per_rank=max(caches),
        parameter_bytes=max(sum(p.bytes for p in stage.parameters.values()) for stage in stages), peak_bytes=peak,
        memory_bytes=capacity, fits=peak <= capacity, largest_batch=dp * _largest(need, capacity),
        largest_decode_batch=dp * _largest(decoding, capacity) if decoding and need(1)[0] <= capacity else 0,
        notes=tuple(dict.fromkeys(notes)), assumed=tuple(dict.fromkeys((*assumptions(running), *said, *routed))),
    )  # fmt: skip


def _plan(
    graph: OpGraph, cluster: Cluster, running: Running, batch: int, mesh: tuple[int, int, int], micro_batches: int
) -> ParallelPlan:
    """The plan of these degrees. ValueError for what is not possible."""
    pp, dp, tp = mesh
    if batch % dp:
        raise ValueError(f"{batch} sequences do not divide over {dp} replicas; use a multiple of {dp}")
    if micro_batches > 1 and pp == 1:
        raise ValueError(f"mb{micro_batches} fills a pipeline, but there is none; add pp2 or more, or leave it out")
    if batch % (dp * micro_batches):
        raise ValueError(
            f"{batch} sequences do not divide into {micro_batches} micro-batches on {dp} replicas; use a multiple of "
            f"{dp * micro_batches}"
        )
    shardings = tp_shardings(graph, tp) if tp > 1 else ()
    if tp > 1 and not shardings:
        raise ValueError(f"tp = {tp} is not possible: {explain_no_shardings(graph, tp)}")
    shardings = head_shardings(graph, tp, shardings)
    flat = ParallelPlan(batch, dp=dp, tp=tp, micro_batches=micro_batches, shardings=shardings)
    if pp > 1:
        check_devices(cluster, pp * dp * tp)
    cuts = stage_cuts(graph, cluster, running, flat, pp)
    plan = replace(flat, pp=pp, cuts=cuts, schedule="gpipe" if pp > 1 else flat.schedule)
    check_size(plan, cluster)
    return plan


def stages_of(graph: OpGraph, plan: ParallelPlan) -> tuple[Stage, ...]:
    """What every stage of the plan runs, of one micro-batch."""
    step, layout, stages = prepared_graph(graph, plan)
    return tuple(prepare(step, plan, layout, stages, i) for i in range(plan.pp))


def _simulated(
    forwards: list[list[Item]], stages: tuple[Stage, ...], plan: ParallelPlan, cluster: Cluster, running: Running,
    decodes: bool,
) -> tuple[Pass, tuple[str, ...]]:  # fmt: skip
    """One pass of all sequences, and what was assumed about experts."""
    routed = [chosen_experts(items, stage.graph) for items, stage in zip(forwards, stages)]
    found = timed([items for items, _ in routed], stages, plan, cluster, running, decodes)
    lowered, whole = found.lowered, found.timeline.makespan
    parts = asdict(overall(breakdown(found.timeline)))
    total = sum(lowered.seconds_by_source.values()) or 1.0
    made = Pass(
        seconds=found.seconds,
        interval=interval_of(found.seconds, parts["host"] / whole if whole else 0.0, lowered, cluster),
        breakdown={name: part * found.seconds / whole for name, part in parts.items()} if whole else parts,
        shares={k: v / total for k, v in sorted(lowered.seconds_by_source.items())},
        flops=lowered.flops // found.passes,
        unpriced=lowered.unpriced,
    )
    return made, tuple(dict.fromkeys(text for _, said in routed for text in said))


def _need(
    graph: OpGraph, plan: ParallelPlan, cluster: Cluster, context: int
) -> Callable[[int], tuple[int, tuple[int, ...]]]:
    """Peak bytes of a rank of the fullest stage, and those of its cache in every stage, by sequences a replica (which
    placements do not depend on)."""
    known: dict[int, tuple[int, tuple[int, ...]]] = {}
    _, layout, cut = prepared_graph(graph, plan)
    caches = [cache_bytes(forward_script(s), context) // plan.micro_batch for s in stages_of(graph, plan)]

    def need(sequences: int) -> tuple[int, tuple[int, ...]]:
        if sequences not in known:
            at_once = -(-sequences // plan.micro_batches)
            one = replace(plan, global_batch=at_once, dp=1, micro_batches=1)
            step = graph.at_batch(at_once)
            stages = tuple(prepare(step, one, layout, cut, i) for i in range(plan.pp))
            held = memory(stages, one, cluster.backend)
            held_caches = tuple(cache * sequences for cache in caches)
            whole = (
                held[plan.tp * i].peak - gradient_buffers(stages[i]) + gathered(stages[i])[0] + held_caches[i]
                for i in range(plan.pp)
            )
            known[sequences] = max(whole), held_caches
        return known[sequences]

    return need


def _largest(need: Callable[[int], tuple[int, tuple[int, ...]]], capacity: int) -> int:
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
