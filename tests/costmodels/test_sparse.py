"""Sparse products: published speed-ups and crossovers, growth with density, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.device import load_device
from costmodels.sparse import (
    Sparse,
    crossover,
    dense_seconds,
    has_two_of_four,
    runs_as_two_of_four,
    sparse_price,
    sparse_seconds,
)

A100, V100 = load_device("a100-sxm-80gb"), load_device("v100-pcie-32gb")


def test_two_of_four_gains_what_is_published_on_large_products_and_nothing_on_tiny_ones() -> None:
    large = Sparse(8192, 8192, 8192, 0.5, pattern=(2, 4))
    assert 1.5 < dense_seconds(A100, large) / sparse_price(A100, large).seconds < 1.8
    tiny = Sparse(16, 16, 16, 0.5, pattern=(2, 4))
    assert dense_seconds(A100, tiny) / sparse_price(A100, tiny).seconds < 1.5


def test_crossovers_are_where_they_are_published() -> None:
    """70 to 80 % zeros in fp32, 95 % or more against tensor cores (shared/facts/compute.md B5)."""
    assert 0.15 < crossover(V100, 4096, 4096, 4096, "float32") < 0.35
    assert 0.0 < crossover(A100, 4096, 4096, 4096, "bfloat16") < 0.05


def test_blocks_gain_almost_what_they_leave_out() -> None:
    blocked = Sparse(16384, 16384, 4096, 0.05, block=32)
    assert 10 < dense_seconds(A100, blocked) / sparse_price(A100, blocked).seconds < 17


@given(density=st.floats(0.001, 0.9), more=st.floats(0.001, 0.1), block=st.sampled_from([1, 32]))
def test_more_values_cost_no_less_and_never_more_than_dense(density: float, more: float, block: int) -> None:
    few, many = (Sparse(2048, 1024, 2048, d, block=block) for d in (density, density + more))
    assert 0 < sparse_seconds(A100, few) <= sparse_seconds(A100, many)
    assert sparse_price(A100, many).seconds <= dense_seconds(A100, many)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_densities_that_are_none(density: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Sparse(8, 8, 8, density)


def test_a_pattern_and_its_density_agree() -> None:
    with pytest.raises(ValueError, match=r"density 0\.5"):
        Sparse(8, 8, 8, 0.25, pattern=(2, 4))


@pytest.mark.parametrize(
    ("name", "dtype", "has"),
    [
        ("a100-sxm-80gb", "bfloat16", True), ("a40", "float16", True), ("l4", "float8_e4m3fn", True),
        ("rtx-4090", "tf32", True), ("h100-sxm", "int8", True), ("gb10", "bfloat16", True), ("mi300x", "float16", True),
        ("v100-sxm2-16gb", "float16", False), ("t4", "float16", False), ("h100-sxm", "float32", False),
        ("h100-sxm", "float64", False), ("a100-sxm-80gb", "float8_e4m3fn", False), ("mi250x", "bfloat16", False),
        ("tpu-v4", "bfloat16", False), ("gaudi2", "bfloat16", False), ("apple-m4-max", "float16", False),
        ("max-1550", "bfloat16", False), ("trainium2", "bfloat16", False),
    ],
)  # fmt: skip
def test_only_sparse_units_gain_by_two_of_four(name: str, dtype: str, has: bool) -> None:
    device = load_device(name)
    assert has_two_of_four(device, dtype) == has
    if dtype in ("float16", "bfloat16", "float32"):
        large = Sparse(4096, 4096, 4096, 0.5, dtype, pattern=(2, 4))
        found = sparse_price(device, large)
        assert (dense_seconds(device, large) / found.seconds > 1.5) == has
        assert bool(found.note) != has and (has or found.seconds == dense_seconds(device, large))


@pytest.mark.parametrize(
    ("pattern", "gains"),
    [((2, 4), True), ((1, 4), True), ((1, 2), True), ((2, 8), True), ((4, 8), False), ((3, 4), False)],
)
def test_patterns_that_leave_more_than_two_of_four_gain_nothing(pattern: tuple[int, int], gains: bool) -> None:
    assert runs_as_two_of_four(A100, Sparse(64, 64, 64, pattern[0] / pattern[1], pattern=pattern)) == gains


def test_a_product_bound_by_its_dense_operand_gains_nothing() -> None:
    thin = Sparse(16, 4096, 4096, 0.5, pattern=(2, 4))  # 33.5 of 33.8 MB are the dense matrix
    assert sparse_price(A100, thin).seconds > 0.98 * dense_seconds(A100, thin)
    flat = Sparse(4096, 16, 4096, 0.5, pattern=(2, 4))  # here they are the sparse one: 9/16 of its bytes are left
    assert 1.2 < dense_seconds(A100, flat) / sparse_price(A100, flat).seconds < 1.7
