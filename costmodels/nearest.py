"""The compiled loop of `costmodels.neighbours`: a file of its own, as those who load a device need no numba."""

from __future__ import annotations

from functools import partial
from math import e, log2

import numpy as np
from numpy.typing import NDArray

from costmodels.compiled import compiled

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

# 2 ** x for x in [0, 1), as a polynomial through its values at Chebyshev's nodes: off by less than 2e-7, what single
# precision tells. A library's exp is no vector code, and the exponentials were three quarters of the loop.
_NODES = 0.5 - 0.5 * np.cos(np.pi * (np.arange(7) + 0.5) / 7)
POWERS = tuple(np.float32(c) for c in np.linalg.solve(np.vander(_NODES), 2.0**_NODES))
HALF = np.float32(-log2(e) / 2)  # of a squared distance to a weight's power of two
LEAST = np.float32(-100.0)  # powers of two below are taken for it
NARROWEST = np.float32(2.0**-12)  # its tenth power is no denormal, which would take five times as long
BIAS, MANTISSA = np.int32(127), np.int32(23)  # of single precision


@compiled
def points_of(numbers: Floats, unit: float, width: float) -> Singles:
    """Logarithms of the numbers f8[n, dims] in widths, as distances count them; the last two dims, what ran before, go
    by the `unit`."""
    points = np.empty(numbers.shape, np.float32)
    context = numbers.shape[1] - 2
    for i in range(len(numbers)):
        for d in range(numbers.shape[1]):
            points[i, d] = np.log1p(numbers[i, d] / (unit if d >= context else 1.0)) / width
    return points


@partial(compiled, fastmath={"reassoc", "contract", "nsz"})
def mean_ratios(
    numbers: Floats, unit: float, width: float, points: Singles, logs: Singles, same: float, alone: float
) -> Floats:
    """The weighed geometric mean f8[2, n] of the ratios (`logs` f4[m]) measured at `points` f4[dims, m] around each op
    of `numbers` f8[n, dims], as `points_of` places it: where it is, and with what ran before at 0."""
    found, at = np.empty((2, len(numbers))), points_of(numbers, unit, width)
    dims, many, often = points.shape[0] - 2, points.shape[1], np.float32(same)
    apart, fractions, powers = np.empty(many, np.float32), np.empty(many, np.float32), np.empty(many, np.int32)
    scales = powers.view(np.float32)
    for i in range(len(at)):
        apart[:] = 0
        for d in range(dims):
            x = at[i, d]
            for j in range(many):
                apart[j] += (points[d, j] - x) * (points[d, j] - x)
        for full in range(2):
            swept, since = at[i, dims], at[i, dims + 1]
            if full:
                if swept == 0 and since == 0:
                    found[1, i] = found[0, i]
                    continue
                swept = since = np.float32(0)
            for j in range(many):
                before, past = points[dims, j] - swept, points[dims + 1, j] - since
                power = max((apart[j] + before * before + past * past) * HALF, LEAST)
                whole = np.floor(power)
                powers[j] = (np.int32(whole) + BIAS) << MANTISSA
                x = power - whole
                value = POWERS[0]
                for c in POWERS[1:]:
                    value = value * x + c
                fractions[j] = value
            total = weighed = np.float32(0)
            for j in range(many):
                weight = fractions[j] * scales[j]
                narrow = max(weight, NARROWEST)
                fifth = narrow * narrow
                fifth *= fifth * narrow
                weight += often * fifth * fifth
                total += weight
                weighed += weight * logs[j]
            found[full, i] = np.exp(weighed / (total + alone))
    return found
