"""Slowdown of compute beside communication."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import costmodels.contention as contention
from costmodels.contention import (
    memory_demand,
    memory_slowdown,
    overlap_slowdown,
    overlapped,
    power_slowdown,
    wave_slowdown,
    waves,
)


def test_a_second_wave_appears_when_units_are_taken() -> None:
    """NVIDIA forum 337991: a GEMM of 132 blocks beside an all-gather on 24 units fell from 80 to 47 % of the peak."""
    slowdown = wave_slowdown(132, 132, 24)
    assert slowdown == 2.0 and 0.80 / slowdown == pytest.approx(0.47, abs=0.08)
    assert wave_slowdown(108, 132, 24) == 1.0
    assert wave_slowdown(132 * 40, 132, 20) == pytest.approx(132 / 112, rel=0.03), "many waves: the share of units"
    assert waves(133, 132) == 2 and waves(264, 132, per_unit=2) == 1


def test_memory_is_shared_only_when_it_is_short() -> None:
    assert memory_slowdown(2e12, 0.5e12, 3e12) == 1.0
    assert memory_slowdown(3e12, 0.6e12, 3e12) == pytest.approx(3 / 2.4)
    assert memory_slowdown(3e12, 2.9e12, 3e12) == pytest.approx(2.0), "nobody is pushed below half"
    assert memory_slowdown(1e12, 9e12, 3e12) == 1.0
    assert memory_demand("all_reduce", 1e9, 1e-2) == pytest.approx(2.5e11)


def test_power_lowers_the_clock_by_the_cube_root() -> None:
    assert power_slowdown(600, 50, 700) == 1.0
    assert power_slowdown(700, 100, 700) == pytest.approx((7 / 6) ** (1 / 3))


def test_overlap_takes_the_work_that_is_done_meanwhile() -> None:
    assert overlapped(10.0, 4.0, 1.0) == (10.0, 0.0)
    assert overlapped(10.0, 4.0, 2.0) == (12.0, 0.0)
    assert overlapped(1.0, 4.0, 2.0) == (4.0, 2.0)
    with pytest.raises(ValueError, match="speed-up"):
        overlapped(1.0, 1.0, 0.5)


whole = st.integers(1, 2000)
rate = st.floats(1e9, 1e13)


@given(whole, st.integers(1, 200), st.integers(0, 150), rate, rate, rate)
def test_slowdowns_are_never_speed_ups_and_grow(
    blocks: int, units: int, taken: int, kernel: float, other: float, bandwidth: float
) -> None:
    assert 1 <= wave_slowdown(blocks, units, taken) <= wave_slowdown(blocks, units, taken + 1)
    assert 1 <= memory_slowdown(kernel, other, bandwidth) <= memory_slowdown(kernel, 2 * other, bandwidth) + 1e-12
    both = overlap_slowdown(blocks, units, taken, kernel, other, bandwidth)
    assert both >= wave_slowdown(blocks, units, taken)


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(1.0, 3.0))
def test_overlap_lies_between_the_longer_and_the_sum_slowed(compute: float, message: float, slowdown: float) -> None:
    seconds, exposed = overlapped(compute, message, slowdown)
    assert max(compute, message) <= seconds * (1 + 1e-12) and seconds <= compute * slowdown + message
    assert 0 <= exposed <= message


def test_user_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="units"):
        waves(1, 0)
    with pytest.raises(ValueError, match="scan"):
        memory_demand("scan", 1.0, 1.0)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(contention).failed == 0
