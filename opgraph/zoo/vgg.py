"""VGG without batch norm (Simonyan and Zisserman 2015, table 1: configurations A, B, D, E).

As in torchvision, adaptive pooling to 7 x 7 stands before three linear layers with dropout 0.5 after the first two.
A block is one convolution (with the pooling that follows it, if any) or one linear layer.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import dropout

STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Vgg(nn.Module):
    def __init__(self, s: sizes.Vgg):
        super().__init__()
        blocks: list[nn.Sequential] = []
        channels = 3
        for convs, times in zip(STAGES[s.depth], (1, 2, 4, 8, 8)):
            for _ in range(convs):
                conv = nn.Conv2d(channels, times * s.width, 3, padding=1)
                blocks.append(nn.Sequential(conv, nn.ReLU(inplace=True)))
                channels = times * s.width
            blocks[-1].append(nn.MaxPool2d(2))
        blocks[-1].extend([nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten()])
        self.blocks = nn.Sequential(*blocks, linear(channels * 49, s), linear(s.hidden, s))
        self.head = nn.Linear(s.hidden, s.classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def linear(inputs: int, s: sizes.Vgg) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, s.hidden), nn.ReLU(), dropout(s.dropout))


def workload(name: str, s: sizes.Vgg) -> Workload:
    blocks = sum(STAGES[s.depth]) + 2
    return image_workload(name, lambda: Vgg(s), (3, s.image, s.image), s.classes, s.batch, blocks)
