"""torch.compile as an option: what is fused by dataflow, what it saves, and inductor's own kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from costmodels.cluster import load_cluster
from costmodels.families import family
from planner.compiled import Kernel, fused_script, is_fusible, kernels_of
from planner.estimate import estimate
from planner.host_thread import Running
from planner.layout import Layout
from planner.lower import lower
from planner.plan import ParallelPlan
from planner.predict import predict
from planner.script import Work, local_work
from planner.step_costs import step_costs
from tests.planner.conftest import GPT, LLAMA, VIT, model
from tests.planner.test_lowering import plan_of

H100 = load_cluster("dgx-h100")


def works(graph, phase="forward"):
    layout = Layout(1, (-1,) * len(graph.tensors), ())
    return [local_work(graph, layout, op) for op in graph.ops if op.phase == phase]


@pytest.mark.parametrize("spec", [GPT, LLAMA, VIT])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_every_op_is_in_one_kernel_or_one_call(spec, phase):
    _, graph = model(spec)
    own = [w for w in works(graph, phase) if not w.is_view and family(w.shape.name) != "free"]
    found = kernels_of(works(graph, phase), graph)
    inside = [w.op for k in found for w in (k.works if isinstance(k, Kernel) else [k])]
    assert sorted(inside) == sorted(w.op for w in own)
    assert sum(isinstance(k, Kernel) for k in found) < 0.8 * sum(is_fusible(w.shape.name) for w in own)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_kernels_have_an_order_in_which_all_data_is_there(phase):
    """No kernel waits, through other kernels or library calls, for itself."""
    import networkx

    _, graph = model(LLAMA)
    found = kernels_of(works(graph, phase), graph)
    home = {w.op: i for i, k in enumerate(found) for w in (k.works if isinstance(k, Kernel) else [k])}
    made: dict[int, int] = {}
    order = networkx.DiGraph()
    for op in graph.ops:
        if op.id in home:
            sources = {made[s] for s in (graph.tensors[t].storage for t in op.inputs) if s in made}
            order.add_edges_from((source, home[op.id]) for source in sources - {home[op.id]})
            made.update({graph.tensors[t].storage: home[op.id] for t in (*op.outputs, *op.mutates)})
    assert networkx.is_directed_acyclic_graph(order)


def test_bytes_between_fused_ops_vanish_and_flop_stay():
    _, graph = model(LLAMA)
    before = works(graph)
    after = [i for i in fused_script(before, graph)[0] if isinstance(i, Work)]
    moved = [sum(w.shape.bytes_read + w.shape.bytes_written for w in ws) for ws in (before, after)]
    products = sum(w.shape.bytes_read + w.shape.bytes_written for w in before if family(w.shape.name) == "gemm")
    assert products < moved[1] < 0.8 * moved[0]
    assert sum(w.shape.flops for w in after) == sum(w.shape.flops for w in before)
    assert Counter(w.shape.name for w in after)["aten.mm.default"] == Counter(w.shape.name for w in before)[
        "aten.mm.default"
    ]


def test_a_chain_of_gelu_by_hand_is_one_kernel():
    """SwiGLU: silu of one product times another is one kernel that reads both and writes once."""
    _, graph = model(LLAMA)
    kernels = [k for k in kernels_of(works(graph), graph) if isinstance(k, Kernel)]
    swiglu = [k for k in kernels if "silu" in k.label]
    assert [k.label for k in swiglu] == ["silu + mul"] * 2
    (shape,) = {w.shape for w in fused_script(works(graph), graph)[0] if isinstance(w, Work) and w.shape.name in (
        "aten.silu.default", "aten.mul.Tensor") and w.shape.out_shapes[0][-1] == 256}  # fmt: skip
    rows = 8 * 32 * 256 * 4
    assert shape.bytes_read == 2 * rows
    assert shape.bytes_written in (rows, 2 * rows)  # backward reads the silu, too


def test_compiled_steps_are_faster_and_say_what_is_fused():
    _, graph = model(GPT)
    plan = ParallelPlan(8)
    eager, compiled, graphs = (
        predict(graph, plan, H100, **options) for options in ({}, {"compiled": True}, {"cuda_graphs": True})
    )
    assert compiled.step_seconds < 0.5 * eager.step_seconds
    assert graphs.breakdown["host"] == 0.0 < compiled.breakdown["host"] < eager.breakdown["host"]
    assert compiled.assumed == ("torch.compile",) and sum(compiled.fused.values()) > 10
    assert eager.assumed == () and eager.fused == {} and graphs.assumed == ("CUDA graphs",)
    assert compiled.peak_bytes == eager.peak_bytes


@pytest.mark.parametrize("kind", ["single", "ddp mb", "fsdp", "tp", "1f1b", "recompute"])
def test_bounds_of_compiled_steps_hold(kind):
    _, graph = model(GPT)
    plan, running = plan_of(GPT, kind), Running(compiled=True)
    found = predict(graph, plan, H100, compiled=True)
    estimates = estimate(step_costs(graph, H100, running), [plan])
    assert 0 < estimates.bound_seconds[0] <= found.step_seconds
    assert estimates.bound_seconds[0] <= estimates.seconds[0]
    assert lower(graph, plan, H100, running).flops == lower(graph, plan, H100).flops
    without = predict(graph, plan, replace(H100, cache={}), compiled=True, cuda_graphs=True)
    assert without.step_seconds <= found.step_seconds


def test_a_fused_gather_reads_its_rows_and_not_the_table():
    """The first kernel of GPT-2 joins both embeddings with what follows: the table of words is larger than its rows."""
    _, graph = model(GPT)
    own = [w for w in works(graph) if family(w.shape.name) == "embedding"]
    items, _ = fused_script(works(graph), graph)
    joined = [i for i in items if isinstance(i, Work) and i.op < 0 and i.shape.bytes_read]
    table = max(w.shape.bytes_read for w in own)
    rows = max(w.shape.bytes_written for w in own)
    assert own and joined
    first = joined[0].shape.bytes_read
    assert rows <= first < table, (rows, first, table)
