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
        slot, kept = assign_slots(choice.flatten(1), experts, slots)
        token, home = slot_tables(slot, self.top_k, length, experts, slots)
        given = x.flatten(0, 1).index_select(0, token).view(experts, rows, slots, hidden)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given.unbind(0))])
        taken = done.flatten(0, 2).index_select(0, home).view(rows, length, self.top_k, hidden)
        weight = score.softmax(dim=-1) * kept.view(rows, length, self.top_k)
        return (taken * weight.to(x.dtype).unsqueeze(-1)).sum(dim=2)


def assign_slots(choice: torch.Tensor, experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot (expert * slots + place) of every choice of a row, first come first served; and which choices got one.

    `choice` is (rows, length * top_k) of expert numbers; a choice without a slot has the number experts * slots.
    """
    chosen = choice.unsqueeze(-1) == torch.arange(experts, device=choice.device)
    place = chosen.cumsum(dim=1).gather(2, choice.unsqueeze(-1)).squeeze(-1) - 1
    kept = place < slots
    return torch.where(kept, choice * slots + place, experts * slots), kept


def slot_tables(
    slot: torch.Tensor, top_k: int, length: int, experts: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token each slot takes, in the order (expert, row, place), and where each choice finds its result.

    Empty slots take the row's first token, choices without a slot find slot 0: neither result is used.
    """
    rows, choices = slot.shape
    row = torch.arange(rows, device=slot.device).unsqueeze(1)
    source = (torch.arange(choices, device=slot.device) // top_k) + row * length
    table = (row * length).expand(rows, experts * slots + 1).scatter(1, slot, source)
    token = table[:, :-1].unflatten(1, (experts, slots)).transpose(0, 1).flatten()
    found = slot % (experts * slots)
    home = (found // slots * rows + row) * slots + found % slots
    return token, home.flatten()


def workload(name: str, s: sizes.Mixtral) -> Workload:
    return token_workload(name, lambda: Llama(s, lambda: Experts(s)), s.vocab, s.seq, s.batch, s.layers)
