"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition", figure 2)."""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload


class LeNet5(nn.Module):
    def __init__(self, s: sizes.LeNet):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
            nn.Sequential(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            nn.Sequential(nn.Linear(400, 120), nn.Tanh()),
            nn.Sequential(nn.Linear(120, 84), nn.Tanh()),
        )
        self.head = nn.Linear(84, s.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def workload(name: str, s: sizes.LeNet) -> Workload:
    return image_workload(name, lambda: LeNet5(s), (1, 32, 32), s.classes, s.batch, 4)
