"""What a loss, a recomputed share and fp8 keep in memory: closed forms, and the op-by-op replay of the same step."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, get_args

import pytest
import torch

from costmodels.cluster import Cluster, Link
from costmodels.device import load_device
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.workload import Workload
from opgraph.zoo.transformer import Shape, workload
from planner.folded import context_of, predict_folded
from planner.folded_lifetimes import events_of
from planner.folded_memory import memory_of
from planner.folded_model import FoldedModel
from planner.lower import lower
from planner.memory import memory
from planner.plan import ParallelPlan
from planner.software import HOST, Loss, Software

SEQ, HIDDEN, VOCAB, LAYERS, MICRO = 128, 64, 4096, 3, 2
TOKENS = MICRO * SEQ
LOGITS = TOKENS * VOCAB  # elements
SHAPE = Shape(3, HIDDEN, 4, 4, 4 * HIDDEN, SEQ, VOCAB, dtype="bfloat16", attention="sdpa")
STYLES = tuple(
    (f"blocks.{i}.{name}", style)
    for i in range(3)
    for name, style in (("attn.qkv", "colwise"), ("mlp.up", "colwise"), ("attn.o", "rowwise"), ("mlp.down", "rowwise"))
)
EAGER = Software("test", HOST["graph"], "none", vocab_parallel=True)
KEPT = {"traced": 4 * LOGITS, "softmax": 4 * LOGITS, "logits": 2 * LOGITS, "in place": 2 * LOGITS}
BESIDES = {"traced": 4, "softmax": 9 * TOKENS, "logits": 4 * TOKENS, "in place": 12 * TOKENS}


class TwoNumbersALogit(torch.autograd.Function):
    """A loss as flash-attn's: it keeps the logits and a number a token, and makes their gradient in their dtype."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.logsumexp(logits, -1)
        ctx.save_for_backward(logits, total, targets)
        return (total - logits.gather(1, targets[:, None])[:, 0]).float().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, total, targets = ctx.saved_tensors
        found = (logits - total[:, None]).exp_()
        found.scatter_add_(1, targets[:, None], -torch.ones_like(total)[:, None])
        return found.mul_(gradients[0].to(found.dtype) / len(total)), None


def fused(y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = TwoNumbersALogit.apply(y.flatten(0, 1), targets.flatten())
    return loss


@lru_cache(maxsize=4)
def traced(dtype: str = "bfloat16", own_loss: bool = False, tied: bool = False) -> OpGraph:
    step = workload("gpt", replace(SHAPE, dtype=dtype, tied=tied))
    if own_loss:
        step = Workload(step.name, step.build, step.batch, fused, step.optimizer, step.batch_size, step.blocks)
    return trace_workload(step, fold=False)


@lru_cache(maxsize=1)
def cluster() -> Cluster:
    link = Link("NVLink", 3e11, 0.0)
    return Cluster("test", load_device("a100-sxm-80gb"), 8, 8, link, Link("IB", 2.5e10, 0.0))


def plan(**changes: Any) -> ParallelPlan:
    base = {"global_batch": 8, "micro_batches": 8 // MICRO, "precision": "bf16"} | changes
    return ParallelPlan(**base)


def model(layers: int = LAYERS, dtype: str = "bfloat16") -> FoldedModel:
    return FoldedModel(traced(dtype).at_batch(MICRO), layers, SEQ, VOCAB)


def part(software: Software, dtype: str = "bfloat16", **changes: Any) -> tuple[int, int]:
    """Bytes that the part with the loss keeps, and that exist beside them at most."""
    context = context_of(model(dtype=dtype), plan(**changes), cluster(), software)
    found = events_of(context, "last", False)
    sizes = {s: size for births, _ in found.forward for s, size in births}
    return sum(sizes[s] for s in found.kept), found.beside()


@pytest.mark.parametrize("fusion", ["none", "module", "chain"])
@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_loss_keeps_the_logits_once_in_the_dtype_that_its_program_keeps(loss: Loss, fusion: Any) -> None:
    """Beside what the final norm keeps it keeps one tensor as large as the logits, and a few bytes a token, however the
    rest is fused."""
    kept, _ = part(replace(EAGER, fusion=fusion, loss=loss, fused_loss=loss != "traced"))
    others = 2 * TOKENS * HIDDEN + 4 * TOKENS  # the norm's output, its mean and deviation
    others += 4 if loss == "traced" else 0  # the loss itself, which one kernel keeps to itself
    assert kept == KEPT[loss] + BESIDES[loss] + others


def test_the_gradient_of_the_logits_is_where_its_program_writes_it() -> None:
    beside = {loss: part(replace(EAGER, loss=loss))[1] for loss in get_args(Loss)}
    one = 4  # the gradient of the loss
    assert beside["traced"] == 8 * LOGITS  # of the log-softmax, and through it; the loss's gradient for its weight
    assert beside["softmax"] == 2 * LOGITS  # the logits beside their softmax
    assert beside["logits"] == 2 * LOGITS + one - BESIDES["logits"]  # their gradient
    head = 2 * VOCAB * HIDDEN + 2 * TOKENS * HIDDEN  # gradients of the head's weight and of what it read
    assert beside["in place"] == head + one - BESIDES["in place"]


def test_in_float32_nothing_is_copied() -> None:
    """Float32 logits turn into Megatron's softmax themselves."""
    kept = {loss: part(replace(EAGER, loss=loss), "float32", precision="fp32")[0] for loss in get_args(Loss)}
    assert kept["traced"] - BESIDES["traced"] == kept["logits"] - BESIDES["logits"]
    assert kept["softmax"] - BESIDES["softmax"] == kept["in place"] - BESIDES["in place"]


def test_ranks_that_split_the_vocabulary_keep_their_part() -> None:
    whole, split = (
        part(replace(EAGER, loss="in place"), **changes)[0]
        for changes in ({}, {"tp": 2, "shardings": STYLES})
    )
    # half the logits, and the numbers of both ranks
    assert whole - split == LOGITS - BESIDES["in place"]


def test_the_folded_loss_frees_what_the_op_by_op_replay_of_such_a_loss_frees() -> None:
    """The same model with the loss written as one function: traced, lowered and replayed on one device."""
    peaks = []
    for own in (False, True):
        graph = traced(own_loss=own).at_batch(MICRO)
        alone = ParallelPlan(global_batch=MICRO, micro_batches=1, precision=graph.precision)
        stages = lower(graph, alone, cluster()).stages
        (found,) = memory(stages, alone, "nccl")
        peaks.append(found.at_peak["activations"])
    folded = [
        predict_folded(model(), plan(global_batch=MICRO, micro_batches=1), cluster(), replace(EAGER, loss=loss)).memory
        for loss in ("traced", "logits")
    ]
    unfolded, closed = peaks[0] - peaks[1], sum((m.activations + m.workspace) * s for m, s in zip(folded, (1, -1)))
    assert closed == pytest.approx(unfolded, rel=0.01)
    assert unfolded == pytest.approx(8 * LOGITS, rel=0.01)  # 12 bytes a logit before, 4 after
    for m, peak in zip(folded, peaks):
        assert m.activations + m.workspace == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_the_replay_in_the_allocator_agrees_with_the_closed_form(loss: Loss) -> None:
    software = replace(EAGER, loss=loss)
    found = predict_folded(model(), plan(), cluster(), software, replay=True)
    assert found.allocated_bytes == pytest.approx(found.memory.allocated, rel=0.04)


def test_a_fused_loss_is_faster_also_where_nothing_else_is_fused() -> None:
    """It passes over the logits three times in their dtype: read, read and written."""
    eager, one = (
        predict_folded(model(), plan(), cluster(), replace(EAGER, loss=loss, fused_loss=loss != "traced")).step_seconds
        for loss in ("traced", "logits")
    )
    assert one < eager


def test_a_fused_norm_keeps_its_input_alone() -> None:
    shape = replace(SHAPE, norm="rms", positions="rope", bias=False)
    found = trace_workload(workload("llama", shape), fold=False).at_batch(MICRO)
    kept = []
    for norms in (False, True):
        software = replace(EAGER, fused_norms=norms)
        of = [
            memory_of(context_of(FoldedModel(found, n, SEQ, VOCAB), plan(), cluster(), software), 0).activations
            for n in (3, 4)
        ]
        kept.append(of[1] - of[0])
    spelled = 2 * 2 * (4 + 4) * TOKENS * HIDDEN // 2  # two norms: the float32 input, and that times the deviation
    assert kept[0] - kept[1] == pytest.approx(spelled, rel=0.01)


def test_attention_reads_and_leaves_its_heads_as_the_products_lay_them() -> None:
    """Turned queries lie token by token, so no copy stands between attention and the product after it."""
    graph = trace_workload(workload("llama", replace(SHAPE, norm="rms", positions="rope", bias=False)), fold=False)
    forward = [op.name for op in graph.ops if op.phase == "forward" and op.module == "blocks.1.attn"]
    assert "aten.clone.default" not in forward and "aten.transpose.int" in forward


def test_products_in_fp8_keep_their_inputs_in_fp8() -> None:
    """Both norms' results and the MLP's are read by products alone: a byte an element less. What attention made it
    keeps itself, so that in fp8 is a byte more."""
    kept = []
    for quantized in (False, True):
        software = replace(EAGER, fp8_inputs=quantized)
        context = context_of(model(), plan(precision="fp8"), cluster(), software)
        found = events_of(context, "block", False)
        sizes = {s: size for births, _ in found.forward for s, size in births}
        kept.append(sum(sizes[s] for s in found.kept))
    assert kept[0] - kept[1] == (1 + 1 + 4 - 1) * TOKENS * HIDDEN
    in_bf16 = [context_of(model(), plan(), cluster(), replace(EAGER, fp8_inputs=saved)) for saved in (False, True)]
    assert events_of(in_bf16[0], "block", False) == events_of(in_bf16[1], "block", False)


def test_a_share_of_the_blocks_is_recomputed_in_the_replay_too() -> None:
    regions = tuple(f"blocks.{i}" for i in range(3))
    peaks = [
        predict_folded(
            model(8), plan(recompute=regions), cluster(), replace(EAGER, recompute_share=share, loss="in place"), True
        ).allocated_bytes
        for share in (0.0, 0.5, 1.0)
    ]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[1] == pytest.approx((peaks[0] + peaks[2]) / 2, rel=0.05)


def test_a_compiler_saves_only_what_backward_reads_of_a_policys_products() -> None:
    """The block's last product is named by the policy that keeps every second one, and nothing needs it."""
    regions = tuple(f"blocks.{i}.{name}" for i in range(3) for name in ("norm1", "attn.qkv", "norm2", "mlp.up"))
    kept = []
    for fusion in ("module", "chain"):
        software = replace(EAGER, fusion=fusion, recompute_matmuls=0.5)
        context = context_of(model(), plan(recompute=regions), cluster(), software)
        last = [op for op in context.parts.pieces.forward["block"] if op.module == "blocks.1.mlp.down"]
        made = {context.parts.local.graph.tensors[t].storage for op in last if not op.is_view for t in op.outputs}
        kept.append(made <= events_of(context, "block", True).kept)
    assert kept == [True, False]
