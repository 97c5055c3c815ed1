"""Plans whose messages share ports, and ops beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodels.cluster import Cluster, load_cluster
from opgraph.batch import trace_workload
from planner.estimate import estimate
from planner.folded_groups import Groups
from planner.lower import lower
from planner.plan import ParallelPlan
from planner.predict import predict
from planner.step_costs import step_costs
from simulator import simulate
from tests.planner.models import BLOCKS, SHARDINGS, gpt


def cluster(ports: int = 0, bandwidth: float = 50e9) -> Cluster:
    base = load_cluster("2x dgx-h100")
    return replace(base, inter=replace(base.inter, ports=ports, bandwidth=bandwidth), devices_per_node=2, cache={})


@pytest.fixture(scope="module")
def graph():
    return trace_workload(gpt())


def messages(graph, plan: ParallelPlan, where: Cluster) -> float:
    program = lower(graph, plan, where).program
    return max(d for d, c in zip(program.duration, program.category) if program.categories[c] == "all_reduce")


def test_rings_that_share_a_port_take_as_many_times_longer(graph) -> None:
    """dp 2 x tp 2 over two nodes of two devices: both rings cross; on slow wires bytes are all that counts."""
    plan = ParallelPlan(8, dp=2, tp=2, shardings=SHARDINGS)
    own, shared = cluster(bandwidth=1e7), cluster(ports=1, bandwidth=1e7)
    assert messages(graph, plan, shared) == pytest.approx(2 * messages(graph, plan, own), rel=0.05)
    alone = ParallelPlan(8, dp=2)  # a group inside one node
    assert messages(graph, alone, shared) == messages(graph, alone, own)


def test_sends_beside_gradients_share_the_port(graph) -> None:
    """Three stages of three ranks on nodes of four: while the last stage reduces its gradients over the port of the
    second node, the stage before sends its own through it. Without pools the same program is faster."""
    base = cluster(ports=1, bandwidth=2e6)
    where = replace(base, devices_per_node=4, nodes=3, cache={})
    plan = ParallelPlan(12, pp=3, dp=3, micro_batches=4, cuts=("blocks.1", "blocks.2"))
    program = lower(graph, plan, where).program
    assert [p.name for p in program.pools] == ["ports 0.0", "ports 1.0", "ports 2.0"]
    free = replace(program, pools=tuple(replace(p, capacity=1e9) for p in program.pools))
    both, apart = simulate(program), simulate(free)
    sends = [i for i in range(len(program)) if program.labels[i] == "send 1>0#3"]
    last = [max(t.finish[i] - t.start[i] for i in sends) for t in (both, apart)]
    assert 1.3 * last[1] < last[0] < 3 * last[1], "the last gradient meets the other stage's all-reduce"
    assert both.makespan >= apart.makespan
    assert lower(graph, ParallelPlan(12, dp=3), where).program.pools == (), "one kind of traffic needs no pool"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_work_beside_messages_takes_longer(graph, kind: str) -> None:
    """Compute of one rank of two, against the same micro-batch alone: longer, by no more than the messages last."""
    where = load_cluster("dgx-h100")
    units = BLOCKS if kind == "fsdp" else ()
    plan = ParallelPlan(16, dp=2, data_parallel=kind, fsdp_units=units, bucket_bytes=2**18)
    lowered = lower(graph, plan, where)
    program = lowered.program
    on = [program.resources[r].kind == "compute" if r >= 0 else False for r in program.resource]
    busy = sum(d for d, c, r in zip(program.duration, on, program.rank) if c and r == 0)
    priced = sum(lowered.seconds_by_source.values()) / 2
    sent = sum(
        d for d, r, res in zip(program.duration, program.rank, program.resource)
        if r == 0 and res >= 0 and program.resources[res].kind == "communication"
    )  # fmt: skip
    assert priced - sent < busy <= (priced - sent) * 1.4


def test_estimate_and_simulation_stay_together(graph) -> None:
    plans = [
        ParallelPlan(16, dp=4, bucket_bytes=2**18),
        ParallelPlan(16, dp=2, tp=2, shardings=SHARDINGS),
        ParallelPlan(16, dp=4, data_parallel="fsdp", fsdp_units=BLOCKS),
    ]
    for where in (cluster(), cluster(ports=1)):
        estimates = estimate(step_costs(graph, where), plans)
        for plan, seconds, bound in zip(plans, estimates.seconds, estimates.bound_seconds):
            step = predict(graph, plan, where).step_seconds
            assert bound <= step * (1 + 1e-9) and 0.6 < seconds / step < 1.4, plan


def test_groups_know_which_others_communicate_with_them() -> None:
    plan = ParallelPlan(8, pp=2, dp=2, tp=2, shardings=SHARDINGS, cuts=("blocks.2",))
    folded = Groups(plan, 1)
    assert folded.likes("dp") == (4, 5) == tuple(plan.likes(6, "dp"))
    assert folded.likes("tp") == (4, 6) == tuple(plan.likes(6, "tp"))
    assert folded.likes("pp") == (4, 5, 6, 7)
    for axis in ("dp", "tp"):
        rows = sorted(r for first in folded.likes(axis) for r in plan.group(first, axis))
        assert rows == [4, 5, 6, 7], "together they are the whole stage"


@pytest.mark.parametrize(("backend", "one_after_another"), [("nccl", 4 + 1), ("gloo", 2 * 4)])
def test_an_activation_and_the_gradient_that_comes_back_travel_at_once(backend: str, one_after_another: int) -> None:
    """1F1B of two stages and four micro-batches over wires that are all that counts. With NCCL: the first activation
    alone, the last gradient alone, and between them groups of an activation and a gradient. Gloo sends one by one."""
    slow = cluster(bandwidth=1e4)
    where = replace(slow, devices_per_node=1, backend=backend, cache={})
    untied = trace_workload(gpt(tied=False))
    lowered = lower(untied, ParallelPlan(8, pp=2, micro_batches=4, cuts=("blocks.2",)), where)
    timeline, program = simulate(lowered.program), lowered.program
    sends = {program.labels[i]: i for i in range(len(program)) if program.labels[i].startswith("send ")}
    each = {float(program.duration[i]) for name, i in sends.items() if "enter" not in name}
    assert len(each) == 1
    assert timeline.makespan == pytest.approx(one_after_another * each.pop(), rel=0.01)
    activation, gradient = sends["send 0>1#2"], sends["send 1>0#1"]
    assert (timeline.start[activation] == timeline.start[gradient]) == (backend == "nccl")
