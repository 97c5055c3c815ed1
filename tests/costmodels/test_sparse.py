"""Sparse products: published speed-ups and crossovers, growth with density, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.device import load_device
from costmodels.sparse import Sparse, crossover, dense_seconds, sparse_price, sparse_seconds

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
