"""Random draws of the proof: one outcome, whatever the piece of the batch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from opgraph.workload import Workload, adamw, mean_square
from planner.plan import ParallelPlan
from validation.settled import settled
from validation.verify import reference


class Drawing(torch.nn.Linear):
    """Draws in every way that models do, outside of any module."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(super().forward(x), 0.3, self.training)
        y = y + torch.randn_like(y) * torch.rand(len(y), 1)
        y = y * y.new_empty(len(y), 1).bernoulli_(0.8) + torch.bernoulli(torch.full_like(y, 0.7))
        q = y.view(len(y), 1, 2, 4)
        return y + F.scaled_dot_product_attention(q, q, q, dropout_p=0.2).flatten(1)


def test_pieces_draw_what_the_whole_batch_draws() -> None:
    workload = Workload("drawing", Drawing, lambda n: ((torch.randn(n, 8),), ()), mean_square, adamw, 8)
    device = torch.device("cpu")
    whole, parts = (reference(ParallelPlan(8), workload, pieces, device, 0) for pieces in (1, 4))
    torch.testing.assert_close(torch.tensor(parts[0]), torch.tensor(whole[0]))
    torch.testing.assert_close(parts[1], whole[1])
    assert all(g.abs().sum() > 0 for g in whole[1].values())


def test_outcomes() -> None:
    x = torch.zeros(3)
    with settled() as drawn:
        assert torch.rand(2).tolist() == torch.randn(2).tolist() == [0.5, 0.5]
        assert torch.randint(10, (2,)).tolist() == torch.randint(0, 11, (2,)).tolist() == [5, 5]
        assert torch.randint(4, 8, (1,)).tolist() == torch.randint_like(torch.zeros(1), 4, 8).tolist() == [6]
        assert torch.randperm(3).tolist() == [0, 1, 2] and x.clone().random_(2, 6).tolist() == [4, 4, 4]
        assert x.normal_(1.0, 4.0).tolist() == [3.0] * 3 and x.uniform_(2, 4).tolist() == [3.0] * 3
        assert x.exponential_(4.0).tolist() == [0.25] * 3
        assert x.bernoulli_(0.2).tolist() == [0.0] * 3 and x.bernoulli_(0.5).tolist() == [1.0] * 3
        assert torch.bernoulli(torch.tensor([0.4, 0.6])).tolist() == [0.0, 1.0]
        assert torch.equal(F.dropout(torch.ones(4), 0.5), torch.full((4,), 2.0))
    assert drawn.draws >= 8
    assert torch.rand(8).unique().numel() > 1
