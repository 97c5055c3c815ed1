"""AlexNet in one tower (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks").

The layout is torchvision's (61,100,840 parameters): 224 x 224 images, adaptive pooling to 6 x 6, dropout 0.5 before
the first two of three linear layers.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import dropout


class AlexNet(nn.Module):
    def __init__(self, s: sizes.AlexNet):
        super().__init__()
        w = s.width
        self.blocks = nn.Sequential(
            conv(3, w, 11, 4, 2, pool=True),
            conv(w, 3 * w, 5, 1, 2, pool=True),
            conv(3 * w, 6 * w, 3, 1, 1),
            conv(6 * w, 4 * w, 3, 1, 1),
            conv(4 * w, 4 * w, 3, 1, 1, pool=True).extend([nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten()]),
            nn.Sequential(dropout(s.dropout), nn.Linear(4 * w * 36, s.hidden), nn.ReLU()),
            nn.Sequential(dropout(s.dropout), nn.Linear(s.hidden, s.hidden), nn.ReLU()),
        )
        self.head = nn.Linear(s.hidden, s.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def conv(inputs: int, outputs: int, kernel: int, stride: int, padding: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2)) if pool else nn.Sequential(*layers)


def workload(name: str, s: sizes.AlexNet) -> Workload:
    return image_workload(name, lambda: AlexNet(s), (3, s.image, s.image), s.classes, s.batch, 7)
