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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import log, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from costmodels.signature import Shape, Signature, is_written, parsed, written

if TYPE_CHECKING:
    from costmodels.ops import OpShape

WIDTH = 1.5  # doublings of one dim
IN_LOGS = WIDTH * log(2)
SAME = 3.0  # weight of the narrow Gaussian, whose width is that of the wide one over the root of ten
ALONE = 0.1
FARTHEST = 1.5  # ln of a measured time over its law beyond which an op is taken for one that was disturbed
UNIT = 2.0**19  # bytes: context in halves of a MiB, see `costmodels.context`
NOTHING = (0, 0, 0, 0)
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]  # prices of 1,407 ops came out within 5e-6 of those by doubles
Group = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """ratios: measured seconds / seconds by its law of every measured op, by `label`."""

    ratios: Mapping[str, float]

    @cached_property
    def groups(self) -> dict[Group, tuple[Singles, Singles]]:
        """What was measured of each kernel's ops with operands of the same ranks: points f4[dims, m], and logarithms of
        their ratios f4[m]."""
        from costmodels.nearest import points_of

        rows: dict[Group, tuple[list[tuple[int, ...]], list[float]]] = {}
        for text, ratio in self.ratios.items():
            kernel, ins, outs, place = _parsed(text)
            numbers, ratios = rows.setdefault(_group(kernel, ins), ([], []))
            numbers.append(_numbers(ins, outs, *place))
            ratios.append(ratio)
        return {
            key: (
                np.ascontiguousarray(points_of(np.array(numbers, float), UNIT, IN_LOGS).T),
                np.clip(np.log(ratios), -FARTHEST, FARTHEST).astype(np.float32),
            )
            for key, (numbers, ratios) in rows.items()
        }

    def factor(self, kernel: str, shape: OpShape) -> tuple[float, float]:
        """How many times its law an op of a `costmodels.ops.kernel_key` takes: where it is, and in full caches."""
        measured = self.groups.get(_group(kernel, shape.in_shapes))
        if measured is None:
            return 1.0, 1.0
        numbers = _numbers(shape.in_shapes, shape.out_shapes, shape.runs, shape.swept, shape.since)
        ratios = _loop()(np.array((numbers,), float), UNIT, IN_LOGS, *measured, SAME, ALONE)
        return ratios.item(0), ratios.item(1)


@cache
def _loop() -> Callable[..., Floats]:
    """The compiled loop, imported when an op first needs it."""
    from costmodels.nearest import mean_ratios

    return mean_ratios


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


def _numbers(ins: Sequence[Shape], outs: Sequence[Shape], runs: int, swept: int, since: int) -> tuple[int, ...]:
    """All elements, the last four dims of three inputs and of the first result, further stretches, and context."""
    elements = 0
    dims: tuple[int, ...] = ()
    for shape in ins:
        each, last = _described(shape)
        elements += each
        if len(dims) < 12:
            dims += last
    if len(ins) < 3:
        dims += NOTHING * (3 - len(ins))
    for shape in outs:
        each, last = _described(shape)
        elements += each
        if len(dims) < 16:
            dims += last
    if not outs:
        dims += NOTHING
    return elements, *dims, max(runs, 1) - 1, swept, since


@lru_cache(maxsize=65536)
def _described(shape: Shape) -> tuple[int, tuple[int, ...]]:
    """Elements (none of a scalar) and the last four dims."""
    return prod(shape) if shape else 0, (*NOTHING[len(shape) :], *shape[-4:])
