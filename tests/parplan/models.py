"""Models for the tests of the command line; some misbehave."""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import nn


def small():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(4, 8)


class Moody(nn.Module):
    """Misbehaves on rank 1 of an executed plan: dies, hangs or raises."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        if sys.argv[1:2] == ["1"] and x.device.type == "cpu":
            if self.how == "dies":
                os._exit(7)
            if self.how == "hangs":
                time.sleep(600)
            raise RuntimeError("no luck")
        return self.layer(x)


def dies():
    return Moody("dies"), torch.randn(4, 8)


def hangs():
    return Moody("hangs"), torch.randn(4, 8)


def raises():
    return Moody("raises"), torch.randn(4, 8)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        raise KeyError("my own mistake")


def untraceable():
    return Untraceable(), torch.randn(4, 8)


class Gru(nn.Module):
    """A language model of two recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 100)
        self.rnn = nn.GRU(64, 64, num_layers=2, batch_first=True)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def gru():
    return Gru(), torch.randint(0, 100, (4, 24))
