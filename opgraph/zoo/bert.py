"""BERT with its masked-language-model head (Devlin et al. 2019): 109,514,298 parameters as base.

Sequences are full, so there is no padding mask; every position is predicted (the published pre-training predicts 15 %
of them), so that the mean loss of equal parts of a batch is the loss of the whole. No pooler.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import token_workload
from opgraph.zoo.layers import Attention, Mlp, dropout, init_transformer


class Embeddings(nn.Module):
    """The sum of token, position and token-type embeddings, normalised; every token is of type 0."""

    def __init__(self, s: sizes.Bert):
        super().__init__()
        self.tokens = nn.Embedding(s.vocab, s.hidden)
        self.positions = nn.Embedding(s.positions, s.hidden)
        self.types = nn.Embedding(2, s.hidden)
        self.norm = nn.LayerNorm(s.hidden, eps=s.eps)
        self.drop = dropout(s.dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.types(torch.zeros_like(ids))
        return self.drop(self.norm(x + self.positions(torch.arange(ids.shape[1], device=ids.device))))


class PostNormBlock(nn.Module):
    def __init__(self, s: sizes.Bert):
        super().__init__()
        self.attn = Attention(s.hidden, s.heads, causal=False, bias=True)
        self.norm1 = nn.LayerNorm(s.hidden, eps=s.eps)
        self.mlp = Mlp(s.hidden, s.ffn)
        self.norm2 = nn.LayerNorm(s.hidden, eps=s.eps)
        self.drop = dropout(s.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class Bert(nn.Module):
    def __init__(self, s: sizes.Bert):
        super().__init__()
        self.embed = Embeddings(s)
        self.blocks = nn.ModuleList(PostNormBlock(s) for _ in range(s.layers))
        self.transform = nn.Sequential(nn.Linear(s.hidden, s.hidden), nn.GELU(), nn.LayerNorm(s.hidden, eps=s.eps))
        self.head = nn.Linear(s.hidden, s.vocab)
        init_transformer(self, s.layers)
        if s.tied:
            self.head.weight = self.embed.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.transform(x))


def workload(name: str, s: sizes.Bert) -> Workload:
    return token_workload(name, lambda: Bert(s), s.vocab, s.seq, s.batch, s.layers)
