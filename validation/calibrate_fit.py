"""Laws from measured ops: non-negative least squares of relative errors, what each op took over its law, and scores on
the half of the ops that was held out."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from costmodels.device import Law
from costmodels.families import FREE, base_name, family
from costmodels.features import FORMS, extent, features, form_of
from costmodels.neighbours import Neighbours, label
from costmodels.ops import OpShape, kernel_key, law_among, law_second, signature
from costmodels.signature import written

Measured = tuple[OpShape, float]
OWN_SAMPLES = 12  # fewer than this are not enough for coefficients of their own
UNSCORED_ERROR = 0.3  # taken where there are too few ops to hold any out
LEAST_SAMPLES = 3  # fewer distinct shapes than this of one op are priced by the law of its family only
ROUNDS = 12  # of reweighting towards least absolute relative error
FOLDS = 10  # parts of the calibration steps that are predicted from the others
# Of 0, 0.5, 1 and 2: ops of 112 models that pass over memory, a quarter left out at a time, were 7.4, 7.4, 7.3 and
# 7.2 % off by time, and 10.3 % in the mean with each.
WARM = 2.0
# Features that add up to all bytes that an op moves, of the forms that also count those that it meets cold.
PLAIN_BYTES = {
    "rows": ("read", "written"), "reduce": ("read_along", "read_across", "written"), "norm": ("bytes",),
    "stream": ("bytes",),
}  # fmt: skip
FULL_WEIGHT = 2e-4  # seconds from which an op counts fully; shorter ones count less, as they do in a step


def fit_laws(samples: Iterable[Measured]) -> dict[str, Law]:
    """A law per op and dtype, and a pooled law per family and dtype, from measured ops.

    An op with few samples gets a parent's law times one factor: that of the op in float32, else of its family. Their
    errors are those of `fit_ops`; here nothing is held out.
    """
    groups: dict[str, list[Measured]] = {}
    for shape, seconds in samples:
        if family(shape.name) not in FREE and seconds > 0:
            groups.setdefault(f"{family(shape.name)}:{shape.dtype}", []).append((shape, seconds))
            for key in {f"{base_name(shape.name)}/{shape.dtype}", kernel_key(shape)}:
                groups.setdefault(key, []).append((shape, seconds))
    laws: dict[str, Law] = {}
    # Parents first: pooled before own, float32 before the other dtypes, an op before its variants.
    for key in sorted(groups, key=lambda k: (not k.endswith("float32"), ":" not in k, "." in k)):
        members = groups[key]
        if _distinct(members) >= LEAST_SAMPLES or ":" in key or not key.endswith("float32"):
            laws[key] = _law(key, members, _parent(key, members[0][0], laws))
    return laws


def _parent(key: str, shape: OpShape, laws: dict[str, Law]) -> Law | None:
    """The law that a law with few samples is scaled from."""
    kind = key.rpartition(":" if ":" in key else "/")[0]
    pooled = f"{family(shape.name)}:{shape.dtype}"
    plain = f"{base_name(shape.name)}/{shape.dtype}"
    candidates = [f"{kind}{':' if ':' in key else '/'}float32", *([plain] if "." in key else []), pooled]
    found = next((laws[c] for c in candidates if c != key and c in laws), None)
    return found if found is not None and found.form == _form(key, shape) else None


def _form(key: str, shape: OpShape) -> str:
    """The form of the law of this key, which prices ops like this one."""
    return form_of(shape.name, key.rpartition("/")[0].partition(".")[2])


def _law(key: str, members: list[Measured], parent: Law | None) -> Law:
    form = _form(key, members[0][0])
    design = np.array([features(shape, form) for shape, _ in members])
    seconds = np.array([s for _, s in members])
    alone = parent is None or _distinct(members) >= OWN_SAMPLES
    extents = np.array([extent(shape, form) for shape, _ in members])
    return Law(
        key, form, tuple(_coefficients(form, design, seconds, parent, alone).tolist()), tuple(extents.min(0).tolist()),
        tuple(extents.max(0).tolist()), UNSCORED_ERROR, len(members),
    )  # fmt: skip


def _held_out(members: list[Measured]) -> np.ndarray:
    return np.array([zlib.crc32(written(signature(shape)).encode()) % 2 == 0 for shape, _ in members])


def _distinct(members: list[Measured]) -> int:
    return len({signature(shape) for shape, _ in members})


def _coefficients(
    form: str, design: np.ndarray, seconds: np.ndarray, parent: Law | None, alone: bool
) -> np.ndarray:
    if parent is None or alone:
        return _with_cold_bytes(form, design, seconds)
    scale = _weighted_median(seconds / np.maximum(design @ np.array(parent.coefficients), 1e-9), seconds)
    result: np.ndarray = scale * np.array(parent.coefficients)
    return result


def _with_cold_bytes(form: str, design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The fit of a law in which a byte that lies in no cache costs at most (1 + `WARM`) / `WARM` times one that does.

    Where all measured ops of a kind met their bytes cold, nothing else tells the two apart, and a law by cold bytes
    alone fits as well: it took 30 us for an index_select after an op that had touched as many bytes, of 230.
    """
    if form not in PLAIN_BYTES:
        return fit(design, seconds)
    names = FORMS[form]
    cold, plain = names.index("bytes_cold"), [names.index(name) for name in PLAIN_BYTES[form]]
    joined = design.copy()
    joined[:, cold] += WARM * design[:, plain].sum(axis=1)
    coefficients = fit(joined, seconds)
    coefficients[plain] += WARM * coefficients[cold]
    return coefficients


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def fit(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative coefficients with a small mean absolute relative error (iteratively reweighted least squares).

    A feature that is everywhere equal to one before it gets none: where all products are of one matrix, a cost of each
    matrix cannot be told from that of a call, and took 44 times as long for hundreds of small ones."""
    design = design.copy()
    for j in range(1, design.shape[1]):
        if any(np.array_equal(design[:, i], design[:, j]) for i in range(j)):
            design[:, j] = 0.0
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


def fit_ops(samples: Iterable[Measured]) -> tuple[dict[str, Law], Neighbours, dict[str, tuple[float, float, int]]]:
    """Laws with their held-out errors, the neighbours of all measured ops, and the held-out errors by family and dtype:
    mean absolute relative error, the same weighted by seconds, and the number of held-out ops. Half of the ops, by a
    hash of their signatures, are priced by what the other half says; the laws that are returned rest on all."""
    members = [(shape, seconds) for shape, seconds in samples if family(shape.name) not in FREE and seconds > 0]
    held_out = _held_out(members)
    half = [m for m, held in zip(members, held_out) if not held]
    tested = [m for m, held in zip(members, held_out) if held]
    by_law: dict[str, list[float]] = {}
    by_family: dict[str, list[tuple[float, float]]] = {}
    for (shape, seconds), predicted in zip(tested, predictions(half, [shape for shape, _ in tested])):
        if not np.isnan(predicted):
            error = abs(predicted / seconds - 1)
            pooled = f"{family(shape.name)}:{shape.dtype}"
            for key in {kernel_key(shape), f"{base_name(shape.name)}/{shape.dtype}", pooled}:
                by_law.setdefault(key, []).append(error)
            by_family.setdefault(pooled.replace(":", "/"), []).append((error, seconds))
    laws = fit_laws(members)
    errors = {key: min(float(np.mean(found)), 1.0) for key, found in by_law.items()}
    scored = {key: replace(law, error=errors.get(key, UNSCORED_ERROR)) for key, law in laws.items()}
    return scored, neighbours_of(members, laws), {key: _scores(np.array(rows)) for key, rows in by_family.items()}


def neighbours_of(members: Sequence[Measured], laws: Mapping[str, Law]) -> Neighbours:
    """What each measured op took over what its law says."""
    ratios = {}
    for shape, seconds in members:
        law = law_among(laws, shape)
        by_law = float(np.dot(features(shape, law.form), law.coefficients)) if law else 0.0
        if by_law > 0:
            ratios[label(signature(shape), shape)] = seconds / by_law
    return Neighbours(ratios)


def predictions(members: Sequence[Measured], shapes: Sequence[OpShape]) -> NDArray[np.float64]:
    """Seconds f8[n] of these ops by what the measured `members` say; nan where they have no law for one."""
    laws = fit_laws(members)
    neighbours = neighbours_of(members, laws)
    found = np.full(len(shapes), np.nan)
    for i, shape in enumerate(shapes):
        kernel = kernel_key(shape)
        if (law := law_among(laws, shape, kernel)) is not None:
            found[i] = law_second(neighbours, law, kernel, shape)
    return found


def step_errors(samples: Sequence[Measured], steps: Mapping[str, tuple[Sequence[OpShape], float]]) -> dict[str, float]:
    """Signed relative error of whole steps (their ops, and the seconds these took), by name, each predicted without any
    op that occurs in it or in the other steps of its tenth."""
    members = [(shape, seconds) for shape, seconds in samples if family(shape.name) not in FREE and seconds > 0]
    names, found = list(steps), {}
    for part in (names[i::FOLDS] for i in range(FOLDS)):
        counts = {name: Counter(s for s in steps[name][0] if family(s.name) not in FREE) for name in part}
        own = {signature(s) for ops in counts.values() for s in ops}
        shapes = list(dict.fromkeys(s for ops in counts.values() for s in ops))
        rest = [m for m in members if signature(m[0]) not in own]
        each = dict(zip(shapes, predictions(rest, shapes).tolist()))
        for name, ops in counts.items():
            predicted = sum(n * each[shape] for shape, n in ops.items())
            if not np.isnan(predicted):
                found[name] = predicted / steps[name][1] - 1
    return found


def _scores(rows: np.ndarray) -> tuple[float, float, int]:
    return float(rows[:, 0].mean()), float(np.average(rows[:, 0], weights=rows[:, 1])), len(rows)
