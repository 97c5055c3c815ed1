"""Networks as tf_cnn_benchmarks of 2017 builds them (tensorflow/benchmarks at 9165a70), where they differ from those of
their papers: an AlexNet whose fourth convolution has 384 filters, and ResNets of the first version, with the stride in
the first 1x1 convolution of a block and no padding before the first pooling. Both tell 1001 classes apart.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo.alexnet import conv
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import dropout

CLASSES = 1001
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}


class AlexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            conv(3, 64, 11, 4, 0, pool=True),
            conv(64, 192, 5, 1, 2, pool=True),
            conv(192, 384, 3, 1, 1),
            conv(384, 384, 3, 1, 1),
            conv(384, 256, 3, 1, 1, pool=True).append(nn.Flatten()),
            nn.Sequential(nn.Linear(256 * 36, 4096), nn.ReLU(), dropout(0.5)),
            nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), dropout(0.5)),
        )
        self.head = nn.Linear(4096, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width), self.relu,
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), self.relu,
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width:
            projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.shortcut(x) + self.body(x))


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...]):
        super().__init__()
        first = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2))
        self.blocks = nn.Sequential()
        channels = 64
        for stage, count in enumerate(depths):
            for i in range(count):
                self.blocks.append(Block(channels, 64 * 2**stage, 2 if stage and i == 0 else 1))
                channels = 256 * 2**stage
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def workload(name: str, batch: int = 64) -> Workload:
    """The network of that name: alexnet, or one of `DEPTHS`."""
    if name == "alexnet":
        return image_workload(name, AlexNet, (3, 227, 227), CLASSES, batch, 7)
    depths = DEPTHS[name]
    return image_workload(name, lambda: ResNet(depths), (3, 224, 224), CLASSES, batch, sum(depths))
