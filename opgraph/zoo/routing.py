"""What stands around the experts of `opgraph.zoo.transformer`: router, slots, and tokens of other ranks."""

from __future__ import annotations

from math import ceil

import torch
from torch import nn
from torch.nn import functional as F


class Dispatch(nn.Module):
    """Takes every token to the slots of its experts; `capacity` 1, so that every slot is filled."""

    def forward(self, x: torch.Tensor, choice: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = choice.flatten().argsort()
        slots = ceil(choice.shape[1] * choice.shape[2] / experts) * choice.shape[0]
        order = F.pad(order, (0, experts * slots - order.numel()))
        given = x.flatten(0, 1).index_select(0, (order * (1.0 / choice.shape[-1])).long())  # the choice's token
        return given.view(experts, slots, x.shape[-1]), order


class Combine(nn.Module):
    def forward(self, done: torch.Tensor, order: torch.Tensor, score: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        home = order[: score.numel()].argsort()
        taken = done.flatten(0, 1).index_select(0, home).view(*like.shape[:2], -1, like.shape[-1])
        return (taken * score.to(like.dtype).unsqueeze(-1)).sum(dim=2)


class Grouped(nn.Module):
    """One product for all experts of the rank."""

    def __init__(self, experts: int, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.choose = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score, choice = self.choose(x).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return score, choice


class Take(nn.Module):
    """The part of the sequence that this rank has."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : x.shape[1] // self.parts]


class Give(nn.Module):
    """A part of the sequence in the place of all of them; where they are split, each rank keeps its own."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y.repeat(1, self.parts, 1)


class Gather(nn.Module):
    """Rows of all ranks that share an expert, along dim 1. Its copy stands for the one that Megatron's dispatcher makes
    of gathered tokens to sort them by expert."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, self.ranks, 1)
