"""Memory by category, its events over steps, the allocator's view of them, and torch's own viewer on our snapshot."""

from __future__ import annotations

import csv
import io
import pickle

import numpy as np
import pytest
from torch.cuda import _memory_viz

from costmodels.allocator import CachingAllocator
from planner.lower import prepared_graph
from planner.memory import memory, memory_events, peak_bytes
from planner.memory_ledger import CATEGORIES, Event, Ledger
from planner.memory_timeline import memory_timeline, reserved_bytes, snapshot, with_cublas, write_csv, write_snapshot
from planner.plan import ParallelPlan
from planner.runtime_stage import prepare
from tests.planner.conftest import ALEXNET, GPT, model

PLANS = {
    "single": {},
    "ddp": {"dp": 2},
    "zero1": {"dp": 2, "data_parallel": "zero1"},
    "fsdp": {"dp": 2, "data_parallel": "fsdp"},
    "recompute": {"dp": 2, "recompute": True},
    "fsdp recompute mb": {"dp": 2, "data_parallel": "fsdp", "recompute": True, "micro_batches": 2},
    "pp": {"pp": 2, "micro_batches": 4},
}


def prepared(spec, kind):
    workload, graph = model(spec)
    options = dict(PLANS[kind])
    if options.pop("recompute", False):
        options["recompute"] = workload.blocks
    if options.get("data_parallel") == "fsdp":
        options["fsdp_units"] = workload.blocks
    if options.get("pp", 1) > 1:
        options["cuts"] = (workload.blocks[len(workload.blocks) // 2],)
    plan = ParallelPlan(8, **options)
    step, layout, stages = prepared_graph(graph, plan)
    return plan, tuple(prepare(step, plan, layout, stages, i) for i in range(plan.pp))


def test_ledger_by_hand():
    ledger = Ledger(recording=True)
    ledger.hold("a", 10, "parameters")
    ledger.place = ("forward", 0, "mm", "layer")
    ledger.hold("b", 5, "activations")
    ledger.pulse(7, "workspace")
    ledger.pulse(0, "workspace")
    ledger.hold("b", 4, "activations")  # another block in its place: the old one goes first
    ledger.drop("nobody")
    ledger.drop("b")
    assert (ledger.live, ledger.peak) == (10, 22)
    assert {k: v for k, v in ledger.at_peak.items() if v} == {"parameters": 10, "activations": 5, "workspace": 7}
    assert [e.bytes for e in ledger.events] == [10, 5, 7, -7, -5, 4, -4]
    assert [e.block for e in ledger.events] == [0, 1, 2, 2, 1, 3, 3]
    assert ledger.events[0].phase == "rest" and ledger.events[-1].module == "layer"


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("spec", [GPT, ALEXNET], ids=["gpt2", "alexnet"])
def test_categories_and_events_add_up_to_the_peak(spec, kind):
    plan, stages = prepared(spec, kind)
    for backend in ("gloo", "nccl"):
        found = memory(stages, plan, backend)
        assert peak_bytes(stages, plan, backend) == tuple(m.peak for m in found)
        for rank in (0, plan.world_size - 1):
            m = found[rank]
            assert sum(m.at_peak.values()) == m.peak > m.resting
            events = memory_events(stages, plan, rank, backend)
            assert np.cumsum([e.bytes for e in events]).max() == m.peak
            assert sum(e.bytes for e in events if e.phase == "rest") == m.resting
            assert min(np.cumsum([e.bytes for e in events])) >= 0


def test_what_the_plans_change():
    rows = {kind: memory(prepared(GPT, kind)[1], prepared(GPT, kind)[0], "nccl")[0] for kind in PLANS if kind != "pp"}
    single, ddp, fsdp = rows["single"], rows["ddp"], rows["fsdp"]
    assert ddp.at_peak["optimizer_state"] == single.at_peak["optimizer_state"]
    assert 0.45 < rows["zero1"].at_peak["optimizer_state"] / ddp.at_peak["optimizer_state"] < 0.55
    assert fsdp.at_peak["optimizer_state"] == pytest.approx(ddp.at_peak["optimizer_state"] / 2, rel=0.01)
    assert ddp.at_peak["communication"] == ddp.at_peak["parameters"]  # the buckets
    assert rows["recompute"].at_peak["activations"] < 0.8 * ddp.at_peak["activations"]


def test_workspace_is_known_for_cpus_only():
    plan, stages = prepared(ALEXNET, "ddp")
    by = {b: [e for e in memory_events(stages, plan, 0, b) if e.category == "workspace"] for b in ("gloo", "nccl")}
    assert any("convolution" in e.op for e in by["gloo"]) and not any("convolution" in e.op for e in by["nccl"])


@pytest.mark.parametrize("kind", PLANS)
def test_steps_repeat_and_the_allocator_holds_at_least_what_is_asked(kind):
    plan, stages = prepared(GPT, kind)
    events = memory_events(stages, plan, 0, "nccl")
    for expandable in (False, True):
        found = memory_timeline(events, 0, CachingAllocator(expandable=expandable), steps=3)
        replayed = found.replayed
        assert found.total.max() == memory(stages, plan, "nccl")[0].peak == replayed.requested.max()
        assert (replayed.reserved >= replayed.allocated).all() and (replayed.allocated >= replayed.requested).all()
        second, third = (replayed.requested[found.steps == n] for n in (2, 3))
        assert (second == third).all() and found.total[-1] == found.total[found.steps == 1][-1]
        grown = replayed.reserved[found.steps == 3].max() - replayed.reserved[found.steps == 2].max()
        assert grown <= 0.1 * replayed.peak_reserved


def test_the_optimizer_state_appears_in_the_first_update():
    plan, stages = prepared(GPT, "single")
    found = memory_timeline(memory_events(stages, plan, 0, "nccl"))
    state = found.live[:, CATEGORIES.index("optimizer_state")]
    first = int(np.flatnonzero(state)[0])
    assert found.steps[first] == 1 and found.events[first].phase == "optimizer"
    assert (state[found.steps == 2] == state[-1]).all() and state[-1] > 0
    assert found.replayed is None and found.peak_reserved == 0


def test_reserved_counts_the_workspace_of_cublas():
    events = (Event(0, 100, "parameters", "rest", 0, "", ""), Event(1, 50, "activations", "forward", 0, "mm", "a"))
    assert reserved_bytes(events, "NVIDIA A100") == 2 * 2**20 + 20 * 2**20  # 8.1 MiB lie in a segment of 20
    assert reserved_bytes(events, "h100-sxm") == 2 * 2**20 + 32 * 2**20
    assert [e.op for e in with_cublas(events, "h100")] == ["", "cublas", "mm"]


def test_csv(tmp_path):
    plan, stages = prepared(GPT, "ddp")
    found = memory_timeline(memory_events(stages, plan, 0, "nccl"), 0, CachingAllocator())
    write_csv(found, tmp_path / "m.csv")
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert len(rows) == len(found.events)
    assert max(int(r["total"]) for r in rows) == found.total.max()
    assert all(int(r["total"]) == sum(int(r[c]) for c in CATEGORIES) for r in rows)
    assert max(int(r["reserved"]) for r in rows) == found.peak_reserved


@pytest.mark.parametrize("expandable", [False, True])
def test_torchs_viewer_opens_the_snapshot(tmp_path, expandable):
    plan, stages = prepared(GPT, "fsdp")
    allocator = CachingAllocator(expandable=expandable)
    found = memory_timeline(memory_events(stages, plan, 0, "nccl"), 0, allocator)
    write_snapshot(found, tmp_path / "m.pickle")
    data = pickle.loads((tmp_path / "m.pickle").read_bytes())
    assert sum(s["total_size"] for s in data["segments"]) == found.replayed.reserved[-1]
    assert sum(s["requested_size"] for s in data["segments"]) == found.total[-1]
    summary = _memory_viz.segsum(data)
    assert f"segments: {len(allocator.segments)}" in summary
    for html in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        assert "<html" in html.lower() or "<script" in html
    assert len(_memory_viz.memory(data, format_flamegraph=lambda lines: lines)) > 0
    if not expandable:  # torch's text trace knows no mapped segments
        assert _memory_viz.trace(data).count("cudaMalloc") == len(allocator.segments)
    actions = [e["action"] for e in data["device_traces"][0]]
    assert actions.count("alloc") - actions.count("free_completed") == sum(
        b["state"] == "active_allocated" for s in data["segments"] for b in s["blocks"]
    )
    grown = sum(e["size"] for e in data["device_traces"][0] if e["action"] in ("segment_alloc", "segment_map"))
    assert grown == found.replayed.reserved[-1]


def test_cpus_have_no_snapshot():
    plan, stages = prepared(GPT, "single")
    with pytest.raises(ValueError, match="only CUDA devices"):
        snapshot(memory_timeline(memory_events(stages, plan, 0)))


def test_the_picture(tmp_path):
    from parplan.memory_plot import plot_memory

    plan, stages = prepared(GPT, "ddp")
    found = memory_timeline(memory_events(stages, plan, 0, "nccl"), 0, CachingAllocator())
    plot_memory(found, "gpt2", tmp_path / "m.png", capacity=int(1.2 * found.peak_reserved))
    from matplotlib.image import imread

    picture = imread(io.BytesIO((tmp_path / "m.png").read_bytes()))
    assert picture.shape[0] > 500 and picture[..., :3].std() > 0.05
