"""The host thread of the op-by-op lowering: small steps wait for it, large ones do not, CPUs have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels.cluster import load_cluster
from costmodels.ops import price_many, shape_of
from opgraph.batch import trace_workload
from planner.estimate import estimate
from planner.folded import predict_folded
from planner.folded_model import FoldedModel
from planner.host_queue import run_of
from planner.host_thread import HostThread, host_costs
from planner.lower import lower
from planner.plan import ParallelPlan
from planner.predict import simulate_plan
from planner.software import HOST, Software
from planner.step_costs import step_costs
from simulator import ProgramBuilder, breakdown, critical_path, simulate
from tests.planner.conftest import GPT, model
from tests.planner.test_lowering import KINDS, plan_of

H100 = load_cluster("dgx-h100")
LARGE = "gpt2:layers=2,hidden=4096,heads=32,seq=1024,vocab=512,batch=8"


def test_a_small_step_waits_for_the_host_and_says_so():
    _, graph = model(GPT)
    found, timeline = simulate_plan(graph, ParallelPlan(8), H100)
    assert found.breakdown["host"] > 0.5 * found.step_seconds
    assert sum(found.breakdown.values()) == pytest.approx(found.step_seconds)
    assert any("host thread" in note for note in found.notes)
    program = timeline.program
    on_path = [program.categories[program.category[t]] for t in critical_path(timeline)]
    assert on_path.count("host") >= 2
    _, high = found.interval
    assert high / found.step_seconds - 1 > 0.3 * found.breakdown["host"] / found.step_seconds


def test_a_single_device_step_is_the_host_queue_of_all_its_ops():
    """The closed form of `host_queue` over every op of the trace, in one piece."""
    _, graph = model(GPT)
    host, module, issue = HOST["torch"], "", []
    prices = price_many(H100.device, [shape_of(graph, op) for op in graph.ops])
    for op in graph.ops:
        entering = host.module if op.module != module and op.phase != "optimizer" else 0.0
        launch = host.backward if op.phase == "backward" else host.op
        free = op.name.startswith(("aten.empty", "aten.new_empty"))
        issue.append(entering + (host.view if op.is_view else 0.0 if free else launch))
        module = op.module
    device = np.array([p.seconds for p in prices])
    found, _ = simulate_plan(graph, ParallelPlan(8), H100)
    # The script begins a micro-batch's backward anew, so its first module counts as entered once more.
    assert found.step_seconds == pytest.approx(run_of(np.array(issue), device).alone, abs=3 * host.module)


def test_a_large_step_does_not_change_by_a_percent():
    graph = trace_workload(model_of(LARGE), precision="bf16")
    found, _ = simulate_plan(graph, ParallelPlan(8, precision="bf16"), H100)
    device = sum(p.seconds for p in price_many(H100.device, [shape_of(graph, op) for op in graph.ops]))
    assert device <= found.step_seconds < 1.01 * device


def model_of(spec):
    from opgraph.models import load_workload

    return load_workload(spec)


def test_cpus_have_no_host_thread(uncalibrated):
    _, graph = model(GPT)
    assert host_costs(uncalibrated) is None
    program = lower(graph, plan_of(GPT, "ddp x tp"), uncalibrated).program
    assert not any(item.kind == "host" for item in program.resources)
    assert simulate_plan(graph, ParallelPlan(8), uncalibrated)[0].breakdown["host"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_is_faster_than_its_host_or_its_device(kind):
    """And estimates lie near the simulation, bounds below it, for every kind of plan of a launch-bound model."""
    _, graph = model(GPT)
    plan = plan_of(GPT, kind)
    found, timeline = simulate_plan(graph, plan, H100)
    bare, _ = simulate_plan(graph, plan, replace(H100, device=replace(H100.device, kind="npu", cache={}), cache={}))
    assert found.step_seconds >= bare.step_seconds * (1 - 1e-9)
    program = timeline.program
    for part in breakdown(timeline).values():
        assert part.total == pytest.approx(timeline.makespan) and part.bubble >= 0 <= part.host
    for r, item in enumerate(program.resources):
        if item.kind == "host":
            assert timeline.makespan >= (timeline.finish - timeline.start)[program.resource == r].sum()
    estimates = estimate(step_costs(graph, H100), [plan])
    assert estimates.bound_seconds[0] <= found.step_seconds
    assert 0.6 < estimates.seconds[0] / found.step_seconds < 1.4


def test_the_folded_lowering_pays_the_same_host():
    """One device, no fusion, the same host: two lowerings of one launch-bound step."""
    _, graph = model("gpt2:layers=3,hidden=128,heads=4,seq=32,vocab=512,batch=8")
    eager = Software(
        "eager", host=replace(HOST["torch"], step=0.0, fork=0.0), fusion="none", norm_clip=False, main_grads=0,
    )  # fmt: skip
    whole = simulate_plan(graph, ParallelPlan(8), H100)[0].step_seconds
    folded = predict_folded(FoldedModel(graph, 3, 32, 512), ParallelPlan(8), H100, eager).step_seconds
    assert folded == pytest.approx(whole, rel=0.05)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.floats(0, 3).map(lambda x: 0 if x < 0.5 else x), st.booleans()),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_joins_are_left_out_only_where_they_change_nothing(items):
    """Random kernels in random blocks against the recursion finish = max(finish, issued) + seconds."""
    tasks = ProgramBuilder()
    device, thread = tasks.resource("device"), tasks.resource("host", rank=0, kind="host")
    host = HostThread(tasks, 0, thread)
    last, block = -1, list[tuple[float, float]]()
    finish = issued = 0.0
    for issue, seconds, ends in items:
        issued += issue
        finish = max(finish, issued) + seconds if seconds else finish
        block.append((issue, seconds))
        if ends or len(block) == len(items):
            last = _add(tasks, host, device, last, block)
            block.clear()
    last = _add(tasks, host, device, last, block)
    if last >= 0:
        assert simulate(tasks.build()).finish[last] == pytest.approx(finish)


def _add(tasks, host, device, last, block):
    if not block:
        return last
    run = run_of(*np.array(block).T)
    if run.device:
        last = tasks.task("block", "forward", run.device, device, [last] if last >= 0 else [])
    return host.after(last, run, "block")
