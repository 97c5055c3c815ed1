"""The search: the same best plan as brute force, honest gaps, memory, and a choice of varied plans."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from costmodels.cluster import load_cluster
from opgraph.batch import trace_workload
from planner import search as module
from planner.predict import predict
from planner.search import diverse, family, search, shortage
from planner.space import enumerate_plans
from planner.space_offload import offloaded_plans
from planner.step_costs import step_costs
from tests.planner.models import gpt, mlp, norm_net, untied
from tests.planner.test_estimate import cores


def with_memory(cluster, nbytes):
    return replace(cluster, device=replace(cluster.device, memory_bytes=nbytes, cache={}), cache={})


@pytest.fixture(scope="module")
def mlp_graph():
    return trace_workload(mlp())


@pytest.fixture(scope="module")
def found(mlp_graph):
    return search(mlp(), mlp_graph, cores(), 8, devices=4)


@pytest.mark.parametrize("cluster", [cores(), load_cluster("dgx-a100")], ids=["cores", "GPUs"])
@pytest.mark.parametrize("make", [mlp, norm_net])
def test_best_plan_equals_brute_force(make, cluster):
    workload = make()
    graph = trace_workload(workload)
    space = enumerate_plans(workload, graph, cluster, 8, 4)
    every = [predict(graph, plan, cluster).step_seconds for plan in space.plans]
    result = search(workload, graph, cluster, 8, devices=4)
    assert result.considered == len(every) and result.infeasible == 0
    assert result.plans[0].prediction.step_seconds == min(every)
    whole = search(workload, graph, cluster, 8, devices=4, limit=len(every))
    assert sorted(every) == [r.prediction.step_seconds for r in whole.plans] and whole.undecided == 0


def test_plans_are_sorted_bounded_and_certified(found):
    steps = [r.prediction.step_seconds for r in found.plans]
    assert steps == sorted(steps) and len(steps) == module.DEFAULT_LIMIT
    assert all(r.bound_seconds <= r.prediction.step_seconds and r.plan == r.prediction.plan for r in found.plans)
    least = found.plans[0].prediction.step_seconds / (1 + found.plans[0].gap)
    assert least <= min(r.bound_seconds for r in found.plans)
    assert all(r.gap == pytest.approx(r.prediction.step_seconds / least - 1) and r.gap >= 0 for r in found.plans)
    assert 0 <= found.undecided <= found.considered - len(steps)


def test_every_family_is_simulated(found, mlp_graph):
    plans = enumerate_plans(mlp(), mlp_graph, cores(), 8, 4).plans
    assert {family(r.plan) for r in found.plans} == {family(p) for p in plans}


def test_ties_are_those_that_the_intervals_do_not_tell_apart(found):
    best = found.plans[0]
    assert best.tied
    for r in found.plans:
        overlap = r.prediction.step_seconds <= best.prediction.interval[1]
        assert r.tied == (r is best or overlap or r.prediction.interval[0] <= best.prediction.step_seconds)


def test_search_is_deterministic(found, mlp_graph):
    again = search(mlp(), mlp_graph, cores(), 8, devices=4)
    assert [r.plan for r in again.plans] == [r.plan for r in found.plans]


def test_limit_and_progress(mlp_graph):
    heard = []
    result = search(
        mlp(), mlp_graph, cores(), 8, devices=2, limit=3, progress=lambda text, share: heard.append((text, share))
    )
    assert len(result.plans) == 3 and result.undecided > 0
    assert len(heard) == 3 and all(text.startswith("simulating ") and 0 <= share < 1 for text, share in heard)


def test_memory_decides(mlp_graph):
    """Just too little memory for the plan that needs most: it is rejected, with its shortage, others stay."""
    cluster = load_cluster("dgx-a100")
    plans = enumerate_plans(mlp(), mlp_graph, cluster, 8, 2).plans
    peaks = {p: max(predict(mlp_graph, p, cluster).peak_bytes) for p in plans}
    limit = sorted(peaks.values())[len(peaks) // 2]
    result = search(mlp(), mlp_graph, with_memory(cluster, limit), 8, devices=2, limit=len(plans))
    assert {r.plan for r in result.plans} == {p for p, peak in peaks.items() if peak <= limit}
    assert result.infeasible == sum(peak > limit for peak in peaks.values())
    short = [r for r in result.rejected if "out of memory on rank" in r.reason]
    assert sum(r.count for r in short) == result.infeasible
    name = short[0].label
    lacking = [peaks[p] - limit for p in plans if peaks[p] > limit and name == " ".join(family(p))]
    said = re.fullmatch(r".* least lacks ([\d.]+) MiB", short[0].reason)
    assert said and 0 < float(said[1]) * 2**20 <= 1.001 * min(lacking)


def test_nothing_fits(mlp_graph):
    small = with_memory(load_cluster("dgx-a100"), 1000)
    with pytest.raises(
        ValueError, match=r"no plan of mlp-test fits .* needs .* GiB or more on rank \d.* use more devices"
    ):
        search(mlp(), mlp_graph, small, 8, devices=2)


def test_bad_questions(mlp_graph):
    cluster = load_cluster("dgx-a100")
    with pytest.raises(ValueError, match="traced in fp32; trace it in bf16"):
        search(mlp(), mlp_graph, cluster, 8, devices=2, precision="bf16")
    with pytest.raises(ValueError, match="simulates 0 plans"):
        search(mlp(), mlp_graph, cluster, 8, devices=2, limit=0)
    with pytest.raises(ValueError, match="takes 1 to 8"):
        search(mlp(), mlp_graph, cluster, 8, devices=16)
    with pytest.raises(ValueError, match=r"no plan of norm-test is legal .*not divisible by dp = 7"):
        search(norm_net(), trace_workload(norm_net()), cluster, 8, devices=7)


def test_shortage_is_of_the_worst_rank():
    plan = enumerate_plans(mlp(), trace_workload(mlp()), cores(), 8, 2).plans[0]
    cluster = with_memory(load_cluster("dgx-a100"), 100)
    assert shortage(plan, cluster, [50, 130]) == (30, 1)
    assert shortage(plan, replace(cluster, node_memory=240), [50, 130]) == (10, 1)


def test_refused_plans_are_named(mlp_graph, monkeypatch):
    def picky(graph, plan, cluster, **options):
        if plan.pp > 1:
            raise ValueError("stages are not for today")
        return predict(graph, plan, cluster, **options)

    monkeypatch.setattr(module, "predict", picky)
    result = search(mlp(), mlp_graph, cores(), 8, devices=2)
    assert result.plans and all(r.plan.pp == 1 for r in result.plans)
    assert any(r.reason == "stages are not for today" for r in result.rejected)


def test_diverse_covers_the_families_and_the_range():
    graph = trace_workload(gpt())
    result = search(gpt(), graph, load_cluster("dgx-a100"), 8, devices=4, limit=30)
    some = diverse(result, 12)
    assert len(some) == len({r.plan for r in some}) == 12
    covered = {family(r.plan)[0] for r in some}
    assert {"dp", "tp", "pp", "pp x dp", "pp x tp", "dp x tp"} <= covered
    assert {r.plan.data_parallel for r in some if r.plan.dp == 4} == {"ddp", "zero1", "fsdp"}
    assert {r.plan.schedule for r in some if r.plan.pp == 4} == {"gpipe", "1f1b"}
    assert some[0] == result.plans[0]
    assert result.plans[-1] in diverse(result, 14)
    assert diverse(result, 2) == some[:2] and len(diverse(result, 1000)) == len(result.plans)


# -- offload ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_graph():
    return trace_workload(untied())


@pytest.fixture(scope="module")
def space(gpt_graph):
    return enumerate_plans(untied(), gpt_graph, load_cluster("dgx-a100"), 2, 2)


@pytest.fixture(scope="module")
def tight(gpt_graph, space):
    """A machine with a byte less memory than the smallest of all plans needs."""
    cluster = load_cluster("dgx-a100")
    return with_memory(cluster, min(max(predict(gpt_graph, p, cluster).peak_bytes) for p in space.plans) - 1)


def test_where_nothing_fits_a_plan_with_offload_is_found_and_is_the_best(gpt_graph, space, tight):
    with pytest.raises(ValueError, match=r"no plan of .* fits dgx-a100: the smallest"):
        search(untied(), gpt_graph, tight, 2, devices=2, offload="never")
    found = search(untied(), gpt_graph, tight, 2, devices=2)
    every = [predict(gpt_graph, p, tight) for p in offloaded_plans(space.costs, space.plans)]
    assert found.plans[0].prediction.step_seconds == min(p.step_seconds for p in every if p.fits)
    assert all(r.plan.offload and r.prediction.fits for r in found.plans)
    assert all(r.bound_seconds <= r.prediction.step_seconds and r.gap >= 0 for r in found.plans)
    assert "offload to the host was tried for" in found.offload and "none was found to fit" in found.offload
    assert found.considered == len(space.plans) + len(every)


def test_one_device_gets_a_plan(gpt_graph):
    """As a model of 7 billion parameters does on one device of 80 GB: its optimizer leaves."""
    cluster = load_cluster("dgx-a100")
    parameters = sum(t.bytes for t in gpt_graph.parameters.values())
    small = with_memory(cluster, int(3.5 * parameters))
    found = search(untied(), gpt_graph, small, 1, devices=1)
    best = found.plans[0]
    assert best.plan.offload == ("optimizer",) and best.prediction.host_bytes["optimizer_state"] >= 2 * parameters
    assert max(best.prediction.peak_bytes) <= 3.5 * parameters


def test_plans_that_fit_without_offload_come_first(gpt_graph):
    cluster = load_cluster("dgx-a100")
    found = search(untied(), gpt_graph, cluster, 2, devices=2)
    assert not any(r.plan.offload for r in found.plans) and "every family" in found.offload
    always = search(untied(), gpt_graph, cluster, 2, devices=2, offload="always")
    assert always.considered > 2 * found.considered and any(r.plan.offload for r in always.plans)
    assert always.plans[0].plan == found.plans[0].plan
    steps = {r.plan: r.prediction.step_seconds for r in always.plans}
    pairs = [(steps[bare], steps[p]) for p in steps if p.offload and (bare := replace(p, offload=())) in steps]
    assert pairs and all(without <= away for without, away in pairs)


def test_families_that_lack_memory_are_tried_with_offload(gpt_graph, space):
    """Memory for sharded plans, not for whole ones: what is tried with offload may still be slower, and comes after."""
    cluster = load_cluster("dgx-a100")
    whole = [p for p in space.plans if p.data_parallel == "ddp" and p.dp == 2]
    small = with_memory(cluster, min(max(predict(gpt_graph, p, cluster).peak_bytes) for p in whole) - 1)
    found = search(untied(), gpt_graph, small, 2, devices=2)
    assert "plans of dp ddp" in found.offload and not found.plans[0].plan.offload
    assert all(family(r.plan) == ("dp", "ddp", "offload") for r in found.plans if r.plan.offload)


def test_why_offload_is_not_tried(mlp_graph):
    assert "shares its memory with the host" in search(mlp(), mlp_graph, cores(), 8, devices=1).offload
    fast = {"devices": 1, "limit": 1}
    cluster = load_cluster("dgx-a100")
    device = replace(cluster.device, pcie_bandwidth=0.0, c2c_bandwidth=0.0, cache={})
    unknown = replace(cluster, device=device, cache={})
    assert "states no link" in search(mlp(), mlp_graph, unknown, 8, **fast).offload
    assert "CUDA graphs" in search(mlp(), mlp_graph, cluster, 8, cuda_graphs=True, **fast).offload
    assert search(mlp(), mlp_graph, cluster, 8, offload="never", **fast).offload == "offload was not allowed"
    for options, words in (({"offload": "sometimes"}, "auto, never or always"), ({"offload": "always"}, "no link")):
        with pytest.raises(ValueError, match=words):
            search(mlp(), mlp_graph, unknown, 8, **options, **fast)
    with pytest.raises(ValueError, match="fits dgx-a100, even with offload to the host: the smallest"):
        search(mlp(), mlp_graph, with_memory(cluster, 1000), 8, devices=2)


def test_weights_of_several_stages_keep_their_optimizer(gpt_graph):
    cluster = load_cluster("dgx-a100")
    tied = enumerate_plans(gpt(), trace_workload(gpt()), cluster, 2, 2)
    for costs, plans, expected in (
        (tied.costs, tied.plans, {("activations",)}),
        (step_costs(gpt_graph, cluster), tied.plans, {("activations",), ("optimizer",), ("optimizer", "activations")}),
    ):
        assert {p.offload for p in offloaded_plans(costs, plans) if p.pp == 2 and p.dp == 1} == expected
