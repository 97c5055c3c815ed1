"""Residual networks beside the zoo's ResNet: 18 and 34 layers of basic blocks (He et al. 2016), ResNeXt (Xie et al.
2017, arXiv:1611.05431), squeeze and excitation (Hu et al. 2018, arXiv:1709.01507), wide ones (Zagoruyko and Komodakis
2016, arXiv:1605.07146). For published training runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo.common import image_workload


@dataclass(frozen=True, slots=True)
class Kind:
    """depths: blocks of each stage. basic: two 3x3 convolutions a block, else a bottleneck. groups, width: of the 3x3
    convolution, which has `width` channels per group and 64 of the first stage. squeeze: reduction of the channels
    between the two products that weigh them, 0 for none."""

    depths: tuple[int, int, int, int]
    basic: bool = False
    groups: int = 1
    width: int = 64
    squeeze: int = 0


KINDS = {
    "resnet18": Kind((2, 2, 2, 2), basic=True),
    "resnet34": Kind((3, 4, 6, 3), basic=True),
    "resnext50": Kind((3, 4, 6, 3), groups=32, width=4),
    "resnext101": Kind((3, 4, 23, 3), groups=32, width=4),
    "seresnext101": Kind((3, 4, 23, 3), groups=32, width=4, squeeze=16),
    "wideresnet50": Kind((3, 4, 6, 3), width=128),
    "wideresnet101": Kind((3, 4, 23, 3), width=128),
}


class Excite(nn.Module):
    """Weighs channels by what two products make of their means."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // squeeze, 1), nn.Conv2d(channels // squeeze, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(torch.relu(self.down(means))))


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, kind: Kind):
        super().__init__()
        outputs = planes if kind.basic else 4 * planes
        self.relu = nn.ReLU(inplace=True)
        if kind.basic:
            units = [(inputs, planes, 3, stride, 1), (planes, planes, 3, 1, 1)]
        else:
            inner = planes * kind.width // 64 * kind.groups
            units = [(inputs, inner, 1, 1, 1), (inner, inner, 3, stride, kind.groups), (inner, outputs, 1, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step, groups in units:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(b),
                       self.relu]  # fmt: skip
        self.body = nn.Sequential(*layers[:-1])
        self.excite = Excite(outputs, kind.squeeze) if kind.squeeze else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.excite(self.body(x)) + self.shortcut(x))


class Residual(nn.Module):
    def __init__(self, kind: Kind, classes: int):
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential()
        channels = 64
        for stage, count in enumerate(kind.depths):
            for i in range(count):
                self.blocks.append(Block(channels, 64 * 2**stage, 2 if stage and i == 0 else 1, kind))
                channels = 64 * 2**stage * (1 if kind.basic else 4)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def workload(name: str, classes: int = 1000, batch: int = 64) -> Workload:
    kind = KINDS[name]
    return image_workload(name, lambda: Residual(kind, classes), (3, 224, 224), classes, batch, sum(kind.depths))
