"""Model and plan of a published transformer run, from its dimensions and degrees."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from planner.folded_model import FoldedModel
from planner.folded_pieces import TRACED_BLOCKS
from planner.plan import DataParallel, ParallelPlan, Sharding
from planner.software import Software
from validation.cases import Case, CaseError

BLOCK_MODULES_SELECTIVE = ("attn.core",)
# Per-operator policy of torchtitan: every second product and attention are kept, all else is made again.
PER_OP = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "attn.rope_q", "attn.rope_k", "norm2", "mlp.up", "mlp.gate",
          "mlp.act")  # fmt: skip
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
    from opgraph.zoo.transformer import Experts, Latent, Shape

    family, precision = case.text("family"), case.text("precision")
    if family not in ("gpt", "mpt", "llama", "gpt_gqa_relu2", "bert", "moe_mla"):
        raise CaseError(f"family {family!r} is none of gpt, mpt, llama, gpt_gqa_relu2, bert, moe_mla")
    tp, cp, ep = case.whole("tp", 1), case.whole("cp", 1), case.whole("ep", 1)
    seq = case.whole("seq_len")
    if seq % cp:
        raise CaseError(f"seq_len {seq} does not divide into cp = {cp} parts")
    kernel = case.text("attention").lower()
    unfused = kernel.startswith(("unfused", "eager")) or "no flash" in kernel
    fused = not unfused and any(w in kernel for w in ("flash", "fused", "cudnn", "sdpa"))
    experts = None
    moe = case.whole("moe_experts", 0)
    if moe:
        if tp > 1:
            raise CaseError("experts together with tensor parallelism are not predicted yet")
        shared = re.search(r"shared-expert ffn (\d+)", case.text("notes"))
        width = int(shared[1]) if shared else 0
        experts = Experts(moe // ep, moe, case.whole("moe_topk"), case.whole("moe_ffn"), width)
    old = ("megatron" in case.text("software").lower() and not fused) or family == "bert"
    vocab = case.whole("vocab")
    padded = ceil(vocab / (128 * tp)) * 128 * tp if software.vocab_parallel else vocab
    llama = family in ("llama", "moe_mla")
    shape = Shape(
        layers=TRACED_BLOCKS, hidden=case.whole("hidden"), heads=case.whole("heads"),
        kv_heads=case.whole("kv_heads", case.whole("heads")), ffn=case.whole("ffn"), seq=seq // cp, vocab=padded,
        norm="rms" if llama else "layer",
        mlp=_activation(case),
        positions="rope" if llama or family == "gpt_gqa_relu2" else "learned",
        attention="sdpa" if fused else "math", causal=family != "bert",
        bias=family in ("gpt", "mpt", "bert"), post_norm=family == "bert", tied=family in ("gpt", "mpt", "bert"),
        joined=software.fusion == "module" or family == "mpt", dropout=0.1 if old else 0.0,
        predicted=_predicted(case),
        latent=Latent() if family == "moe_mla" else None, experts=experts,
        dtype={"fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}.get(precision, "float32"),
    )  # fmt: skip
    name = f"{family}{' tied' if shape.tied else ''}"
    graph = traces.graph(name, shape, case.whole("micro_batch"))
    return FoldedModel(graph, case.whole("layers"), seq // cp, padded, first_differs=experts is not None)


def _activation(case: Case) -> Any:
    """What stands between the products of an MLP. Hugging Face's GPT-2 spells GELU out ("gelu_new", the default of its
    configuration and the value in NeuSight's); its OPT has one kernel (ReLU), and Megatron's layers have their own."""
    name, family = case.text("software").lower(), case.text("family")
    if case.whole("gated_mlp", 0):
        return "swiglu"
    if family == "gpt_gqa_relu2":
        return "relu2"
    spelled = family == "gpt" and "hugging face" in name and "megatron" not in name
    return "gelu_new" if spelled and case.text("model").lower().startswith("gpt") else "gelu"


def _predicted(case: Case) -> int:
    """Positions whose logits are made: the masked ones in BERT pre-training. NVIDIA's PyTorch scripts of that time
    make those of all positions."""
    masked = case.text("family") == "bert" and "pre-training" in case.text("notes")
    return PREDICTIONS_PER_SEQUENCE if masked and "pytorch" not in case.text("software").lower() else 0


def plan_of(case: Case, software: Software) -> ParallelPlan:
    """The plan of a row."""
    dp, tp, pp, cp = (case.whole(axis, 1) for axis in ("dp", "tp", "pp", "cp"))
    if dp * tp * pp * cp != case.whole("num_gpus"):
        raise CaseError(f"dp x tp x pp x cp = {dp * tp * pp * cp} differs from num_gpus = {case.whole('num_gpus')}")
    batch, micro = case.whole("global_batch"), case.whole("micro_batch")
    if not micro or batch % (dp * micro):
        raise CaseError(f"global_batch {batch} is no multiple of dp x micro_batch = {dp} x {micro}")
    zero: dict[str, DataParallel] = {"none": "ddp", "": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "fsdp"}
    if case.text("zero_fsdp") not in zero:
        raise CaseError(f"zero_fsdp is {case.text('zero_fsdp')!r}; it must be none, zero1, zero2 or zero3")
    try:
        return ParallelPlan(
            global_batch=batch, pp=pp, dp=dp, tp=tp, cp=cp, ep=case.whole("ep", 1), vpp=case.whole("vpp", 1),
            micro_batches=batch // (dp * micro), data_parallel=zero[case.text("zero_fsdp")],
            cuts=_cuts(case, pp * case.whole("vpp", 1)), shardings=_shardings(case, software) if tp > 1 else (),
            recompute=_recompute(case), precision=_precision(case), sequence_parallel=case.text("sp") == "1" and tp > 1,
        )  # fmt: skip
    except ValueError as error:
        raise CaseError(str(error)) from None


def _precision(case: Case) -> Any:
    precision = case.text("precision")
    if precision not in ("fp32", "tf32", "fp16", "bf16", "fp8"):
        raise CaseError(f"precision is {precision!r}; it must be fp32, tf32, fp16, bf16 or fp8")
    return precision


def _cuts(case: Case, chunks: int) -> tuple[str, ...]:
    """Where chunks begin: equal numbers of blocks; embedding and loss count as a block each where only that divides;
    operators per stage where the notes list them (13 a block and 3 around them)."""
    layers = case.whole("layers")
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
    return tuple(f"blocks.{i * layers // chunks}" for i in range(1, chunks))


def _shardings(case: Case, software: Software) -> tuple[tuple[str, Sharding], ...]:
    joined = software.fusion == "module"
    gated = bool(case.whole("gated_mlp", 0))
    columns = ["attn.qkv"] if joined else ["attn.q", "attn.k", "attn.v"]
    columns += ["mlp.up"] if joined or not gated else ["mlp.up", "mlp.gate"]
    found: list[tuple[str, Sharding]] = []
    for i in range(TRACED_BLOCKS):
        found += [(f"blocks.{i}.{name}", "colwise") for name in columns]
        found += [(f"blocks.{i}.{name}", "rowwise") for name in ("attn.o", "mlp.down")]
    return tuple(found)


def _recompute(case: Case) -> tuple[str, ...]:
    kind = case.text("recompute")
    notes = case.text("notes")
    if kind in ("none", ""):
        return ()
    if kind == "full" or "whole layers" in notes or "recomputed operators per stage" in notes:
        return tuple(f"blocks.{i}" for i in range(TRACED_BLOCKS))
    if kind != "selective":
        raise CaseError(f"recompute is {kind!r}; it must be none, full or selective")
    names = PER_OP if "per-op" in notes else BLOCK_MODULES_SELECTIVE
    return tuple(f"blocks.{i}.{name}" for i in range(TRACED_BLOCKS) for name in names)
