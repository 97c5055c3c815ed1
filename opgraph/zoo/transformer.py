"""One transformer for all published shapes: GPT, MPT, Llama, BERT, squared-ReLU with grouped queries, MLA with experts.

Where training software joins projections (q, k, v in one product; gate and up in one), so does `joined`: heads and
features are interleaved as in Megatron, so that a shard of the product holds whole heads. Every module without
children is what such software runs as one kernel or one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from opgraph.workload import Batch, Workload, adamw
from opgraph.zoo.common import block_paths
from opgraph.zoo.layers import Rotation, dropout, rotate, rotation_tables, token_loss
from opgraph.zoo.routing import Combine, Dispatch, Gather, Give, Grouped, Router, Take


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    q: int = 1536
    kv: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128


@dataclass(frozen=True, slots=True)
class Experts:
    """`count` experts of width `ffn` on this rank's part of the tokens, `shared` width of the expert of all tokens.
    gated: three matrices an expert (SwiGLU), else two with the shape's activation. parts: ranks that split the
    sequence around the experts; this one takes its part and gives it back at full length, and `shared` is its part of
    that expert's width. split: ranks that share each routed expert, of which `ffn` is this one's part; it gathers the
    tokens of all of them, and hands their sums back."""

    count: int
    routed: int  # experts that the router tells apart (all ranks)
    top_k: int
    ffn: int
    shared: int = 0
    gated: bool = True
    parts: int = 1
    split: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """vocab 0: neither embedding nor logits. predicted: positions per sequence whose logits are made (0: all).
    head_width: numbers of a head (0: an equal part of the hidden size).
    dtype: of parameters and activations ("float32", "bfloat16", "float16")."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    seq: int
    vocab: int
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "gelu_new", "swiglu", "relu2"] = "gelu"
    positions: Literal["learned", "rope", "alibi"] = "learned"
    attention: Literal["sdpa", "math"] = "sdpa"
    causal: bool = True
    bias: bool = True
    post_norm: bool = False
    tied: bool = False
    joined: bool = True
    dropout: float = 0.0
    predicted: int = 0
    latent: Latent | None = None
    experts: Experts | None = None
    dtype: str = "float32"
    head_width: int = 0

    @property
    def width_of_head(self) -> int:
        return self.head_width or self.hidden // self.heads


def _norm(s: Shape, width: int) -> nn.Module:
    return nn.LayerNorm(width, bias=s.bias) if s.norm == "layer" else nn.RMSNorm(width, eps=1e-5)


class Softmax(nn.Module):
    """Scaled, masked softmax of the scores; `mask` is added (causal, and ALiBi where there is one)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = scores * self.scale
        return F.softmax(scores if mask is None else scores + mask, dim=-1)


class Core(nn.Module):
    """Attention between projections. `math` makes the whole matrix of scores."""

    def __init__(self, s: Shape, head_dim: int):
        super().__init__()
        self.kind, self.causal, self.grouped = s.attention, s.causal, s.kv_heads != s.heads
        self.softmax = Softmax(head_dim**-0.5)
        self.drop = dropout(s.dropout)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)
        if self.grouped:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        rows = q.shape[0]
        # heads before the batch, so that a shard of the heads is a shard of the products (Megatron does the same)
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))
        y = torch.bmm(self.drop(self.softmax(torch.bmm(q, k.transpose(1, 2)), mask)), v)
        return y.unflatten(0, (-1, rows)).transpose(0, 1)


class Rope(nn.Module):
    """Turns (batch, heads, tokens, width) as it lies in memory: token by token. So attention's result lies like that,
    too, and the next product reads it without a copy (torchtitan and Megatron-LM turn before they move the heads)."""

    def forward(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        cos, sin = rotation
        return rotate(x.transpose(1, 2), (cos.unsqueeze(1), sin.unsqueeze(1))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.head_dim, self.group, self.joined = s.width_of_head, s.heads // s.kv_heads, s.joined
        q, kv = s.heads * self.head_dim, s.kv_heads * self.head_dim
        if s.joined:
            self.qkv = nn.Linear(s.hidden, q + 2 * kv, bias=s.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(s.hidden, n, bias=s.bias) for n in (q, kv, kv))
        self.rope_q, self.rope_k = Rope(), Rope()
        self.core = Core(s, self.head_dim)
        self.o = nn.Linear(q, s.hidden, bias=s.bias)

    def forward(self, x: torch.Tensor, rotation: Rotation | None, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self._joined(x) if self.joined else (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )  # fmt: skip
        if rotation is not None:
            q, k = self.rope_q(q, rotation), self.rope_k(k, rotation)
        return self.o(self.core(q, k, v, mask).transpose(1, 2).flatten(2))

    def _joined(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per key head: its query heads, the key, the value (Megatron's order)."""
        d = self.head_dim
        y = self.qkv(x).unflatten(-1, (-1, (self.group + 2) * d))
        q, k, v = y.split((self.group * d, d, d), dim=-1)
        return q.reshape(*x.shape[:2], -1, d).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class LatentAttention(nn.Module):
    """Multi-head latent attention: queries, keys and values from low-rank latents, rotary part kept apart."""

    def __init__(self, s: Shape, w: Latent):
        super().__init__()
        self.heads, self.w = s.heads, w
        self.q_down = nn.Linear(s.hidden, w.q, bias=False)
        self.q_norm = nn.RMSNorm(w.q, eps=1e-6)
        self.q_up = nn.Linear(w.q, s.heads * (w.nope + w.rope), bias=False)
        self.kv_down = nn.Linear(s.hidden, w.kv + w.rope, bias=False)
        self.kv_norm = nn.RMSNorm(w.kv, eps=1e-6)
        self.rope_k = KeyRope()
        self.kv_up = LatentUp(w.kv, s.heads * (w.nope + w.value), bias=False, width=w.nope + w.value)
        self.join = LatentJoin(w)
        self.core = Core(s, w.nope + w.rope)
        self.o = nn.Linear(s.heads * w.value, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, rotation: Rotation | None, mask: torch.Tensor | None) -> torch.Tensor:
        w = self.w
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, turned = self.kv_down(x).split((w.kv, w.rope), dim=-1)
        kv, shared = self.kv_up(self.kv_norm(latent), self.rope_k(turned, rotation))
        q, k, v = self.join(q, kv, shared, rotation)
        return self.o(self.core(q, k, v, mask)[..., : w.value].transpose(1, 2).flatten(2))


class KeyRope(nn.Module):
    """Turns the part of the keys that all heads share."""

    def forward(self, turned: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        assert rotation is not None
        return rotate(turned.unsqueeze(1), rotation)


class LatentUp(nn.Linear):
    """Keys and values of the heads, and the shared part of the keys for each of them: where ranks have some of the
    heads each, its gradient is a sum over ranks, as that of the latent is."""

    def __init__(self, inputs: int, outputs: int, bias: bool, width: int):
        super().__init__(inputs, outputs, bias=bias)
        self.width = width

    def forward(self, latent: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        kv = super().forward(latent).unflatten(-1, (-1, self.width)).transpose(1, 2)
        return kv, turned.expand(-1, kv.shape[1], -1, -1)


class LatentJoin(nn.Module):
    """Queries and keys of nope and rotated parts; values widened to the keys' width, as one attention kernel takes."""

    def __init__(self, w: Latent):
        super().__init__()
        self.w = w

    def forward(
        self, q: torch.Tensor, kv: torch.Tensor, shared: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w = self.w
        assert rotation is not None
        q = torch.cat((q[..., : w.nope], rotate(q[..., w.nope :], rotation)), dim=-1)
        k = torch.cat((kv[..., : w.nope], shared), dim=-1)
        return q, k, F.pad(kv[..., w.nope :], (0, w.nope + w.rope - w.value))


class Activation(nn.Module):
    def __init__(self, kind: str, joined: bool):
        super().__init__()
        self.kind, self.joined = kind, joined

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if self.kind == "gelu":
            return F.gelu(x, approximate="tanh")
        if self.kind == "gelu_new":  # spelled out, as Hugging Face's GPT-2 has it: eight kernels without a compiler
            return 0.5 * x * (1.0 + torch.tanh(sqrt(2.0 / pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        if self.kind == "relu2":
            return F.relu(x).square()
        if gate is None:
            pairs = x.unflatten(-1, (-1, 2))
            x, gate = pairs.select(-1, 0), pairs.select(-1, 1)
        return F.silu(gate) * x


class Mlp(nn.Module):
    def __init__(self, s: Shape, ffn: int):
        super().__init__()
        gated = s.mlp == "swiglu"
        self.up = nn.Linear(s.hidden, ffn * (2 if gated and s.joined else 1), bias=s.bias)
        self.gate = nn.Linear(s.hidden, ffn, bias=s.bias) if gated and not s.joined else None
        self.act = Activation(s.mlp, s.joined)
        self.down = nn.Linear(ffn, s.hidden, bias=s.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.up(x), self.gate(x)))


class Mixture(nn.Module):
    """Routed experts and one that takes all tokens. Tokens of all expert-parallel ranks fill this rank's experts, so
    that a rank with 1/ep of the experts works on as many tokens as one with all of them."""

    def __init__(self, s: Shape, e: Experts):
        super().__init__()
        self.count = e.count
        self.router = Router(s.hidden, e.routed, e.top_k)
        self.dispatch, self.combine = Dispatch(), Combine()
        self.up = Grouped(e.count, s.hidden, (2 if e.gated else 1) * e.ffn)
        self.act = Activation("swiglu" if e.gated else s.mlp, True)
        self.down = Grouped(e.count, e.ffn, s.hidden)
        self.shared = Mlp(s, e.shared) if e.shared else None
        self.gather: nn.Module = Gather(e.split) if e.split > 1 else nn.Identity()
        self.scatter: nn.Module = Take(e.split) if e.split > 1 else nn.Identity()
        self.shared_gather: nn.Module = Gather(e.parts) if e.parts > 1 and e.shared else nn.Identity()
        self.shared_scatter: nn.Module = Take(e.parts) if e.parts > 1 and e.shared else nn.Identity()
        self.take: nn.Module = Take(e.parts) if e.parts > 1 else nn.Identity()
        self.give: nn.Module = Give(e.parts) if e.parts > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.take(x)
        score, choice = self.router(x)
        given, order = self.dispatch(x, choice, self.count)
        done = self.scatter(self.down(self.act(self.up(self.gather(given)))))
        y = self.combine(done, order, score, x)
        if self.shared is not None:
            y = y + self.shared_scatter(self.shared(self.shared_gather(x)))
        return self.give(y)


class Block(nn.Module):
    def __init__(self, s: Shape, sparse: bool):
        super().__init__()
        self.post = s.post_norm
        self.norm1, self.norm2 = _norm(s, s.hidden), _norm(s, s.hidden)
        self.attn = LatentAttention(s, s.latent) if s.latent else Attention(s)
        self.mlp = Mixture(s, s.experts) if s.experts and sparse else Mlp(s, s.ffn)
        self.add1, self.add2 = Add(s.dropout), Add(s.dropout)

    def forward(self, x: torch.Tensor, rotation: Rotation | None, mask: torch.Tensor | None) -> torch.Tensor:
        if self.post:
            x = self.norm1(self.add1(x, self.attn(x, rotation, mask)))
            return self.norm2(self.add2(x, self.mlp(x)))
        x = self.add1(x, self.attn(self.norm1(x), rotation, mask))
        return self.add2(x, self.mlp(self.norm2(x)))


class Add(nn.Module):
    """Dropout of the branch, added to the residual."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + (F.dropout(branch, self.p) if self.p else branch)


class Transformer(nn.Module):
    """`blocks.0` is dense where there are experts (DeepSeek-V2), all others alike."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        if s.vocab:
            self.embed = nn.Embedding(s.vocab, s.hidden)
            self.positions = nn.Embedding(s.seq, s.hidden) if s.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(s, i > 0) for i in range(s.layers))
        self.norm = nn.Identity() if s.post_norm or not s.vocab else _norm(s, s.hidden)
        if s.vocab:
            self.transform = nn.Sequential(nn.Linear(s.hidden, s.hidden), nn.GELU(), _norm(s, s.hidden)) \
                if s.post_norm else nn.Identity()  # fmt: skip
            self.head = nn.Linear(s.hidden, s.vocab, bias=s.post_norm)
            if s.tied:
                self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        s = self.s
        x = self._embedded(ids) if s.vocab else ids
        rotation = mask = None
        if s.positions == "rope":
            rotation = rotation_tables(s.seq, s.latent.rope if s.latent else s.width_of_head, 1e4, x)
        if s.attention == "math" and s.causal:
            mask = torch.full((s.seq, s.seq), -1e4, dtype=x.dtype, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, rotation, mask)
        x = self.norm(x)
        if not s.vocab:
            return x
        return self.head(self.transform(x[:, : s.predicted] if s.predicted else x))

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x if self.positions is None else x + self.positions(torch.arange(ids.shape[1], device=ids.device))


def workload(name: str, s: Shape, batch: int = 2) -> Workload:
    """The step of this transformer. Without a vocabulary, hidden states go in and their mean is the loss."""
    dtype = getattr(torch, s.dtype)

    def make(n: int) -> Batch:
        if not s.vocab:
            return (torch.zeros(n, s.seq, s.hidden, dtype=dtype, device="cpu").requires_grad_(),), ()
        ids = torch.randint(s.vocab, (n, s.seq), device="cpu")
        return (ids,), (torch.randint(s.vocab, (n, s.predicted or s.seq), device="cpu"),)

    def loss(y: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        return token_loss(y, *targets) if targets else y.mean()

    def build() -> nn.Module:
        return Transformer(s).to(dtype)

    return Workload(name, build, make, loss, adamw, batch, block_paths(s.layers))


def parameter_count(s: Shape) -> int:
    """Parameters of the whole model, counted on the meta device."""
    with torch.device("meta"):
        return sum(prod(p.shape) for p in Transformer(s).parameters())
