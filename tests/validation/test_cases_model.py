"""What the words of a row say about its model and its trainer's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from costmodels.names import device_named
from planner.folded import context_of, predict_folded
from planner.folded_memory import State, memory_of, state_bytes
from planner.plan import ParallelPlan
from validation.cases import Case, CaseError
from validation.cases_cluster import cluster_of
from validation.cases_model import fused_attention, head_width_of, is_tied
from validation.cases_notes import notes_of
from validation.cases_software import software_of
from validation.cases_transformer import Traces, model_of, plan_of

LLAMA_1B = {"model": "Llama-3.2-1B", "family": "llama", "layers": "16", "hidden": "2048", "heads": "32",
            "kv_heads": "8", "ffn": "8192", "vocab": "128256"}  # fmt: skip
QWEN_32B = {"model": "Qwen3-32B", "family": "qwen", "layers": "64", "hidden": "5120", "heads": "64", "kv_heads": "8",
            "ffn": "25600", "vocab": "151936"}  # fmt: skip
PYTHIA = {"model": "Pythia-1.4B", "family": "gpt", "layers": "24", "hidden": "2048", "heads": "16",
          "kv_heads": "16", "ffn": "8192", "vocab": "50304"}  # fmt: skip


def row(**changes: str) -> Case:
    base = {"case_id": "a", "set": "s", "seq_len": "1024", "gpu": "H100 SXM5 80GB", "num_gpus": "8", "dp": "8",
            "global_batch": "8", "micro_batch": "1", "precision": "bf16", "software": "torchtitan"}  # fmt: skip
    return Case("transformer", base | LLAMA_1B | changes)


def parameters(case: Case) -> int:
    model = model_of(case, software_of(case), Traces())
    block = sum(t.numel for name, t in model.graph.parameters.items() if name.startswith("blocks.1."))
    around = sum(t.numel for name, t in model.graph.parameters.items() if not name.startswith("blocks."))
    return around + model.layers * block


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (LLAMA_1B, 1_235_814_400), (LLAMA_1B | {"notes": "untied embeddings"}, 1_498_482_688),
        (QWEN_32B, 32_762_112_000), (PYTHIA, 1_414_647_808),
    ],
)  # fmt: skip
def test_models_have_as_many_parameters_as_were_published(model: dict[str, str], published: int) -> None:
    """The counts of the models' own pages; Qwen3's norms of queries and keys (16,384 numbers) and Pythia's positions
    (which turn, where GPT's are learned: 2 million) are what remains."""
    assert parameters(row(**model)) == pytest.approx(published, rel=2e-3)


def test_widths_of_heads_and_tied_weights_are_read_from_the_row_first() -> None:
    assert head_width_of(row(head_dim="96"), 2048, 32) == 96
    assert head_width_of(row(notes="head_dim = 80; seen elsewhere"), 2048, 32) == 80
    assert head_width_of(row(notes="kv_channels 128"), 2048, 32) == 128
    assert head_width_of(row(), 2048, 32) == 64
    with pytest.raises(CaseError, match="head_dim must say how wide"):
        head_width_of(row(model="x"), 2048, 24)
    assert is_tied(row(), "llama") and not is_tied(row(notes="tie_word_embeddings=false"), "llama")
    assert not is_tied(row(model="Llama-3-8B"), "llama") and is_tied(row(model="Llama-3-8B", notes="tied"), "llama")
    assert is_tied(row(model="GPT-3"), "gpt") and not is_tied(row(model="GPT-NeoX-20B"), "gpt")


@pytest.mark.parametrize(
    ("software", "fused"),
    [
        ("Hugging Face transformers 4.45", True), ("Hugging Face transformers 4.30", False),
        ("transformers 4.36", True), ("Hugging Face", True), ("Hugging Face Transformers, PyTorch 2.1", True),
        ("HuggingFace Trainer, torch 2.4.0", True), ("Hugging Face + DeepSpeed 0.14", True),
        ("PyTorch 1.13, Hugging Face", False), ("HuggingFace==4.30.2", False), ("Hugging Face (2022)", False),
        ("Megatron-LM 2022", False), ("torchtitan", True),
    ],
)  # fmt: skip
def test_unstated_attention_is_what_the_trainer_of_that_time_runs(software: str, fused: bool) -> None:
    case = row(software=software)
    assert fused_attention(case) == fused
    said = [n for n in notes_of(case, device_named("H100 SXM5 80GB")) if n.startswith("attention is not stated")]
    assert len(said) == (software_of(case).name.startswith("Hugging"))


def test_context_parallelism_runs_with_fused_attention() -> None:
    case = row(attention="eager", cp="8", dp="1")
    assert fused_attention(case) and not fused_attention(row(attention="eager"))
    assert any("fused attention, which is predicted" in n for n in notes_of(case, device_named("H100 SXM5 80GB")))


def test_megatron_core_overlaps_sends_of_interleaved_stages_alone_and_sends_whole_tensors() -> None:
    """`overlap_p2p_comm` of megatron/training/arguments.py; `get_tensor_shapes` of its schedules."""
    plain, interleaved = (software_of(row(software="Megatron-Core", pp="4", vpp=v)) for v in ("1", "2"))
    assert not plain.p2p_overlap and interleaved.p2p_overlap
    assert not plain.p2p_split and software_of(row(software="Megatron-LM 2022")).p2p_split


def held(software: str, zero: Any = "ddp", **changes: str) -> State:
    case = row(software=software, **changes)
    plan = ParallelPlan(
        global_batch=8 * int(changes.get("micro_batches", 2)), dp=int(changes.get("dp", 8)), data_parallel=zero,
        micro_batches=int(changes.get("micro_batches", 2)), precision=changes.get("precision", "bf16"),  # type: ignore
    )  # fmt: skip
    return state_bytes(software_of(case), plan)


def test_bytes_that_trainers_hold_of_a_parameter() -> None:
    """Parameters, gradients, moments and masters: 16 in mixed precision (Rajbhandari et al. 2020, section 3.1), 18 with
    Megatron's gradients in float32; torch's buckets stand beside gradients, and the optimizer of Megatron of 2021
    copies them all."""
    assert held("Megatron-Core") == State(2, 4, 12)
    assert held("Megatron-Core", precision="fp8") == State(2, 4, 12, casts=2)
    assert held("Megatron-Core", precision="fp8", notes="fp8_param_gather") == State(2, 4, 12)
    assert held("Megatron-LM (2021)", precision="fp16") == State(2, 2, 12, at_step=4)
    assert held("Megatron-LM (2021)") == State(2, 4, 12)
    assert held("Megatron-LM 2022") == State(2, 4, 12)
    assert held("PyTorch DDP") == State(4, 8, 8, casts=2, at_step=4) == held("Hugging Face")
    assert held("PyTorch DDP", notes="no optimizer") == State(4, 8, 0, casts=2)
    assert held("PyTorch DDP", precision="fp32") == State(4, 8, 8, at_step=4)
    assert held("PyTorch DDP", micro_batches="1") == State(4, 4, 8, casts=2, at_step=8)
    assert held("PyTorch DDP", dp="1") == State(4, 4, 8, casts=2, at_step=4)
    assert held("PyTorch DDP", "zero1") == State(2, 2, 12)
    assert held("torchtitan", "fsdp", zero_fsdp="zero3") == State(4, 4, 8, at_step=4)
    assert held("Megatron-Core", "fsdp", precision="fp8") == State(4, 4, 8)
    assert replace(held("Composer"), at_step=4) == held("torchtitan") == held("PyTorch DDP")
    assert held("JAX") == State(2, 2, 12) == held("Hugging Face, Megatron layers")
    assert held("PyTorch DDP", precision="fp8") == State(2, 4, 12)
    assert held("torchtitan", "zero1", zero_fsdp="zero3", pp="2") == State(2, 4, 12)


@pytest.mark.parametrize("software", ["PyTorch DDP", "Megatron-LM (2021)"])
@pytest.mark.parametrize("dp", ["1", "8"])
def test_the_replay_holds_at_the_step_what_the_closed_form_does(software: str, dp: str) -> None:
    """A tied embedding is one parameter; the optimizer's step decides where activations are few."""
    case = row(model="GPT-2", family="gpt", layers="12", hidden="768", heads="12", kv_heads="12", ffn="3072",
               vocab="50257", seq_len="128", software=software, precision="fp16", dp=dp, num_gpus=dp, global_batch=dp,
               attention="flash")  # fmt: skip
    trainer = software_of(case)
    plan = plan_of(case, trainer)
    model, cluster = model_of(case, trainer, Traces()), cluster_of(case, {})
    found = [predict_folded(model, plan, cluster, trainer, replay) for replay in (False, True)]
    assert found[0].memory.at_step
    assert found[1].allocated_bytes == pytest.approx(found[0].allocated_bytes, rel=0.02)


def test_autocast_casts_no_tables() -> None:
    """Of GPT-2 in one stage: the blocks' weights and the head's, which is the embedding's."""
    case = row(model="GPT-2", family="gpt", layers="12", hidden="768", heads="12", kv_heads="12", ffn="3072",
               vocab="50257", software="PyTorch DDP", dp="1", num_gpus="1", global_batch="1")  # fmt: skip
    trainer = software_of(case)
    context = context_of(model_of(case, trainer, Traces()), plan_of(case, trainer), cluster_of(case, {}), trainer)
    blocks = 12 * 12 * 768 * 768
    held, elements = memory_of(context, 0).parameters, sum(context.elements(context.chunks[0]))
    assert held - 4 * elements == pytest.approx(2 * (blocks + 50257 * 768), rel=2e-3)


def test_adam_in_several_kernels_moves_what_torchs_does() -> None:
    """20 passes of 4 bytes in place of seven, over what a rank updates."""
    case = row(software="torchtitan", zero_fsdp="zero3")
    trainer, cluster = software_of(case), cluster_of(case, {})
    model, plan = model_of(case, trainer, Traces()), plan_of(case, trainer)
    one, several = (
        predict_folded(model, plan, cluster, replace(trainer, adam_passes=n)).device["optimizer"] for n in (0, 20)
    )
    share = parameters(case) / 8
    assert several - one > 4 * (20 - 7) * share / cluster.device.memory_bandwidth
    assert several - one < 1.5 * 4 * (20 - 7) * share / cluster.device.memory_bandwidth
