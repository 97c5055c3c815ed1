"""The residual network of face recognition: InsightFace's IResNet-100 (Deng et al. 2019, arXiv:1801.07698).

Basic blocks of BN, 3x3 convolution, BN, PReLU, 3x3 convolution, BN on 112 x 112 crops, a 512-wide embedding, and one
logit per person.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from opgraph.workload import Workload
from opgraph.zoo.common import image_workload

DEPTHS = (3, 13, 30, 3)
WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.act(self.norm2(self.conv1(self.norm1(x)))))
        return self.norm3(y) + self.shortcut(x)


class FaceResNet(nn.Module):
    def __init__(self, classes: int, depths: tuple[int, ...] = DEPTHS, image: int = 112):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.blocks = nn.Sequential()
        inputs = 64
        for width, count in zip(WIDTHS, depths):
            for i in range(count):
                self.blocks.append(Block(inputs, width, 2 if i == 0 else 1))
                inputs = width
        side = image // 16
        self.embed = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.Dropout(0.4), nn.Flatten(), nn.Linear(inputs * side * side, 512),
            nn.BatchNorm1d(512),
        )  # fmt: skip
        self.head = Cosines(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(self.blocks(self.stem(x))))


class Cosines(nn.Module):
    """Scaled cosines between an embedding and every person's weight."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 64.0 * F.linear(unit(x), unit(self.weight))


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return rows * (rows.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt()


def workload(classes: int = 85742, batch: int = 64, depths: tuple[int, ...] = DEPTHS) -> Workload:
    """One step on `batch` crops; 85,742 persons are those of the data set face_emore."""
    return image_workload(
        "faceresnet100", lambda: FaceResNet(classes, depths), (3, 112, 112), classes, batch, sum(depths)
    )  # fmt: skip
