"""What can be sharded is found from dataflow, and what cannot is said."""

import pytest
import torch
from torch import nn

from opgraph.batch import trace_workload
from opgraph.trace import trace
from opgraph.workload import Workload, adamw, mean_square
from planner.layout import propagate
from planner.plan import ParallelPlan
from planner.rules import ShardingError
from planner.tensor_parallel import explain_no_shardings, tp_shardings
from tests.planner.conftest import ALEXNET, GPT, LLAMA, MLP, VIT, model
from tests.planner.models import across
from validation.launch import run_plans
from validation.measure import Options


def test_attention_and_mlp_of_a_transformer():
    _, graph = model(GPT)
    block = {p.removeprefix("blocks.0."): s for p, s in tp_shardings(graph, 2) if p.startswith("blocks.0.")}
    assert block == {
        "attn.q": "colwise", "attn.k": "colwise", "attn.v": "colwise", "attn.o": "rowwise",
        "mlp.up": "colwise", "mlp.down": "rowwise",
    }  # fmt: skip


def test_grouped_queries_gate_and_up():
    _, graph = model(LLAMA)
    styles = dict(tp_shardings(graph, 2))
    assert styles["blocks.1.mlp.gate"] == styles["blocks.1.mlp.up"] == "colwise"
    assert styles["blocks.1.mlp.down"] == "rowwise"
    assert not any("attn" in p for p, _ in tp_shardings(graph, 4)), "2 key-value heads do not divide over 4 ranks"


@pytest.mark.parametrize(("spec", "pairs"), [(MLP, 3), (ALEXNET, 1), (VIT, 4)])
def test_number_of_pairs(spec, pairs):
    _, graph = model(spec)
    assert sum(s == "rowwise" for _, s in tp_shardings(graph, 2)) == pairs


def test_one_all_reduce_per_rowwise_output_and_per_colwise_input_gradient():
    _, graph = model(GPT)
    shardings = tp_shardings(graph, 2)
    layout = propagate(graph, ParallelPlan(8, tp=2, shardings=shardings))
    phases = [graph.ops[r.after].phase for r in layout.reductions]
    assert phases.count("forward") == sum(s == "rowwise" for _, s in shardings)
    assert phases.count("backward") == sum(s == "colwise" for _, s in shardings)


def test_illegal_shardings_name_module_and_reason():
    _, graph = model(GPT)
    with pytest.raises(ShardingError, match="head"):
        propagate(graph, ParallelPlan(8, tp=2, shardings=(("nohead", "colwise"),)))
    with pytest.raises(ShardingError, match=r"blocks\.0"):  # a colwise up without a rowwise down
        propagate(graph, ParallelPlan(8, tp=2, shardings=(("blocks.0.mlp.up", "colwise"),)))
    with pytest.raises(ShardingError, match="equal parts"):
        propagate(graph, ParallelPlan(8, tp=3, shardings=(("blocks.0.mlp.up", "colwise"),)))


def test_models_without_pairs_say_why():
    _, graph = model("resnet50:width=8,image=32,classes=10,batch=8")
    assert tp_shardings(graph, 2) == ()
    assert "needs two" in explain_no_shardings(graph, 2)


@pytest.mark.parametrize("root, count", [(nn.Linear(8, 8), "none"), (nn.Sequential(nn.Linear(8, 8)), "one")])
def test_models_of_few_linears_are_told_how_many_count(root: nn.Module, count: str) -> None:
    said = explain_no_shardings(trace(root, (torch.randn(2, 8),)), 2)
    assert said.endswith(f"each called once and with a weight of its own, and the model has {count}")


def test_in_place_work_on_a_sharded_output_is_refused():
    import torch
    from torch import nn

    from opgraph.batch import trace_workload

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(self.act(self.a(x)))

    graph = trace_workload(Workload("net", Net, lambda n: ((torch.randn(n, 8),), ()), mean_square, adamw, 4))
    with pytest.raises(ShardingError, match="in place"):
        propagate(graph, ParallelPlan(4, tp=2, shardings=(("a", "colwise"), ("b", "rowwise"))))
    assert tp_shardings(graph, 2) == ()


ACROSS = {"q": "colwise", "k": "colwise", "v": "colwise", "out": "rowwise", "up": "colwise", "down": "rowwise"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_whose_bias_is_added_apart_are_linears_too(precision):
    graph = trace_workload(across(), precision=precision)
    assert tp_shardings(graph, 2) == tuple((f"blocks.{i}.{name}", s) for i in range(2) for name, s in ACROSS.items())
    layout = propagate(graph, ParallelPlan(8, tp=2, shardings=tp_shardings(graph, 2)))
    assert len(layout.reductions) == 2 * 2 + 2 + 3  # out, down; inputs of up; q, k, v of block 1


@pytest.mark.executed
def test_products_whose_bias_is_added_apart_are_executed():
    """On two gloo ranks, and beside data parallelism on four: the step of one device, losses and gradients."""
    shardings = tp_shardings(trace_workload(across()), 2)
    plans = [ParallelPlan(8, tp=2, shardings=shardings, dp=dp) for dp in (1, 2)]
    for m in run_plans("tests.planner.models:across", plans, Options(memory=False, measure=False, timeout_seconds=120)):
        assert (m.status, m.reason) == ("ok", "")
        assert m.loss_error < 1e-5 and m.gradient_error < 1e-5
