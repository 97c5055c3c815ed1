"""What pipeline stages send, and what each of them makes itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opgraph.graph import OpGraph
from opgraph.trace import trace
from planner.split import split
from planner.stages import stage_ops


class Decays(nn.Module):
    """As RetNet: every block multiplies by a matrix that the root makes of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.linspace(0.5, 0.9, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay = self.rate[:, None] ** torch.arange(4.0)
        for block in self.blocks:
            x = block(x) @ decay
        return x


class Embeds(nn.Module):
    """A block of the second stage reads the token ids again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.first(ids) + self.second(ids))


def traced(net: nn.Module, x: torch.Tensor) -> OpGraph:
    return trace(net, (x,), loss=lambda y: y.square().mean())


def test_what_is_made_of_a_buffer_is_made_by_each_stage() -> None:
    graph = traced(Decays(), torch.randn(6, 4))
    stages = stage_ops(graph, ("blocks.1",))
    assert [graph.tensors[t].shape for t in stages[0].sends] == [(6, 4)]
    assert all(any("pow" in op.name for op in s.forward) for s in stages)
    assert len(split(Decays(), ("blocks.1",), (torch.randn(6, 4),)).stages[0].sends) == 1


def test_integers_cross_no_cut_in_simulation_as_in_execution() -> None:
    net, ids = Embeds(), torch.randint(0, 9, (6, 5))
    graph = traced(net, ids)
    for refuse in (lambda: stage_ops(graph, ("second",)), lambda: split(net, ("second",), (ids,))):
        with pytest.raises(ValueError, match="cut at 'second' would have to send an integer tensor"):
            refuse()
    assert [graph.tensors[t].shape for t in stage_ops(graph, ("out",))[0].sends] == [(6, 5, 4)]


def test_modules_that_are_held_twice_keep_their_weights() -> None:
    twice = nn.Linear(4, 4)
    net = nn.Sequential(twice, nn.Linear(4, 4), twice)
    before = dict(net.named_parameters())
    whole = split(net, ("1",), (torch.randn(6, 4),))
    assert all(after is before[name] for name, after in net.named_parameters())
    assert whole.shared_parameters == (("0.bias", (0, 1)), ("0.weight", (0, 1)))
