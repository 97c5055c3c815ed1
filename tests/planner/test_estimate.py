"""Estimates and bounds against the simulation: the bound holds for every plan, the estimate ranks like it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from costmodels.cluster import load_cluster, uncalibrated_core
from costmodels.families import family
from costmodels.ops import price_many, shape_of
from opgraph.batch import trace_workload
from planner.curves import curves
from planner.estimate import bound_seconds, estimate
from planner.plan import ParallelPlan, plan_from_dict
from planner.predict import predict
from planner.software import HOST as HOSTS
from planner.space import enumerate_plans
from planner.step_costs import crossings, step_costs
from tests.planner.models import BLOCKS, SHARDINGS, gpt, mlp, norm_net

HOST = {
    "op_forward": 3e-6, "op_backward": 4e-6, "optimizer_step": 5e-5, "optimizer_param": 2e-6, "ddp_step": 3e-5,
    "ddp_param": 3e-6, "ddp_bucket": 2e-5, "fsdp_unit_forward": 1e-4, "fsdp_unit_backward": 2e-4,
    "fsdp_param_forward": 1e-5, "fsdp_param_backward": 2e-5, "fsdp_optimizer_param": 1e-5, "checkpoint_forward": 5e-5,
    "checkpoint_backward": 1e-4, "checkpoint_saved_forward": 1e-5, "checkpoint_saved_backward": 2e-5,
    "dtensor_linear_forward": 1e-4, "dtensor_linear_backward": 1e-4, "dtensor_view_forward": 2e-5,
    "dtensor_view_backward": 3e-5, "pp_action": 5e-5,
}  # fmt: skip
HOST_OF_GPUS = HOSTS["torch"]


def without_host(cluster):
    """The same accelerators, as ones that no host thread feeds op by op."""
    return replace(cluster, device=replace(cluster.device, kind="npu"), cache={})


def cores(count: int = 2):
    """A machine whose ranks share `count` cores, the same wherever the tests run."""
    device = replace(uncalibrated_core(2**34), host=HOST)
    nccl = load_cluster("dgx-a100")
    link = replace(nccl.intra, bandwidth=1e9, latency=5e-5)
    return replace(
        nccl, name="cores", device=device, nodes=1, devices_per_node=count, intra=link, inter=link, backend="gloo",
        cores=count, node_memory=2**34, cache={},
    )  # fmt: skip


PROBLEMS = {
    "gpt on GPUs": (gpt, lambda: load_cluster("dgx-a100"), 4, 40),
    "gpt on cores": (gpt, cores, 4, 40),
    "mlp on two nodes": (mlp, lambda: load_cluster("2x dgx-a100"), 16, 100),
    "mlp on cores": (mlp, cores, 4, 100),
    "gpt on a cube mesh": (gpt, lambda: load_cluster("dgx1-v100"), 8, 40),
    "mlp on nodes that differ": (mlp, lambda: load_cluster("dgx1-v100 + dgx-a100"), 16, 60),
    "cnn on GPUs": (norm_net, lambda: load_cluster("dgx-a100"), 4, 100),
    "cnn on cores": (norm_net, cores, 4, 100),
}


@pytest.fixture(scope="module", params=PROBLEMS)
def simulated(request):
    """Plans of a problem (all of them, or so many picked at random), their estimates, and predictions."""
    make, cluster, devices, most = PROBLEMS[request.param]
    workload, cluster = make(), cluster()
    graph = trace_workload(workload)
    space = enumerate_plans(workload, graph, cluster, max(devices, 8), devices)
    chosen = np.random.default_rng(0).permutation(len(space.plans))[:most]
    plans = [space.plans[i] for i in chosen]
    return plans, estimate(space.costs, plans), [predict(graph, p, cluster) for p in plans]


def test_bound_holds_for_every_plan(simulated):
    plans, estimates, predictions = simulated
    for plan, bound, p in zip(plans, estimates.bound_seconds, predictions):
        assert 0 < bound <= p.step_seconds * (1 + 1e-9), plan
    assert np.median(estimates.bound_seconds / [p.step_seconds for p in predictions]) > 0.4


def test_memory_need_holds_for_every_rank_of_every_plan(simulated):
    plans, estimates, predictions = simulated
    for plan, need, p in zip(plans, estimates.need_bytes, predictions):
        for rank, peak in enumerate(p.peak_bytes):
            assert 0 < need[plan.coordinates(rank)["pp"]] <= peak, plan


def test_estimate_ranks_like_the_simulation(simulated):
    _, estimates, predictions = simulated
    steps = np.array([p.step_seconds for p in predictions])
    assert np.all(estimates.seconds >= estimates.bound_seconds)
    assert spearmanr(estimates.seconds, steps).statistic > 0.85
    assert 0.5 < np.median(estimates.seconds / steps) < 1.2
    peaks = np.array([max(p.peak_bytes) for p in predictions])
    assert spearmanr(estimates.peak_bytes.max(1), peaks).statistic > 0.5


@pytest.mark.parametrize("make", [gpt, mlp, norm_net])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_bound_holds_where_calls_of_runtimes_are_cheaper_in_full_caches(make, share):
    workload, cluster = make(), cores()
    called = ("ddp", "fsdp_unit", "fsdp_param", "checkpoint", "dtensor_linear", "dtensor_view", "pp_action")
    warm = {f"{key}_warm": share * seconds for key, seconds in HOST.items() if key.startswith(called)}
    warmer = replace(cluster, device=replace(cluster.device, host=HOST | warm, cache={}), cache={})
    graph = trace_workload(workload)
    space = enumerate_plans(workload, graph, warmer, 8, 4)
    plans = [space.plans[i] for i in np.random.default_rng(1).permutation(len(space.plans))[:30]]
    sooner = 0
    for plan, bound in zip(plans, estimate(space.costs, plans).bound_seconds):
        seconds, cold = (predict(graph, plan, c).step_seconds for c in (warmer, cluster))
        assert 0 < bound <= seconds * (1 + 1e-9) and seconds <= cold * (1 + 1e-9), plan
        sooner += seconds < 0.99 * cold
    assert sooner > len(plans) / 3


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_bound_holds_in_16_and_8_bits(precision):
    graph, cluster = trace_workload(gpt(), precision=precision), load_cluster("dgx-h100")
    for plan in enumerate_plans(gpt(), graph, cluster, 8, 2, precision).plans[::3]:
        assert plan.precision == precision
        assert bound_seconds(graph, plan, cluster) <= predict(graph, plan, cluster).step_seconds


def test_single_device_estimate_is_the_sum_of_its_ops():
    graph, cluster = trace_workload(gpt()), load_cluster("dgx-a100")
    prices = price_many(cluster.device, [shape_of(graph, op) for op in graph.ops if not op.is_view])
    whole = sum(p.seconds for p in prices)
    cluster = without_host(cluster)
    assert bound_seconds(graph, ParallelPlan(8), cluster) == pytest.approx(whole, rel=0.05)  # constants are left out
    assert predict(graph, ParallelPlan(8), cluster).step_seconds == pytest.approx(whole)


def test_single_device_estimate_of_a_small_model_is_that_of_its_host():
    """On a GPU this model is launch-bound: the host's seconds for all ops bound it, and the device comes on top."""
    graph, cluster = trace_workload(gpt()), load_cluster("dgx-a100")
    host = HOST_OF_GPUS
    issue = sum(
        host.view if op.is_view else host.backward if op.phase == "backward" else host.op
        for op in graph.ops if family(op.name) != "free" and op.phase != "optimizer"
    )  # fmt: skip
    issue += host.module * len({(op.phase, op.module) for op in graph.ops if op.phase != "optimizer"})
    prices = price_many(cluster.device, [shape_of(graph, op) for op in graph.ops if not op.is_view])
    step = predict(graph, ParallelPlan(8), cluster).step_seconds
    assert bound_seconds(graph, ParallelPlan(8), cluster) == pytest.approx(issue, rel=0.05)
    assert issue < step < 1.3 * issue + sum(p.seconds for p in prices if p.seconds > 1e-4)


def test_curves_hold_every_op_at_local_shapes():
    graph, cluster = trace_workload(gpt()), load_cluster("dgx-a100")
    costs = step_costs(graph, cluster)
    whole, half = curves(costs, ParallelPlan(8)), curves(costs, ParallelPlan(8, tp=2, shardings=SHARDINGS))
    assert whole.params.sum() == sum(t.bytes for t in graph.parameters.values())
    sharded = [n for n in graph.parameters if any(n.startswith(f"{path}.") for path, _ in SHARDINGS)]
    kept = [n for n in sharded if n.endswith("bias") and n.split(".")[-2] in ("out", "down")]
    split = sum(graph.parameters[n].bytes for n in sharded if n not in kept)
    assert half.params.sum() == whole.params.sum() - split / 2
    assert half.messages.sum() > 0 == whole.messages.sum()
    assert curves(costs, ParallelPlan(16, dp=2)) is whole


def test_stages_share_the_work():
    """Pipeline stages and recomputation: what the curves lose nowhere."""
    graph, cluster = trace_workload(gpt(tied=False)), without_host(load_cluster("dgx-a100"))
    single = bound_seconds(graph, ParallelPlan(8), cluster)
    cut = ParallelPlan(8, pp=2, cuts=("blocks.2",), schedule="gpipe")
    again = ParallelPlan(8, recompute=BLOCKS)
    assert single < bound_seconds(graph, again, cluster) < 1.5 * single
    one_after_the_other = bound_seconds(graph, cut, cluster)
    assert 0.95 * single < one_after_the_other < 1.1 * single


def test_crossings_of_a_cut():
    graph = trace_workload(gpt())
    costs = step_costs(graph, load_cluster("dgx-a100"))
    at_block = crossings(costs, costs.spans["blocks.1"][0])
    assert len(at_block) == 1 and at_block[0] >= 0
    inside = crossings(costs, costs.spans["blocks.1.norm2"][0])
    assert len(inside) == 1
    skipping = crossings(costs, costs.spans["blocks.1.attention"][0])
    assert len(skipping) == 2  # the residual too
    assert -1 in crossings(costs, costs.spans["embed"][0])  # the token ids


def test_unknown_cut_is_refused():
    with pytest.raises(ValueError, match="cut 'nowhere' is no module path"):
        bound_seconds(trace_workload(gpt()), ParallelPlan(8, pp=2, cuts=("nowhere",)), load_cluster("dgx-a100"))


PARTS = (
    {"recompute": BLOCKS}, {"recompute": BLOCKS, "recompute_first": (1,)},
    {"recompute": BLOCKS, "recompute_keeps": ("products",)},
    {"recompute": BLOCKS, "recompute_first": (2,), "recompute_keeps": ("attention",)}, {},
)  # fmt: skip


@pytest.mark.parametrize(
    "mesh",
    [{}, {"dp": 2, "data_parallel": "zero2", "fsdp_units": BLOCKS, "micro_batches": 2},
     {"tp": 2, "shardings": SHARDINGS}, {"pp": 2, "cuts": ("blocks.2",), "micro_batches": 4}],
    ids=["single", "zero2", "tp", "pp"],
)  # fmt: skip
def test_parts_of_recomputation_are_bounded_and_ordered(mesh):
    """Less recomputed is faster and holds more; every bound holds."""
    graph, cluster = trace_workload(gpt()), load_cluster("dgx-a100")
    plans = [ParallelPlan(8, **mesh, **part) for part in PARTS]
    found = estimate(step_costs(graph, cluster), plans)
    rows = [predict(graph, p, cluster) for p in plans]
    for p, bound, need, row in zip(plans, found.bound_seconds, found.need_bytes, rows):
        assert bound <= row.step_seconds * (1 + 1e-9), p.label
        assert all(need[p.coordinates(r)["pp"]] <= peak for r, peak in enumerate(row.peak_bytes)), p.label
    full, first, products, _, none = rows
    assert none.step_seconds < products.step_seconds < full.step_seconds > first.step_seconds > none.step_seconds
    assert max(full.peak_bytes) < max(first.peak_bytes) <= max(none.peak_bytes)
    assert max(full.peak_bytes) < max(products.peak_bytes)


def test_recomputation_of_a_part_is_checked():
    for fields, words in (
        ({"recompute_first": (1,)}, "recompute is empty"),
        ({"recompute": BLOCKS, "recompute_first": (1, 2)}, "one for each of the 1 stages"),
        ({"recompute": BLOCKS, "recompute_keeps": ("norms",)}, "products and attention"),
    ):
        with pytest.raises(ValueError, match=words):
            ParallelPlan(8, **fields)
    part = ParallelPlan(8, recompute=BLOCKS, recompute_first=(2,), recompute_keeps=("products",))
    assert part.label == "single recompute2 keep-products"
    assert plan_from_dict(json.loads(json.dumps(part.to_dict()))) == part
