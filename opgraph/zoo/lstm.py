"""LSTM language model (Zaremba et al. 2014, "Recurrent neural network regularization").

Every layer is an nn.LSTM of its own, so that layers can be cut apart. State starts at zero in every batch.
"""

from __future__ import annotations

import torch
from torch import nn

from opgraph.workload import Workload
from opgraph.zoo import sizes
from opgraph.zoo.common import token_workload
from opgraph.zoo.layers import dropout


class Layer(nn.Module):
    def __init__(self, hidden: int, p: float):
        super().__init__()
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.drop = dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.lstm(x)[0])


class LstmModel(nn.Module):
    def __init__(self, s: sizes.Lstm):
        super().__init__()
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Layer(s.hidden, s.dropout) for _ in range(s.layers))
        self.head = nn.Linear(s.hidden, s.vocab)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)
        if s.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def workload(name: str, s: sizes.Lstm) -> Workload:
    return token_workload(name, lambda: LstmModel(s), s.vocab, s.seq, s.batch, s.layers)
