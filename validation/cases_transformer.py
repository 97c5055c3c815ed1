"""Model and plan of a published transformer run, from its dimensions and degrees."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from planner.folded_model import FoldedModel
from planner.folded_pieces import TRACED_BLOCKS
from planner.plan import DataParallel, ParallelPlan, Sharding, expert_parts
from planner.software import Software
from validation.cases import MOST_MICRO_BATCHES, MOST_PASSES, Case, CaseError
from validation.cases_model import (
    activation_of,
    family_of,
    fused_attention,
    head_width_of,
    is_gated,
    is_tied,
    kv_heads_of,
)
from validation.cases_software import is_per_op

BLOCK_MODULES_SELECTIVE = ("attn.core",)
# Per-operator policy of torchtitan: every second product and attention are kept, all else is made again.
PER_OP = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "attn.rope_q", "attn.rope_k", "norm2", "mlp.up", "mlp.gate",
          "mlp.act")  # fmt: skip
ZERO: dict[str, DataParallel] = {"none": "ddp", "": "ddp", "0": "ddp", "zero0": "ddp", "ddp": "ddp", "1": "zero1",
                                 "zero1": "zero1", "2": "zero2", "zero2": "zero2", "3": "fsdp", "zero3": "fsdp",
                                 "fsdp": "fsdp"}  # fmt: skip
PRECISIONS = {"fp32": "fp32", "float32": "fp32", "tf32": "tf32", "fp16": "fp16", "float16": "fp16", "half": "fp16",
              "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "float8": "fp8", "mxfp8": "fp8",
              "amp": "fp16", "mixed": "fp16"}  # fmt: skip  # tables that say no more are from before bfloat16
PREDICTIONS_PER_SEQUENCE = 20  # masked positions of BERT pre-training at length 128 (its scripts and the rows' notes)


@dataclass(slots=True)
class Traces:
    """Steps traced so far, by shape; one trace serves all batch sizes, depths and layouts of a shape."""

    known: dict[Any, Any] = field(default_factory=dict)

    def graph(self, name: str, shape: Any, batch: int) -> Any:
        from opgraph.batch import trace_workload
        from opgraph.zoo.transformer import workload

        if (name, shape) not in self.known:
            self.known[name, shape] = trace_workload(workload(name, shape), fold=False)
        if (name, shape, batch) not in self.known:
            self.known[name, shape, batch] = self.known[name, shape].at_batch(batch)
        return self.known[name, shape, batch]


def model_of(case: Case, software: Software, traces: Traces) -> FoldedModel:
    """The model of a row, traced with three blocks at its micro-batch."""
    from opgraph.zoo.transformer import Latent, Shape

    family, precision = family_of(case), precision_of(case)
    tp, cp = case.degree("tp"), case.degree("cp")
    seq, hidden, heads = (case.whole(name, least=1) for name in ("seq_len", "hidden", "heads"))
    kv_heads = kv_heads_of(case)
    if seq % cp:
        raise CaseError(f"seq_len {seq} does not divide into cp = {cp} parts")
    width = head_width_of(case, hidden, heads)
    fused = fused_attention(case)
    moe = case.whole("moe_experts", 0)
    experts = _experts(case, moe) if moe else None
    old = ("megatron" in case.text("software").lower() and not fused) or family == "bert"
    vocab = case.whole("vocab")
    unit = (128 if software.joined else 1) * tp if software.vocab_parallel else 1  # Megatron pads to 128 a rank
    padded = ceil(vocab / unit) * unit
    llama = family in ("llama", "moe_mla")
    shape = Shape(
        layers=TRACED_BLOCKS, hidden=hidden, heads=heads, kv_heads=kv_heads,
        head_width=width if width * heads != hidden else 0,
        ffn=_ffn(case, hidden), seq=seq // cp,
        vocab=padded,
        norm="rms" if llama else "layer",
        mlp=activation_of(case),
        positions="rope" if llama or family == "gpt_gqa_relu2" else "learned",
        attention="sdpa" if fused else "math", causal=family != "bert",
        bias=family in ("gpt", "mpt", "bert"), post_norm=family == "bert", tied=is_tied(case, family),
        joined=software.joined or family == "mpt", dropout=0.1 if old else 0.0,
        predicted=_predicted(case),
        latent=Latent() if family == "moe_mla" else None, experts=experts,
        dtype={"fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}.get(precision, "float32"),
    )  # fmt: skip
    name = f"{family}{' tied' if shape.tied else ''}"
    graph = traces.graph(name, shape, case.whole("micro_batch", least=1))
    return FoldedModel(graph, case.whole("layers", least=1), seq // cp, padded, _dense_first(case) if experts else 0)


def _ffn(case: Case, hidden: int) -> int:
    """The width of an MLP: with experts that of theirs, where the row does not say, and without a gate four times the
    hidden size."""
    if case.whole("ffn", 0):
        return case.whole("ffn")
    if case.whole("moe_experts", 0):
        return case.whole("moe_ffn", least=1)
    if is_gated(case):
        raise CaseError(f"column ffn is {case.text('ffn')!r}; gated MLPs have no usual width, so a number is needed")
    return 4 * hidden


def _experts(case: Case, count: int) -> Any:
    from opgraph.zoo.transformer import Experts

    parts, ep, top = case.degree("tp"), case.degree("ep"), case.whole("moe_topk", least=1)
    if case.whole("seq_len") // case.degree("cp") % parts:
        raise CaseError(f"tp = {parts} does not divide the sequence of a rank; experts need equal parts of it")
    if count % ep:
        raise CaseError(f"ep = {ep} does not divide moe_experts = {count}; each rank has equally many experts")
    if top > count:
        raise CaseError(f"moe_topk {top} is more than moe_experts {count}")
    shared = re.search(r"shared-expert ffn (\d+)", case.text("notes"))
    width, ffn = int(shared[1]) if shared else 0, case.whole("moe_ffn", least=1)
    split = expert_parts(case.degree("dp") * case.degree("cp"), parts, ep)
    if ffn % split or width % parts:
        raise CaseError(
            f"tp = {parts} does not divide the width of an expert, moe_ffn = {ffn}"
            + (f" or that of the shared one, {width}" if width else "")
            + "; tensor-parallel ranks have equal parts of it"
        )
    return Experts(count // ep, count, top, ffn // split, width // parts, is_gated(case), parts, split)


def _dense_first(case: Case) -> int:
    """Blocks before the first with experts: as the notes say ("1 dense + 3 MoE layers"), else one in DeepSeek's
    family (DeepSeek-V2's; V3 has three), none in others (Mixtral, Grok)."""
    if stated := re.search(r"(\d+) dense\b", case.text("notes")):
        return int(stated[1])
    return 0 if family_of(case) != "moe_mla" else 3 if re.search(r"v-?3|r1", case.text("model").lower()) else 1


def _predicted(case: Case) -> int:
    """Positions whose logits are made: the masked ones in BERT pre-training. NVIDIA's PyTorch scripts of that time
    make those of all positions."""
    masked = family_of(case) == "bert" and "pre-training" in case.text("notes")
    return PREDICTIONS_PER_SEQUENCE if masked and "pytorch" not in case.text("software").lower() else 0


def replicas_of(case: Case) -> int:
    """The dp of a row; where it is not stated, as many as the other degrees leave of the GPUs."""
    others = case.degree("tp") * case.degree("pp") * case.degree("cp")
    gpus = case.whole("num_gpus", least=1)
    return case.degree("dp") if case.stated("dp") or gpus % others else gpus // others


def plan_of(case: Case, software: Software) -> ParallelPlan:
    """The plan of a row."""
    dp, (tp, pp, cp, ep, vpp) = replicas_of(case), (case.degree(axis) for axis in ("tp", "pp", "cp", "ep", "vpp"))
    layers = case.whole("layers", least=1)
    if pp * vpp > layers + 2:
        raise CaseError(f"{layers} layers, embedding and loss cannot fill pp x vpp = {pp} x {vpp} chunks")
    if dp * tp * pp * cp != (gpus := case.whole("num_gpus", least=1)):
        raise CaseError(f"dp x tp x pp x cp = {dp * tp * pp * cp} differs from num_gpus = {gpus}")
    batch, micro = case.whole("global_batch", least=1), case.whole("micro_batch", least=1)
    if batch % (dp * micro):
        raise CaseError(f"global_batch {batch} is no multiple of dp x micro_batch = {dp} x {micro}")
    _check_length(case, batch // (dp * micro), layers, pp)
    experts = case.whole("moe_experts", 0) > 0  # with tensor parallelism Megatron wants the sequence split, too
    if ep > 1 and not experts:
        raise CaseError(f"ep = {ep} without moe_experts: a dense model has no experts to divide; leave ep out, or 1")
    split = _sequence_split(case)
    try:
        return ParallelPlan(
            global_batch=batch, pp=pp, dp=dp, tp=tp, cp=cp, ep=ep, vpp=vpp,
            micro_batches=batch // (dp * micro), data_parallel="zero1" if is_replaced_by_zero1(case) else _zero(case),
            cuts=_cuts(case, pp * vpp), shardings=_shardings(case, software) if tp > 1 else (),
            recompute=_recompute(case), precision=precision_of(case),
            sequence_parallel=tp > 1 and (split or experts),
        )  # fmt: skip
    except ValueError as error:
        raise CaseError(str(error)) from None


def _check_length(case: Case, micro_batches: int, layers: int, pp: int) -> None:
    """CaseError where a step is longer than any: its passes are worked through one by one."""
    if micro_batches > MOST_MICRO_BATCHES or micro_batches * layers // pp > MOST_PASSES:
        tokens = case.whole("global_batch") % case.whole("seq_len", least=1) == 0
        asked = "global_batch is in sequences; is this one in tokens?" if tokens else "no step has so many"
        raise CaseError(f"{micro_batches:,} micro-batches and {layers:,} layers on {pp} stages make a step; {asked}")


def _zero(case: Case) -> DataParallel:
    zero = re.sub(r"[^a-z0-9]", "", case.word("zero_fsdp").removesuffix(".0"))  # spreadsheets write 2 as 2.0
    if zero not in ZERO:
        raise CaseError(f"zero_fsdp is {case.text('zero_fsdp')!r}; it must be none, zero1, zero2 or zero3 (or 0 to 3)")
    return ZERO[zero]


def is_replaced_by_zero1(case: Case) -> bool:
    """FSDP in a pipeline keeps whole what it gathered until the step ends, and scatters gradients once (torchtitan's
    default `reshard_after_forward` with pipelines): the messages and memory of zero1."""
    return case.degree("pp") > 1 and _zero(case) == "fsdp"


def _sequence_split(case: Case) -> bool:
    """Whether sequence parallelism is on: some tables write its degree. torchtitan's tensor parallelism has it
    always."""
    word = case.word("sp")
    if not case.stated("sp") and "torchtitan" in case.text("software").lower():
        return True
    if word in ("true", "yes", "on"):
        return True
    try:
        return word not in ("false", "no", "off") and case.whole("sp", 0) > 0
    except CaseError:
        raise CaseError(f"sp is {case.text('sp')!r}; it must be 0 or 1, or the degree") from None


def precision_of(case: Case, usual: str = "bf16") -> Any:
    """What the products compute in: the first word of the column that names a type ("bf16-mixed", "fp8 (hybrid)");
    `usual` where the row does not say."""
    if not case.stated("precision"):
        return usual
    words = re.split(r"[^a-z0-9]+", case.word("precision"))
    found = next((PRECISIONS[word] for word in words if word in PRECISIONS), None)
    if found is None:
        raise CaseError(f"precision is {case.text('precision')!r}; it must be fp32, tf32, fp16, bf16 or fp8")
    return found


def _cuts(case: Case, chunks: int) -> tuple[str, ...]:
    """Where chunks begin: equal numbers of blocks; embedding and loss count as a block each where only that divides;
    operators per stage where the notes list them (13 a block and 3 around them)."""
    layers = case.whole("layers", least=1)
    if chunks == 1:
        return ()
    if listed := re.search(r"operators per stage \[([\d, ]+)\]", case.text("notes")):
        counts = [int(n) for n in listed[1].split(",")]
        if len(counts) == chunks:
            ends = [round(sum(counts[: i + 1]) / 13) for i in range(chunks - 1)]
            return tuple(f"blocks.{min(e, layers)}" for e in ends)
    if layers % chunks and (layers + 2) % chunks == 0:
        size = (layers + 2) // chunks
        return tuple(f"blocks.{size * i - 1}" for i in range(1, chunks))
    vpp, ends = chunks // case.degree("pp"), [0]
    for chunk in range(chunks):  # a stage's share of the layers, then a chunk's share of the stage's
        turn, stage = divmod(chunk, chunks // vpp)
        own = layers * (stage + 1) * vpp // chunks - layers * stage * vpp // chunks
        ends.append(ends[-1] + own * (turn + 1) // vpp - own * turn // vpp)
    return tuple(f"blocks.{end}" for end in ends[1:-1])


def _shardings(case: Case, software: Software) -> tuple[tuple[str, Sharding], ...]:
    joined = software.joined
    gated = is_gated(case)
    columns = ["attn.qkv"] if joined else ["attn.q", "attn.k", "attn.v"]
    if family_of(case) == "moe_mla":  # what makes the latents stays whole, as in Megatron-Core
        columns = ["attn.q_up", "attn.kv_up"]
    dense = ["mlp.up"] if joined or not gated else ["mlp.up", "mlp.gate"]
    found: list[tuple[str, Sharding]] = []
    for i in range(TRACED_BLOCKS):
        whole = i > 0 and case.whole("moe_experts", 0) > 0  # experts are traced as one rank's part
        found += [(f"blocks.{i}.{name}", "colwise") for name in (columns if whole else columns + dense)]
        found += [(f"blocks.{i}.{name}", "rowwise") for name in (("attn.o",) if whole else ("attn.o", "mlp.down"))]
    return tuple(found)


def _recompute(case: Case) -> tuple[str, ...]:
    kind = case.word("recompute")
    notes = case.text("notes")
    if kind in ("none", ""):
        return ()
    if kind == "full" or "whole layers" in notes or "recomputed operators per stage" in notes:
        return tuple(f"blocks.{i}" for i in range(TRACED_BLOCKS))
    if kind != "selective":
        raise CaseError(f"recompute is {case.text('recompute')!r}; it must be none, full or selective")
    names = PER_OP if is_per_op(case) else BLOCK_MODULES_SELECTIVE
    return tuple(f"blocks.{i}.{name}" for i in range(TRACED_BLOCKS) for name in names)
