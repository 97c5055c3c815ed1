"""Folded steps: what is counted once stands for all, and features change the step as they must."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from costmodels.cluster import Cluster, Link
from costmodels.collectives import collective_price
from costmodels.contention import overlapped, waited
from costmodels.device import load_device
from costmodels.ops import price_many, shape_of
from costmodels.overlap import beside, slowdowns
from costmodels.variability import synchronous
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.zoo.transformer import Experts, Shape, workload
from planner.folded import FoldedPrediction, predict_folded
from planner.folded import context_of as folded_context
from planner.folded_groups import Groups
from planner.folded_kernels import Kernels, Launch, Message, priced
from planner.folded_lane import Lane
from planner.folded_local import local_step
from planner.folded_memory import memory_of
from planner.folded_model import FoldedModel, chunks_of
from planner.folded_overlap import exposed, neighbour
from planner.folded_parts import parts_of
from planner.folded_pieces import pieces
from planner.folded_step import Context, program_of
from planner.lower import lower
from planner.plan import ParallelPlan, check_executable, plan_from_dict
from planner.predict import predict
from planner.software import HOST, Software
from simulator import ProgramBuilder

SEQ, HIDDEN, VOCAB, LAYERS = 256, 512, 1024, 8
SHAPE = Shape(3, HIDDEN, 8, 8, 4 * HIDDEN, SEQ, VOCAB, dtype="bfloat16", attention="math")
STYLES = tuple(
    (f"blocks.{i}.{n}", s)
    for i in range(3)
    for n, s in (("attn.qkv", "colwise"), ("mlp.up", "colwise"), ("attn.o", "rowwise"), ("mlp.down", "rowwise"))
)
FAST_HOST = Software("test", HOST["graph"])
FULL = tuple(f"blocks.{i}" for i in range(3))


@lru_cache(maxsize=1)
def traced() -> OpGraph:
    return trace_workload(workload("gpt", SHAPE), fold=False)


def model(micro: int = 4) -> FoldedModel:
    return FoldedModel(traced().at_batch(micro), LAYERS, SEQ, VOCAB)


@lru_cache(maxsize=1)
def cluster() -> Cluster:
    link = Link("NVLink", 3e11, 0.0)
    return Cluster("test", load_device("a100-sxm-80gb"), 8, 8, link, Link("IB", 2.5e10, 0.0))


def plan(**changes: Any) -> ParallelPlan:
    base: dict[str, Any] = {"global_batch": 64, "precision": "bf16"} | changes
    dp, pp, vpp = base.get("dp", 1), base.get("pp", 1), base.get("vpp", 1)
    base.setdefault("micro_batches", base["global_batch"] // (4 * dp))
    base.setdefault("cuts", tuple(f"blocks.{i * LAYERS // (pp * vpp)}" for i in range(1, pp * vpp)))
    if base.get("tp", 1) > 1:
        base.setdefault("shardings", STYLES)
    return ParallelPlan(**base)


def step(software: Software = FAST_HOST, layers: int = LAYERS, **changes: Any) -> FoldedPrediction:
    return predict_folded(replace(model(), layers=layers), plan(**changes), cluster(), software)


def test_parts_hold_each_op_of_the_step_once() -> None:
    graph = traced()
    found = pieces(graph)
    for phase, parts in (("forward", found.forward), ("backward", found.backward)):
        ids = [op.id for ops in parts.values() for op in ops]
        assert len(ids) == len(set(ids))
        everything = {op.id for op in graph.ops if op.phase == phase}
        third = {op.id for op in graph.ops if op.phase == phase and op.module.startswith("blocks.2")}
        assert third <= everything - set(ids)
        assert len(everything - set(ids)) == len(parts["block"])  # only the third block is left out
    assert set(found.parameters["block"]) == {n for n in graph.parameters if n.startswith("blocks.1.")}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"pp": 2, "cuts": ("blocks.1",)}])
def test_a_folded_step_takes_what_the_step_lowered_op_by_op_takes(
    axes: dict[str, Any], micro: int, graphs: bool
) -> None:
    """Three layers without what only trainers add, with the host thread of torch and without one; the optimizer is
    taken off the op-by-op step. What remains is the optimizer's split over stages and ranks, and that torch's 1F1B
    waits for what it sends, as trainers do not: up to 4 %."""
    host = replace(HOST["graph" if graphs else "torch"], step=0.0, fork=0.0)
    plain = Software(
        "plain", host, fusion="none", tp_async=False, main_grads=0, norm_clip=False,
        reduce_bytes=2, vocab_parallel=False, optimizer="none",
    )  # fmt: skip
    chosen = plan(global_batch=4 * micro, micro_batches=micro, **axes)
    folded = predict_folded(replace(model(), layers=3), chosen, cluster(), plain).step_seconds
    graph = traced()
    whole = predict(graph, replace(chosen, precision=graph.precision), cluster(), cuda_graphs=graphs).step_seconds
    ops = [op for op in graph.ops if op.phase == "optimizer"]
    optimizer = sum(p.seconds for p in price_many(cluster().device, [shape_of(graph, op) for op in ops]))
    # With a host, the launches that only the op-by-op step makes count: sums of gradients, shares of rowwise biases.
    assert folded == pytest.approx(whole - optimizer / chosen.world_size, rel=0.04 if graphs else 0.12)


def test_work_grows_by_one_block_a_layer() -> None:
    seconds = [step(layers=n).step_seconds for n in (4, 8, 12)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0], rel=1e-6)


def test_tensor_parallelism_divides_products_and_sends_messages() -> None:
    one, four = step(), step(tp=4)
    assert four.device["gemm"] < 0.7 * one.device["gemm"]  # small products fill the device less
    assert "tp all_reduce" in four.device and "tp all_reduce" not in one.device
    spread = step(tp=4, sequence_parallel=True)
    assert "tp reduce_scatter" in spread.device and "tp all_gather" in spread.device
    assert spread.device["norm"] < four.device["norm"]
    assert spread.memory.activations < four.memory.activations


def test_recomputation_runs_forward_again_and_keeps_less() -> None:
    none, core, full = step(), step(recompute=tuple(f"{b}.attn.core" for b in FULL)), step(recompute=FULL)
    assert none.step_seconds < core.step_seconds < full.step_seconds
    assert none.memory.activations > core.memory.activations > full.memory.activations
    assert full.device["gemm"] / none.device["gemm"] == pytest.approx(4 / 3, rel=0.15)


@pytest.mark.parametrize(("heads", "seq", "micro"), [(8, 256, 4), (8, 512, 2), (16, 256, 4)])
def test_activations_of_a_layer_are_those_of_korthikanti(heads: int, seq: int, micro: int) -> None:
    """Bytes of a layer over s b h, with dropout and 16 bits: 34 + 5 a s / h; 34 where attention between its projections
    is recomputed (Megatron's selective recomputation: the paths of those modules); 2 where the layer is (Korthikanti
    et al. 2022, equations 1, 4 and table 2). Theirs leave out the statistics of the norms: 16 / h of s b h here."""
    shape = replace(SHAPE, heads=heads, kv_heads=heads, seq=seq, dropout=0.1)
    graph = trace_workload(workload("gpt", shape), fold=False).at_batch(micro)
    unit, scores = seq * micro * HIDDEN, 5 * heads * seq / HIDDEN
    core = tuple(f"{block}.attn.core" for block in FULL)
    for recompute, expected in (((), 34 + scores), (core, 34), (FULL, 2)):
        own = plan(global_batch=micro, micro_batches=1, recompute=recompute)
        held = [
            predict_folded(FoldedModel(graph, layers, seq, VOCAB), own, cluster(), FAST_HOST).memory.activations
            for layers in (8, 9)
        ]
        assert 0 <= (held[1] - held[0]) / unit - expected <= 16.01 / HIDDEN, recompute


def test_stages_recompute_their_own_share() -> None:
    """From the plan's count of blocks, or from the trainer's shares; each stage pays for its own."""
    whole = tuple(f"blocks.{i}" for i in range(LAYERS))
    none, full = step(pp=2), step(pp=2, recompute=whole)
    first = step(pp=2, recompute=whole, recompute_first=(LAYERS // 2, 0))
    stated = step(replace(FAST_HOST, recompute_shares=(1.0, 0.0)), pp=2, recompute=whole)
    assert stated == first and none.step_seconds < first.step_seconds < full.step_seconds
    half = step(pp=2, recompute=whole, recompute_first=(LAYERS // 4,))
    assert half == step(replace(FAST_HOST, recompute_share=0.5), pp=2, recompute=whole)
    assert step(pp=2, recompute=whole, recompute_first=(LAYERS // 2,)) == full
    context = folded_context(model(), plan(pp=2, recompute=whole, recompute_first=(2, 0)), cluster(), FAST_HOST)
    kept = [memory_of(context.at(s), s).activations for s in range(2)]
    alone = [memory_of(folded_context(model(), plan(pp=2), cluster(), FAST_HOST), s).activations for s in range(2)]
    assert kept[0] < alone[0] and kept[1] == alone[1]
    with pytest.raises(ValueError, match="5 modules of stage 0, which has 4"):
        step(pp=2, recompute=whole, recompute_first=(5, 0))


def test_interleaving_shrinks_the_bubble() -> None:
    wide = step(pp=4, global_batch=32)
    thin = step(pp=4, vpp=2, global_batch=32)
    assert thin.breakdown["bubble"] < wide.breakdown["bubble"]
    assert thin.step_seconds < wide.step_seconds


def test_a_pipeline_of_equal_stages_takes_micro_batches_plus_stages_less_one() -> None:
    """Without embedding, logits and updates, the closed form of 1F1B holds, with a message after each pass."""
    bare = replace(FAST_HOST, optimizer="none", host=replace(HOST["graph"], step=0.0))
    shape = replace(SHAPE, vocab=0)
    graph = trace_workload(workload("blocks", shape), fold=False).at_batch(4)
    fast = replace(cluster(), intra=Link("free", 1e18, 0.0), inter=Link("free", 1e18, 0.0), cache={})
    blocks = FoldedModel(graph, LAYERS, SEQ, 0)
    whole = predict_folded(blocks, plan(micro_batches=16), fast, bare).step_seconds / 16
    piped = predict_folded(blocks, plan(pp=4), fast, bare).step_seconds
    send = collective_price(fast, "send", 4 * SEQ * HIDDEN * 2, (0, 1)).seconds  # links are free, launches are not
    assert piped == pytest.approx((whole / 4 + 2 * send) * (16 + 3), rel=0.03)


def test_sharded_optimizers_need_less_memory_each_by_its_share() -> None:
    ddp, zero1, zero2, fsdp = (
        step(dp=8, data_parallel=kind).memory for kind in ("ddp", "zero1", "zero2", "fsdp")
    )
    assert zero1.optimizer == pytest.approx(ddp.optimizer / 8, rel=0.01)
    assert zero1.gradients == ddp.gradients and zero2.gradients == pytest.approx(ddp.gradients / 8, rel=0.01)
    assert fsdp.parameters + fsdp.optimizer < zero1.parameters + zero1.optimizer


def test_a_slow_host_bounds_the_step() -> None:
    slow = replace(FAST_HOST, host=replace(HOST["torch-2021"], op=1e-3))
    assert step(slow).step_seconds > 5 * step().step_seconds
    kernels = Kernels(local_step(model().graph, plan(), SEQ, VOCAB, True), slow)
    launches = kernels.forward(pieces(model().graph).forward["block"])
    issued = sum(x.host for x in launches) * LAYERS * 16
    assert step(slow).step_seconds > issued


def test_timed_passes_keep_the_host_from_running_ahead() -> None:
    """Each pass begins with an idle device: a slow host is late by its first launches, and its data come first."""
    host = HOST["torch-2021"]
    free, timed = (replace(FAST_HOST, host=host, timed_passes=on) for on in (False, True))
    ahead, waits = step(free, global_batch=64).step_seconds, step(timed, global_batch=64).step_seconds
    assert ahead < waits < 1.2 * ahead
    fetched = replace(timed, host=replace(host, batch=2e-3))
    assert step(fetched, global_batch=64).step_seconds == pytest.approx(waits + 16 * 2e-3, rel=1e-6)
    assert step(replace(FAST_HOST, timed_passes=True)).step_seconds == pytest.approx(step().step_seconds), "graphs"


def test_a_stage_whose_sends_block_posts_two_messages_after_each_pass() -> None:
    blocks = replace(FAST_HOST, p2p_overlap=False)
    slow = replace(blocks, host=replace(blocks.host, message=1e-3))
    more = step(slow, pp=2, global_batch=32).step_seconds - step(blocks, pp=2, global_batch=32).step_seconds
    # Of eight micro-batches the first stage posts after every forward, the second after every backward; 1F1B lets one
    # stage's posts stand beside the other's pass, so between one chain of them and both
    assert more * (1 + 1e-9) >= 8 * 2e-3 and more <= 2 * 9 * 2e-3


def test_joined_kernels_move_less() -> None:
    joined, apart = step(FAST_HOST), step(replace(FAST_HOST, fusion="none"))
    light = ("pointwise", "norm", "norm_backward", "softmax", "copy", "reduction")
    assert sum(joined.device.get(k, 0) for k in light) < sum(apart.device.get(k, 0) for k in light)
    assert joined.device["gemm"] == pytest.approx(apart.device["gemm"], rel=1e-6)


def test_overlapped_gradients_cost_less_than_those_sent_afterwards() -> None:
    late = step(replace(FAST_HOST, dp_overlap=False), dp=16, global_batch=64)
    assert step(dp=16, global_batch=64).step_seconds < late.step_seconds


def test_chunks_follow_the_cuts() -> None:
    chunks = chunks_of(model(), plan(pp=2, vpp=2))
    assert [c.count("block") for c in chunks] == [2, 2, 2, 2]
    assert chunks[0].count("first") == chunks[-1].count("last") == 1
    with pytest.raises(ValueError, match="no block"):
        chunks_of(model(), replace(plan(pp=2), cuts=("blocks.99",)))


def test_what_cannot_run_yet_is_refused_in_one_sentence() -> None:
    beyond = replace(plan(), sequence_parallel=True)
    with pytest.raises(ValueError, match="sequence_parallel"):
        check_executable(beyond)
    with pytest.raises(ValueError, match="vpp = 2"):
        lower(traced(), plan(pp=2, vpp=2), cluster())
    check_executable(plan(dp=2))
    with pytest.raises(ValueError, match="simulate for a plan with offload"):
        predict_folded(model(), plan(dp=2, offload=("optimizer",)), cluster(), FAST_HOST)


def test_context_and_expert_parallel_ranks_share_what_they_both_hold() -> None:
    """Experts have no context parallelism: neighbours have different experts, and dp x cp / ep ranks the same ones."""
    groups = Groups(plan(dp=4, cp=2, ep=4))
    assert groups.ranks("ep") == (0, 1, 2, 3) and groups.ranks("edp") == (0, 4)
    assert groups.ranks("cp") == (0, 1) and groups.ranks("dp") == tuple(range(8))
    assert groups.likes("ep") == (0, 4)
    assert plan(dp=4, cp=2, ep=4).expert_replicas == 2


def test_experts_are_split_over_tensor_parallel_ranks_unless_other_experts_are_there() -> None:
    """Megatron's order: ranks that split an expert are neighbours, then come those of other experts."""
    tp = {"tp": 2, "shardings": (("blocks.0.attn.q", "colwise"),)}
    split = plan(dp=4, ep=2, **tp)
    assert (split.etp, split.expert_replicas) == (2, 2)
    groups = Groups(split)
    assert groups.ranks("tp") == (0, 1) and groups.ranks("ep") == (0, 2) and groups.ranks("edp") == (0, 4)
    folded = plan(dp=2, ep=4, **tp)  # four ranks have different experts, two of them those of tp
    assert (folded.etp, folded.expert_replicas) == (1, 1) and Groups(folded).ranks("ep") == (0, 1, 2, 3)
    assert (plan(dp=4, ep=4).etp, plan(**tp).etp) == (1, 2)


def test_a_rank_updates_all_its_experts_that_no_other_rank_has() -> None:
    """Four experts on as many ranks, all on each or one on each: a rank's part of the optimizer is as large."""
    sizes = []
    for ep in (1, 4):
        shape = replace(SHAPE, experts=Experts(4 // ep, 4, 1, HIDDEN))
        graph = trace_workload(workload("moe", shape), fold=False).at_batch(4)
        chosen = plan(dp=4, ep=ep, data_parallel="zero1", global_batch=16)
        software = replace(FAST_HOST, main_grads=0)  # no buffer to clear
        context = folded_context(FoldedModel(graph, LAYERS, SEQ, VOCAB), chosen, cluster(), software)
        dense, experts = context.elements(context.chunks[0])
        memory = memory_of(context, 0)
        assert memory.optimizer == 12 * (dense / 4 + experts / chosen.expert_replicas)
        program_of(context)
        sizes.append(context.at(0).tally.seconds["optimizer"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)  # a quarter of the experts, of which each rank has its own


@pytest.mark.parametrize(("cut", "busiest"), [("blocks.2", 1), ("blocks.7", 0)])
def test_parts_are_those_of_the_stage_that_is_busiest(cut: str, busiest: int) -> None:
    """Its kernels, its messages and its optimizer, of 8 blocks and the parts around them."""
    chosen = plan(pp=2, dp=2, cuts=(cut,))
    found = predict_folded(model(), chosen, cluster(), FAST_HOST).device
    context = folded_context(model(), chosen, synchronous(cluster(), 4), FAST_HOST)
    program_of(context)
    mine, other = (context.at(s).tally.seconds for s in (busiest, 1 - busiest))
    assert found == mine
    for part in ("gemm", "optimizer", "dp all_reduce"):
        assert mine[part] > 1.3 * other[part]
    whole = predict_folded(model(), plan(dp=2), cluster(), FAST_HOST).device
    assert max(mine[p] / whole[p] for p in ("gemm", "optimizer", "dp all_reduce")) < 1


def test_messages_of_fsdp_are_counted_with_the_error_of_their_price() -> None:
    found = folded_context(model(), plan(dp=4, data_parallel="fsdp"), cluster(), FAST_HOST)
    program = program_of(found)
    tally = found.at(0).tally
    for kind in ("all_gather", "reduce_scatter"):
        sent = sum(t for i, t in enumerate(program.duration) if program.categories[program.category[i]] == kind)
        assert tally.seconds[f"dp {kind}"] == pytest.approx(sent)
        assert tally.errors[f"dp {kind}"] > 0.01 * sent


def test_plans_of_the_first_schema_are_still_read() -> None:
    data = plan(dp=2).to_dict()
    for name in ("vpp", "sequence_parallel", "cp", "ep"):
        del data[name]
    assert plan_from_dict(data | {"schema": 1}) == plan(dp=2)
    with pytest.raises(ValueError, match="schema is 99"):
        plan_from_dict(data | {"schema": 99})


def test_the_replayed_step_reserves_at_least_what_it_allocates() -> None:
    for changes in ({}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 4, "data_parallel": "fsdp"}):
        found = predict_folded(model(), plan(**changes), cluster(), FAST_HOST, replay=True)
        assert 0 < found.allocated_bytes <= found.reserved_bytes <= 1.5 * found.allocated_bytes, changes
        assert found.allocated_bytes == pytest.approx(found.memory.allocated, rel=0.25), changes


def test_a_single_blocks_activations_are_those_of_the_trace() -> None:
    """Without fusion, what a block keeps is what the trace says outlives its forward."""
    graph = model().graph
    end = max(op.id for op in graph.ops if op.phase == "forward")
    mine = {op.id for op in pieces(graph).forward["block"]}
    kept = sum(s.bytes for s in graph.storages if s.birth in mine and s.death > end)
    eager = replace(FAST_HOST, fusion="none")
    more = step(eager, layers=9).memory.activations - step(eager, layers=8).memory.activations
    assert more == pytest.approx(kept, rel=1e-6)


def test_messages_beside_compute_slow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward takes longer by what `costmodels.overlap` says of its kernels beside each gradient message."""
    sent: list[tuple[float, float]] = []
    once = Context.message

    def noted(self: Context, kind: str, size: float, axis: str, stage: int = 0) -> float:
        seconds = once(self, kind, size, axis, stage)
        sent.append((size, seconds))
        return seconds

    monkeypatch.setattr(Context, "message", noted)
    own = plan(global_batch=128, micro_batches=4, dp=8)
    context = context_of(own)
    program = program_of(context)
    found = [s for name, s in zip(program.labels, program.duration) if name == "slowed"]
    kernels = {w: context.parts.by_where[w].backward for w in ("first", "block0", "block", "last")}
    counts = dict(context.chunks[0].parts)
    alone = sum(counts[w] * t for w, part in kernels.items() if w in counts for _, t in part.kernels)
    expected = []
    for size, seconds in sent:
        other = beside(cluster(), "all_reduce", size, range(8), seconds)
        assert other.units and other.bandwidth
        slowed = 0.0
        for w in counts:
            shapes, times = zip(*kernels[w].kernels)
            slowed += counts[w] * sum(t * x for t, x in zip(times, slowdowns(cluster().device, shapes, times, other)))
        expected.append(seconds * (1 - alone / slowed))
    # The first passes beside the kernels that follow it, all of it; those that are under way at the end lose less.
    assert len(found) > 1 and min(found) > 0
    assert expected[0] * (1 - 1e-9) <= sum(found) <= sum(expected) * (1 + 1e-9)
    one = step(global_batch=16, micro_batches=4).step_seconds
    assert step(global_batch=128, micro_batches=4, dp=8).step_seconds >= one + sum(found)


def test_kernels_lose_only_while_a_message_is_under_way() -> None:
    lane = Lane(ProgramBuilder(), 0)
    lane.message("a", "all_reduce", 1.0, lost=0.25)
    lane.message("b", "all_reduce", 2.0, lost=0.5)
    lane.message("free", "send", 9.0)
    assert lane._lost(0.6) == pytest.approx(0.2)  # 0.8 s beside the first, of which 0.2 are lost
    assert lane._lost(0.4) == pytest.approx(0.05 + 0.25)  # 0.2 s beside the rest of it, 0.5 s beside the second
    assert lane._lost(10.0) == pytest.approx(0.75) and not lane.beside  # 1.5 s are left, the rest is alone
    assert lane._lost(10.0) == 0.0


@pytest.mark.parametrize("axes", [{"pp": 4}, {"pp": 4, "vpp": 2}, {"pp": 2, "data_parallel": "zero1"}])
@pytest.mark.parametrize("rate", [1e8, 5e9])
def test_overlapping_the_gradients_of_a_pipeline_never_costs_more(axes: dict[str, Any], rate: float) -> None:
    """However slow the network is: behind the first stage nothing runs beside a stage's last gradients, and in front a
    smaller last bucket (a message that moves fewer bytes a second) costs 2 % at most."""
    slow = replace(cluster(), inter=replace(cluster().inter, bandwidth=rate), devices_per_node=1, nodes=64, cache={})
    chosen = plan(dp=4, global_batch=4 * 4 * 8, micro_batches=8, **axes)
    late = replace(FAST_HOST, dp_overlap=False)
    seconds = [predict_folded(model(), chosen, slow, s).step_seconds for s in (FAST_HOST, late)]
    assert seconds[0] <= seconds[1] * (1.02 if axes["pp"] == 2 else 1 + 1e-9)


@pytest.mark.parametrize("rate", [1e9, 25e9])
def test_fsdp_without_overlap_waits_for_each_message(rate: float) -> None:
    slow = replace(cluster(), inter=replace(cluster().inter, bandwidth=rate), devices_per_node=1, nodes=64, cache={})
    chosen = plan(dp=8, global_batch=8 * 4, micro_batches=1, data_parallel="fsdp")
    on, off = (
        predict_folded(model(), chosen, slow, replace(FAST_HOST, dp_overlap=overlap)) for overlap in (True, False)
    )
    assert on.step_seconds < off.step_seconds
    messages = sum(seconds for what, seconds in off.device.items() if what.startswith("dp "))
    kernels = sum(off.device.values()) - messages
    assert off.step_seconds == pytest.approx(messages + kernels + FAST_HOST.host.step, rel=0.01)


def context_of(own: ParallelPlan, software: Software = FAST_HOST) -> Context:
    whole = model()
    local = local_step(whole.graph, own, SEQ, VOCAB, software.vocab_parallel)
    parts = parts_of(local, pieces(whole.graph), software, cluster())
    return Context(parts, own, software, cluster(), chunks_of(whole, own))


def test_a_split_layers_backward_runs_its_messages_beside_its_two_products() -> None:
    """Megatron-LM: the input is gathered beside the product for its gradient, which is reduced beside the product for
    the weight's. Each message adds what `overlapped` leaves of it."""
    own = plan(tp=4, sequence_parallel=True)
    kernels = Kernels(local_step(model().graph, own, SEQ, VOCAB, True), FAST_HOST)
    launches = kernels.backward(pieces(model().graph).backward["block"])
    shapes = [x.shape for x in launches if x.shape is not None]
    prices = iter(price_many(cluster().device, shapes))
    device = [next(prices).seconds if x.shape is not None else 0.0 for x in launches]
    behind = [i for i, x in enumerate(launches) if x.message is not None and x.message.beside]
    assert len(behind) == 4
    for i in behind:
        message, at = launches[i].message, neighbour(launches, i)
        assert message is not None and at is not None
        shape, weight = launches[at].shape, message.weight
        assert shape is not None and (shape.out_shapes[0] == weight) == (message.kind == "reduce_scatter")
        for seconds in (device[at] / 4, 4 * device[at]):
            other = beside(cluster(), message.kind, message.bytes, range(4), seconds)
            slowdown = slowdowns(cluster().device, [shape], [device[at]], other)[0]
            both = overlapped(device[at], seconds, slowdown)[0]
            adds = exposed(launches, i, device, seconds, cluster(), range(4))
            assert adds == pytest.approx(both - device[at], rel=1e-12)
            assert max(0.0, seconds - device[at]) <= adds * (1 + 1e-9) and adds < seconds
    waits = replace(FAST_HOST, tp_async=False)
    assert step(waits, tp=4, sequence_parallel=True).step_seconds > step(tp=4, sequence_parallel=True).step_seconds


def test_inputs_in_fp8_are_gathered_in_fp8_and_results_reduced_as_they_are() -> None:
    """Transformer Engine casts, then gathers; sums of products leave it in bf16. The head's input is not cast."""
    own, found = plan(tp=4, sequence_parallel=True, precision="fp8"), {}
    for eight in (False, True):
        kernels = Kernels(local_step(model().graph, own, SEQ, VOCAB, True), replace(FAST_HOST, fp8_inputs=eight))
        parts = pieces(model().graph)
        for where in ("block", "last"):
            launches = [*kernels.forward(parts.forward[where]), *kernels.backward(parts.backward[where])]
            messages = [x.message for x in launches if x.message is not None and x.message.axis == "tp"]
            found[where, eight] = [(m.kind, m.bytes) for m in messages]
    halved = [(kind, size // 2 if kind == "all_gather" else size) for kind, size in found["block", False]]
    assert found["block", True] == halved and any(kind == "all_gather" for kind, _ in halved)
    assert found["last", True] == found["last", False]


def test_products_of_hopper_wait_for_bulk_messages_but_not_for_pieces() -> None:
    """Blocks that find no unit start when the message is through; those of a product in pieces all find one."""
    hopper = replace(cluster(), device=load_device("h100-sxm"))
    own, large = plan(tp=4, sequence_parallel=True), model(64)
    local = local_step(large.graph, own, SEQ, VOCAB, True)
    parts = pieces(large.graph)
    for pipelined in (False, True):
        kernels = Kernels(local, replace(FAST_HOST, tp_overlap=pipelined))
        launches = kernels.forward(parts.forward["block"]) if pipelined else kernels.backward(parts.backward["block"])
        shapes = [x.shape for x in launches if x.shape is not None]
        prices = iter(price_many(hopper.device, shapes))
        device = [next(prices).seconds if x.shape is not None else 0.0 for x in launches]
        found = 0
        for i, launch in enumerate(launches):
            message, at = launch.message, neighbour(launches, i) if launch.message else None
            if message is None or at is None or message.kind != "reduce_scatter" or bool(message.beside) is pipelined:
                continue
            shape, seconds = launches[at].shape, device[at] / 2
            assert shape is not None
            other = beside(hopper, message.kind, message.bytes, range(4), seconds)
            adds = exposed(launches, i, device, seconds, hopper, range(4))
            if pipelined:
                slowdown = slowdowns(hopper.device, [shape], [device[at]], replace(other, static=False))[0]
                first = min(seconds, device[at]) / message.pieces
                assert adds == pytest.approx(first + overlapped(device[at], seconds - first, slowdown)[0] - device[at])
            else:
                slowdown = slowdowns(hopper.device, [shape], [device[at]], other)[0]
                assert adds == pytest.approx(waited(device[at], seconds, slowdown) - device[at])
                assert adds >= overlapped(device[at], seconds, slowdown)[0] - device[at] - 1e-12
            found += 1
        assert found


def test_fsdp2_copies_parameters_and_gradients_between_its_kernels() -> None:
    own = plan(dp=8, data_parallel="fsdp")
    views, copies = (
        predict_folded(model(), own, cluster(), replace(FAST_HOST, fsdp_copies=c)).step_seconds for c in (False, True)
    )
    elements = sum(t.numel for n, t in traced().parameters.items() if not n.startswith(("blocks.0", "blocks.2")))
    blocks = sum(t.numel for n, t in traced().parameters.items() if n.startswith("blocks.1"))
    root = elements - blocks
    # out: 2 + 2 bytes, into: 2 + 4 bytes an element; a block is copied out twice, the root once. At most the bandwidth.
    moved = own.micro_batches * (LAYERS * blocks * (4 + 4 + 6) + root * (4 + 6))
    assert copies - views > moved / cluster().device.memory_bandwidth
    assert copies - views < 20 * moved / cluster().device.memory_bandwidth


def test_main_gradients_are_cleared_and_clipped() -> None:
    """Both pass over the gradients once a step: what is written, and what is read and written again."""
    plain, cleared, clipped = (
        predict_folded(model(), plan(), cluster(), replace(FAST_HOST, fused_accumulation=True, **changes))
        for changes in (
            {"norm_clip": False, "main_grads": 0}, {"norm_clip": False, "main_grads": 4}, {"main_grads": 0},
        )
    )  # fmt: skip
    bandwidth = cluster().device.memory_bandwidth
    elements = plain.memory.parameters // 2
    assert cleared.device["optimizer"] - plain.device["optimizer"] > 4 * elements / bandwidth
    assert clipped.device["optimizer"] - plain.device["optimizer"] > 12 * elements / bandwidth


def test_replayed_fsdp_holds_what_leaves_recomputed_regions_and_the_gathering_streams_pool() -> None:
    """Results of recomputed ops that others read are kept; whole parameters are counted once, and again in the pool of
    the stream that gathers them (FSDP2)."""
    regions = tuple(f"blocks.{i}.{name}" for i in range(3) for name in ("norm1", "attn.qkv", "norm2", "mlp.up"))
    own = plan(dp=8, data_parallel="fsdp", recompute=regions)
    views, copies, policy = (
        predict_folded(model(), own, cluster(), replace(FAST_HOST, **changes), replay=True)
        for changes in ({}, {"fsdp_copies": True}, {"recompute_matmuls": 0.5})
    )
    elements = {n: t.numel for n, t in traced().parameters.items()}
    block = sum(n for name, n in elements.items() if name.startswith("blocks.1."))
    root = sum(n for name, n in elements.items() if not name.startswith("blocks."))
    assert copies.reserved_bytes - views.reserved_bytes == 2 * max(root, 2 * block)
    assert views.memory.gathered == 2 * (root + 2 * block)
    assert views.allocated_bytes == pytest.approx(views.memory.allocated, rel=0.1)
    # A policy that names products keeps the last one's result in every block: 4 sequences of 256 tokens.
    assert policy.memory.activations - views.memory.activations == LAYERS * 2 * 4 * SEQ * HIDDEN


def test_intervals_reach_further_up_where_tensor_cores_work() -> None:
    found = step()
    low, high = found.interval
    below, above = 1 - low / found.step_seconds, high / found.step_seconds - 1
    busy = sum(found.device[k] for k in ("gemm", "attention", "attention_backward") if k in found.device)
    share = busy / sum(found.device.values())
    assert above**2 - below**2 == pytest.approx((1.645 * 0.15 * share) ** 2 / 3, rel=1e-6)


def test_zero2_hands_on_the_gradients_of_every_micro_batch() -> None:
    """Who keeps a share of the gradients cannot sum them whole (DeepSpeed reduces at every backward of ZeRO-2)."""
    once = [step(dp=8, data_parallel=kind, global_batch=32).step_seconds for kind in ("zero1", "zero2")]
    often = [step(dp=2, data_parallel=kind).step_seconds for kind in ("zero1", "zero2")]
    assert once[1] == pytest.approx(once[0]) and often[1] > 1.01 * often[0]


@lru_cache(maxsize=1)
def apart() -> OpGraph:
    """Queries, keys, values, gate and up as products of their own."""
    shape = replace(SHAPE, mlp="swiglu", joined=False)
    return trace_workload(workload("llama", shape), fold=False).at_batch(4)


def of_siblings(joined: bool, sp: bool) -> tuple[dict[str, list[str]], int]:
    """Messages of a block in forward and backward, and the bytes that the step allocates."""
    names = (*(f"attn.{x}" for x in "qkv"), "mlp.up", "mlp.gate")
    cut = tuple((f"blocks.{i}.{n}", "colwise") for i in range(3) for n in names)
    cut += tuple((f"blocks.{i}.{n}", "rowwise") for i in range(3) for n in ("attn.o", "mlp.down"))
    split = plan(tp=4, shardings=cut, sequence_parallel=sp)
    software = replace(FAST_HOST, joined=joined, tp_async=joined)
    context = folded_context(FoldedModel(apart(), LAYERS, SEQ, VOCAB), split, cluster(), software)
    kernels, found = context.parts.kernels, context.parts.pieces
    launches = {"forward": kernels.forward(list(found.forward["block"])),
                "backward": kernels.backward(list(found.backward["block"]))}  # fmt: skip
    kinds = {k: [x.message.kind for x in v if x.message] for k, v in launches.items()}
    return kinds, memory_of(context.at(0), 0).allocated


def test_products_of_one_input_share_its_gather_and_the_sum_of_its_gradients() -> None:
    """Two inputs of a block are gathered and two results reduced, whether a layer's products are one or several;
    Megatron gathers inputs again in backward, DTensor keeps them whole."""
    whole, more = of_siblings(False, True)
    assert sorted(whole["forward"]) == ["all_gather"] * 2 + ["reduce_scatter"] * 2
    assert sorted(whole["backward"]) == ["all_gather"] * 2 + ["reduce_scatter"] * 2
    again, less = of_siblings(True, True)
    assert again["forward"] == whole["forward"]
    assert sorted(again["backward"]) == ["all_gather"] * 4 + ["reduce_scatter"] * 2
    assert more - less == pytest.approx(LAYERS * 2 * 3 / 4 * 4 * SEQ * HIDDEN * 2, rel=0.1)
    alike, _ = of_siblings(False, False)
    assert alike["forward"] == alike["backward"] == ["all_reduce"] * 2


def test_a_ring_of_keys_waits_for_its_slowest_link() -> None:
    """Sixteen ranks on two nodes cross the network at two places of the ring."""
    found = []
    for rate in (2.5e10, 1e9):
        two = replace(cluster(), inter=Link("IB", rate, 0.0), cache={})
        launches = [Launch(0.0, None, Message("send", 2**26, "cp", 0))]
        spread, one = (priced(launches, two, Groups(plan(cp=n))).seconds["cp send"] for n in (16, 8))
        found.append((spread, one))
        assert spread >= 2**26 / rate > one
    assert found[0][1] == found[1][1] and found[1][0] > 10 * found[0][0]
