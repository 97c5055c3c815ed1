"""Laws from measured ops: non-negative least squares of relative errors; half of the ops are held out to score them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
from scipy.optimize import nnls

from costmodels.device import Law
from costmodels.families import FREE, base_name, family
from costmodels.features import extent, features, form_of
from costmodels.ops import OpShape, signature

Measured = tuple[OpShape, float]
LEAST_SAMPLES = 5  # fewer distinct shapes than this of one op are priced by the law of its family only
ROUNDS = 12  # of reweighting towards least absolute relative error
FULL_WEIGHT = 2e-4  # seconds from which an op counts fully; shorter ones count less, as they do in a step


def fit_laws(samples: Iterable[Measured]) -> dict[str, Law]:
    """A law per op and dtype, and a pooled law per family and dtype, from measured ops."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for shape, seconds in samples:
        if family(shape.name) not in FREE and seconds > 0:
            form = form_of(shape.name)
            groups.setdefault((f"{base_name(shape.name)}/{shape.dtype}", form), []).append((shape, seconds))
            groups.setdefault((f"{family(shape.name)}:{shape.dtype}", form), []).append((shape, seconds))
    laws = {}
    for (key, form), members in groups.items():
        if len(members) >= LEAST_SAMPLES or ":" in key:
            laws[key] = _law(key, form, members)
    return laws


def _law(key: str, form: str, members: list[Measured]) -> Law:
    design = np.array([features(shape, form) for shape, _ in members])
    seconds = np.array([s for _, s in members])
    held_out = np.array([zlib.crc32(signature(shape).encode()) % 2 == 0 for shape, _ in members])
    error = 0.0
    if held_out.any() and not held_out.all():
        first = fit(design[~held_out], seconds[~held_out])
        error = float(np.mean(np.abs(design[held_out] @ first / seconds[held_out] - 1)))
    else:
        error = 0.3  # too few ops to hold any out
    extents = np.array([extent(shape, form) for shape, _ in members])
    return Law(
        key, form, tuple(fit(design, seconds).tolist()), tuple(extents.min(0).tolist()),
        tuple(extents.max(0).tolist()), min(error, 1.0), len(members),
    )  # fmt: skip


def fit(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative coefficients with a small mean absolute relative error (iteratively reweighted least squares)."""
    rows = design / seconds[:, None]
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    rows = rows / scale
    base = np.minimum(seconds / FULL_WEIGHT, 1.0) ** 0.25 * (np.maximum(seconds / FULL_WEIGHT, 1.0) ** 0.1)
    weights = base
    coefficients = np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        coefficients, _ = nnls(rows * weights[:, None], weights, maxiter=50 * rows.shape[1])
        weights = base / np.sqrt(np.maximum(np.abs(rows @ coefficients - 1), 0.02))
    result: np.ndarray = coefficients / scale
    return result


def errors_by_family(samples: Iterable[Measured]) -> dict[str, tuple[float, float, int]]:
    """Held-out error of the per-op laws by family and dtype: mean absolute relative error, the same weighted by
    seconds, and the number of held-out ops."""
    groups: dict[str, list[Measured]] = {}
    for shape, seconds in samples:
        if family(shape.name) not in FREE and seconds > 0:
            groups.setdefault(f"{base_name(shape.name)}/{shape.dtype}", []).append((shape, seconds))
    found: dict[str, list[tuple[float, float]]] = {}
    for members in groups.values():
        shape = members[0][0]
        form = form_of(shape.name)
        design = np.array([features(s, form) for s, _ in members])
        seconds_of = np.array([s for _, s in members])
        held = np.array([zlib.crc32(signature(s).encode()) % 2 == 0 for s, _ in members])
        if len(members) < LEAST_SAMPLES or held.all() or not held.any():
            continue
        predicted = design[held] @ fit(design[~held], seconds_of[~held])
        rows = found.setdefault(f"{family(shape.name)}/{shape.dtype}", [])
        rows += list(zip(np.abs(predicted / seconds_of[held] - 1), seconds_of[held]))
    return {key: _scores(np.array(rows)) for key, rows in found.items()}


def _scores(rows: np.ndarray) -> tuple[float, float, int]:
    return float(rows[:, 0].mean()), float(np.average(rows[:, 0], weights=rows[:, 1])), len(rows)
