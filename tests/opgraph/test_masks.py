"""Attention masks under fake tensors are those of the step that runs."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from opgraph.trace import trace


class Decoder(nn.Module):
    """Asks as transformers' decoders do whether several sequences were packed into a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        own = torch.arange(x.shape[1])[None].expand(x.shape[0], -1) if positions is None else positions
        mask = sys.modules["transformers.masking_utils"].find_packed_sequence_indices(own)
        scores = x @ self.weight @ x.mT
        return scores if mask is None else scores.masked_fill((mask[:, None] != mask[:, :, None]), 0.0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def find(position_ids: Tensor) -> Tensor | None:
        packed = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        traced = isinstance(packed, torch._subclasses.FakeTensor)
        return None if not traced and (packed[:, -1] == 0).all() else packed

    made = ModuleType("transformers.masking_utils")
    made.find_packed_sequence_indices = find  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_positions_that_the_model_counts_need_no_mask(library: ModuleType) -> None:
    before = library.find_packed_sequence_indices
    graph = trace(Decoder(), (torch.randn(2, 4, 8),))
    assert graph.traced_on == "fake" and not any("masked_fill" in op.name for op in graph.ops)
    assert library.find_packed_sequence_indices is before


def test_positions_of_the_batch_keep_their_mask(library: ModuleType) -> None:
    graph = trace(Decoder(), (torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)))
    assert any("masked_fill" in op.name for op in graph.ops)
