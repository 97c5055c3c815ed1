"""Offload as an option of plans: what crosses, how long it takes, where the bytes are, what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from costmodels.cluster import load_cluster
from planner.apply import apply
from planner.check import lowered_script
from planner.estimate import bound_seconds, estimate
from planner.lower import lower
from planner.memory import memory
from planner.memory_offload import offload_optimizer
from planner.offload import HOST_BANDWIDTH, link_bandwidth
from planner.plan import OLDER_SCHEMAS, SCHEMA_VERSION, ParallelPlan, plan_from_dict
from planner.predict import predict
from planner.script import Copy
from planner.software import HOST
from planner.space import enumerate_plans
from planner.space_offload import offloaded_plans
from planner.step_costs import step_costs
from simulator import simulate
from tests.planner.conftest import GPT, LLAMA, model

BLOCKS = model(GPT)[0].blocks
FSDP = ParallelPlan(8, dp=2, data_parallel="fsdp", fsdp_units=BLOCKS)
CASES = {
    "fsdp": replace(FSDP, offload=("parameters",)),
    "zero2 mb": replace(FSDP, data_parallel="zero2", micro_batches=2, offload=("parameters",)),
    "shards' optimizer": replace(FSDP, offload=("optimizer",)),
    "ddp": ParallelPlan(8, dp=2, offload=("optimizer",)),
    "zero1": ParallelPlan(8, dp=2, data_parallel="zero1", offload=("optimizer",)),
    "single": ParallelPlan(8, offload=("optimizer",)),
    "activations": ParallelPlan(8, recompute=BLOCKS, offload=("activations",)),
    "activations 1f1b": ParallelPlan(
        8, pp=2, micro_batches=4, cuts=BLOCKS[1:], recompute=BLOCKS, offload=("activations",)
    ),
    "all": replace(FSDP, recompute=BLOCKS, offload=("parameters", "activations")),
}


def cluster(bandwidth=None, **changes):
    """A DGX A100, its links to the host at `bandwidth` bytes/s."""
    found = load_cluster("dgx-a100")
    if bandwidth is not None:
        changes |= {"pcie_bandwidth": bandwidth, "c2c_bandwidth": 0.0}
    return replace(found, device=replace(found.device, **changes, cache={}), cache={})


def copies(plan):
    return [item for item in lowered_script(model(GPT)[1], plan, 0) if isinstance(item, Copy)]


def copied(plan, to):
    """Bytes that rank 0 copies."""
    return sum(item.bytes for item in copies(plan) if item.to == to)


def without(plan):
    return replace(plan, offload=())


def held(plan):
    return memory(lower(model(GPT)[1], plan, cluster()).stages, plan, "nccl")


def test_shards_come_up_for_every_gather_and_their_gradients_go_down_once():
    counted = offload_optimizer(model(GPT)[1])
    script = lowered_script(model(GPT)[1], FSDP, 0)
    gathered = sum(i.bytes for i in script if getattr(i, "kind", "") == "all_gather")
    assert copied(CASES["fsdp"], "device") == gathered // 2
    for case in ("fsdp", "zero2 mb", "shards' optimizer"):
        assert copied(CASES[case], "host") == counted.to_host // 2
    assert copied(CASES["shards' optimizer"], "device") == counted.to_device // 2
    for case in ("ddp", "single"):
        assert (copied(CASES[case], "host"), copied(CASES[case], "device")) == (counted.to_host, counted.to_device)
    assert 0.3 * counted.to_host < copied(CASES["zero1"], "host") < 0.7 * counted.to_host


def test_what_recomputed_modules_keep_goes_once_and_comes_back():
    inputs = len(BLOCKS) * 8 * 32 * 128 * 4  # batch, tokens, width
    for case, share in (("activations", 1), ("all", 2)):
        assert copied(CASES[case], "host") - copied(without(CASES[case]), "host") >= inputs // share
    assert copied(CASES["activations"], "host") == copied(CASES["activations"], "device") == inputs
    plan = CASES["activations 1f1b"]  # the second stage's block reads what it received, which stays
    script = lowered_script(model(GPT)[1], plan, 1)
    assert copied(plan, "host") == inputs // 2 and not [i for i in script if isinstance(i, Copy)]


@pytest.mark.parametrize("plan", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bandwidth", [1e6, 1e9, 31.5e9])
def test_the_step_lasts_as_long_as_its_copies_and_no_longer_than_one_after_the_other(plan, bandwidth):
    graph, machine = model(GPT)[1], cluster(bandwidth)
    step = predict(graph, plan, machine).step_seconds
    seconds = [copied(plan, to) / link_bandwidth(machine) for to in ("host", "device")]
    update = 0.0
    if plan.offloads_optimizer:
        update = offload_optimizer(graph).device * 4.1 / HOST_BANDWIDTH  # 8 accesses to 2 of state, counters
        update *= plan.dp if plan.data_parallel == "ddp" else 1
    assert step >= max(seconds)
    issue = plan.micro_batches * HOST["torch"].op * len(copies(plan))
    assert step <= 1.001 * (sum(seconds) + update + issue + predict(graph, without(plan), machine).step_seconds)


def test_copies_hide_behind_compute_and_slow_links_show():
    graph, plan = model(GPT)[1], CASES["activations"]
    base = predict(graph, without(plan), cluster()).step_seconds
    issue = 2 * len(BLOCKS) * HOST["torch"].op  # the host thread still launches the copies
    assert base <= predict(graph, plan, cluster(1e15)).step_seconds <= base + 1.001 * issue
    times = [predict(graph, CASES["fsdp"], cluster(b)).step_seconds for b in (1e7, 1e9, 1e11)]
    assert times == sorted(times, reverse=True) and times[0] > 3 * times[-1]


def test_activations_of_one_micro_batch_come_up_while_those_of_another_go_down():
    """On a link that is all that counts: every micro-batch goes down, and the last one comes up after it. One stage
    alone runs the backward of each micro-batch at once and has nothing to do beside."""
    graph, machine = model(GPT)[1], cluster(1e5)
    plan = CASES["activations 1f1b"]
    once = copied(plan, "host") / plan.micro_batches / link_bandwidth(machine)
    step = predict(graph, plan, machine).step_seconds
    assert step == pytest.approx((plan.micro_batches + 1) * once, rel=0.02)
    alone = replace(plan, pp=1, cuts=())
    both = (copied(alone, "host") + copied(alone, "device")) / link_bandwidth(machine)
    assert predict(graph, alone, machine).step_seconds == pytest.approx(both, rel=0.02)


def test_the_update_moves_its_bytes_in_the_memory_that_a_node_shares():
    graph = model(GPT)[1]
    lowered = lower(graph, CASES["fsdp"], cluster())
    timeline = simulate(lowered.program)
    which = [i for i, r in enumerate(lowered.program.resources) if r.name.endswith("host update")]
    assert len(which) == 2
    spans = [(timeline.finish - timeline.start)[lowered.program.resource == i].sum() for i in which]
    counters = 4 * len(graph.parameters)
    least = 32 * sum(t.numel for t in graph.parameters.values()) / HOST_BANDWIDTH  # both ranks' bytes share it
    for span in spans:
        assert least <= span <= least + 2 * 8 * counters / HOST_BANDWIDTH


def test_bytes_by_category_on_device_and_host():
    graph, plan = model(GPT)[1], CASES["fsdp"]
    share, state = (sum(t.bytes for t in graph.parameters.values()) // 2, offload_optimizer(graph).device)
    away, here = held(plan)[0], held(without(plan))[0]
    counters = 4 * len(graph.parameters)
    assert away.host["parameters"] == away.host["gradients"] == share
    assert away.host["optimizer_state"] == (state - counters) // 2 + counters
    assert away.pinned == 2 * share and not here.host
    assert away.at_peak["optimizer_state"] == 0 and here.at_peak["optimizer_state"] == away.host["optimizer_state"]
    assert here.resting - away.resting == share + away.host["optimizer_state"]
    assert away.peak < here.peak


def test_activations_leave_until_their_module_runs_again():
    one = 128 * 128 * 128 * 4
    workload, graph = model("gpt2:layers=4,hidden=128,heads=4,seq=128,vocab=64,batch=128")
    plan = ParallelPlan(128, recompute=workload.blocks, offload=("activations",))
    peaks = []
    for p in (plan, without(plan)):
        found = memory(lower(graph, p, cluster()).stages, p, "nccl")[0]
        peaks.append(found.peak)
        assert found.host == ({"activations": 4 * one} if p.offload else {})
        assert found.pinned == sum(found.host.values())
    # the fullest moment is no longer the last block's backward but the second one's: beside its own input the first
    # one's is back, and the two blocks behind have left their gradients
    block = sum(t.bytes for name, t in graph.parameters.items() if name.startswith(f"{workload.blocks[0]}."))
    assert peaks[1] - peaks[0] == 4 * one - 2 * one - 2 * block


def test_optimizers_on_the_host_keep_a_copy_of_what_they_update():
    graph = model(GPT)[1]
    size, state = sum(t.bytes for t in graph.parameters.values()), offload_optimizer(graph).device
    found = held(CASES["single"])[0]
    assert found.host == {"parameters": size, "gradients": size, "optimizer_state": state}
    assert held(without(CASES["single"]))[0].resting - found.resting == state
    owners = held(CASES["zero1"])
    assert sum(m.host["parameters"] for m in owners) == sum(m.host["gradients"] for m in owners) == size


def test_stages_of_a_pipeline_keep_their_shards_on_the_host():
    workload, graph = model(LLAMA)  # no weight is shared by two stages
    plan = ParallelPlan(
        8, pp=2, dp=2, micro_batches=2, data_parallel="fsdp", fsdp_units=workload.blocks, cuts=workload.blocks[1:],
        offload=("parameters",),
    )  # fmt: skip
    found = memory(lower(graph, plan, cluster()).stages, plan, "nccl")
    whole = sum(t.bytes for t in graph.parameters.values())
    assert sum(m.host["parameters"] for m in found) == sum(m.host["gradients"] for m in found) == whole
    times = [predict(graph, p, cluster(b)).step_seconds for p, b in ((plan, 1e8), (plan, 1e12), (without(plan), 1e12))]
    assert times[0] > whole / 4 / link_bandwidth(cluster(1e8)) and times[0] > times[1] > times[2]


def test_one_memory_copies_nothing_and_frees_nothing(uncalibrated):
    graph, plan = model(GPT)[1], CASES["all"]
    for machine in (uncalibrated, cluster(unified_memory=True)):
        away, here = predict(graph, plan, machine), predict(graph, without(plan), machine)
        assert away.step_seconds == pytest.approx(here.step_seconds, rel=1e-12)
        assert max(away.peak_bytes) >= max(here.peak_bytes)
        assert any("moves nothing" in note for note in away.notes)
    assert math.isinf(machine.device.host_bandwidth)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("bandwidth", [1e8, 3e9, 31.5e9])
def test_estimates_rank_like_the_simulation_and_bounds_hold(bandwidth, nodes):
    """Plans of all kinds of offload picked at random, on one node and two, links from slow to those of the machine."""
    workload, graph = model(LLAMA)
    machine = replace(load_cluster("2x dgx-a100"), nodes=nodes, devices_per_node=4 // nodes, cache={})
    machine = replace(machine, device=cluster(bandwidth).device, cache={})
    space = enumerate_plans(workload, graph, machine, 8, 4)
    every = offloaded_plans(space.costs, space.plans)
    plans = [every[i] for i in np.random.default_rng(nodes).permutation(len(every))[:25]]
    assert {kind for p in plans for kind in p.offload} == {"parameters", "optimizer", "activations"}
    found, rows = estimate(space.costs, plans), [predict(graph, p, machine) for p in plans]
    steps = np.array([row.step_seconds for row in rows])
    for plan, bound, need, row in zip(plans, found.bound_seconds, found.need_bytes, rows):
        assert 0 < bound <= row.step_seconds * (1 + 1e-9), plan.label
        for rank, peak in enumerate(row.peak_bytes):
            assert 0 < need[plan.coordinates(rank)["pp"]] <= peak, plan.label
    assert np.all(found.seconds >= found.bound_seconds)
    assert spearmanr(found.seconds, steps).statistic > 0.85
    assert 0.8 < np.median(found.seconds / steps) < 1.2 and np.median(found.bound_seconds / steps) > 0.6


@pytest.mark.parametrize("plan", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bandwidth", [1e7, 31.5e9])
def test_every_kind_of_offload_is_estimated(plan, bandwidth):
    graph, machine = model(GPT)[1], cluster(bandwidth)
    found, row = estimate(step_costs(graph, machine), [plan]), predict(graph, plan, machine)
    assert found.bound_seconds[0] <= row.step_seconds * (1 + 1e-9)
    assert 0.6 < found.seconds[0] / row.step_seconds < 1.4
    assert all(found.need_bytes[0, plan.coordinates(r)["pp"]] <= peak for r, peak in enumerate(row.peak_bytes))


def test_slow_copies_are_what_a_bound_counts():
    """On a link that is all that counts, the bound is the volume of the fuller direction, and the update."""
    graph, machine = model(GPT)[1], cluster(1e5)
    for case in ("fsdp", "activations", "single", "ddp", "zero2 mb"):
        plan = CASES[case]
        down, up = (copied(plan, to) / link_bandwidth(machine) for to in ("host", "device"))
        serial = case in ("single", "ddp")  # parameters come up when gradients are down
        least = down + up if serial else max(down, up)
        assert bound_seconds(graph, plan, machine) == pytest.approx(least, rel=0.05), case
    free = bound_seconds(graph, without(CASES["activations"]), cluster(1e15))
    assert bound_seconds(graph, CASES["activations"], cluster(1e15)) == pytest.approx(free)


def test_what_makes_no_sense_is_refused():
    for fields, words in (
        ({"offload": ("weights",)}, "knows parameters, optimizer, activations"),
        ({"offload": ("parameters",), "dp": 2}, "fsdp or zero2"),
        ({"offload": ("activations",)}, "add recompute"),
    ):
        with pytest.raises(ValueError, match=words):
            ParallelPlan(8, **fields)
    graph = model(GPT)[1]
    with pytest.raises(ValueError, match="states no link"):
        predict(graph, CASES["fsdp"], cluster(0.0))
    with pytest.raises(ValueError, match="CUDA graphs"):
        predict(graph, CASES["fsdp"], cluster(), cuda_graphs=True)
    with pytest.raises(ValueError, match="states no link"):
        bound_seconds(graph, CASES["fsdp"], cluster(0.0))
    tied = replace(FSDP, pp=2, micro_batches=2, cuts=BLOCKS[1:], offload=("parameters",))
    with pytest.raises(ValueError, match="several pipeline stages"):
        predict(graph, tied, cluster())
    for case in ("single", "activations"):
        with pytest.raises(ValueError, match="simulated only"):
            apply(CASES[case], model(GPT)[0], 0)


def test_json_labels_and_older_schemas():
    for plan in CASES.values():
        assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert CASES["all"].label == "dp2 fsdp recompute offload offload-activations"
    assert plan_from_dict({"schema": 3, "global_batch": 8}).offload == ()
    assert CASES["all"].to_dict()["schema"] == SCHEMA_VERSION and set(range(1, SCHEMA_VERSION)) == set(OLDER_SCHEMAS)
