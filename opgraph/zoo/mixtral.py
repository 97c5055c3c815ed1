"""Mixtral (Jiang et al. 2024): Llama with experts, each token going to its top k.

Shapes must not depend on the data, or nothing could be traced without running it. torch._grouped_mm would do, but
under fake tensors torch 2.13 takes it in bfloat16 only. So every expert has a fixed number of slots,
ceil(capacity * seq * top_k / experts) per sequence, and a token that finds its expert full is dropped there (its
residual passes on), as in GShard (Lepikhin et al. 2020). With capacity 1 the experts do the FLOPs of perfectly
balanced routing, never those of all experts on all tokens; capacity = experts / top_k drops nothing.

Slots are counted per sequence, not per batch: then the samples do not influence each other, and a step on
micro-batches is the step on their union. Experts are plain linear layers, one module each, so that they can be
sharded or placed like any other. There is no load-balancing loss.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import token_workload
from opgraph.zoo.layers import SwiGlu
from opgraph.zoo.llama import Llama


class Experts(nn.Module):
    def __init__(self, s: sizes.Mixtral):
        super().__init__()
        self.top_k, self.capacity = s.top_k, s.capacity
        self.router = nn.Linear(s.hidden, s.experts, bias=False)
        self.experts = nn.ModuleList(SwiGlu(s.hidden, s.ffn) for _ in range(s.experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, hidden = x.shape
        experts = len(self.experts)
        slots = min(length, ceil(length * self.top_k * self.capacity / experts))
        score, choice = self.router(x).float().topk(self.top_k, dim=-1)
        choice = choice.flatten(1)
        place = places(choice, experts)
        kept = place < slots
        token, home = slot_tables(choice, place, kept, length, experts, slots)
        given = x.flatten(0, 1).index_select(0, token).view(experts, rows, slots, hidden)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given.unbind(0))])
        taken = done.flatten(0, 2).index_select(0, home).view(rows, length, self.top_k, hidden)
        weight = score.softmax(dim=-1) * kept.view(rows, length, self.top_k)
        return (taken * weight.to(x.dtype).unsqueeze(-1)).sum(dim=2)


def places(choice: torch.Tensor, experts: int) -> torch.Tensor:
    """How many earlier choices of the same row have the same expert; `choice` is (rows, length * top_k) of experts."""
    chosen = choice.unsqueeze(-1) == torch.arange(experts, device=choice.device)
    return chosen.cumsum(dim=1).gather(2, choice.unsqueeze(-1)).squeeze(-1) - 1


def slot_tables(
    choice: torch.Tensor, place: torch.Tensor, kept: torch.Tensor, length: int, experts: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token each slot takes, in the order (expert, row, place), and where each choice finds its result.

    Empty slots take the row's first token, choices without a slot find the first result: neither is used.
    """
    rows, choices = choice.shape
    start = torch.arange(rows, device=choice.device).unsqueeze(1) * length
    source = torch.arange(length, device=choice.device).unsqueeze(1).expand(-1, choices // length).flatten() + start
    column = torch.where(kept, choice * slots + place, experts * slots)  # one column more for those without a slot
    table = start.expand(rows, experts * slots + 1).scatter(1, column, source)
    token = table[:, :-1].unflatten(1, (experts, slots)).transpose(0, 1).flatten()
    row = torch.arange(rows, device=choice.device).unsqueeze(1)
    home = torch.where(kept, (choice * rows + row) * slots + place, 0)
    return token, home.flatten()


def workload(name: str, s: sizes.Mixtral) -> Workload:
    return token_workload(name, lambda: Llama(s, lambda: Experts(s)), s.vocab, s.seq, s.batch, s.layers)
