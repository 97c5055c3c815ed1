"""Recurrent layers on accelerators: every road prices the kernel, a CPU still runs step by step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from costmodels.cluster import load_cluster, uncalibrated_core
from costmodels.ops import price, shape_of
from costmodels.rounding import in_precision
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.recurrent import reserve_bytes
from opgraph.workload import Workload, adamw, mean_square
from planner.estimate import bound_seconds, estimate
from planner.host_thread import Running
from planner.inference import infer
from planner.inference_graph import trace_forward
from planner.lower import lower
from planner.plan import ParallelPlan
from planner.predict import predict
from planner.search import search
from planner.software import HOST
from planner.step_costs import step_costs

H100 = load_cluster("dgx-h100")
SEQ, WIDTH, VOCAB = 64, 512, 500
PLAIN = ParallelPlan(8)


class Words(nn.Module):
    """A language model of `layers` GRUs, each a block."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def words(layers: int = 1, width: int = WIDTH, seq: int = SEQ) -> Workload:
    def batch(n: int):
        return (torch.randint(0, VOCAB, (n, seq)),), ()

    blocks = tuple(f"blocks.{i}" for i in range(layers))
    return Workload("words", lambda: Words(layers, width), batch, mean_square, adamw, 8, blocks)


@cache
def traced(layers: int = 1, width: int = WIDTH, seq: int = SEQ) -> OpGraph:
    return trace_workload(words(layers, width, seq))


def cpu():
    link = replace(H100.intra, bandwidth=1e9, latency=5e-5)
    return replace(
        H100, name="cpu", device=uncalibrated_core(2**40), nodes=1, devices_per_node=1, intra=link, inter=link,
        backend="gloo", cores=1, node_memory=2**40, cache={},
    )  # fmt: skip


def test_a_layer_of_512_steps_takes_far_less_than_its_launches_and_more_than_its_products():
    graph = trace_workload(words(1, WIDTH, 512), accelerator=True)
    found = predict(graph, PLAIN, H100)
    counts = [sum(not op.is_view for op in traced(1, 64, n).ops) for n in (16, 32)]
    launches = counts[1] + (512 - 32) * (counts[1] - counts[0]) // 16  # of a CPU's ops, all of which cost the host 8 us
    assert launches > 20 * 512
    assert found.step_seconds < 0.5 * launches * HOST["torch"].backward
    assert found.breakdown["host"] < 0.02 * found.step_seconds
    device = in_precision(H100, "fp32").device  # recurrent layers round to tf32
    layer = sum(price(device, shape_of(graph, op)).seconds for op in graph.ops if "cudnn_rnn" in op.name)
    products = sum(op.flops for op in graph.ops if "cudnn_rnn" in op.name) / H100.device.peak_flops["tf32"]
    assert max(products, 3 * 512 * 4e-6) < layer < found.step_seconds  # two kernels a step, backward twice of that
    assert "aten._cudnn_rnn.default" in found.unpriced


def test_one_kernel_beats_its_steps():
    slow, found = (predict(g, PLAIN, H100) for g in (replace(traced(), on_accelerators=None), traced()))
    assert found.step_seconds < slow.step_seconds / 3 and found.breakdown["host"] < slow.breakdown["host"] / 10


def test_flop_count_as_on_a_cpu():
    graph = traced()
    fast = lower(graph, PLAIN, H100)
    state = 3 * WIDTH * WIDTH
    assert fast.flops == graph.flops() + 2 * 8 * state  # the gradient of the first state: see tests/opgraph


def test_a_cpu_runs_step_by_step_as_before():
    graph = traced(1, 64, 16)
    before = replace(graph, on_accelerators=None)
    machine = cpu()
    now, then = (predict(g, PLAIN, machine) for g in (graph, before))
    assert now == then and not any("cudnn" in name for name in now.unpriced)
    assert bound_seconds(graph, PLAIN, machine) == bound_seconds(before, PLAIN, machine)


@pytest.mark.parametrize("plan", [PLAIN, ParallelPlan(8, dp=2), ParallelPlan(8, micro_batches=2)])
def test_the_estimate_is_what_is_simulated(plan):
    graph = traced(2)
    running = Running(cuda_graphs=True)
    found = predict(graph, plan, H100, cuda_graphs=True)
    estimated = estimate(step_costs(graph, H100, running), [plan])
    assert estimated.seconds[0] == pytest.approx(found.step_seconds, rel=0.02)
    assert 0.5 * found.step_seconds < estimated.bound_seconds[0] <= found.step_seconds
    assert estimated.need_bytes[0, 0] <= max(found.peak_bytes)


def test_search_and_pipelines_take_the_kernel():
    result = search(words(2), traced(2), H100, 8, devices=2, limit=8)
    best, slow = result.plans[0], replace(traced(2), on_accelerators=None)
    assert best.prediction.step_seconds < predict(slow, best.plan, H100).step_seconds / 2
    pipeline = next(r for r in result.plans if r.plan.pp == 2)
    assert pipeline.plan.cuts == ("blocks.1",) and "aten._cudnn_rnn.default" in pipeline.prediction.unpriced


def test_blocks_fold():
    whole, folded = (trace_workload(words(7, 64, 4), fold=fold) for fold in (False, True))
    assert folded.run_by("gpu").repeats and not whole.run_by("gpu").repeats
    for kind in ("cpu", "gpu"):
        found, wanted = (replace(g.run_by(kind), repeats=(), on_accelerators=None) for g in (folded, whole))
        assert found == wanted


def test_backward_keeps_the_reserve_space():
    graph, plan = traced(), ParallelPlan(8)
    fast = graph.run_by("gpu")
    kept = reserve_bytes(3, SEQ, 8, WIDTH, WIDTH, 1, 1, 4)
    slow = predict(replace(graph, on_accelerators=None), plan, H100)
    found = predict(graph, plan, H100)
    parameters = sum(t.bytes for t in graph.parameters.values())
    assert max(found.peak_bytes) > 3 * parameters + kept
    assert max(found.peak_bytes) < max(slow.peak_bytes)
    assert {s.bytes for s in fast.storages} >= {kept}


def test_compiled_steps_and_replayed_graphs_call_it_too():
    compiled = predict(traced(), PLAIN, H100, compiled=True)
    assert "aten._cudnn_rnn.default" in compiled.unpriced
    assert not any("cudnn" in chain for chain in compiled.fused)
    assert predict(traced(), PLAIN, H100, cuda_graphs=True).step_seconds <= predict(traced(), PLAIN, H100).step_seconds


def test_inference_reads_a_prompt_by_the_kernel():
    graph = trace_forward(words(), "bf16")
    found = infer(graph, None, H100, batch=8, prompt=SEQ, generate=0)
    slow = infer(replace(graph, on_accelerators=None), None, H100, batch=8, prompt=SEQ, generate=0)
    assert found.prefill.flops == slow.prefill.flops and found.prefill.seconds < slow.prefill.seconds / 2
    assert found.decode is None and "no KV cache" in found.no_decode
