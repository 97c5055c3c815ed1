"""Notes of rows that are predicted otherwise than they say."""

from __future__ import annotations

import pytest

from costmodels.names import device_named
from tests.validation.test_cases import outcome_of, row
from validation import cases_notes
from validation.cases_model import attention_named
from validation.cases_notes import notes_of, notes_of_pictures

TITAN = {"software": "torchtitan", "zero_fsdp": "zero3", "tp": "1", "dp": "8", "pp": "1", "recompute": "selective",
         "family": "llama", "gated_mlp": "1", "precision": "bf16", "attention": "SDPA flash"}  # fmt: skip


def notes(**changes: str) -> tuple[str, ...]:
    return notes_of(row(**changes), device_named("A100 SXM4 80GB"))


def test_selective_recomputation_of_torchtitan_is_its_policy_by_operators() -> None:
    """`selective_ac_option = 'op'` in its configurations; other trainers recompute the core of attention."""
    plain, told, none = (outcome_of(**TITAN | more) for more in ({}, {"notes": "per-op list"}, {"recompute": "none"}))
    assert plain.predicted_seconds == told.predicted_seconds and plain.allocated_bytes == told.allocated_bytes
    assert (plain.allocated_bytes or 0) < (none.allocated_bytes or 0)
    assert (plain.predicted_seconds or 0) > (none.predicted_seconds or 0)
    (note,) = plain.notes
    assert note.startswith("selective recomputation is taken as torchtitan's per-op policy") and told.notes == ()
    layers = outcome_of(**TITAN | {"notes": "selective (whole layers, frequency not restated)"})
    assert layers.notes == () and layers.predicted_seconds != plain.predicted_seconds
    (other,) = notes(**TITAN | {"software": "Megatron-LM core 0.8"})
    assert "attention's core alone" in other
    assert notes(recompute="selective") == ()  # unfused: what Megatron's selective recomputation was made for


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"notes": "optimizer offloaded to CPU"}, True),
        ({"software": "DeepSpeed ZeRO-Offload"}, True),
        ({"notes": "no CPU offload; compiled"}, False),
        ({"notes": "offload: none"}, False),
        ({"notes": "not compiled; offload of activations"}, True),
    ],
)
def test_a_row_says_that_offload_is_left_out(text: dict[str, str], said: bool) -> None:
    assert any(note.startswith("offload is not predicted") for note in notes(**text)) == said


def test_a_row_says_that_megatron_refuses_a_round_that_is_not_full() -> None:
    found = {batch: notes(vpp="2", global_batch=batch) for batch in ("12", "16")}
    assert [note.startswith("3 micro-batches are no multiple of pp = 2") for note in found["12"]] == [True]
    assert found["16"] == () and notes(global_batch="12") == ()


def test_a_step_in_fp8_is_one_in_bf16_on_a_device_without() -> None:
    changes = {"attention": "flash", "software": "NeMo, Transformer Engine"}
    eight, sixteen = (outcome_of(precision=p, **changes) for p in ("fp8", "bf16"))
    assert eight.predicted_seconds == sixteen.predicted_seconds and eight.parts == sixteen.parts
    assert eight.reserved_bytes == sixteen.reserved_bytes
    hopper = [outcome_of(precision=p, gpu="H100 SXM5 80GB", **changes) for p in ("fp8", "bf16")]
    assert hopper[0].parts != hopper[1].parts


def test_the_price_of_a_missing_type_is_what_the_note_says() -> None:
    """T4's products in bf16 rest on A100's kernels, in tf32 on its own in float32."""
    said = {p: [n for n in notes_of(row(precision=p), device_named("T4")) if "has no" in n] for p in ("bf16", "tf32")}
    assert "kernels of A100 SXM4 80GB" in said["bf16"][0] and said["tf32"][0].endswith("at float32's rate")
    single, tf32, bf16 = (outcome_of(gpu="T4", precision=p).parts["gemm"] for p in ("fp32", "tf32", "bf16"))
    assert single == tf32 != bf16


def test_rates_that_no_type_of_the_device_has_are_said_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_named("T4")
    said = "Tesla T4 has no bfloat16: convolutions and products reach"
    assert notes_of_pictures(row(precision="bf16"), "bf16", device) == (f"{said} float32's rate at most",)
    monkeypatch.setattr(cases_notes, "peak_of", lambda device, dtype: 5e12)
    assert notes_of_pictures(row(precision="bf16"), "bf16", device) == (f"{said} 5 TFLOP/s at most",)


@pytest.mark.parametrize(
    ("words", "fused"),
    [
        ("FA2", True), ("fa-3", True), ("TE", True), ("mem_efficient", True), ("memory-efficient", True),
        ("Flash Attention 2", True), ("scaled_dot_product_attention", True), ("unfused", False),
        ("SDPA math", False), ("eager", False), ("core_attn", None), ("core", False), ("no flash", False),
        ("non-fused softmax", False), ("zigzag", None), ("", None),
    ],
)  # fmt: skip
def test_words_for_attention(words: str, fused: bool | None) -> None:
    assert attention_named(row(attention=words)) is fused


def test_words_that_are_not_known_are_said() -> None:
    (kernel, program) = notes(attention="zigzag", software="Frobnicator 3", tp="1", dp="4")
    assert "'zigzag' is not known and taken as one fused kernel" in kernel
    assert "'Frobnicator 3' is not known and predicted as Megatron-Core" in program
    assert notes(attention="zigzag", software="Megatron-LM 2022")[0].count("unfused") == 1
    assert notes(attention="", software="DeepSpeed") == notes(attention="FA2", software="") == ()
