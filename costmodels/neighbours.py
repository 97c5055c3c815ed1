"""What the measured ops nearest to an op say of its law.

A law weighs about a dozen features with constants for all ops of a kernel. What it misses (how a kernel blocks its
loops, which caches hold its operands) is alike for ops that are alike. So the price of an op is its law times what the
nearest measured ops of the same kernel took over their law, each weighed by a Gaussian of its distance in log2 of the
dims and of what ran before (Nadaraya 1964, Watson 1964), with one neighbour of ratio 1 that weighs `ALONE`: an op far
from all others keeps its law. A second, narrow Gaussian lets what is all but the same op count four times (ops of 112
models, a quarter left out at a time, that other models had in the same place: 10.4 % become 9.3; others within 0.1).

`WIDTH` and `ALONE` were chosen on calibration's own models and drawn ones, a quarter of them left out at a time. An
EPYC, 262 models: 14.4 % of laws alone become 11.1 % in the mean over 12,000 float32 ops, 8.1 become 7.1 % by time. A
Xeon, 112 models, with the laws and both Gaussians of now: 9.6 % in the mean over 5,500 ops, 7.3 % by time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from costmodels.signature import Shape, Signature, is_written, parsed, written

if TYPE_CHECKING:
    from costmodels.ops import OpShape

WIDTH = 1.5  # doublings of one dim
SAME = 3.0  # weight of the narrow Gaussian, whose width is that of the wide one over the root of ten
ALONE = 0.1
LEAST = -80.0  # logarithm of the least weight: from -88 on exp makes denormals, up to 7 times as slow (measured)
NARROWEST = np.float32(exp(LEAST / 10))
AT_ONCE = 8192  # weights: they stay in a cache, and so small a product gets no second thread from BLAS
FARTHEST = 1.5  # ln of a measured time over its law beyond which an op is taken for one that was disturbed
UNIT = 2**19  # bytes: context in halves of a MiB, see `costmodels.context`
CONTEXT = slice(18, 20)  # of a point
NOTHING = (0, 0, 0, 0)
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]  # prices of 1,407 ops came out within 5e-6 of those by doubles
Group = tuple[str, tuple[int, ...]]
_Measured = tuple[Singles, Singles, Singles]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """ratios: measured seconds / seconds by its law of every measured op, by `label`."""

    ratios: Mapping[str, float]

    @cached_property
    def groups(self) -> dict[Group, _Measured]:
        """What was measured of each kernel's ops with operands of the same ranks."""
        rows: dict[Group, tuple[list[list[int]], list[float]]] = {}
        for text, ratio in self.ratios.items():
            kernel, ins, outs, place = _parsed(text)
            numbers, ratios = rows.setdefault(_group(kernel, ins), ([], []))
            numbers.append(_numbers(ins, outs, *place))
            ratios.append(ratio)
        clipped = {key: np.clip(np.log(ratios), -FARTHEST, FARTHEST) for key, (_, ratios) in rows.items()}
        return {key: _measured(_points(numbers), clipped[key]) for key, (numbers, _) in rows.items()}

    def factors(self, kernel: str, shapes: Sequence[OpShape]) -> Floats:
        """How many times their law ops take that are all of one `costmodels.ops.kernel_key`: f8[2, n], where they are
        and in full caches."""
        found = np.ones((2, len(shapes)))
        members: dict[Group, list[int]] = {}
        for i, shape in enumerate(shapes):
            members.setdefault(_group(kernel, shape.in_shapes), []).append(i)
        for key, at in members.items():
            if measured := self.groups.get(key):
                ops = [shapes[i] for i in at]
                alike: dict[tuple[tuple[Shape, ...], tuple[Shape, ...], int], int] = {}  # in whatever context
                which = [alike.setdefault((s.in_shapes, s.out_shapes, s.runs), len(alike)) for s in ops]
                full = _points([_numbers(*op, 0, 0) for op in alike])
                placed = [i for i, s in enumerate(ops) if s.swept or s.since]
                here = full[[which[i] for i in placed]]
                here[:, CONTEXT] = _context([(ops[i].swept, ops[i].since) for i in placed])
                ratios = _mean_ratio(np.concatenate((full, here)), *measured)
                found[:, at] = ratios[which]
                found[0, [at[i] for i in placed]] = ratios[len(alike) :]
        return found


def _measured(points: Singles, logs: Floats) -> _Measured:
    """Of measured ops at `points`: those with dims first, the halves of their squared lengths, and what is summed."""
    summed = np.column_stack((logs, np.ones(len(logs)))).astype(np.float32)
    return np.ascontiguousarray(points.T), (points**2).sum(1) / 2, summed


def _mean_ratio(at: Singles, points: Singles, halves: Singles, summed: Singles) -> Floats:
    """The weighed geometric mean of the ratios around each point of `at`; the rest as `_measured` gives it."""
    sums = np.empty((len(at), 2), np.float32)
    squares = np.einsum("ij,ij->i", at, at)[:, None] / 2
    rows = max(AT_ONCE // len(halves), 1)
    for first in range(0, len(at), rows):
        part = slice(first, first + rows)
        weights = at[part] @ points  # minus the halves of both squares: minus half of the squared distance
        weights -= halves
        weights -= squares[part]
        np.clip(weights, LEAST, 0.0, out=weights)
        np.exp(weights, out=weights)
        narrow = np.maximum(weights, NARROWEST)  # its tenth power, which is no denormal
        narrow *= narrow
        eighth = narrow * narrow
        eighth *= eighth
        narrow *= eighth
        narrow *= SAME
        weights += narrow
        np.matmul(weights, summed, out=sums[part])
    logs, total = sums.T.astype(float)
    found: Floats = np.exp(logs / (total + ALONE))
    return found


def label(signature: Signature, shape: OpShape) -> str:
    """An op in its place, as device files name it: `costmodels.ops.signature`, then stretches and context."""
    return f"{written(signature)}@{shape.runs},{shape.swept},{shape.since}"


def is_label(text: str) -> bool:
    """Whether this is what `label` writes."""
    signature, _, place = text.rpartition("@")
    return is_written(signature) and re.fullmatch(r"\d+,\d+,\d+", place) is not None


def _parsed(text: str) -> tuple[str, tuple[Shape, ...], tuple[Shape, ...], tuple[int, ...]]:
    """Kernel, shapes of the operands and of the results, stretches and context of a label."""
    signature, _, place = text.rpartition("@")
    return *parsed(signature), tuple(map(int, place.split(",")))


def _group(kernel: str, ins: Sequence[Shape]) -> Group:
    return kernel, tuple([len(s) for s in ins[:3] if s])


def _numbers(ins: Sequence[Shape], outs: Sequence[Shape], runs: int, swept: int, since: int) -> list[int]:
    """All elements, the last four dims of three inputs and of the first result, further stretches, and context."""
    elements = sum([prod(s) for s in ins if s]) + sum([prod(s) for s in outs if s])
    first, second, third, *_ = (*ins, (), (), ()) if len(ins) < 3 else ins
    result = outs[0] if outs else ()
    return [
        elements, *NOTHING[len(first) :], *first[-4:], *NOTHING[len(second) :], *second[-4:], *NOTHING[len(third) :],
        *third[-4:], *NOTHING[len(result) :], *result[-4:], max(runs, 1) - 1, swept, since,
    ]  # fmt: skip


def _points(numbers: Sequence[Sequence[int]]) -> Singles:
    """Their logarithms in widths, as distances count them: f4[n, dims]."""
    points = np.array(numbers, np.float32)
    points[:, CONTEXT] /= UNIT
    return _in_widths(points)


def _context(places: Sequence[tuple[int, int]]) -> Singles:
    """What stands in a point of these `swept` and `since`."""
    return _in_widths(np.array(places, np.float32).reshape(-1, 2) / np.float32(UNIT))


def _in_widths(numbers: Singles) -> Singles:
    np.log1p(numbers, out=numbers)
    numbers /= WIDTH * log(2)
    return numbers
