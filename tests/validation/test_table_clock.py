"""The clock that a table of eager products shows: on tables made at known clocks."""

from __future__ import annotations

import numpy as np
import pytest

from costmodels.device import load_device
from validation.table_clock import clock_scores, paces
from validation.tables_gemm import Table

STEP, LAUNCH = 2e-6, 2e-5  # seconds per 8 of k, and of a launch


def measured(clock: np.ndarray, other: int = 0) -> Table:
    """One row for each clock: 2 matrices of 64 x 64 and k of 400 to 800, then `other` rows of many waves; the least
    time of the table is twice the launch."""
    rows = len(clock)
    dims = np.column_stack([np.full(rows, 2.0), np.full((rows, 2), 64.0), 400.0 + np.arange(rows) % 51 * 8])
    seconds = LAUNCH + STEP * dims[:, 3] / 8 / clock
    many = np.tile([64.0 * load_device("t4").units, 64, 64, 400], (other, 1))
    least = [[1.0, 8, 8, 8]]
    made = np.concatenate([dims, many, least])
    times = np.concatenate([seconds, np.full(other, 1.0), [2 * LAUNCH]])
    return Table("t4", "float32_batched", "random", "made here", made, times, True, ("64x64",) * len(made))


def test_paces_are_the_inverse_of_the_clock_and_leave_out_waves_and_short_rows() -> None:
    clock = np.linspace(0.5, 1.0, 41)
    table = measured(clock, other=5)
    at, pace = paces(table, np.ones(len(table.dims), bool), "64x64")
    assert at.tolist() == list(range(41))
    np.testing.assert_allclose(pace, np.median(clock) / clock, rtol=1e-9)


def test_a_clock_that_changes_once_is_near_to_itself_and_far_apart() -> None:
    clock = np.where(np.arange(800) < 400, 1.0, 0.5)
    (score,) = clock_scores(measured(clock), np.ones(801, bool))
    assert score["n"] == 800
    assert score["near"] == pytest.approx(55 / (10 * 800 - 55) * np.log(2), rel=1e-9)
    # of pairs at least 300 apart, those from one half to the other, all 100 + 99 + ... others within a half
    within = 2 * sum(range(1, 101))
    pairs = sum(range(1, 501))
    assert score["far"] == pytest.approx((pairs - within) / pairs * np.log(2), rel=1e-9)
    assert score["p90"] / score["p10"] == pytest.approx(2.0)


def test_a_steady_clock_shows_none_and_few_rows_say_nothing() -> None:
    (score,) = clock_scores(measured(np.ones(400)), np.ones(401, bool))
    assert [score[name] for name in ("p10", "p90")] == pytest.approx([1, 1])
    assert [score[name] for name in ("near", "far")] == pytest.approx([0, 0], abs=1e-9)
    assert clock_scores(measured(np.ones(29)), np.ones(30, bool)) == []


def test_rows_that_are_not_to_be_looked_at_are_not() -> None:
    table = measured(np.where(np.arange(400) % 2 == 0, 1.0, 0.5))
    inside = np.arange(401) % 2 == 0
    at, pace = paces(table, inside, "64x64")
    assert at.tolist() == list(range(0, 400, 2))
    assert pace == pytest.approx(1.0)
