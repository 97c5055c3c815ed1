"""Grouped products of any float trace, with the shapes and strides that torch's kernel gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from opgraph.grouped import GroupedProducts
from opgraph.trace import trace


def operands(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    ends = torch.tensor([4, 8], dtype=torch.int32)
    across = torch.randn(2, 13, 16).mT  # columns that are no multiple of 16 bytes: the result's rows are padded
    return {
        "ragged rows": (torch.randn(8, 16), across, ends),
        "ragged columns": (torch.randn(2, 8, 16), torch.randn(16, 8), ends),
        "ragged contraction": (torch.randn(12, 8), torch.randn(8, 12), ends),
        "batches": (torch.randn(2, 8, 16), across, None),
    }[kind]


@pytest.mark.parametrize("kind", ["ragged rows", "ragged columns", "ragged contraction", "batches"])
def test_shapes_and_strides_are_those_of_the_kernel(kind: str) -> None:
    a, b, ends = operands(kind)
    real = torch._grouped_mm(a, b, offs=ends)
    with FakeTensorMode(), GroupedProducts():
        a, b, ends = operands(kind)
        fake = torch._grouped_mm(a, b, offs=ends)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_experts_in_float32_trace_with_their_products() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, 32))

        def forward(self, x: Tensor) -> Tensor:
            expert = torch.arange(x.shape[0]).remainder(4).sort().values
            ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
            return torch.nn.functional.grouped_mm(x[expert // 2], self.weight, offs=ends)

    graph = trace(Experts(), (torch.randn(8, 16),))
    assert graph.traced_on == "fake" and graph.flops("forward") == 2 * 8 * 16 * 32
    assert any(op.name.startswith("aten.floor_divide") for op in graph.ops)
