"""The layers that several transformer families share, and the initial weights of all of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

Rotation = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Multi-head attention with a projection each for q, k, v; fewer k/v heads than q heads is grouped-query attention.

    Heads are what is left over after `head_dim`, so that a shard of the projections attends with its own heads.
    """

    def __init__(
        self, hidden: int, heads: int, *, causal: bool, bias: bool, kv_heads: int | None = None, head_dim: int = 0,
        qkv_bias: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        self.causal, self.head_dim = causal, head_dim or hidden // heads
        self.grouped = kv_heads is not None and kv_heads != heads
        kv = (kv_heads or heads) * self.head_dim
        with_bias = bias if qkv_bias is None else qkv_bias
        self.q = nn.Linear(hidden, heads * self.head_dim, bias=with_bias)
        self.k = nn.Linear(hidden, kv, bias=with_bias)
        self.v = nn.Linear(hidden, kv, bias=with_bias)
        self.o = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    def forward(self, x: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between (`tanh` is GPT-2's approximation of it)."""

    def __init__(self, hidden: int, ffn: int, approximate: str = "none"):
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.act = nn.GELU(approximate=approximate)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), without biases."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PreNormBlock(nn.Module):
    """Transformer block with the norms before attention and MLP (GPT-2, ViT)."""

    def __init__(self, attention: Attention, mlp: Mlp, eps: float, p: float):
        super().__init__()
        hidden = mlp.up.in_features
        self.norm1 = nn.LayerNorm(hidden, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(hidden, eps=eps)
        self.mlp = mlp
        self.drop = dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def dropout(p: float) -> nn.Module:
    """Dropout, or nothing at all where p is 0."""
    return nn.Dropout(p) if p else nn.Identity()


def rotation_tables(length: int, head_dim: int, theta: float, like: torch.Tensor) -> Rotation:
    """cos and sin of the rotary angles (Su et al. 2021), each (length, head_dim / 2), in the dtype of `like`."""
    rate = theta ** (torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / -head_dim)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), rate)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of every head, as the published Hugging Face weights expect."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def init_transformer(model: nn.Module, layers: int, std: float = 0.02) -> None:
    """GPT-2's initial weights: normal with `std`, smaller by sqrt(2 layers) where a branch joins the residual sum."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            joins = path.endswith((".o", ".down"))
            nn.init.normal_(module.weight, std=std / (2 * layers) ** 0.5 if joins else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all tokens: logits (batch, seq, vocab), targets (batch, seq)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def class_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the samples: logits (batch, classes), targets (batch,)."""
    return F.cross_entropy(logits.float(), targets)
