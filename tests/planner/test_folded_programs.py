"""What programs run of a folded step: where recomputing stops, what they cast, sort and gather, and when."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from costmodels.cluster import Cluster, Link
from costmodels.device import load_device
from costmodels.families import family
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.zoo.transformer import Experts, Shape, workload
from planner.folded import context_of
from planner.folded_kernels import Kernels, Launch
from planner.folded_local import local_step, read_by
from planner.folded_model import FoldedModel
from planner.folded_parts import _experts
from planner.folded_pieces import pieces
from planner.folded_step import Context, program_of
from planner.fusion import Fused
from planner.plan import ParallelPlan
from planner.software import HOST, Software
from simulator import simulate

SEQ, HIDDEN, VOCAB, LAYERS = 256, 512, 1024, 4
SHAPE = Shape(3, HIDDEN, 8, 8, 4 * HIDDEN, SEQ, VOCAB, dtype="bfloat16")
ROTARY = replace(SHAPE, positions="rope", norm="rms", mlp="swiglu", bias=False)
MIXED = replace(SHAPE, experts=Experts(2, 8, 2, HIDDEN))
PLAIN = Software("test", HOST["graph"], optimizer="none")
STYLES = tuple(
    (f"blocks.{i}.{n}", s)
    for i in range(3)
    for n, s in (("attn.qkv", "colwise"), ("mlp.up", "colwise"), ("attn.o", "rowwise"), ("mlp.down", "rowwise"))
)
FULL = tuple(f"blocks.{i}" for i in range(3))


@lru_cache(maxsize=3)
def traced(shape: Shape = SHAPE) -> OpGraph:
    return trace_workload(workload("gpt", shape), fold=False)


def plan(**changes: Any) -> ParallelPlan:
    base: dict[str, Any] = {"global_batch": 16, "micro_batches": 2, "precision": "bf16"} | changes
    pp = base.get("pp", 1)
    base.setdefault("cuts", tuple(f"blocks.{i * LAYERS // pp}" for i in range(1, pp)))
    return ParallelPlan(**base)


def cluster(rate: float = 2.5e10) -> Cluster:
    link = Link("NVLink", 3e11, 0.0)
    return Cluster("test", load_device("a100-sxm-80gb"), 8, 1, link, Link("IB", rate, 0.0))


def context(software: Software, own: ParallelPlan, shape: Shape = SHAPE, rate: float = 2.5e10) -> Context:
    return context_of(FoldedModel(traced(shape).at_batch(2), LAYERS, SEQ, VOCAB), own, cluster(rate), software)


def shapes_of(software: Software, own: ParallelPlan, shape: Shape = SHAPE) -> list[Any]:
    """Kernels of one block's backward."""
    return [s for s, _ in context(software, own, shape).parts.by_where["block"].backward.kernels]


def products(shapes: list[Any]) -> list[int]:
    return [s.flops for s in shapes if family(s.name) == "gemm"]


# -- recomputation ------------------------------------------------------------------------------------------
def test_a_checkpoint_that_stops_early_leaves_out_the_last_product_of_a_block() -> None:
    """Nothing is saved of the down projection's result, nor of the sum that follows."""
    own = plan(recompute=FULL)
    whole, early = (shapes_of(replace(PLAIN, early_stop=stop), own) for stop in (False, True))
    down = 2 * 2 * SEQ * HIDDEN * 4 * HIDDEN
    assert sum(products(whole)) - sum(products(early)) == down
    assert len(products(whole)) == len(products(early)) + 1 and len(whole) > len(early) + 1


def test_regions_inside_a_block_stop_each_for_itself_unless_one_policy_covers_the_block() -> None:
    """A region of one product saves nothing of it, and is not run; a policy by operators runs the block up to the last
    op that saves, so the named products before it run."""
    own = plan(recompute=tuple(f"{b}.{n}" for b in FULL for n in ("attn.o", "mlp.up")))
    none, apart, policy = (
        products(shapes_of(replace(PLAIN, **changes), plan() if not changes else own))
        for changes in ({}, {"early_stop": True}, {"early_stop": True, "recompute_matmuls": 0.5})
    )
    assert len(apart) == len(none) and len(policy) == len(none) + 2


def test_a_reduction_that_is_not_reached_is_not_sent_again() -> None:
    own = plan(tp=4, sequence_parallel=True, shardings=STYLES, recompute=FULL)
    whole, early = (
        context(replace(PLAIN, early_stop=stop), own).parts.by_where["block"].backward.seconds for stop in (False, True)
    )
    assert early["tp reduce_scatter"] < whole["tp reduce_scatter"]
    assert early["tp all_gather"] == pytest.approx(whole["tp all_gather"])


# -- kernels ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 2])
def test_every_factor_of_a_layer_is_cast_once_whatever_its_shape(rows: int) -> None:
    """Also where there are as many rows as outputs, and a weight's gradient has the shape of the layer's result."""
    graph = traced().at_batch(2 * rows)
    own = plan(precision="fp8")
    kernels, parts = Kernels(local_step(graph, own, SEQ, VOCAB, True), PLAIN), pieces(graph)
    for found, count in ((kernels.forward(parts.forward["block"]), 4), (kernels.backward(parts.backward["block"]), 4)):
        casts = [x for x in found if x.shape is not None and x.shape.name == "aten._to_copy.default"]
        assert len([c for c in casts if c.shape and c.shape.bytes_read == c.shape.bytes_written]) == count


def test_ranks_cast_their_part_of_what_is_gathered_and_turn_what_comes() -> None:
    """Of a column-split layer's input and a row-split one's gradient each rank casts a fourth: 2 + 1 bytes an element,
    and 1 + 1 of everything for the other layout. The other two of each are its own: 2 + 2 bytes."""
    own = plan(precision="fp8", tp=4, sequence_parallel=True, shardings=STYLES)
    parts, moved = pieces(traced()), {}
    for eight in (False, True):
        kernels = Kernels(local_step(traced(), own, SEQ, VOCAB, True), replace(PLAIN, fp8_inputs=eight))
        found = [*kernels.forward(parts.forward["block"]), *kernels.backward(parts.backward["block"])]
        casts = [x.shape for x in found if x.shape and x.shape.name == "aten._to_copy.default"]
        moved[eight] = sum(s.bytes_read + s.bytes_written for s in casts)
    tokens = traced().batch * SEQ
    local = (HIDDEN + 4 * HIDDEN) + (3 * HIDDEN + 4 * HIDDEN)  # columns: in of o, down; gradients of qkv, up
    assert moved[False] == 4 * tokens * (local // 4 + 4 * HIDDEN)
    assert moved[True] == tokens * (4 * local // 4 + 4 * HIDDEN * 3 // 4 + 4 * HIDDEN * 2)


def test_a_kernel_reads_both_halves_of_what_it_rotates() -> None:
    """Rotary embeddings read a head's two halves as views of one storage; each counts, and no more than the whole."""
    graph = traced(ROTARY)
    local = local_step(graph, plan(), SEQ, VOCAB, False)
    fused = Fused(local, PLAIN)
    found = 0
    for group in fused.groups(pieces(graph).forward["block"]):
        shape = fused.shape(group)
        if shape is None or not group[0].module.endswith(("rope_q", "rope_k")):
            continue
        heads = max(graph.tensors[t].bytes for op in group for t in op.outputs if not op.is_view)
        assert heads <= shape.bytes_read <= 1.5 * heads, group[0].module
        found += 1
    assert found == 2


def test_what_asks_for_a_shape_reads_nothing() -> None:
    op = next(op for op in traced().ops if op.phase == "forward" and len(op.inputs) == 2)
    assert read_by(op) == op.inputs
    assert read_by(replace(op, name="aten.new_zeros.default")) == read_by(replace(op, name="aten.zero_.default")) == ()


def test_tokens_from_several_ranks_are_sorted_by_expert_and_back() -> None:
    graph = traced(MIXED)
    forward = pieces(graph).forward["block"]
    given = next(op for op in forward if op.module.endswith("mlp.dispatch") and "index_select" in op.name)
    size = graph.tensors[given.outputs[0]].bytes

    def moved(**changes: Any) -> list[Launch]:
        return [x for x in _experts(local_step(graph, plan(**changes), SEQ, VOCAB, False), forward, 0.0) if x.shape]

    assert [(x.shape.bytes_read, x.shape.bytes_written) for x in moved(dp=4, ep=4) if x.shape] == [(size, size)] * 2
    assert not moved(dp=4)  # every rank has all experts, and dispatch leaves their tokens in order


# -- messages -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("joined", "gathers"), [(True, 1), (False, 0)])
def test_split_embeddings_and_logits_gather_in_backward(joined: bool, gathers: int) -> None:
    """Sequence parallelism: the gradient of the embedding's rows is gathered, and where trainers keep a part of the
    head's input alone, that too; its gradient is reduced beside the product for the weight's."""
    own = plan(tp=4, sequence_parallel=True, shardings=STYLES)
    kernels = Kernels(local_step(traced(), own, SEQ, VOCAB, True), replace(PLAIN, joined=joined))
    parts, hidden = pieces(traced()).backward, 2 * SEQ * HIDDEN * 2
    sent = {w: [x.message for x in kernels.backward(parts[w]) if x.message] for w in ("first", "last")}
    assert [(m.kind, m.bytes) for m in sent["first"]] == [("all_gather", hidden)]
    rows = [(m.kind, m.bytes) for m in sent["last"] if m.bytes == hidden]
    assert rows == [("all_gather", hidden)] * gathers + [("reduce_scatter", hidden)]
    assert all(m.beside == -1 and m.weight == (VOCAB // 4, HIDDEN) for m in sent["last"] if m.bytes == hidden)


def starts(c: Context, label: str) -> list[float]:
    timeline = simulate(program_of(c))
    named = zip(timeline.program.labels, timeline.start)
    return [float(start) for name, start in named if name == label]


def test_fsdp2_gathers_as_soon_as_the_block_before_the_last_is_copied_out() -> None:
    """In forward two gathers may be ahead of the block that computes, with FSDP1 one; the last block, where it stays
    whole, is not gathered for backward."""
    own = plan(dp=8, data_parallel="fsdp", global_batch=16, micro_batches=1)
    two = replace(PLAIN, fsdp_copies=True)
    one, ahead, kept = (
        context(s, own) for s in (PLAIN, two, replace(two, fsdp_keeps_last=True))
    )
    assert len(starts(one, "gather")) == len(starts(ahead, "gather")) == 2 * LAYERS
    assert len(starts(kept, "gather")) == 2 * LAYERS - 1
    for c in (one, ahead):
        gathers, computes = starts(c, "gather")[:LAYERS], starts(c, "F")
        assert gathers[1] < computes[0] + 1e-12  # the second beside the first block, not after it
    copies = starts(ahead, "copy out")
    assert starts(ahead, "gather")[2] >= copies[0] and starts(one, "gather")[2] >= starts(one, "F")[1] - 1e-12


@pytest.mark.parametrize("pp", [1, 2])
def test_optimizer_shards_are_gathered_in_groups_of_blocks(pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward begins when its first blocks are whole; with a bucket for everything it waits for one message."""
    begun = {}
    for bucket in (2**10, 2**40):
        monkeypatch.setattr("planner.folded_step.BUCKET", bucket)
        own = plan(dp=4, pp=pp, data_parallel="zero1", global_batch=16, micro_batches=2)
        c = context(PLAIN, own, rate=1e10)
        groups = starts(c, "F first")
        messages = len(groups) if bucket < 2**20 else pp
        assert len(groups) == LAYERS + 2 and len(starts(c, "gather parameters")) == messages
        begun[bucket] = groups[0]
    assert begun[2**10] < 0.5 * begun[2**40]


def test_the_first_stage_reduces_beside_its_last_backward_and_others_after_theirs() -> None:
    program = program_of(context(PLAIN, plan(dp=4, pp=2, global_batch=32, micro_batches=4)))
    last = [program.resources[r].rank for n, r in zip(program.labels, program.resource) if n == "B last"]
    assert len(last) == LAYERS // 2 + 1 and set(last) == {0}
