"""Inception-v3 (Szegedy et al. 2016, arXiv:1512.00567) without its auxiliary classifier: 23,834,568 parameters.

The paper's table 1 leaves the grids of its figures 5 to 7 open in detail; widths here are those of the published
checkpoints (TensorFlow's slim and torchvision agree on them), to which the count refers. Images are 299 x 299.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo.common import image_workload

IMAGE = 299
Edge = int | tuple[int, int]


def unit(inputs: int, outputs: int, kernel: Edge, stride: int = 1, same: bool = True) -> nn.Sequential:
    """Convolution, batch norm, ReLU; `same` keeps the grid."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2) if same else 0
    layer = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, eps=0.001), nn.ReLU(inplace=True))


def chain(inputs: int, *steps: tuple[int, Edge]) -> nn.Sequential:
    """Units of (outputs, kernel), one after the other on the same grid."""
    widths = [inputs, *(outputs for outputs, _ in steps)]
    return nn.Sequential(*(unit(a, b, kernel) for a, b, (_, kernel) in zip(widths, widths[1:], steps)))


class Branches(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def grid35(inputs: int, pooled: int) -> Branches:
    return Branches(
        unit(inputs, 64, 1), chain(inputs, (48, 1), (64, 5)), chain(inputs, (64, 1), (96, 3), (96, 3)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(inputs, pooled, 1)),
    )  # fmt: skip


def to17(inputs: int) -> Branches:
    return Branches(
        unit(inputs, 384, 3, 2, same=False),
        nn.Sequential(*chain(inputs, (64, 1), (96, 3)), unit(96, 96, 3, 2, same=False)), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def grid17(inputs: int, width: int) -> Branches:
    """Convolutions of seven in a row and seven in a column, instead of seven by seven."""
    row, column = (1, 7), (7, 1)
    return Branches(
        unit(inputs, 192, 1), chain(inputs, (width, 1), (width, row), (192, column)),
        chain(inputs, (width, 1), (width, column), (width, row), (width, column), (192, row)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(inputs, 192, 1)),
    )  # fmt: skip


def to8(inputs: int) -> Branches:
    return Branches(
        nn.Sequential(unit(inputs, 192, 1), unit(192, 320, 3, 2, same=False)),
        nn.Sequential(*chain(inputs, (192, 1), (192, (1, 7)), (192, (7, 1))), unit(192, 192, 3, 2, same=False)),
        nn.MaxPool2d(3, 2),
    )  # fmt: skip


def grid8(inputs: int) -> Branches:
    def split() -> Branches:
        return Branches(unit(384, 384, (1, 3)), unit(384, 384, (3, 1)))

    return Branches(
        unit(inputs, 320, 1), nn.Sequential(unit(inputs, 384, 1), split()),
        nn.Sequential(*chain(inputs, (448, 1), (384, 3)), split()),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(inputs, 192, 1)),
    )  # fmt: skip


class InceptionV3(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(
            unit(3, 32, 3, 2, same=False), unit(32, 32, 3, same=False), unit(32, 64, 3), nn.MaxPool2d(3, 2),
            unit(64, 80, 1), unit(80, 192, 3, same=False), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.blocks = nn.Sequential(
            grid35(192, 32), grid35(256, 64), grid35(288, 64), to17(288), grid17(768, 128), grid17(768, 160),
            grid17(768, 160), grid17(768, 192), to8(768), grid8(1280), grid8(2048),
        )  # fmt: skip
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(), nn.Flatten())
        self.head = nn.Linear(2048, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def workload(classes: int = 1000, batch: int = 64) -> Workload:
    return image_workload("inception3", lambda: InceptionV3(classes), (3, IMAGE, IMAGE), classes, batch, 11)
