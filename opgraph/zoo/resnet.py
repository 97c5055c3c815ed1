"""ResNet of bottlenecks (He et al. 2016, table 1), with the stride in the 3x3 convolution as torchvision has it.

Batch norm normalises over what it sees: a step on micro-batches is not the step on their union. `norm=group`
(Wu and He 2018, 32 groups) has the same parameters and no such coupling, for plans that are compared exactly.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, norm: str):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = make_norm(norm, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(norm, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, s: sizes.ResNet):
        super().__init__()
        stem = nn.Conv2d(3, s.width, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, make_norm(s.norm, s.width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential()
        channels = s.width
        for stage, count in enumerate(STAGES[s.depth]):
            width = s.width * 2**stage
            for i in range(count):
                self.blocks.append(Bottleneck(channels, width, 2 if stage and i == 0 else 1, s.norm))
                channels = 4 * width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.head = nn.Linear(channels, s.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def make_norm(norm: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(gcd(32, channels), channels)


def workload(name: str, s: sizes.ResNet) -> Workload:
    blocks = sum(STAGES[s.depth])
    return image_workload(name, lambda: ResNet(s), (3, s.image, s.image), s.classes, s.batch, blocks)
