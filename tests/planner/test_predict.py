"""Predictions: sums that must hold, and refusals that must be clear."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from costmodels.cluster import load_cluster
from costmodels.ops import price, shape_of
from costmodels.rounding import in_precision
from opgraph.batch import trace_workload
from opgraph.models import load_workload
from opgraph.summary import model_flops
from planner.apply import apply
from planner.estimate import bound_seconds
from planner.plan import ParallelPlan
from planner.predict import NINE_IN_TEN, interval_of, mfu_peak, predict, simulate_plan
from planner.search import search
from tests.planner.conftest import ALEXNET, GPT, VIT, model
from tests.planner.test_lowering import KINDS, plan_of


@pytest.mark.parametrize("kind", KINDS)
def test_breakdown_sums_to_the_step_and_shares_to_one(kind, uncalibrated):
    _, graph = model(GPT)
    found = predict(graph, plan_of(GPT, kind), uncalibrated)
    assert sum(found.breakdown.values()) == pytest.approx(found.step_seconds)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.interval[0] <= found.step_seconds <= found.interval[1]
    assert found.fits and len(found.peak_bytes) == found.plan.world_size


def test_brief_steps_have_an_error_of_their_own(uncalibrated):
    """Only passes below 10 ms, and never a narrower interval than others have."""
    none = SimpleNamespace(seconds_by_source={"interpolated": 1.0}, deviation=0.0)
    device = replace(uncalibrated.device, kind="cpu", step_error=0.05, brief_error=0.2)

    def half(seconds, device, passes=1):
        low, high = interval_of(seconds, 0.0, none, replace(uncalibrated, device=device), passes)
        return (high - low) / 2 / seconds

    assert half(0.009, device) == pytest.approx(NINE_IN_TEN * 0.2)
    assert half(0.011, device) == pytest.approx(NINE_IN_TEN * 0.05)
    assert half(0.036, device, 4) == half(0.009, device)
    assert half(0.009, replace(device, brief_error=0.01)) == pytest.approx(NINE_IN_TEN * 0.05)


def test_a_single_device_step_is_the_sum_of_its_ops(uncalibrated):
    from costmodels.ops import price_many, shape_of

    _, graph = model(GPT)
    prices = price_many(uncalibrated.device, [shape_of(graph, op) for op in graph.ops])
    host = sum(
        uncalibrated.device.host.get("op_backward" if op.phase == "backward" else "op_forward", 0)
        for op in graph.ops if op.phase != "optimizer"
    )  # fmt: skip
    step = predict(graph, ParallelPlan(8), uncalibrated).step_seconds
    assert step == pytest.approx(sum(p.seconds for p in prices) + host, rel=1e-9)


def test_more_ranks_than_cores_share_them(uncalibrated):
    _, graph = model(GPT)
    plan = ParallelPlan(8, dp=4)
    few, many = (predict(graph, plan, replace(uncalibrated, cores=c, cache={})) for c in (2, 4))
    assert few.step_seconds > 1.3 * many.step_seconds


def test_faster_links_never_make_a_plan_slower():
    _, graph = model(GPT)
    slow = load_cluster("dgx-a100")
    fast = replace(slow, intra=replace(slow.intra, bandwidth=4 * slow.intra.bandwidth), cache={})
    for kind in ("ddp", "fsdp", "tp", "1f1b", "pp x fsdp"):
        plan = plan_of(GPT, kind)
        assert predict(graph, plan, fast).step_seconds <= predict(graph, plan, slow).step_seconds


def test_what_does_not_fit_the_cluster_or_the_trace_is_said():
    _, graph = model(GPT)
    with pytest.raises(ValueError, match="needs 16 devices"):
        predict(graph, ParallelPlan(16, dp=16), load_cluster("dgx-a100"))
    with pytest.raises(ValueError, match="precision"):
        predict(graph, ParallelPlan(8, precision="bf16"), load_cluster("dgx-a100"))
    with pytest.raises(ValueError, match="never reached"):
        predict(graph, ParallelPlan(8, pp=2, cuts=("nowhere",)), load_cluster("dgx-a100"))


def test_the_same_plan_gives_the_same_timeline(uncalibrated):
    _, graph = model(GPT)
    plan = plan_of(GPT, "pp x fsdp")
    first, second = (simulate_plan(graph, plan, uncalibrated)[1] for _ in range(2))
    assert (first.start == second.start).all() and (first.finish == second.finish).all()


def test_where_torch_rounds_to_tf32_unasked_a_note_says_so():
    _, graph = model(ALEXNET)
    said = {c: predict(graph, ParallelPlan(8), load_cluster(c)).notes for c in ("dgx-h100", "dgx1-p100")}
    assert any("allow_tf32" in note for note in said["dgx-h100"])
    assert not any("allow_tf32" in note for note in said["dgx1-p100"])
    _, graph = model(GPT)
    assert not any("allow_tf32" in note for note in predict(graph, ParallelPlan(8), load_cluster("dgx-h100")).notes)


def test_mfu_is_model_flop_over_the_peak_of_the_plans_precision():
    """Of every token 6 FLOP a weight of a product, and 12 x seq x hidden a block for attention: two products forward
    and four backward, though fused attention computes its scores once more."""
    workload = load_workload("gpt2:layers=2,hidden=128,heads=2,vocab=512,positions=64,seq=64,batch=8")
    weights = 2 * 12 * 128**2 + 512 * 128
    flops = 8 * 64 * (6 * weights + 2 * 12 * 64 * 128)
    a100 = load_cluster("dgx-a100")
    for precision, peak in (("fp32", 19.5e12), ("tf32", 156e12), ("bf16", 312e12)):
        graph = trace_workload(workload, precision=precision)
        assert model_flops(graph) == flops < graph.flops()
        for plan in (ParallelPlan(8, precision=precision), ParallelPlan(8, dp=2, micro_batches=2, precision=precision)):
            found = predict(graph, plan, a100)
            assert found.mfu == pytest.approx(flops / (found.step_seconds * plan.world_size * peak))


def test_recomputation_adds_no_mfu():
    _, graph = model(GPT)
    a100 = load_cluster("dgx-a100")
    plain, again = (predict(graph, ParallelPlan(8, recompute=r), a100, cuda_graphs=True) for r in ((), ("blocks.0",)))
    assert again.step_seconds > plain.step_seconds
    assert again.mfu * again.step_seconds == pytest.approx(plain.mfu * plain.step_seconds)


def test_the_peak_in_fp32_is_that_of_the_format_of_most_flop():
    """torch rounds convolutions to tf32 unasked: nearly all of AlexNet's FLOP, and 1 % of a ViT's, its patches."""
    a100 = in_precision(load_cluster("dgx-a100"), "fp32").device
    peaks = {spec: mfu_peak(model(spec)[1], "fp32", a100) for spec in (ALEXNET, VIT)}
    assert peaks == {ALEXNET: 156e12, VIT: 19.5e12}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_bubble_of_equal_stages_is_the_closed_form(schedule):
    """(p - 1) / (m + p - 1): four stages of two equal layers; the first and last layer are small beside them."""
    graph = trace_workload(load_workload("mlp:layers=8,hidden=2048,ffn=8192,features=8,batch=2048"))
    cuts = ("blocks.2", "blocks.4", "blocks.6")
    for m in (4, 16):
        plan = ParallelPlan(2048 * m, pp=4, micro_batches=m, schedule=schedule, cuts=cuts)
        found = predict(graph, plan, load_cluster("dgx-h100"), cuda_graphs=True)
        assert found.breakdown["bubble"] / found.step_seconds == pytest.approx(3 / (m + 3), rel=0.05)


def test_a_plan_in_tf32_rounds_products_where_the_device_can():
    workload, graph = model(GPT)
    rounded = replace(graph, precision="tf32")
    full, fast = ParallelPlan(8, dp=2), ParallelPlan(8, dp=2, precision="tf32")
    a100, p100 = load_cluster("dgx-a100"), load_cluster("dgx1-p100")
    on = [predict(g, p, a100, cuda_graphs=True) for g, p in ((graph, full), (rounded, fast))]
    assert on[1].step_seconds < on[0].step_seconds and on[1].peak_bytes == on[0].peak_bytes
    assert predict(rounded, fast, p100).step_seconds == predict(graph, full, p100).step_seconds
    found = search(workload, rounded, a100, 8, devices=2, precision="tf32", cuda_graphs=True)
    best = found.plans[0]
    assert best.plan.precision == "tf32" and best.plan.label.endswith("tf32")
    assert best.prediction.step_seconds == predict(rounded, best.plan, a100, cuda_graphs=True).step_seconds
    assert bound_seconds(rounded, fast, a100) <= predict(rounded, fast, a100).step_seconds


V100 = "dgx1-v100"


def test_fp16_runs_on_tensor_cores_that_have_no_bfloat16():
    """V100: 125 TFLOP/s in float16, 15.7 in float32, at which bfloat16 runs."""
    workload = load_workload("gpt2:layers=2,batch=8")
    plans = {p: ParallelPlan(64, dp=8, precision=p) for p in ("fp32", "bf16", "fp16")}
    graphs = {p: trace_workload(workload, precision=p) for p in plans}
    found = {p: predict(graphs[p], plan, load_cluster(V100), cuda_graphs=True) for p, plan in plans.items()}
    assert found["fp16"].step_seconds < 0.5 * min(found["bf16"].step_seconds, found["fp32"].step_seconds)
    assert max(found["fp16"].peak_bytes) < max(found["fp32"].peak_bytes)
    assert not any("float16" in note for note in found["fp16"].notes) and 0.1 < found["fp16"].mfu < 1
    assert any("has no bfloat16" in note for note in found["bf16"].notes)


def test_unscaling_in_fp16_is_one_pass_over_the_gradients():
    """Read and written once: 8 bytes a parameter at 3.35 TB/s."""
    workload = load_workload("gpt2:layers=2,batch=8")
    cluster, scaled = load_cluster("dgx-h100"), trace_workload(workload, precision="fp16")
    (op,) = [op for op in scaled.ops if "non_finite" in op.name]
    parameters = sum(t.numel for t in scaled.parameters.values())
    assert scaled.bytes_read(op) + scaled.bytes_written(op) == pytest.approx(8 * parameters, rel=1e-3)
    assert 8 * parameters / 3.35e12 < price(cluster.device, shape_of(scaled, op)).seconds < 16 * parameters / 3.35e12


def test_fp8_pays_where_products_are_wide_and_is_bf16_where_there_is_none(uncalibrated):
    workload = load_workload("llama3-8b:layers=2,seq=4096,vocab=4096,batch=2")
    graphs = {p: trace_workload(workload, precision=p) for p in ("bf16", "fp8")}
    h100, a100 = (
        [predict(graphs[p], ParallelPlan(2, precision=p), load_cluster(name), cuda_graphs=True) for p in graphs]
        for name in ("dgx-h100", "dgx-a100")
    )
    assert 0.6 * h100[0].step_seconds < h100[1].step_seconds < 0.9 * h100[0].step_seconds
    assert h100[1].peak_bytes == h100[0].peak_bytes and 0.1 < h100[1].mfu < h100[0].mfu
    assert a100[1].step_seconds == a100[0].step_seconds and any("has no fp8" in note for note in a100[1].notes)
    with pytest.raises(ValueError, match="products in fp8 on the CPUs"):
        predict(graphs["fp8"], ParallelPlan(2, precision="fp8"), uncalibrated)
    with pytest.raises(ValueError, match="fp8 is predicted only"):
        apply(ParallelPlan(2, precision="fp8"), workload, 0)
