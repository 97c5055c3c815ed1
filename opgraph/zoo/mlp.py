"""A residual multi-layer perceptron."""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import Mlp


class ResidualMlp(nn.Module):
    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.mlp = Mlp(hidden, ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Perceptron(nn.Module):
    def __init__(self, s: sizes.Mlp):
        super().__init__()
        self.stem = nn.Linear(s.features, s.hidden)
        self.blocks = nn.ModuleList(ResidualMlp(s.hidden, s.ffn) for _ in range(s.layers))
        self.head = nn.Linear(s.hidden, s.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def workload(name: str, s: sizes.Mlp) -> Workload:
    return image_workload(name, lambda: Perceptron(s), (s.features,), s.classes, s.batch, s.layers)
