"""GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020, all layers dense)."""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import token_workload
from opgraph.zoo.layers import Attention, Mlp, PreNormBlock, dropout, init_transformer


class Gpt(nn.Module):
    def __init__(self, s: sizes.Gpt):
        super().__init__()
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.positions = nn.Embedding(s.positions, s.hidden)
        self.drop = dropout(s.dropout)
        self.blocks = nn.ModuleList(block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden, eps=s.eps)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        init_transformer(self, s.layers)
        if s.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def block(s: sizes.Gpt) -> PreNormBlock:
    attention = Attention(s.hidden, s.heads, causal=True, bias=True)
    return PreNormBlock(attention, Mlp(s.hidden, s.ffn, "tanh"), s.eps, s.dropout)


def workload(name: str, s: sizes.Gpt) -> Workload:
    return token_workload(name, lambda: Gpt(s), s.vocab, s.seq, s.batch, s.layers)
