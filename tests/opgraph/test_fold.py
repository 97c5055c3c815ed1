"""A folded trace is the whole trace, field by field; what cannot be folded is traced whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opgraph.batch import trace_workload
from opgraph.fold import find_fold
from opgraph.graph import OpGraph
from opgraph.memory import replay_memory
from opgraph.models import load_workload
from opgraph.workload import Workload, adamw, mean_square

SMALL = {
    "gpt2": "gpt2:layers=8,hidden=32,heads=2,ffn=64,seq=16,vocab=100,batch=3",
    "llama": "llama3-8b:layers=8,hidden=32,heads=4,kv_heads=2,ffn=64,seq=16,vocab=100,batch=2",
    "llama tied": "llama3-1b:layers=7,hidden=32,heads=4,kv_heads=2,ffn=64,seq=16,vocab=100,batch=1",
    "bert": "bert-base:layers=8,hidden=32,heads=2,ffn=64,seq=16,vocab=100,batch=2",
    "vit": "vit-b16:layers=8,hidden=32,heads=2,ffn=64,batch=2",
    "mixtral": "mixtral-8x7b:layers=6,hidden=32,heads=4,kv_heads=2,ffn=64,seq=16,vocab=100,batch=2",
}


def assert_same(a: OpGraph, b: OpGraph) -> None:
    assert a.tensors == b.tensors
    assert a.storages == b.storages
    for x, y in zip(a.ops, b.ops, strict=True):
        assert x == y
    assert a.gradient_ops == b.gradient_ops
    assert replace(a, repeats=()) == replace(b, repeats=())
    assert replay_memory(a).peak_bytes == replay_memory(b).peak_bytes


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_folded_is_the_whole_trace(spec: str) -> None:
    workload = load_workload(spec)
    short, whole = trace_workload(workload), trace_workload(workload, fold=False)
    assert short.repeats == (workload.blocks,) and whole.repeats == ()
    assert_same(short, whole)
    assert_same(short.at_batch(5), whole.at_batch(5))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_folded_under_autocast(precision: str) -> None:
    workload = load_workload(SMALL["gpt2"])
    short = trace_workload(workload, precision=precision)
    assert short.repeats
    assert_same(short, trace_workload(workload, precision=precision, fold=False))


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_folded_with_every_optimizer(name: str) -> None:
    workload = replace(load_workload(SMALL["gpt2"]), optimizer=OPTIMIZERS[name])
    short = trace_workload(workload)
    assert short.repeats
    assert_same(short, trace_workload(workload, fold=False))


class Layer(nn.Module):
    def __init__(self, width: int, index: int):
        super().__init__()
        self.index, self.scale = index, 0.5
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.relu(self.linear(x))


class Stack(nn.Module):
    """`how` says how the blocks are run."""

    def __init__(self, n: int, how: str):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Layer(8, i) for i in range(n))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        kept = []
        for i, block in enumerate(self.blocks):
            if self.how.startswith("checkpoint"):
                x = checkpoint(block, x, use_reentrant=self.how == "checkpoint reentrant")
            else:
                x = block(x)
            if self.how == "glue":
                x = x * 2
            if self.how == "index" and i == 2:
                x = x.sin()
            kept.append(x)
        if self.how == "collect":
            return torch.stack(kept).sum(0)
        if self.how == "skips":
            for back in kept[::-1]:
                x = x + back
        return x


def stack(how: str, n: int = 8, change: Callable[[Stack], None] | None = None) -> Workload:
    def build() -> nn.Module:
        model = Stack(n, how)
        if change:
            change(model)
        return model

    paths = tuple(f"blocks.{i}" for i in range(n))
    return Workload(how, build, lambda b: ((torch.randn(b, 4),), ()), mean_square, adamw, 3, paths)


@pytest.mark.parametrize("how", ["plain", "glue", "checkpoint reentrant", "checkpoint"])
def test_folded_however_blocks_are_run(how: str) -> None:
    short = trace_workload(stack(how))
    assert short.repeats, how
    assert_same(short, trace_workload(stack(how), fold=False))
    assert ("recompute" in {op.phase for op in short.ops}) == how.startswith("checkpoint")


@pytest.mark.parametrize("how", ["collect", "skips", "index"])
def test_what_depends_on_the_number_of_blocks_is_traced_whole(how: str) -> None:
    graph = trace_workload(stack(how))
    assert not graph.repeats
    assert_same(graph, trace_workload(stack(how), fold=False))


def tie(model: Stack) -> None:
    model.blocks[3].linear.weight = model.blocks[1].linear.weight  # type: ignore[union-attr,assignment]


def freeze(model: Stack) -> None:
    model.blocks[4].requires_grad_(False)


def rescale(model: Stack) -> None:
    model.blocks[4].scale = 0.25  # type: ignore[assignment]


def widen(model: Stack) -> None:
    model.blocks[4].linear = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))


@pytest.mark.parametrize("change", [tie, freeze, rescale, widen])
def test_blocks_that_are_not_alike_are_not_folded(change: Callable[[Stack], None]) -> None:
    graph = trace_workload(stack("plain", change=change))
    assert not graph.repeats
    assert_same(graph, trace_workload(stack("plain", change=change), fold=False))


def test_the_longest_run_of_alike_blocks_is_folded() -> None:
    workload = stack("plain", 10, rescale_first)
    short = trace_workload(workload)
    assert short.repeats == (workload.blocks[2:],)
    assert_same(short, trace_workload(workload, fold=False))


def rescale_first(model: Stack) -> None:
    model.blocks[1].scale = 0.25  # type: ignore[assignment]


@pytest.mark.parametrize("frozen", ["first", "blocks.0"])
def test_frozen_beginnings(frozen: str) -> None:
    workload = stack("plain", change=lambda model: model.get_submodule(frozen).requires_grad_(False) and None)
    assert_same(trace_workload(workload), trace_workload(workload, fold=False))


@pytest.mark.parametrize("name", ["resnet50", "alexnet", "lstm-medium", "mlp", "gpt2:layers=5,hidden=64,heads=2"])
def test_models_without_a_long_list_are_not_folded(name: str) -> None:
    workload = load_workload(name)
    with torch.device("meta"):
        assert find_fold(workload.build(), workload.blocks) is None
