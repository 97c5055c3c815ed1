"""Steps of models without repeated blocks: micro-batches, replicas of pipelines, and what a stage holds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from costmodels.cluster import Cluster, Link
from costmodels.collectives import collective_price
from costmodels.device import load_device
from opgraph.graph import OpGraph
from opgraph.trace import trace
from planner.folded import FoldedPrediction
from planner.folded_memory import Memory
from planner.plan import ParallelPlan
from planner.software import HOST, Software
from planner.stages import stage_ops
from planner.whole_memory import whole_memory
from planner.whole_step import Sharing, predict_whole

SOFTWARE = Software("test", HOST["graph"], "none", fused_accumulation=False, main_grads=0, optimizer="sgd")
WIDTH, LAYERS, SAMPLES = 1024, 8, 64
FULL = 4 * WIDTH * WIDTH  # bytes of a layer's weight
RECOMPUTE = ("",)
ALL_REDUCE = Sharing()


@lru_cache(maxsize=8)
def graph(batch: int) -> OpGraph:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Sigmoid()) for _ in range(LAYERS)]
    return trace(nn.Sequential(*layers), (torch.randn(batch, WIDTH),), loss=lambda y: y.square().mean())


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not wait for the slowest of them."""
    monkeypatch.setattr("planner.whole_step.synchronous", lambda cluster, ranks: cluster)


@lru_cache(maxsize=1)
def cluster() -> Cluster:
    link = Link("NVLink", 3e11, 1e-6)
    return Cluster("test", load_device("v100-sxm2-16gb"), 8, 8, link, Link("IB", 2.5e10, 5e-6))


def plan(chunks: int = 1, pp: int = 1, dp: int = 1, recompute: tuple[str, ...] = ()) -> ParallelPlan:
    cuts = tuple(str(i * LAYERS // pp) for i in range(1, pp))
    return ParallelPlan(SAMPLES * dp, pp=pp, dp=dp, micro_batches=chunks, schedule="gpipe", cuts=cuts,
                        recompute=recompute)  # fmt: skip


def step(sharing: Sharing = ALL_REDUCE, **changes: Any) -> FoldedPrediction:
    chosen = plan(**changes)
    return predict_whole(graph(chosen.micro_batch), chosen, cluster(), SOFTWARE, sharing)


def memory(divided: tuple[str, ...] = (), **changes: Any) -> Memory:
    chosen = plan(**changes)
    return whole_memory(graph(chosen.micro_batch), chosen, divided)


@pytest.mark.parametrize("sharing", [Sharing(), Sharing("server"), Sharing("copies"), Sharing(divided=("7",))])
@pytest.mark.parametrize("dp", [1, 4])
def test_a_batch_in_parts_is_never_faster_and_exchanges_once(sharing: Sharing, dp: int) -> None:
    steps = [step(sharing, chunks=chunks, dp=dp) for chunks in (1, 2, 4, 8)]
    seconds = [s.step_seconds for s in steps]
    assert seconds == sorted(seconds) and seconds[1] > seconds[0]
    kind = "dp all_reduce" if sharing.exchange == "all_reduce" else f"dp {sharing.exchange}"
    if not sharing.divided and kind in steps[0].device:
        assert [s.device[kind] for s in steps] == pytest.approx([steps[0].device[kind]] * 4)


def test_a_step_is_the_compute_of_all_its_micro_batches() -> None:
    """Without messages: that of one alone, as often as there are micro-batches, sums of gradients, one update."""
    parts, alone = step(chunks=4), predict_whole(graph(SAMPLES // 4), ParallelPlan(SAMPLES // 4), cluster(), SOFTWARE)
    update = alone.device["optimizer"] + SOFTWARE.host.step
    adding = parts.device["pointwise"] - 4 * alone.device["pointwise"]
    assert adding >= 3 * 3 * LAYERS * FULL / cluster().device.memory_bandwidth
    assert parts.step_seconds == pytest.approx(4 * (alone.step_seconds - update) + adding + update)
    assert parts.device["gemm"] == pytest.approx(4 * alone.device["gemm"])


@pytest.mark.parametrize("pp", [2, 4])
def test_a_stage_updates_and_sums_what_it_has(pp: int) -> None:
    """Told of the first of equal stages; gradients are summed as often as there are micro-batches but one."""
    whole, part = step(chunks=4), step(chunks=4, pp=pp)
    floor = cluster().device.floor_seconds
    assert part.device["optimizer"] - floor == pytest.approx((whole.device["optimizer"] - floor) / pp, rel=0.05)
    adding = [found.device["pointwise"] for found in (step(chunks=4, pp=pp), step(chunks=8, pp=pp))]
    least = 3 * FULL * LAYERS / pp / cluster().device.memory_bandwidth
    assert adding[0] > 3 * least and adding[1] > 7 * least


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("recompute", [(), RECOMPUTE])
def test_replicas_of_a_pipeline_exchange_each_stages_gradients(recompute: tuple[str, ...]) -> None:
    """After its last backward; stages have equally many parameters, and the first is done last."""
    one, two = (step(chunks=4, pp=2, dp=dp, recompute=recompute) for dp in (1, 2))
    message = collective_price(cluster(), "all_reduce", LAYERS * FULL / 2, (0, 1)).seconds
    assert "dp all_reduce" not in one.device and two.device["dp all_reduce"] == pytest.approx(message)
    assert two.step_seconds == pytest.approx(one.step_seconds + message)


@pytest.mark.usefixtures("steady")
def test_one_stage_in_replicas_exchanges_gradients() -> None:
    one, two = (step(chunks=4, dp=dp, recompute=RECOMPUTE) for dp in (1, 2))
    message = collective_price(cluster(), "all_reduce", LAYERS * FULL, (0, 1)).seconds
    assert two.step_seconds == pytest.approx(one.step_seconds + message)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_stage_holds_its_own_parameters(pp: int, chunks: int) -> None:
    found = memory(pp=pp, chunks=chunks)
    assert found.parameters == found.gradients == found.optimizer == LAYERS * FULL // pp
    assert step(pp=pp, chunks=chunks).allocated_bytes == found.allocated


def test_a_pipeline_holds_all_micro_batches_at_the_end_of_forward() -> None:
    """A stage keeps what enters it, and the sigmoids (inputs of the next product, and what their backward reads);
    the last one of them, the loss's square root, is as large."""
    sample = 4 * WIDTH * SAMPLES
    for pp in (2, 4):
        whole, parts = (memory(pp=pp, chunks=chunks).activations for chunks in (1, 8))
        assert parts == pytest.approx(whole, rel=0.01)
        assert whole >= (LAYERS // pp + 1) * sample
    assert memory(pp=4, chunks=8).activations < memory(pp=2, chunks=8).activations
    accumulated = [memory(chunks=chunks).activations for chunks in (1, 2, 4)]
    assert accumulated[0] == pytest.approx(2 * accumulated[1], rel=0.01) == pytest.approx(4 * accumulated[2], rel=0.02)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_recomputed_stages_hold_their_inputs_and_one_micro_batch(pp: int) -> None:
    chunks, sample = 8, 4 * WIDTH * SAMPLES
    one = graph(SAMPLES // chunks)
    made = max(sum(one.storages[one.tensors[t].storage].bytes for op in s.forward if "sigmoid" in op.name
                   for t in op.outputs) for s in stage_ops(one, plan(pp=pp).cuts))  # fmt: skip
    assert made == LAYERS // pp * sample // chunks
    found = memory(pp=pp, chunks=chunks, recompute=RECOMPUTE).activations
    assert found == pytest.approx(sample + made, abs=2 * sample // chunks)
    assert found >= sample + made
    assert found < memory(pp=pp, recompute=RECOMPUTE).activations


def test_divided_layers_are_held_in_parts() -> None:
    whole, divided = memory(dp=4), memory(("6", "7"), dp=4)
    assert whole.parameters == LAYERS * FULL
    assert divided.parameters == divided.optimizer == (LAYERS - 2) * FULL + 2 * FULL // 4
    assert step(Sharing(divided=("6", "7")), dp=4).allocated_bytes == divided.allocated
