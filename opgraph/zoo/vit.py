"""Vision transformer (Dosovitskiy et al. 2021, table 1): 86,567,656 parameters as B/16 with a 1000-class head."""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import image_workload
from opgraph.zoo.layers import Attention, Mlp, PreNormBlock, dropout, init_transformer


class Patches(nn.Module):
    """One token per patch behind a class token, plus learned positions."""

    def __init__(self, s: sizes.Vit):
        super().__init__()
        tokens = (s.image // s.patch) ** 2 + 1
        self.conv = nn.Conv2d(3, s.hidden, s.patch, s.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, s.hidden))
        self.positions = nn.Parameter(torch.empty(1, tokens, s.hidden))
        nn.init.normal_(self.positions, std=0.02)
        self.drop = dropout(s.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        return self.drop(x + self.positions)


class Vit(nn.Module):
    def __init__(self, s: sizes.Vit):
        super().__init__()
        self.embed = Patches(s)
        self.blocks = nn.ModuleList(block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden, eps=s.eps)
        self.head = nn.Linear(s.hidden, s.classes)
        init_transformer(self, s.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def block(s: sizes.Vit) -> PreNormBlock:
    attention = Attention(s.hidden, s.heads, causal=False, bias=True)
    return PreNormBlock(attention, Mlp(s.hidden, s.ffn), s.eps, s.dropout)


def workload(name: str, s: sizes.Vit) -> Workload:
    return image_workload(name, lambda: Vit(s), (3, s.image, s.image), s.classes, s.batch, s.layers)
