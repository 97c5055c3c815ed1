"""Tracing of modules of every kind: what is recorded, and what bad input is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opgraph.batch import trace_workload
from opgraph.flops import NoFormulaError
from opgraph.graph import OpGraph
from opgraph.models import load_workload
from opgraph.trace import LOSS, TraceError, trace
from opgraph.workload import Workload, adamw, mean_square

ZOO = [
    "mlp", "lenet5", "alexnet", "resnet50", "googlenet", "lstm-medium", "gpt2:layers=2", "llama3-8b:layers=2",
    "mixtral-8x7b:layers=2", "bert-base:layers=2", "vit-b16:layers=2",
]  # fmt: skip


def names(graph: OpGraph, phase: str = "") -> list[str]:
    return [op.name.split(".")[1] for op in graph.ops if not phase or op.phase == phase]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def trace_net(module: nn.Module | None = None, **options: Any) -> OpGraph:
    return trace(Net() if module is None else module, (torch.randn(4, 8),), **options)


@pytest.mark.parametrize("name", ZOO)
def test_backward_ops_know_their_module(name: str) -> None:
    graph = trace_workload(load_workload(name), fold=False)
    loss = {op.id for op in graph.ops if op.phase == "forward" and op.module == "<loss>"}
    lost = [op for op in graph.ops if op.phase == "backward" and op.module == "<loss>" and op.forward not in loss]
    assert [op.name for op in lost] == ["aten.ones_like.default"]  # the gradient of the loss itself
    assert {name for name, _ in graph.gradient_ops} == set(graph.parameters)


def test_phases_and_links() -> None:
    graph = trace_net()
    assert names(graph, "forward")[:3] == ["t", "addmm", "gelu"]
    by_name = {op.name: op for op in graph.ops}
    assert by_name["aten.gelu_backward.default"].forward == by_name["aten.gelu.default"].id
    assert by_name["aten.gelu.default"].module == "" and by_name["aten._fused_adamw_.default"].phase == "optimizer"
    assert [op.module for op in graph.ops if op.name == "aten.addmm.default"] == ["up", "down"]
    assert graph.flops("forward") == 2 * 2 * 4 * 8 * 16
    assert graph.flops("backward") == 3 * 2 * 4 * 8 * 16  # the first layer's input needs no gradient
    assert {name for name, _ in graph.gradient_ops[:2]} == {"down.weight", "down.bias"}  # backward begins at the end
    assert all(s.role == "gradient" for s in graph.storages if s.id in gradient_storages(graph))


def gradient_storages(graph: OpGraph) -> set[int]:
    return {graph.tensors[graph.ops[op].outputs[0]].storage for _, op in graph.gradient_ops if graph.ops[op].outputs}


@pytest.mark.parametrize("precision,dtype", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast(precision: str, dtype: str) -> None:
    graph = trace_net(precision=precision)
    products = [op for op in graph.ops if op.flops]
    assert len(products) == 5 and all(graph.tensors[op.outputs[0]].dtype == dtype for op in products)
    squares = [op for op in graph.ops if op.name.endswith("square.default")]
    assert all(graph.tensors[op.outputs[0]].dtype == "float32" for op in squares)
    assert {t.dtype for t in graph.parameters.values()} == {"float32"}
    assert graph.precision == precision


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_work_is_recompute(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_() if reentrant else x
            return checkpoint(super().forward, x, use_reentrant=reentrant) * 2

    plain, graph = trace_net(), trace_net(Checkpointed())
    again = [op for op in graph.ops if op.phase == "recompute" and not op.is_view]
    assert [op.module for op in again if "addmm" in op.name] == ["up", "down"][: len([o for o in again if o.flops])]
    assert "gelu" in names(graph, "recompute")  # called outside of any module
    assert graph.flops("forward") == plain.flops("forward")
    assert all(op.module in ("", "up", "down") for op in again)


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    graph = trace(Tied(), (torch.randint(11, (2, 3)),))
    assert list(graph.parameters) == ["embed.weight"] and graph.param_count == 88
    assert [name for name, _ in graph.gradient_ops] == ["embed.weight"]


def test_ops_in_place_and_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    relu = next(op for op in graph.ops if op.name == "aten.relu_.default")
    assert relu.mutates and not relu.outputs
    norm = next(op for op in graph.ops if "batch_norm" in op.name)
    assert {graph.tensors[t].name for t in norm.mutates} == {"1.running_mean", "1.running_var"}
    counter = next(op for op in graph.ops if op.name == "aten.add_.Tensor")
    assert graph.tensors[counter.mutates[0]].name == "1.num_batches_tracked"
    quiet = trace(model.eval(), (torch.randn(2, 3, 8, 8),))
    assert not next(op for op in quiet.ops if "batch_norm" in op.name).mutates


def test_compiled_modules_keep_their_paths() -> None:
    eager = trace_net()
    assert trace_net(torch.compile(Net()), name="Net") == eager
    inner = Net()
    inner.up = torch.compile(inner.up)  # type: ignore[assignment]
    graph = trace_net(inner)
    assert set(graph.parameters) == set(eager.parameters)
    assert {op.module for op in graph.ops} == {op.module for op in eager.ops}


def test_modules_without_parameters_have_a_forward_only() -> None:
    graph = trace(nn.GELU(), (torch.randn(2, 3),))
    assert {op.phase for op in graph.ops} == {"forward"} and not graph.param_count


def test_frozen_parameters_get_no_gradient() -> None:
    model = Net()
    model.up.requires_grad_(False)
    graph = trace_net(model)
    assert {name for name, _ in graph.gradient_ops} == {"down.weight", "down.bias"}
    assert graph.flops("backward") == 2 * 4 * 8 * 16
    states = [t for t in graph.tensors if t.role == "optimizer_state"]
    assert {t.name for t in states} == {"down.weight", "down.bias"}


def test_parameters_without_gradient_are_told() -> None:
    model = Net()
    model.add_module("spare", nn.Linear(8, 8))
    assert trace_net(model).notes == (
        "no gradient reaches spare.weight and others: torch's DistributedDataParallel stops at such parameters; "
        "freeze them with requires_grad_(False)",
    )
    assert trace_net(model).idle == ("spare.weight", "spare.bias")
    model.spare.requires_grad_(False)
    assert trace_net(model).notes == () == trace_net(model).idle


def test_sparse_gradients_are_told_in_one_sentence() -> None:
    bag = nn.Sequential(nn.EmbeddingBag(10, 8, mode="sum", sparse=True), nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"^the gradient in module '0' is sparse .*sparse=False$"):
        trace(bag, (torch.randint(10, (4, 3)),))


def test_lazy_parameters_are_told_in_one_sentence() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(TraceError, match=r"^0\.weight is a parameter of a lazy module.*run the model once on a batch"):
        trace(model, (torch.randn(2, 8),))


def test_complex_parameters_take_the_optimizer_without_its_fused_form() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4, dtype=torch.cfloat)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(torch.complex(x, x)).abs()

    graph = trace(Mixed(), (torch.randn(2, 8),))
    fused = [op for op in graph.ops if "_fused_adamw" in op.name]
    assert len(fused) == 1
    stepped = {graph.tensors[t].name for t in fused[0].mutates} & set(graph.parameters)
    assert stepped == {"a.weight", "a.bias"}
    optimizer = adamw(Mixed().parameters())
    assert [(g["fused"], len(g["params"])) for g in optimizer.param_groups] == [(True, 2), (False, 2)]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_data_dependent_control_flow_is_traced_on_real_tensors() -> None:
    model = Branching()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model, (torch.ones(2, 8),))
    assert graph.traced_on == "real" and "test_trace.py" in graph.notes[0] and "x.sum() > 0" in graph.notes[0]
    assert {op.module for op in graph.ops if op.flops} == {"a"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.device("meta"):
        on_meta = Branching()
    with pytest.raises(TraceError, match=r"depend on data .*test_trace.py:\d+ .*real weights"):
        trace(on_meta, (torch.ones(2, 8),))
    workload = Workload("w", Branching, lambda n: ((torch.ones(n, 8),), ()), mean_square, adamw, 2)
    graph = trace_workload(workload)
    assert graph.traced_on == "real" and not graph.varies  # all its batches are ones
    forked = replace(workload, batch=lambda n: ((torch.randn(1, 8).repeat(n, 1),), ()))
    assert trace_workload(forked).varies


OPTIMIZERS: dict[str, tuple[Any, int]] = {  # name -> optimizer, tensors of state per parameter
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
    "fused": (lambda p: torch.optim.AdamW(p, fused=True), 3),
    "foreach": (lambda p: torch.optim.AdamW(p, foreach=True), 3),
    "loop": (lambda p: torch.optim.AdamW(p, foreach=False), 3),
    "adagrad": (lambda p: torch.optim.Adagrad(p), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    make, states = OPTIMIZERS[name]
    graph = trace_net(optimizer=make)
    assert sum(t.role == "optimizer_state" for t in graph.tensors) == 4 * states
    ours = [op for op in graph.ops if op.phase == "optimizer"]
    parameters = {t.storage for t in graph.parameters.values()}
    assert {graph.tensors[t].storage for op in ours for t in op.mutates} >= parameters
    if name == "loop":
        assert {op.module for op in ours if op.mutates} >= {"up", "down"}


def test_optimizers_that_call_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates the model several times"):
        trace_net(optimizer=lambda p: torch.optim.LBFGS(p))


@dataclass
class Answer:
    scores: torch.Tensor
    label: str = "x"


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: {"y": y}, lambda y: Answer(y), lambda y: [y, (y,)]])
def test_outputs_of_any_form(wrap: Any) -> None:
    class Wrapped(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(super().forward(x))

    assert trace_net(Wrapped()).flops("forward") == trace_net().flops("forward")


def test_keyword_inputs() -> None:
    assert trace(Net(), {"x": torch.randn(4, 8)}).ops == trace_net().ops


def test_lstm() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    graph = trace(Recurrent(), (torch.randn(3, 5, 8),))
    assert names(graph, "forward").count("mkldnn_rnn_layer") == 2
    assert graph.flops("forward") == 2 * 3 * 5 * 4 * 16 * (8 + 16 + 16 + 16)
    assert {op.module for op in graph.ops if op.flops} == {"lstm"}


def test_heavy_ops_without_a_formula() -> None:
    class Solver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inverse()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.linalg.matrix_exp(self.weight)

    inputs = (torch.randn(2, 4),)
    with pytest.raises(NoFormulaError, match=r"linalg_matrix_exp.default in module 'inner' has no FLOP formula"):
        trace(Solver(), inputs)
    graph = trace(Solver(), inputs, flops={"linalg_matrix_exp": lambda ins, outs, args: 2 * ins[0][-1] ** 3})
    assert sum(op.flops for op in graph.ops if op.name.startswith("aten.linalg_matrix_exp.")) >= 2 * 4**3


class Broken(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.up(x))


class Picky(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("I want another input")


@pytest.mark.parametrize(
    "model,says", [(Broken, r"RuntimeError.*self.up\(self.up\(x\)\)"), (Picky, "ValueError: I want")]
)
def test_models_that_fail_are_told_their_line(model: type[nn.Module], says: str) -> None:
    with pytest.raises(TraceError, match=says) as raised:
        trace_net(model())
    assert "test_trace.py:" in str(raised.value)


def test_torch_logs_no_page_beside_the_sentence(caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(super().forward(x)[None], x[None].double())

    with pytest.raises(TraceError, match="RuntimeError"):
        trace_net(Mixed())
    assert not caplog.records


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="precision is 'fp8'; known are fp32, tf32, bf16, fp16"):
        trace_net(precision="fp8")
    with pytest.raises(ValueError, match="inputs is a tensor"):
        trace(Net(), torch.randn(4, 8))
    with pytest.raises(TraceError, match=r"the loss is a tensor of shape \(4, 8\); it must be a tensor with one"):
        trace_net(loss=lambda y: y)
    with pytest.raises(TraceError, match="does not depend on any trainable parameter"):
        trace_net(loss=lambda y: y.detach().sum())


def test_a_loss_that_is_a_module_is_the_loss() -> None:
    """Its ops belong to no part of the model, so that targets cross no cut."""
    outside = [
        [op.name for op in trace(Net(), (torch.randn(4, 8),), (torch.randn(4, 8),), loss=loss).ops if op.module == LOSS]
        for loss in (nn.MSELoss(), nn.functional.mse_loss)
    ]
    assert outside[0] == outside[1] and any("mse_loss" in name for name in outside[0])


def test_tracing_leaves_the_module_as_it_was() -> None:
    model = Net()
    before = dict(model.named_parameters())
    trace_net(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] and p.grad is None for n, p in model.named_parameters())
