"""What the measured ops nearest to an op say of its law.

A law weighs about a dozen features with constants for all ops of a kernel. What it misses (how a kernel blocks its
loops, which caches hold its operands) is alike for ops that are alike. So the price of an op is its law times what the
nearest measured ops of the same kernel took over their law, each weighed by a Gaussian of its distance in log2 of the
dims and of what ran before (Nadaraya 1964, Watson 1964), with one neighbour of ratio 1 that weighs `ALONE`: an op far
from all others keeps its law.

`WIDTH`, `ALONE` and `SIZE` were chosen on calibration's own models and 210 drawn ones, a quarter of them left out at a
time (EPYC, two cores): 14.4 % of laws alone become 11.1 % in the mean over 12,000 float32 ops, 8.1 become 7.1 % by
time, and the steps of these models 5.2 instead of 6.1 % with -0.4 instead of -3.7 % of bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from costmodels.ops import OpShape

WIDTH = 1.5  # doublings of one dim
ALONE = 0.3
SIZE = 2.0  # how much more a doubling of all elements together counts than one of a dim
FARTHEST = 1.5  # ln of a measured time over its law beyond which an op is taken for one that was disturbed
UNIT = 2**19  # bytes: context in halves of a MiB, see `costmodels.context`
Shape = tuple[int, ...]
Group = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """ratios: measured seconds / seconds by its law of every measured op, by `label`."""

    ratios: Mapping[str, float]

    @cached_property
    def groups(self) -> dict[Group, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Points f8[n, dims] and ln of the ratios f8[n] of each kernel's ops with operands of the same ranks."""
        rows: dict[Group, tuple[list[list[float]], list[float]]] = {}
        for text, ratio in self.ratios.items():
            kernel, ins, outs, place = _parsed(text)
            points, logs = rows.setdefault(_group(kernel, ins), ([], []))
            points.append(_point(ins, outs, *place))
            logs.append(float(np.clip(np.log(ratio), -FARTHEST, FARTHEST)))
        return {key: (np.array(points), np.array(logs)) for key, (points, logs) in rows.items()}

    def factors(self, kernel: str, shapes: Sequence[OpShape]) -> NDArray[np.float64]:
        """By how much the times of these ops, all of one `costmodels.ops.kernel_key`, differ from their law: f8[n]."""
        found = np.ones(len(shapes))
        members: dict[Group, list[int]] = {}
        for i, shape in enumerate(shapes):
            members.setdefault(_group(kernel, shape.in_shapes), []).append(i)
        for key, at in members.items():
            if key in self.groups:
                points, logs = self.groups[key]
                ops = [shapes[i] for i in at]
                own = np.array([_point(s.in_shapes, s.out_shapes, s.runs, s.swept, s.since) for s in ops])
                apart = (own**2).sum(1)[:, None] + (points**2).sum(1) - 2 * own @ points.T
                weights = np.exp(-np.maximum(apart, 0.0) / (2 * WIDTH**2))
                found[at] = np.exp(weights @ logs / (weights.sum(1) + ALONE))
        return found


def label(signature: str, shape: OpShape) -> str:
    """An op in its place, as device files name it: `costmodels.ops.signature`, then stretches and context."""
    return f"{signature}@{shape.runs},{shape.swept},{shape.since}"


def is_label(text: str) -> bool:
    """Whether this is what `label` writes."""
    return re.fullmatch(r"[^|]+/\w+\|[\d,;]*\|[\d,;]*@\d+,\d+,\d+", text) is not None


def _parsed(text: str) -> tuple[str, tuple[Shape, ...], tuple[Shape, ...], tuple[int, ...]]:
    """Kernel, shapes of the operands and of the results, stretches and context of a label."""
    signature, _, place = text.rpartition("@")
    kernel, ins, outs = signature.split("|")
    return kernel, _shapes(ins), _shapes(outs), tuple(map(int, place.split(",")))


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(tuple(map(int, s.split(","))) if s else () for s in text.split(";")) if text else ()


def _group(kernel: str, ins: Sequence[Shape]) -> Group:
    return kernel, tuple(len(s) for s in ins[:3] if s)


def _point(ins: Sequence[Shape], outs: Sequence[Shape], runs: int, swept: int, since: int) -> list[float]:
    """All elements, the last four dims of three inputs and of the first result, stretches and context, in log2."""
    dims = [log2(d + 1) for s in (*ins[:3], *((),) * (3 - len(ins[:3])), *(outs[:1] or ((),))) for d in _last_four(s)]
    elements = sum(prod(s) for s in (*ins, *outs) if s)
    return [SIZE * log2(elements + 1), *dims, log2(max(runs, 1)), log2(1 + swept / UNIT), log2(1 + since / UNIT)]


def _last_four(shape: Shape) -> Shape:
    return (0,) * (4 - len(shape[-4:])) + shape[-4:]
