"""`parplan infer`, and the options of `simulate` and `search` that assume compiled steps."""

from __future__ import annotations

import pytest

SMALL = "llama3-8b:layers=3,hidden=128,heads=4,kv_heads=2,ffn=256,vocab=512"
ON = ("--cluster", "dgx-h100")


def test_infer_prints_latency_cache_and_memory(parplan):
    words = ("infer", SMALL, *ON, "--plan", "tp2", "--batch", 4, "--prompt", 64, "--generate", 16)
    data = parplan(*words, "--json").data
    assert data["kv_cache_bytes"] == 2 * 3 * 2 * 32 * 80 * 4 * 2
    assert data["interval"][0] < data["prefill_seconds"] < data["interval"][1]
    assert data["decode_seconds_per_token"] <= data["decode_seconds_last_token"]
    assert data["tokens_per_second"] == pytest.approx(4 / data["decode_seconds_per_token"])
    assert data["fits"] and data["largest_batch"] >= 4 and data["host_bound"] and data["no_decode"] is None
    assert sum(data["shares"].values()) == pytest.approx(1) and data["label"] == "tp2"
    text = parplan(*words, "--compile", "--cuda-graphs")
    assert text.code == 0 and "KV cache" in text.out and "torch.compile, CUDA graphs" in text.out


def test_compiled_decode_is_faster(parplan):
    words = ("infer", SMALL, *ON, "--prompt", 64, "--generate", 16, "--json")
    eager, compiled = parplan(*words).data, parplan(*words, "--compile").data
    assert compiled["decode_seconds_per_token"] < 0.7 * eager["decode_seconds_per_token"]
    assert compiled["assumed"] == ["torch.compile"] and compiled["kv_cache_bytes"] == eager["kv_cache_bytes"]


def test_a_pipeline_and_experts_are_said(parplan):
    words = ("infer", SMALL, *ON, "--prompt", 64, "--generate", 16, "--batch", 4, "--json", "--cuda-graphs")
    one, two, four = (parplan(*words, "--plan", plan).data for plan in ("single", "pp2", "pp2 mb2"))
    assert two["label"] == "pp2 gpipe" and four["label"] == "pp2 gpipe mb2"
    assert two["decode_seconds_per_token"] > one["decode_seconds_per_token"] > 0
    assert two["kv_cache_bytes"] == one["kv_cache_bytes"] > two["kv_cache_bytes_per_rank"]
    model = "mixtral-8x7b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=128,vocab=512"
    found = parplan("infer", model, *ON, "--prompt", 64, "--generate", 16, "--json").data
    assert found["assumed"] == ["uniform routing: 1 tokens choose 2 of 8 experts a layer"]


def test_an_encoder_gets_a_prefill_and_a_reason(parplan):
    model = "bert-base:layers=2,hidden=64,heads=2,vocab=128,positions=40"  # no room beyond the prompt
    result = parplan("infer", model, *ON, "--prompt", 32, "--json")
    assert result.code == 0 and "no decoder" in result.err
    assert result.data["decode_seconds_per_token"] is None and result.data["prefill_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mlp",), "mlp takes no sequence of tokens, so it has no prompt"),
        (("gpt2", "--prompt", 1024), "1152"),
        ((SMALL, "--plan", "mb2"), "there is none; add pp2"),
        ((SMALL, "--plan", "pp8"), "places to cut"),
        ((SMALL, "--plan", "pp2 mb2", "--batch", 3), "use a multiple of 2"),
        ((SMALL, "--plan", "pp2 recompute"), "more than inference knows"),
        ((SMALL, "--plan", "dp2 offload-optimizer"), "more than inference knows"),
        ((SMALL, "--plan", "dp2 zero1"), "more than inference knows"),
        ((SMALL, "--plan", "dp2 zero2"), "more than inference knows"),
        ((SMALL, "--plan", "tp2 bf16", "--precision", "fp32"), "--precision says the precision"),
        ((SMALL, "--batch", 0), "--batch is 0"),
        ((SMALL, "--generate", -1), "--generate is -1"),
        (("file.py:make",), "makes its own inputs, whose prompt cannot be set"),
        ((SMALL, "--precision", "int4"), "fp32, tf32, bf16, fp16 or fp8"),
    ],
)  # fmt: skip
def test_what_cannot_be_inferred_is_one_sentence(parplan, words, said):
    result = parplan("infer", *words, *ON)
    assert result.code == 2 and said in result.err and result.out == ""


def test_simulate_and_search_take_compiled_steps(parplan):
    model = "mlp:layers=3,hidden=64"
    words = ("simulate", model, *ON, "--plan", "dp2", "-b", 8)
    eager, compiled = parplan(*words, "--json").data, parplan(*words, "--compile", "--json").data
    assert compiled["step_seconds"] < eager["step_seconds"] and eager["fused"] == {}
    assert compiled["fused"] and compiled["assumed"] == ["torch.compile"]
    assert "fused" in parplan(*words, "--compile").out
    found = parplan("search", model, *ON, "-b", 8, "--devices", 2, "--compile", "--cuda-graphs", "--json").data
    assert found["assumed"] == ["torch.compile", "CUDA graphs"]
    assert all(p["bound_seconds"] <= p["step_seconds"] and p["gap"] >= 0 for p in found["plans"])
