"""Small models of the tests of split, apply and dry-run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from opgraph.workload import Workload, adamw


class Attention(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + (y if scale is None else y * scale)


class Gpt(nn.Module):
    """A decoder with ops of its own at the root: positions, a constant scale, a tied head as a function."""

    def __init__(self, layers: int = 4, width: int = 32, vocab: int = 64, length: int = 16, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(width, 8) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        _, length = ids.shape
        positions = torch.arange(length, device=ids.device)
        scale = torch.ones(length, 1, device=ids.device)
        scale[0] = 0.5
        scale[1:].mul_(2.0)
        x = self.drop(self.embed(ids) + self.position(positions))
        for block in self.blocks:
            x = block(x, scale=scale)
        x = self.norm(x)
        return {"logits": self.head(x)}


SHARDINGS = tuple(
    pair
    for i in range(4)
    for pair in (
        (f"blocks.{i}.attention.q", "colwise"), (f"blocks.{i}.attention.k", "colwise"),
        (f"blocks.{i}.attention.v", "colwise"), (f"blocks.{i}.attention.out", "rowwise"),
        (f"blocks.{i}.up", "colwise"), (f"blocks.{i}.down", "rowwise"),
    )
)  # fmt: skip
BLOCKS = tuple(f"blocks.{i}" for i in range(4))


def cross_entropy(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1).float(), target.flatten())


def gpt(tied: bool = True) -> Workload:
    def batch(n: int):
        ids = torch.randint(0, 64, (n, 17))
        return (ids[:, :-1].contiguous(),), (ids[:, 1:].contiguous(),)

    return Workload("gpt-test", lambda: Gpt(tied=tied), batch, cross_entropy, adamw, 8, BLOCKS)


def untied() -> Workload:
    return gpt(tied=False)


def mean_of_squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def mlp() -> Workload:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 8),
        )  # fmt: skip

    return Workload(
        "mlp-test", build, lambda n: ((torch.randn(n, 16),), (torch.randn(n, 8),)), mean_of_squares, adamw, 8,
        ("0", "2", "4", "6"),
    )  # fmt: skip


def norm_net() -> Workload:
    """A net with batch statistics and dropout."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, 8)
        )

    return Workload(
        "norm-test", build, lambda n: ((torch.randn(n, 3, 8, 8),), (torch.randn(n, 8),)), mean_of_squares, adamw, 8
    )


class Across(nn.Module):
    """A block of attention and MLP over sequences whose outer dim in memory is not the one that comes first: torch
    copies the rows of each Linear, and adds its bias apart from the product."""

    def __init__(self, width: int = 32, head: int = 8) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.transpose(0, 1)
        q, k, v = (f(t).unflatten(-1, (-1, self.head)).permute(1, 2, 0, 3) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        t = t + self.out(y.permute(2, 0, 1, 3).flatten(2).transpose(0, 1).contiguous().transpose(0, 1))
        return x + self.down(F.gelu(self.up(t)).transpose(0, 1))


class Rows(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Across() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def across() -> Workload:
    def batch(n: int):
        return (torch.randn(n, 12, 32),), (torch.randn(n, 12, 32),)

    return Workload("across", Rows, batch, mean_of_squares, adamw, 8, ("blocks.0", "blocks.1"))


CORES = tuple(f"blocks.{i}.attn.core" for i in range(2))


def cored() -> Workload:
    """A transformer whose attention between the projections is a module that makes the whole matrix of scores, which
    Megatron's selective recomputation drops."""
    from opgraph.zoo.transformer import Shape, workload

    return workload("cored", Shape(2, 32, 4, 4, 64, 16, 64, attention="math"), 8)
