"""Compiled loops and the plain Python that runs where numba is missing say the same."""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from costmodels import gemm_correction, gemm_law, nearest, rowwise
from costmodels.compiled import compiled
from costmodels.device import load_device
from costmodels.gemm import pricing_of

KINDS = ("stream", "norm", "softmax")
DRAW = np.random.default_rng(7)


def plain(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module with every compiled function as it was written, those that others call too."""
    functions = {name: value.py_func for name, value in vars(module).items() if hasattr(value, "py_func")}
    assert functions, "nothing in this module is compiled"
    for name, function in functions.items():
        monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    found = pricing_of(load_device("a100-sxm-80gb" if dtype == "bfloat16" else "t4"), dtype, batched=False)
    assert found is not None and found.correction is not None
    dims = np.exp(DRAW.uniform(0, np.log(20000), (40, 4))).round()
    dims[:, 0] = 1
    fast = [
        gemm_law.fastest(found.law, found.candidates, dims), gemm_law.chosen(found.law, found.candidates, dims),
        gemm_correction.factors_of(found.correction, dims),
    ]  # fmt: skip
    plain(gemm_law, monkeypatch)
    plain(gemm_correction, monkeypatch)
    slow = [
        gemm_law.fastest(found.law, found.candidates, dims), gemm_law.chosen(found.law, found.candidates, dims),
        gemm_correction.factors_of(found.correction, dims),
    ]  # fmt: skip
    for one, other in zip(fast, slow):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_nothing_is_lost_where_candidates_are_passed_over() -> None:
    """A candidate whose parts alone exceed the best so far is not joined: none of those can be the fastest."""
    found = pricing_of(load_device("h100-sxm"), "bfloat16", batched=False)
    assert found is not None
    dims = np.exp(DRAW.uniform(0, np.log(20000), (60, 4))).round()
    every = [
        gemm_law.seconds_in(found.law, found.candidates, np.full(len(dims), j), dims)
        for j in range(found.candidates.shape[1])
    ]
    best = np.min(every, axis=0) + found.constants.floor
    np.testing.assert_allclose(gemm_law.fastest(found.law, found.candidates, dims), best, rtol=1e-12)


def test_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.exp(DRAW.uniform(0, 9, (80, 20))).round()
    points = np.ascontiguousarray(nearest.points_of(numbers, 2.0, 1.5).T)
    asked = np.concatenate((numbers[:5] * 1.5, numbers[:5] * 300))
    asked[::2, -2:] = 0
    logs = DRAW.normal(0, 0.3, 80).astype(np.float32)
    arguments = asked, 2.0, 1.5, points, logs, 3.0, 0.1
    fast = nearest.mean_ratios(*arguments)
    plain(nearest, monkeypatch)
    np.testing.assert_allclose(fast, nearest.mean_ratios(*arguments), rtol=2e-6)
    at = np.log1p(asked / np.array([1.0] * 18 + [2.0] * 2)) / 1.5
    squared = ((at[:, :, None] - points[None]) ** 2).sum(1)
    weights = np.exp(-squared / 2) + 3.0 * np.exp(-squared / 2) ** 10
    exact = np.exp((weights * logs).sum(1) / (weights.sum(1) + 0.1))
    assert np.ptp(exact) > 0.1
    np.testing.assert_allclose(fast[0], exact, rtol=2e-5)
    assert (fast[1, ::2] == fast[0, ::2]).all() and (fast[1, 1:5:2] != fast[0, 1:5:2]).all()


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_device("a100-pcie-80gb")
    work = np.exp(DRAW.uniform(0, 12, (4, 60))).round()
    work[0] *= work[2]
    fast = [rowwise.seconds_of(device.kernels["rowwise"]["float32"], device, kind, work) for kind in KINDS]
    plain(rowwise, monkeypatch)
    for kind, seconds in zip(KINDS, fast):
        again = rowwise.seconds_of(device.kernels["rowwise"]["float32"], device, kind, work)
        np.testing.assert_allclose(seconds, again, rtol=1e-12)


def test_without_numba_functions_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "numba":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    def twice(x: float) -> float:
        return 2 * x

    original = builtins.__import__
    assert hasattr(compiled(twice), "py_func")
    monkeypatch.setattr(builtins, "__import__", missing)
    assert compiled(twice) is twice and compiled(twice, fastmath={"contract"})(2.0) == 4.0
