"""Work and depth of single operators: counted by hand, against traced graphs, and by the laws that bind them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opgraph.summary import work_and_depth
from opgraph.trace import trace
from opgraph.work import (
    Convolution,
    WorkDepth,
    activation,
    batch_norm,
    brent_bounds,
    direct,
    dot_products,
    fft_1d,
    fft_convolution,
    fully_connected,
    im2col,
    pooling,
    recurrent,
    rnn_cell,
    tree,
    winograd,
)


def counted_sum(terms: int) -> int:
    """Steps of a tree, by doing it."""
    steps = 0
    while terms > 1:
        terms, steps = (terms + 1) // 2, steps + 1
    return steps


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 31, 32, 33, 1000])
def test_trees(terms: int) -> None:
    assert tree(terms) == counted_sum(terms)


def test_products_by_hand() -> None:
    # 2 x 3 times 3 x 4: 8 sums of 3 products; the products at once, then 2 levels
    assert fully_connected(2, 3, 4) == WorkDepth(2 * 2 * 3 * 4, 3) == dot_products(8, 3)
    assert fully_connected(2, 3, 4, "input_gradient") == WorkDepth(48, 3)
    assert fully_connected(2, 3, 4, "weight_gradient") == WorkDepth(48, 2)


def forward_of(module: nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    return work_and_depth(trace(module.requires_grad_(False), inputs, loss=lambda y: y))


def test_traced_operators_agree() -> None:
    found = fully_connected(6, 40, 30)
    assert forward_of(nn.Linear(40, 30, bias=False), torch.randn(6, 40)) == (found.work, found.depth)
    c = Convolution(2, 5, 7, 9, 8, 3, 4)
    x = torch.randn(2, 5, c.input_height, c.input_width)
    assert forward_of(nn.Conv2d(5, 7, (3, 4), bias=False), x) == (direct(c).work, direct(c).depth)
    strided = Convolution(2, 5, 7, 4, 4, 3, 3, stride=2)
    x = torch.randn(2, 5, strided.input_height, strided.input_width)
    assert forward_of(nn.Conv2d(5, 7, 3, 2, bias=False), x)[0] == direct(strided).work
    assert forward_of(nn.ReLU(), torch.randn(6, 40)) == (240, activation(240).depth)


def test_depth_of_backward_and_of_recurrent_layers_in_a_graph() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False)
    graph = trace(conv, (torch.randn(2, 4, 10, 10),), loss=lambda y: y.square().sum())
    from opgraph.summary import depth_of

    backward = next(op for op in graph.ops if "convolution_backward" in op.name)
    c = Convolution(2, 4, 6, 8, 8, 3, 3)
    assert depth_of(backward, graph) == max(direct(c, p).depth for p in ("input_gradient", "weight_gradient"))  # type: ignore[arg-type]
    short, long = (
        work_and_depth(trace(nn.LSTM(8, 16).requires_grad_(False), (torch.randn(n, 2, 8),), loss=lambda y: y[0]))
        for n in (5, 10)
    )
    assert long[1] - short[1] == 5 * rnn_cell(2, 8, 16, 4).depth and long[0] > 1.9 * short[0]


def test_im2col_copies_and_multiplies() -> None:
    c = Convolution(1, 2, 3, 4, 4, 3, 3)
    assert im2col(c) == WorkDepth(direct(c).work + 16 * 2 * 9, direct(c).depth + 1)


def test_a_transform_by_hand() -> None:
    assert fft_1d(2) == WorkDepth(10, 3)  # one butterfly: a complex product (6) and two complex additions (4)
    assert fft_1d(8) == WorkDepth(3 * 4 * 10, 9) and fft_1d(5) == fft_1d(8)


def test_winograds_products_are_fewer_by_the_published_factor() -> None:
    """F(2x2, 3x3) takes 16 products for 36, F(4x4, 3x3) 36 for 144 (Lavin and Gray 2016); transforms grow slower."""
    c = Convolution(8, 512, 512, 24, 24, 3, 3)
    for tile, factor in ((2, 2.25), (4, 4.0)):
        assert direct(c).work / winograd(c, tile).work == pytest.approx(factor, rel=0.15)
        assert winograd(c, tile).work > direct(c).work / factor  # transforms are on top
    assert winograd(c).depth > direct(c).depth - 10
    with pytest.raises(ValueError, match="square kernel"):
        winograd(Convolution(1, 1, 1, 4, 4, 3, 5))


def test_fft_wins_for_large_kernels_only() -> None:
    small, large = (Convolution(8, 64, 64, 56 - k + 1, 56 - k + 1, k, k) for k in (1, 13))
    assert fft_convolution(small).work > direct(small).work
    assert fft_convolution(large).work < direct(large).work


def test_the_others_by_hand() -> None:
    assert pooling(2, 3, 4, 4, 2) == WorkDepth(2 * 3 * 16 * 3, 2)
    assert batch_norm(2, 3, 4, 4) == WorkDepth(3 * (7 * 32 + 5), 2 * (5 + 1) + 8)
    one = rnn_cell(1, 3, 5, 4)
    assert one == WorkDepth(2 * 20 * 8 + 20 * 2 + 25, 3 + 1 + 2 + 4)
    assert recurrent(1, 3, 5, 10, gates=4) == WorkDepth(10 * one.work, 10 * one.depth)
    two = recurrent(1, 3, 5, 10, layers=2, gates=4)
    above = rnn_cell(1, 5, 5, 4)
    assert two.depth == one.depth + 10 * above.depth  # the deeper layer carries the chain
    with pytest.raises(ValueError, match="no cell of 2 gates"):
        rnn_cell(1, 1, 1, 2)


def test_brents_bounds() -> None:
    layer = fully_connected(32, 1024, 1024)
    assert layer.parallelism == layer.work / 11
    assert brent_bounds(layer.work, layer.depth, 1) == (layer.work, layer.work)
    for p in (2, 7, 1000, 10**9):
        low, high = brent_bounds(layer.work, layer.depth, p)
        assert max(layer.work / p, layer.depth) == low <= high <= low * 2
    with pytest.raises(ValueError, match="give 1 or more"):
        brent_bounds(10, 2, 0)


def test_composition() -> None:
    a, b = WorkDepth(10, 2), WorkDepth(6, 3)
    assert a.then(b) == WorkDepth(16, 5) and a.beside(b) == WorkDepth(16, 3) and a.repeated(4) == WorkDepth(40, 2)
