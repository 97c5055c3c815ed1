"""What the fits of kernel laws share: halves by hash, robust fits of positive constants, scores, sections."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from costmodels import tomlfile
from costmodels.device import CATALOGUE

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Constants of one law, dtype and device, and how they do on the half of the shapes that the fit did not see.

    device: file stem in the catalogue. data: which table. rows: all rows of it that the law is about. predicted,
    measured: seconds of the held-out rows; kinds: what each of them is (op, algorithm, head dim), for the report.
    again: seconds of the same rows with the constants of another device, what is the table's own (its host, its cache)
    kept. extra: further scores.
    """

    device: str
    law: str
    dtype: str
    constants: dict[str, Any]
    data: str
    rows: int
    predicted: Array
    measured: Array
    kinds: NDArray[np.str_]
    again: Callable[[Mapping[str, Any]], Array]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> Array:
        """Signed relative errors of the held-out rows."""
        return self.predicted / self.measured - 1


def held_out(*columns: Iterable[Any]) -> Flags:
    """Which rows are scored: half of all shapes, by a hash of the shape, so that equal shapes stay together on every
    device and in every run."""
    digests = (hashlib.sha256("/".join(map(str, row)).encode()).digest()[0] for row in zip(*columns))
    return np.array([d % 2 == 1 for d in digests])


def score(errors: Array) -> dict[str, float]:
    """n, mean, median and 90th percentile of the absolute errors, worst, and bias (mean signed error)."""
    size = np.abs(errors)
    return {
        "n": len(errors), "mean": float(size.mean()), "median": float(np.median(size)),
        "p90": float(np.quantile(size, 0.9)), "worst": float(size.max()), "bias": float(errors.mean()),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant to fit: its start, and whether it is a share (between 0 and 1) or any positive number."""

    name: str
    start: float
    share: bool = False


def fit_constants(
    constants: Sequence[Constant], seconds: Callable[[dict[str, float]], Array], measured: Array,
    starts: Sequence[Mapping[str, float]] = ({},), relative: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The constants with the least robust error: log ratios, or relative errors where `relative`; errors beyond 15 %
    (10 % if relative) count linearly, so that measurements that went wrong do not lead. The best of several starts."""
    best = None
    # Bounds, not clipping: beyond a clipped value nothing would change, and the search would stop there.
    low = np.array([-7.0 if c.share else -20.0 for c in constants])
    high = np.array([7.0 if c.share else 9.0 for c in constants])
    for start in starts:
        first = np.array([_inverse(c, start.get(c.name, c.start)) for c in constants])

        def residuals(x: Array) -> Array:
            ratio = seconds(values(constants, x)) / measured
            return ratio - 1 if relative else np.log(ratio)

        found = least_squares(residuals, np.clip(first, low + 1e-3, high - 1e-3), bounds=(low, high), loss="soft_l1",
                              f_scale=0.1 if relative else 0.15, max_nfev=150)  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return values(constants, best.x)


def values(constants: Sequence[Constant], x: Array) -> dict[str, float]:
    """Constants from the unbounded numbers that the optimiser moves."""
    return {c.name: float(1 / (1 + np.exp(-v)) if c.share else np.exp(v)) for c, v in zip(constants, x.tolist())}


def _inverse(c: Constant, value: float) -> float:
    return float(np.log(value / (1 - value)) if c.share else np.log(value))


def fit_terms(terms: Array, measured: Array, rounds: int = 8) -> Array:
    """Non-negative weights of `terms` (a row each) with the least absolute relative error (reweighted squares)."""
    weight = np.ones(len(measured))
    found = np.zeros(len(terms))
    for _ in range(rounds):
        scaled = terms * (weight / measured)
        found = nnls(scaled.T, weight)[0]
        errors = found @ terms / measured - 1
        weight = 1 / np.sqrt(np.maximum(np.abs(errors), 0.02))
    return found


def write_sections(fits: Iterable[Fitted]) -> None:
    """Put each fit's constants into `costmodels/catalogue/kernels/<device>.toml`; other sections stay as they are."""
    for fit in fits:
        path = CATALOGUE / "kernels" / f"{fit.device}.toml"
        content = tomlfile.read_toml(path) if path.is_file() else {}
        about = {
            "data": fit.data, "rows": fit.rows, "held_out": len(fit.measured),
            "error": float(np.abs(fit.errors).mean()),
        }  # fmt: skip
        content.setdefault(fit.law, {})[fit.dtype] = {**about, **fit.constants}
        tomlfile.write_toml(path, content)
