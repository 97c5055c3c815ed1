"""One graph serves every batch size: at_batch(n) is what tracing at n gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from opgraph.batch import NotAffineError, fit_batch, trace_workload
from opgraph.graph import OpGraph
from opgraph.memory import replay_memory
from opgraph.models import load_workload
from opgraph.trace import trace
from opgraph.workload import Workload, adamw, mean_square

MODELS = [
    "mlp", "lenet5", "alexnet", "resnet50", "lstm-medium", "vgg11",
    "gpt2:layers=2,hidden=64,heads=2,ffn=128,seq=32,vocab=100",
    "llama3-8b:layers=6,hidden=64,heads=4,kv_heads=2,ffn=128,seq=32,vocab=100",
    "mixtral-8x7b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=128,seq=32,vocab=100",
    "bert-base:layers=2,hidden=64,heads=2,ffn=128,seq=32,vocab=100",
    "vit-b16:layers=2,hidden=64,heads=2,ffn=128",
]  # fmt: skip


def direct(workload: Workload, batch: int) -> OpGraph:
    with torch.device("meta"):
        module = workload.build()
    inputs, targets = workload.batch(batch)
    return trace(module, inputs, targets, loss=workload.loss, optimizer=workload.optimizer, name=workload.name)


def plain(graph: OpGraph) -> OpGraph:
    """Without the batch coefficients; floats among arguments (1 / batch) are not fitted."""
    return replace(
        graph,
        tensors=tuple(replace(t, per_batch=(), strides_per_batch=()) for t in graph.tensors),
        storages=tuple(replace(s, bytes_per_batch=0) for s in graph.storages),
        ops=tuple(replace(op, args_per_batch=(), flops_per_batch=0) for op in graph.ops),
        repeats=(),
    )


@pytest.mark.parametrize("spec", MODELS, ids=[m.partition(":")[0] for m in MODELS])
def test_at_batch_is_the_trace_at_that_batch(spec: str) -> None:
    workload = load_workload(spec)
    graph = trace_workload(workload)
    for batch in (2, 5, 16):
        fitted, traced = plain(graph.at_batch(batch)), plain(direct(workload, batch))
        assert fitted.tensors == traced.tensors
        assert fitted.storages == traced.storages
        assert fitted.ops == traced.ops
        assert fitted.gradient_ops == traced.gradient_ops
        assert replay_memory(fitted).peak_bytes == replay_memory(traced).peak_bytes


def test_there_and_back() -> None:
    graph = trace_workload(load_workload(MODELS[6]))
    assert graph.at_batch(9).at_batch(graph.batch) == graph
    with pytest.raises(ValueError, match="the batch size is 0; it must be at least 1"):
        graph.at_batch(0)


def workload_of(build: Callable[[], nn.Module], batch: int = 2) -> Workload:
    return Workload("w", build, lambda n: ((torch.randn(n, 4),), ()), mean_square, adamw, batch)


class Fickle(nn.Linear):
    """Does something else with an odd batch."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sin() if len(x) % 2 else super().forward(x).tanh()


def test_other_ops_at_another_batch() -> None:
    with pytest.raises(NotAffineError, match="runs other operators at batch 3 than at batch 2, from op 2"):
        trace_workload(workload_of(Fickle))


class Pairs(nn.Linear):
    """Compares every sample with every other: sizes grow with the square of the batch."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y @ y.T


def test_sizes_that_grow_with_the_square_of_the_batch() -> None:
    graph = trace_workload(workload_of(Pairs))
    assert "square of the batch" in graph.notes[0]
    traced = direct(workload_of(Pairs), 7)
    assert graph.at_batch(7).flops() == traced.flops()
    assert [t.shape for t in graph.at_batch(7).tensors] == [t.shape for t in traced.tensors]
    assert [s.bytes for s in graph.at_batch(7).storages] == [s.bytes for s in traced.storages]


class Inverse(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(super().forward(x)[:, :, None] * x[:, None])


def test_formulas_of_the_user_are_fitted() -> None:
    formulas = {"linalg_inv_ex": lambda ins, outs, args: 2 * ins[0][0] * ins[0][-1] ** 3}
    workload = workload_of(Inverse)
    graph = trace_workload(workload, flops=formulas).at_batch(10)
    assert next(op.flops for op in graph.ops if "linalg_inv" in op.name) == 2 * 10 * 4**3


def test_two_traces_of_one_batch_fit_nothing() -> None:
    graph = direct(load_workload("mlp"), 3)
    with pytest.raises(ValueError, match="both traces have batch 3"):
        fit_batch(graph, graph)


class Sorted(nn.Module):
    """Tokens go to one of two layers, as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return y


@pytest.mark.parametrize("seed", [1, 2])
def test_sizes_that_depend_on_data_follow_the_batch(seed: int) -> None:
    torch.manual_seed(seed)  # tracing draws its own numbers
    graph = trace_workload(workload_of(Sorted, 20))
    assert graph.traced_on == "real" and graph == trace_workload(workload_of(Sorted, 20))
    for batch in (1, 40, 400):
        at = graph.at_batch(batch)
        assert min(n for t in at.tensors for n in t.shape) >= 0 <= min(s.bytes for s in at.storages)
        products = (op for op in at.ops if op.phase == "forward" and "addmm" in op.name and "experts" in op.module)
        routed = [at.tensors[op.outputs[0]].shape[0] for op in products]
        assert sum(routed) == pytest.approx(batch, abs=4 + batch / 20)


def test_squares_need_no_storages() -> None:
    """The planner prices a graph without storages at other batches."""
    graph = trace_workload(workload_of(Pairs))
    prices = replace(graph, storages=()).at_batch(6)
    assert prices.tensors == graph.at_batch(6).tensors and (6, 6) in {t.shape for t in prices.tensors}
