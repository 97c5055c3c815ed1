"""Llama 2 (Touvron et al. 2023) and Llama 3 (Dubey et al. 2024), and what differs from them by sizes: Mistral, Qwen 2.

The cosines and sines of the rotary positions are computed once per step and handed to every block; there are no
buffers. The stretched rotary frequencies of Llama 3.1 and later cost the same and are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import token_workload
from opgraph.zoo.layers import Attention, SwiGlu, init_transformer, rotation_tables


class Block(nn.Module):
    def __init__(self, s: sizes.Llama, mlp: nn.Module):
        super().__init__()
        self.norm1 = nn.RMSNorm(s.hidden, eps=s.eps)
        self.attn = Attention(
            s.hidden, s.heads, causal=True, bias=False, kv_heads=s.kv_heads, head_dim=s.head_dim, qkv_bias=s.qkv_bias
        )
        self.norm2 = nn.RMSNorm(s.hidden, eps=s.eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), (cos, sin))
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """`make_mlp` makes the feed-forward layer of a block."""

    def __init__(self, s: sizes.Llama, make_mlp: Callable[[], nn.Module]):
        super().__init__()
        self.head_dim, self.theta = s.head_dim, s.rope_theta
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Block(s, make_mlp()) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        init_transformer(self, s.layers)
        if s.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        cos, sin = rotation_tables(ids.shape[1], self.head_dim, self.theta, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def workload(name: str, s: sizes.Llama) -> Workload:
    def build() -> nn.Module:
        return Llama(s, lambda: SwiGlu(s.hidden, s.ffn))

    return token_workload(name, build, s.vocab, s.seq, s.batch, s.layers)
