"""The numbers of a step, against hand-made ones."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.memory import replay_memory
from opgraph.models import load_workload
from opgraph.summary import activation_bytes, model_flops, summary, work_and_depth
from opgraph.trace import trace


def forward_only(module: nn.Module, *inputs: torch.Tensor) -> OpGraph:
    return trace(module.requires_grad_(False), inputs, loss=lambda y: y)


class Call(nn.Module):
    def __init__(self, what):  # type: ignore[no-untyped-def]
        super().__init__()
        self.what = what

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.what(*inputs)


DEPTHS = {
    "matmul": (lambda a, b: a @ b, ((4, 16), (16, 8)), 2 * 4 * 16 * 8, 4 + 1),
    "odd matmul": (lambda a, b: a @ b, ((4, 17), (17, 8)), 2 * 4 * 17 * 8, 5 + 1),
    "batched": (lambda a, b: a @ b, ((3, 4, 16), (3, 16, 8)), 3 * 2 * 4 * 16 * 8, 4 + 1),
    "sum": (lambda a: a.sum(), ((5, 20),), 100, 7),
    "sum of rows": (lambda a: a.sum(1), ((5, 8),), 40, 3),
    "pointwise": (lambda a: a.sin().cos(), ((5, 20),), 200, 2),
    "side by side": (lambda a: a.sin() + a.cos(), ((5, 20),), 300, 2),
    "views": (lambda a: a.t()[0].sin(), ((5, 20),), 5, 1),
    "softmax": (lambda a: a.softmax(-1), ((3, 16),), 48, 5),
    "in place": (lambda a: a.sin().mul_(2).add_(1), ((4,),), 12, 3),
    "lookup": (lambda a: nn.functional.embedding(torch.zeros(6, dtype=torch.long), a), ((1000, 4),), 0, 1),
    "convolution": (
        lambda x, w: nn.functional.conv2d(x, w), ((2, 3, 8, 8), (5, 3, 3, 3)), 2 * 2 * 5 * 36 * 27, 5 + 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHS)
def test_work_and_depth(name: str) -> None:
    what, shapes, work, depth = DEPTHS[name]
    graph = forward_only(Call(what), *(torch.randn(*s) for s in shapes))
    found = work_and_depth(graph)
    assert found[1] == depth + (1 if name == "lookup" else 0) and (name == "lookup" or found[0] == work)


def test_depth_grows_with_the_layers_and_work_with_the_batch() -> None:
    spec = "gpt2:layers={},hidden=32,heads=2,ffn=64,seq=16,vocab=100"
    four, eight, twelve = (trace_workload(load_workload(spec.format(n))) for n in (4, 8, 12))
    depths = [work_and_depth(g)[1] for g in (four, eight, twelve)]
    assert depths[2] - depths[1] == depths[1] - depths[0] > 0
    work, depth = work_and_depth(four.at_batch(8 * four.batch))
    assert depth <= depths[0] + 40 and work > 7 * work_and_depth(four)[0] * 0.8


def test_activations_of_a_small_network() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    graph = trace(model, (torch.randn(32, 8),), loss=lambda y: y.square().sum())
    # ReLU's output, which serves its own backward and the second layer's; the last output for the square; the loss
    assert activation_bytes(graph) == 4 * (32 * 16 + 32 * 4 + 1)


def test_the_summary_is_json_with_the_keys_of_the_design() -> None:
    graph = trace_workload(load_workload("gpt2:layers=8,hidden=32,heads=2,ffn=64,seq=16,vocab=100"))
    found = json.loads(json.dumps(summary(graph)))
    assert set(found["flops"]) == {"forward", "backward", "recompute", "optimizer", "total"}
    assert found["flops"]["total"] == graph.flops() == sum(graph.flops(p) for p in ("forward", "backward"))
    assert found["params"] == graph.param_count and found["ops"] == len(graph.ops)
    assert found["peak_bytes"] == replay_memory(graph).peak_bytes
    assert 0 < found["activation_bytes"] < found["peak_bytes"]
    assert found["work"] > found["flops"]["total"] and 0 < found["depth"] < found["work"]


class Checkpointed(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.linear = again, nn.Linear(16, 16, bias=False)

    def wave(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sin()  # whose backward needs the product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.wave, x, use_reentrant=False) if self.again else self.wave(x)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_model_flops_count_nothing_twice() -> None:
    """A product of 8 x 16 by 16 x 16, forward and for the weight (and none for the input, which needs no gradient);
    attention of 8 positions: two products forward and four backward, of the five that the fused kernel runs."""
    x = torch.randn(2, 1, 8, 16)
    plain, again = (trace(Checkpointed(c), (x,), loss=lambda y: y.square().mean()) for c in (False, True))
    product, scores = 2 * 2 * 8 * 16 * 16, 2 * 2 * 8 * 8 * 16
    assert plain.flops() == 2 * product + 7 * scores and again.flops() == plain.flops() + product
    assert model_flops(plain) == model_flops(again) == 2 * product + 6 * scores
