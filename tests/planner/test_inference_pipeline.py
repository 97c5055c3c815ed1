"""Inference through pipeline stages: exact sums of stages and messages, and what each stage holds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from costmodels.cluster import load_cluster
from costmodels.collectives import collective_price
from costmodels.variability import synchronous
from opgraph.models import with_length
from planner.host_thread import Running
from planner.inference import Inference, infer, stages_of
from planner.inference_graph import decode_items, prefill_items, trace_forward
from planner.inference_pipeline import TOKEN
from planner.lower import lower_scripts
from planner.runtime import forward_script
from simulator import simulate

H100, TWO_NODES = load_cluster("dgx-h100"), load_cluster("2x dgx-h100")
LLAMA = "llama3-8b:layers=6,hidden=512,heads=8,kv_heads=2,ffn=1024,vocab=2000"
PROMPT, GENERATE, HIDDEN = 128, 32, 512
REPLAYED = Running(cuda_graphs=True, autograd=False)


@cache
def graphs():
    return tuple(trace_forward(with_length(LLAMA, n), "bf16") for n in (PROMPT, 1))


def run(batch: int = 4, cluster=H100, cuda_graphs: bool = True, **more) -> Inference:
    whole, token = graphs()
    return infer(whole, token, cluster, batch=batch, prompt=PROMPT, generate=GENERATE, cuda_graphs=cuda_graphs, **more)


def alone(found: Inference, cluster=H100) -> tuple[list[float], list[float]]:
    """Seconds of each stage by itself, for one micro-batch: prefill, and decode at the longest context."""
    passes: tuple[list[float], list[float]] = [], []
    for which, graph in enumerate(graphs()):
        for stage in stages_of(graph, found.plan):
            items = forward_script(stage)
            items = decode_items(items, PROMPT + GENERATE, stage.graph) if which else prefill_items(items)
            one, first = replace(found.plan, pp=1, cuts=()), replace(stage, ops=replace(stage.ops, index=0))
            paced = synchronous(cluster, found.plan.pp)
            lowered = lower_scripts([[[tuple(items)]]], (first,), one, paced, REPLAYED)
            passes[which].append(simulate(lowered.program).makespan)
    return passes


def send(nbytes: int, source: int, target: int, cluster=H100) -> float:
    return collective_price(cluster, "send", nbytes, (source, target), firsts=range(source, source + 1)).seconds


def test_without_a_pipeline_nothing_changes():
    one = run()
    (prefill,), (decode,) = alone(one)
    assert one.prefill.seconds == pytest.approx(prefill) and one.last.seconds == pytest.approx(decode)
    assert one.plan.cuts == () and one == run(pp=1, micro_batches=1)


@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("cluster", [H100, TWO_NODES], ids=["one node", "two nodes"])
def test_latency_is_the_sum_of_stages_and_sends(pp, cluster):
    found = run(pp=pp, cluster=cluster)
    prefill, last = alone(found, cluster)
    hidden = 4 * HIDDEN * 2
    between = [send(PROMPT * hidden, s, s + 1, cluster) for s in range(pp - 1)]
    assert found.prefill.seconds == pytest.approx(sum(prefill) + sum(between))
    between = [send(hidden, s, s + 1, cluster) for s in range(pp - 1)]
    back = send(4 * TOKEN, pp - 1, 0, cluster)
    assert found.last.seconds == pytest.approx(sum(last) + sum(between) + back)
    assert found.tokens_per_second == pytest.approx(4 / found.decode.seconds)


def test_stages_split_work_cache_and_parameters():
    one, three = run(), run(pp=3)
    assert three.prefill.flops == one.prefill.flops and three.decode.flops == one.decode.flops
    assert three.kv_cache_bytes == one.kv_cache_bytes == 2 * 6 * 2 * 64 * (PROMPT + GENERATE) * 4 * 2
    stages = stages_of(graphs()[0], three.plan)
    layers = [len({op.module for op in s.ops.forward if "attention" in op.name}) for s in stages]
    assert sum(layers) == 6 and three.cache_per_rank * 6 == one.kv_cache_bytes * max(layers)
    assert three.cache_per_rank < one.cache_per_rank and three.parameter_bytes < one.parameter_bytes
    held = [sum(p.bytes for p in s.parameters.values()) for s in stages]
    assert sum(held) == one.parameter_bytes and max(held) == three.parameter_bytes
    assert three.peak_bytes < one.peak_bytes and three.peak_bytes > three.parameter_bytes + three.cache_per_rank


def test_the_fullest_stage_decides_what_fits():
    found = run(pp=2)
    tight = replace(H100, device=replace(H100.device, memory_bytes=found.peak_bytes), cache={})
    assert run(pp=2, cluster=tight).fits and not run(cluster=tight).fits
    less = replace(H100, device=replace(H100.device, memory_bytes=found.peak_bytes - 1), cache={})
    assert not run(pp=2, cluster=less).fits
    most = run(pp=2, cluster=tight).largest_batch
    assert most >= 4 and run(batch=most, pp=2, cluster=tight).fits


def test_micro_batches_fill_the_pipeline():
    """From token to token: the slowest stage with all micro-batches, or one of them through all stages, whichever takes
    longer; a prompt pays the other stages once."""
    found = run(batch=8, pp=2, micro_batches=4)
    prefill, last = alone(found)
    hidden = 2 * HIDDEN * 2
    latency = sum(last) + send(hidden, 0, 1) + send(2 * TOKEN, 1, 0)
    busiest = 4 * max(last)
    assert busiest > latency
    assert busiest * (1 - 1e-9) <= found.last.seconds <= 1.35 * busiest
    least = max(sum(prefill) + 3 * max(prefill), 0.0)
    assert least < found.prefill.seconds < 1.3 * least
    together = run(batch=8, pp=2)
    assert found.prefill.flops == together.prefill.flops and found.decode.flops == together.decode.flops
    assert found.kv_cache_bytes == together.kv_cache_bytes and found.peak_bytes < together.peak_bytes


def test_a_long_prompt_gains_from_micro_batches():
    together, apart = (run(batch=1024, pp=2, micro_batches=m) for m in (1, 8))
    assert 0.5 * together.prefill.seconds < apart.prefill.seconds < 0.75 * together.prefill.seconds


def test_parallel_axes_go_together_and_the_host_feeds_every_stage():
    found = run(batch=8, pp=2, tp=2, dp=2)
    assert found.plan.world_size == 8 and found.kv_cache_bytes == run(batch=8).kv_cache_bytes
    assert found.cache_per_rank * 8 == found.kv_cache_bytes
    eager = run(batch=8, pp=2, cuda_graphs=False)
    assert eager.decode.host_bound and sum(eager.decode.breakdown.values()) == pytest.approx(eager.decode.seconds)
    filled = run(batch=8, pp=2, micro_batches=2, cuda_graphs=False)
    assert sum(filled.decode.breakdown.values()) == pytest.approx(filled.decode.seconds)
    assert filled.tokens_per_second < 2 * eager.tokens_per_second


def test_what_is_not_possible_is_said():
    with pytest.raises(ValueError, match="places to cut"):
        run(pp=16, cluster=TWO_NODES)
    with pytest.raises(ValueError, match="add pp2"):
        run(micro_batches=2)
    with pytest.raises(ValueError, match="use a multiple of 4"):
        run(batch=6, pp=2, micro_batches=4)
    with pytest.raises(ValueError, match="takes 1 to 8"):
        run(batch=16, pp=2, dp=8)
