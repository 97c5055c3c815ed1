"""GoogLeNet (Szegedy et al. 2015, table 1) with batch norm, without auxiliary heads: 6,624,904 parameters.

As in torchvision, the branch that the paper gives 5x5 convolutions has 3x3 ones (pytorch/vision issue 906). That is
what the published count refers to. Batch norm couples the samples of a batch, see `resnet`.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import dropout

# Columns of table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection; then the kernel of the pooling after it.
INCEPTIONS = (
    (64, 96, 128, 16, 32, 32, 0),
    (128, 128, 192, 32, 96, 64, 3),
    (192, 96, 208, 16, 48, 64, 0),
    (160, 112, 224, 24, 64, 64, 0),
    (128, 128, 256, 24, 64, 64, 0),
    (112, 144, 288, 32, 64, 64, 0),
    (256, 160, 320, 32, 128, 128, 2),
    (256, 160, 320, 32, 128, 128, 0),
    (384, 192, 384, 48, 128, 128, 0),
)


class Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, inputs: int, dims: tuple[int, ...]):
        super().__init__()
        one, three_in, three, five_in, five, pool, after = dims
        self.branch1 = conv(inputs, one, 1)
        self.branch2 = nn.Sequential(conv(inputs, three_in, 1), conv(three_in, three, 3, padding=1))
        self.branch3 = nn.Sequential(conv(inputs, five_in, 1), conv(five_in, five, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(inputs, pool, 1))
        self.pool = nn.MaxPool2d(after, 2, ceil_mode=True) if after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1))


class GoogLeNet(nn.Module):
    def __init__(self, s: sizes.GoogLeNet):
        super().__init__()
        self.stem = nn.Sequential(
            conv(3, 64, 7, stride=2, padding=3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            conv(64, 64, 1),
            conv(64, 192, 3, padding=1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.blocks = nn.Sequential()
        channels = 192
        for dims in INCEPTIONS:
            self.blocks.append(Inception(channels, dims))
            channels = dims[0] + dims[2] + dims[4] + dims[5]
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), dropout(s.dropout))
        self.head = nn.Linear(channels, s.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, eps=0.001), nn.ReLU(inplace=True))


def workload(name: str, s: sizes.GoogLeNet) -> Workload:
    shape = (3, s.image, s.image)
    return image_workload(name, lambda: GoogLeNet(s), shape, s.classes, s.batch, len(INCEPTIONS))
