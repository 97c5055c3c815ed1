"""Inference against closed forms (cache, FLOP, least time), its order in prompt and batch, and executed memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from costmodels.cluster import load_cluster
from opgraph.models import load_workload, with_length
from opgraph.workload import Workload, adamw, mean_square
from planner.inference import Inference, infer, stages_of
from planner.inference_graph import DTYPES, attentions, no_decode, trace_forward
from planner.inference_graph import decode_items as decode
from planner.plan import ParallelPlan
from planner.runtime import forward_script
from planner.script import Work
from tests.planner.conftest import LLAMA as SMALL_LLAMA
from tests.planner.conftest import forward_peak

H100 = load_cluster("dgx-h100")
GPT = "gpt2:layers=3,hidden=128,heads=4,vocab=512,seq=64"
LLAMA = "llama3-8b:layers=3,hidden=256,heads=8,kv_heads=2,ffn=512,vocab=512,seq=64"
BIG = "llama3-70b"
SHORT = "llama3-70b:layers=8"
SIZE = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # of the cache: in bfloat16 beside weights in fp8


@cache
def graphs(spec: str, prompt: int, precision: str = "bf16"):
    return tuple(trace_forward(with_length(spec, n), precision) for n in (prompt, 1))


def run(spec: str, batch: int = 1, prompt: int = 64, generate: int = 32, precision: str = "bf16", **more) -> Inference:
    whole, token = graphs(spec, prompt, precision)
    return infer(whole, token, H100, batch=batch, prompt=prompt, generate=generate, **more)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("spec", "kv_heads", "width"), [(GPT, 4, 32), (LLAMA, 2, 32)])
def test_the_cache_is_keys_and_values_of_every_layer(spec, kv_heads, width, precision, tp):
    found = run(spec, batch=6, precision=precision, tp=tp, dp=2)
    assert found.kv_cache_bytes == 2 * 3 * kv_heads * width * (64 + 32) * 6 * SIZE[precision]
    assert found.cache_per_rank * 2 * tp == found.kv_cache_bytes
    assert found.peak_bytes > found.cache_per_rank + found.parameter_bytes


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("spec", "heads"), [(GPT, 4), (LLAMA, 8)])
def test_flop_are_those_of_the_weights_and_of_all_pairs(spec, heads, batch):
    """2 FLOP a weight of a product and token; 4 x head dim a head and pair of tokens (torch counts all pairs)."""
    found = run(spec, batch)
    whole, _ = graphs(spec, 64)
    ids = ("embed", "positions") if "llama" in spec else ("positions",)  # gpt2's head is its embedding
    weights = sum(
        t.numel for n, t in whole.parameters.items() if len(t.shape) == 2 and n.rpartition(".")[0] not in ids
    )
    pairs = 4 * 3 * heads * 32
    assert found.prefill.flops == batch * (2 * weights * 64 + pairs * 64 * 64)
    assert found.last.flops == batch * (2 * weights + pairs * (64 + 32))
    assert found.decode.flops == batch * (2 * weights + pairs * (64 + 16))


@pytest.mark.parametrize(("spec", "batch", "tp"), [(BIG, 1, 8), (SHORT, 64, 8), (SHORT, 8, 4)])
def test_decode_reads_weights_and_cache_at_the_bandwidth_at_best(spec, batch, tp):
    """Llama 3 70B in bf16: 140 GB on 8 GPUs of 3.35 TB/s take 5.2 ms a token."""
    found = run(spec, batch, 1024, 512, tp=tp, cuda_graphs=True)
    table = 128256 * 8192 * 2 // tp  # a rank's part of the embedding, rows of which are read
    read = found.parameter_bytes - table + found.cache_per_rank * (1024 + 256) // (1024 + 512)
    least = read / H100.device.memory_bandwidth
    assert least < found.decode.seconds < 4 * least
    assert found.fits and found.largest_decode_batch > found.largest_batch > 8
    if spec == BIG:
        assert found.decode.seconds > 5.2e-3


def test_time_grows_with_prompt_and_batch():
    by_prompt = [run(SHORT, 4, prompt, 64, tp=8, cuda_graphs=True) for prompt in (512, 2048, 8192)]
    by_batch = [run(SHORT, batch, 2048, 64, tp=8, cuda_graphs=True) for batch in (1, 16, 128)]
    for rows in (by_prompt, by_batch):
        for less, more in pairwise(rows):
            assert less.prefill.seconds < more.prefill.seconds
            assert less.decode.seconds < more.decode.seconds
            assert less.kv_cache_bytes < more.kv_cache_bytes and less.peak_bytes < more.peak_bytes
        assert all(r.decode.seconds <= r.last.seconds for r in rows)
    assert by_batch[0].largest_batch == by_batch[1].largest_batch
    assert by_batch[0].tokens_per_second < by_batch[1].tokens_per_second


def test_the_largest_batch_fits_and_one_more_does_not():
    whole, token = graphs(LLAMA, 64)
    small = replace(H100, device=replace(H100.device, memory_bytes=2**26), cache={})

    def at(batch: int) -> Inference:
        return infer(whole, token, small, batch=batch, prompt=64, generate=32, tp=2)

    found = at(8)
    assert 8 < found.largest_batch < found.largest_decode_batch
    assert at(found.largest_batch).fits and not at(found.largest_batch + 1).fits
    assert at(found.largest_batch + 1).largest_batch == found.largest_batch


def test_a_small_model_waits_for_the_host_unless_graphs_are_replayed():
    eager, graph = run(GPT), run(GPT, cuda_graphs=True)
    assert eager.decode.host_bound and not graph.decode.host_bound
    assert eager.decode.seconds > 3 * graph.decode.seconds
    assert any("host thread" in note for note in eager.notes)
    assert not any("host thread" in note for note in graph.notes)
    assert graph.request_seconds == pytest.approx(graph.prefill.seconds + 31 * graph.decode.seconds)


def test_replicas_share_the_batch():
    one, two = run(GPT, 4), run(GPT, 8, dp=2)
    assert two.decode.seconds == pytest.approx(one.decode.seconds)
    assert two.peak_bytes == one.peak_bytes and two.largest_batch == 2 * one.largest_batch
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)


def test_an_encoder_has_a_prefill_only():
    spec = "bert-base:layers=2,hidden=64,heads=2,vocab=128"
    whole = trace_forward(with_length(spec, 32), "bf16")
    assert "no decoder" in no_decode(whole)
    found = infer(whole, None, H100, batch=2, prompt=32, generate=8)
    assert found.decode is None and found.kv_cache_bytes == 0 and found.prefill.seconds > 0
    assert "no KV cache" in no_decode(trace_forward(load_workload("mlp:layers=2,hidden=32"), "fp32"))


def test_what_does_not_fit_together_is_said():
    with pytest.raises(ValueError, match="use a multiple of 2"):
        run(GPT, 3, dp=2)
    with pytest.raises(ValueError, match="needs 16 devices"):
        run(GPT, 4, dp=4, tp=4)
    with pytest.raises(ValueError, match="tp = 3"):
        run(GPT, 4, tp=3)


def test_decode_runs_the_ops_of_a_real_step_with_a_cache():
    """Attention of one query over a cache of 40 tokens: the shapes that torch's own op gets."""
    (stage,) = stages_of(graphs(SMALL_LLAMA, 16, "fp32")[1], ParallelPlan(8))
    items = decode(forward_script(stage), 40, stage.graph)
    works = [w for w in items if isinstance(w, Work) and "attention" in w.shape.name]
    q, k, v = torch.empty(8, 4, 1, 32), torch.empty(8, 2, 40, 32), torch.empty(8, 2, 40, 32)
    assert [w.shape.in_shapes[:3] for w in works] == [(tuple(q.shape), tuple(k.shape), tuple(v.shape))] * 2
    assert all(not w.shape.causal for w in works)
    assert all(w.shape.bytes_read == 4 * (q.numel() + k.numel() + v.numel()) for w in works)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert all(w.shape.out_shapes[0] == tuple(out.shape) for w in works)


@pytest.mark.parametrize("spec", [GPT, LLAMA])
def test_the_forward_pass_holds_what_a_real_one_allocates(spec, uncalibrated):
    """By torch's profiler, under no_grad on this CPU: to the byte, without the cache."""
    workload = with_length(spec, 64)
    whole = trace_forward(workload, "fp32")
    found = infer(whole, None, uncalibrated, batch=workload.batch_size, prompt=64, generate=0)
    torch.manual_seed(0)
    module, (inputs, _) = workload.build().eval(), workload.batch(workload.batch_size)
    assert found.peak_bytes - found.cache_per_rank == pytest.approx(forward_peak(module, inputs), rel=0.002)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.layers(x)


def test_torchs_own_encoder_runs_op_by_op():
    workload = Workload("encoder", Encoder, lambda n: ((torch.ones(n, 6, 16),), ()), mean_square, adamw, 3)
    graph = trace_forward(workload, "fp32")
    assert len(attentions(graph)) == 2 and torch.backends.mha.get_fastpath_enabled()
    tokens, products = 3 * 6, 2 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 32)
    assert graph.flops() == 2 * tokens * products + 2 * 2 * 2 * tokens * 6 * 16


def test_weights_in_fp8_take_half_the_memory_and_less_time_to_read():
    """Of Llama 3 8B all but embedding and head (1 GiB each in bf16) lie in blocks."""
    short = "llama3-8b:layers=4"
    found = {p: run(short, precision=p, cuda_graphs=True) for p in ("bf16", "fp16", "fp8")}
    blocks = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert found["bf16"].parameter_bytes - found["fp8"].parameter_bytes == blocks
    assert found["fp8"].peak_bytes < found["bf16"].peak_bytes - 0.95 * blocks
    token = {p: f.decode.seconds for p, f in found.items()}
    assert 0.5 * token["bf16"] < token["fp8"] < 0.9 * token["bf16"]
    assert token["fp16"] == pytest.approx(token["bf16"], rel=0.05)
    with pytest.raises(ValueError, match="products in fp8 on the CPUs"):
        infer(*graphs(LLAMA, 16, "fp8"), load_cluster("local"), batch=1, prompt=16, generate=4)
