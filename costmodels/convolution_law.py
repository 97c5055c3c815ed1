"""Seconds of a convolution by each algorithm that a library may choose, and the choice: the fastest one that applies.

* implicit GEMM: one product of batch x pixels by filters over channels x taps, in tiles that fill the units in waves.
* Winograd F(2x2,3x3), fused: 2.25 times fewer multiplications; transforms in registers, no workspace.
* Winograd F(4x4,3x3), in steps: 4 times fewer; input, filters and output pass through memory transformed (workspace).
* FFT, in overlapping tiles of 32x32: few multiplications for any filter, much traffic.
* direct: convolutions with few channels per group (depthwise), bound by what they move.

Counts of multiplications: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016. A convolution
is a row of numbers, the fields of `Conv` (`conv_shapes.rows_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from costmodels.compiled import compiled
from costmodels.conv_shapes import Conv

Array = NDArray[np.float64]
Algorithm = Literal["implicit_gemm", "winograd", "winograd_fused", "fft", "direct"]
ALGORITHMS: tuple[Algorithm, ...] = ("implicit_gemm", "winograd", "winograd_fused", "fft", "direct")
IMPLICIT, WINOGRAD, FUSED, FFT, DIRECT = range(len(ALGORITHMS))

LAUNCH = 2e-6  # s a kernel, as in `costmodels.rowwise`
KERNELS = (1, 4, 2, 4, 1)  # launches of each algorithm

# ASSUMPTIONS. Gradients of the weights reach this share of the forward rate (their sum runs over batch x pixels and is
# split over blocks).
WEIGHT_GRADIENT_SHARE = 0.85
SPLIT_DEPTH = 256  # least depth of a part of a split sum
DIRECT_STREAM, DIRECT_RATE = 0.5, 0.25  # shares of bandwidth and of the fp32 rate of depthwise kernels
FFT_TILES = (16, 32)
# cuDNN's heuristic takes FFT where its predicted time is below half of the others': chosen on the fitting halves of all
# five devices from 0.5 to 8 for agreement with the table's algorithms.
FFT_WEIGHT = 2.0
# Filters beyond 3x3 are in no table, and counts of multiplications alone would make 7x7 four to six times as fast as
# the peak. No more is claimed of them than was measured of FFT with 3x3: the largest rate over the data sheet's, in
# FLOP of a direct convolution, of 207 rows on five devices (A100: 1.82; P100 1.77, V100 1.36).
FFT_SIDE, FFT_MOST = 3, 1.82

# Constants by kind of kernel. The first is a share of the peak; a kind whose first is missing is not run. The shares of
# the rate in `_tiles` are lists, of the tiles after the first.
IMPLICIT_CONSTANTS = (
    "implicit_rate", "implicit_smooth", "implicit_depth", "implicit_in", "implicit_out", "implicit_weight",
    "implicit_tiles",
)  # fmt: skip
PRODUCT_CONSTANTS = (
    "product_rate", "product_smooth", "product_depth", "tile_in", "tile_out", "tile_weight", "product_tiles",
)  # fmt: skip
FUSED_CONSTANTS = ("fused_rate", "fused_smooth", "fused_narrow", "fused_depth", "fused_stream")
TILES = (  # of implicit GEMM, of the products between transforms
    ((128, 128), (128, 64), (64, 64), (128, 32)),
    ((128, 128), (128, 64), (64, 64), (32, 32)),
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the law needs of a device for one dtype: units, FLOP/s of one unit, bytes/s, bytes of an element, FLOP/s of
    all units outside tensor cores, the multiple in which channels are taken, the exponent with which implicit GEMM's
    compute and memory overlap (1: their sum), and the share of the peak that products reach over the lender's."""

    units: float
    unit: float
    bandwidth: float
    size: float
    plain: float
    multiple: float
    overlap: float = 1.0
    reached: float = 1.0


# Places in what `packed` makes: the constants of the two kinds of product, those of the fused kernel, the hardware.
_RATE, _SMOOTH, _DEPTH, _IN, _OUT, _WEIGHTS, _SHARES = range(7)  # of a kind of product; its shares are the last
_EACH = _SHARES + len(TILES[0]) - 1
_PRODUCTS = _EACH  # where those between transforms begin
(
    _FUSED_RATE, _FUSED_SMOOTH, _FUSED_NARROW, _FUSED_DEPTH, _FUSED_STREAM,
    _UNITS, _UNIT, _BANDWIDTH, _SIZE, _PLAIN, _MULTIPLE,
    _OVERLAP, _REACHED,
) = range(2 * _EACH, 2 * _EACH + len(FUSED_CONSTANTS) + len(fields(Hardware)))  # fmt: skip

# Places in the row of a convolution.
(
    _BATCH, _CHANNELS, _FILTERS, _GROUPS, _IN_PIXELS, _OUT_PIXELS, _TAPS, _SIDE, _HEIGHT, _WIDTH, _UNIT_STRIDE,
    _WINOGRAD, _WEIGHT,
) = range(len(Conv._fields))  # fmt: skip


def packed(constants: Mapping[str, Any], hardware: Hardware) -> Array:
    """Constants and hardware as the compiled law takes them."""
    numbers: list[float] = []
    kinds = ((IMPLICIT_CONSTANTS, _EACH), (PRODUCT_CONSTANTS, _EACH), (FUSED_CONSTANTS, len(FUSED_CONSTANTS)))
    for names, places in kinds:
        if names[0] in constants:
            *plain, last = (constants[name] for name in names)
            kind = [*plain, *last] if isinstance(last, list | tuple) else [*plain, last]
            if len(kind) != places:
                raise ValueError(f"{len(kind)} constants {', '.join(names)}; the law needs {places}")
            numbers += kind
        else:
            numbers += [np.nan] * places
    return np.array([*numbers, *astuple(hardware)], float)


@compiled
def by_algorithm(p: Array, rows: Array) -> Array:
    """Device seconds by algorithm (rows as in `ALGORITHMS`, infinite where one does not apply) and convolution; `p` as
    `packed` makes it."""
    found = np.empty((len(KERNELS), len(rows)))
    for i in range(len(rows)):
        empty = rows[i, : _TAPS + 1].min() == 0  # nothing to compute: implicit GEMM's launch
        for algorithm in range(len(KERNELS)):
            seconds = (0.0 if algorithm == IMPLICIT else np.inf) if empty else _seconds(p, algorithm, rows[i])
            found[algorithm, i] = seconds + LAUNCH * KERNELS[algorithm]
    return found


@compiled
def kernel_seconds(p: Array, algorithm: int, rows: Array) -> Array:
    """The same by one algorithm, without its launches."""
    found = np.empty(len(rows))
    for i in range(len(rows)):
        found[i] = _seconds(p, algorithm, rows[i])
    return found


@compiled
def chosen(times: Array) -> NDArray[np.int64]:
    """Which algorithm (an index into `ALGORITHMS`) is taken, by the seconds of each: the fastest, FFT reluctantly."""
    found = np.empty(times.shape[1], np.int64)
    for i in range(times.shape[1]):
        best, least = 0, np.inf
        for algorithm in range(len(times)):
            seconds = times[algorithm, i] * (FFT_WEIGHT if algorithm == FFT else 1.0)
            if seconds < least:
                best, least = algorithm, seconds
        found[i] = best
    return found


@compiled
def fastest(p: Array, rows: Array) -> Array:
    """Device seconds of convolutions by the algorithm that is taken, FFT no faster than `FFT_MOST` says."""
    times = by_algorithm(p, rows)
    which, found = chosen(times), np.empty(len(rows))
    for i in range(len(rows)):
        found[i] = times[which[i], i]
        if which[i] == FFT and rows[i, _SIDE] > FFT_SIDE:
            c = rows[i]
            direct = 2.0 * c[_BATCH] * c[_OUT_PIXELS] * c[_FILTERS] * c[_CHANNELS] * c[_TAPS]
            found[i] = max(found[i], direct / (FFT_MOST * p[_REACHED] * p[_UNIT] * p[_UNITS]))
    return found


@compiled
def _seconds(p: Array, algorithm: int, c: Array) -> float:
    if algorithm == IMPLICIT:
        return _implicit(p, c)
    if algorithm == WINOGRAD:
        return _winograd(p, c)
    if algorithm == FUSED:
        return _fused(p, c)
    if algorithm == FFT:
        return _fft(p, c)
    return _direct(p, c)


@compiled
def _implicit(p: Array, c: Array) -> float:
    """Implicit GEMM: rows are batch x pixels, columns filters, the sum runs over channels x taps; for a gradient of
    weights rows are channels x taps and the sum runs over batch x pixels. Tensor cores take channels in a multiple."""
    if np.isnan(p[_RATE]):
        return np.inf
    pixels, inner = c[_BATCH] * c[_OUT_PIXELS], np.ceil(c[_CHANNELS] / p[_MULTIPLE]) * p[_MULTIPLE] * c[_TAPS]
    compute = _summed(p, 0, pixels, c[_FILTERS], inner, c[_GROUPS], c[_WEIGHT] > 0)
    # fitted rates may exceed the data sheet's, whose clock some boards pass (V100: 1.16); no prediction counts on that
    compute = max(compute, 2.0 * pixels * c[_FILTERS] * inner * c[_GROUPS] / (p[_UNIT] * p[_UNITS]))
    read, weights = c[_BATCH] * c[_IN_PIXELS] * c[_CHANNELS], c[_CHANNELS] * c[_FILTERS] * c[_TAPS]
    memory = _moved(p, 0, read, pixels * c[_FILTERS], weights, c[_GROUPS])
    if p[_OVERLAP] == 1 or min(compute, memory) <= 0:
        return compute + memory
    larger, smaller = max(compute, memory), min(compute, memory)
    return larger * (1 + (smaller / larger) ** p[_OVERLAP]) ** (1 / p[_OVERLAP])


@compiled
def _winograd(p: Array, c: Array) -> float:
    """F(4x4,3x3) in steps: 36 products over the tiles, and the transforms' traffic."""
    if np.isnan(p[_PRODUCTS + _RATE]) or c[_WINOGRAD] == 0:
        return np.inf
    tiles = c[_BATCH] * np.ceil(c[_HEIGHT] / 4) * np.ceil(c[_WIDTH] / 4)
    compute = _summed(p, 1, tiles, c[_FILTERS], c[_CHANNELS], 36.0, c[_WEIGHT] > 0)
    read = c[_BATCH] * c[_IN_PIXELS] * c[_CHANNELS] + 36 * tiles * c[_CHANNELS]
    written = 36 * tiles * c[_FILTERS] + c[_BATCH] * c[_OUT_PIXELS] * c[_FILTERS]
    return compute + _moved(p, 1, read, written, 45 * c[_CHANNELS] * c[_FILTERS], 1.0)


@compiled
def _fused(p: Array, c: Array) -> float:
    """F(2x2,3x3) fused: a block holds 32 tiles and 64 or 32 filters and walks over the channels, eight at a time."""
    if np.isnan(p[_FUSED_RATE]) or c[_WINOGRAD] == 0 or c[_WEIGHT] > 0:
        return np.inf
    tiles = c[_BATCH] * np.ceil(c[_HEIGHT] / 2) * np.ceil(c[_WIDTH] / 2)
    depth = np.ceil(c[_CHANNELS] / 8) * 8 + p[_FUSED_DEPTH]
    best = np.inf
    for filters in (64, 32):
        blocks = np.ceil(c[_FILTERS] / filters) * np.ceil(tiles / 32)
        rate = p[_UNIT] * p[_FUSED_RATE] * (1.0 if filters == 64 else p[_FUSED_NARROW])
        one = 2.0 * 16 * 32 * filters * depth / rate
        best = min(best, _waves(blocks / p[_UNITS], p[_FUSED_SMOOTH]) * one)
    moved = c[_BATCH] * c[_IN_PIXELS] * c[_CHANNELS] + c[_BATCH] * c[_OUT_PIXELS] * c[_FILTERS]
    moved += 25 * c[_CHANNELS] * c[_FILTERS]
    return best + p[_SIZE] * (moved / (p[_FUSED_STREAM] * p[_BANDWIDTH]))


@compiled
def _fft(p: Array, c: Array) -> float:
    """FFT in tiles of 32x32 that overlap by the filter: a complex product per point (8 FLOP), transforms through
    memory. The constants of the Winograd steps serve, which are the same two kinds of kernel. Gradients of weights sum
    over the tiles (cuDNN has `CONVOLUTION_BWD_FILTER_ALGO_FFT` since its third version, `_FFT_TILING` since 5.1)."""
    best = np.inf
    if np.isnan(p[_PRODUCTS + _RATE]) or c[_UNIT_STRIDE] == 0 or c[_SIDE] <= 1 or c[_GROUPS] != 1:
        return best
    rate = p[_UNIT] * p[_PRODUCTS + _RATE]
    for edge in FFT_TILES:
        if c[_SIDE] < edge // 2:
            step = max(edge - (c[_SIDE] - 1), 1.0)
            tiles = c[_BATCH] * np.ceil(c[_HEIGHT] / step) * np.ceil(c[_WIDTH] / step)
            points = float(edge * (edge // 2 + 1))
            if c[_WEIGHT] > 0:
                share = rate * WEIGHT_GRADIENT_SHARE
                compute = _tiled(p, 1, share, c[_CHANNELS], c[_FILTERS], 4 * tiles, points, True)
            else:
                compute = _tiled(p, 1, rate, tiles, c[_FILTERS], 4 * c[_CHANNELS], points, False)
            read, written = 2.0 * points * (tiles * c[_CHANNELS]), 2.0 * points * (tiles * c[_FILTERS])
            weights = 2.0 * points * (c[_CHANNELS] * c[_FILTERS])
            best = min(best, compute + _moved(p, 1, read, written, weights, 1.0))
    return best


@compiled
def _direct(p: Array, c: Array) -> float:
    if c[_GROUPS] <= 1 or c[_CHANNELS] >= 8:
        return np.inf
    maps = c[_BATCH] * (c[_IN_PIXELS] * c[_CHANNELS] + c[_OUT_PIXELS] * c[_FILTERS])
    moved = c[_GROUPS] * (maps + c[_CHANNELS] * c[_FILTERS] * c[_TAPS])
    flops = 2.0 * c[_GROUPS] * c[_BATCH] * c[_OUT_PIXELS] * c[_FILTERS] * c[_CHANNELS] * c[_TAPS]
    return max(moved * p[_SIZE] / (p[_BANDWIDTH] * DIRECT_STREAM), flops / (p[_PLAIN] * DIRECT_RATE))


@compiled
def _summed(p: Array, kind: int, rows: float, columns: float, depth: float, batch: float, weight: bool) -> float:
    """Seconds of the products of a convolution, or of those of its weights' gradient: rows and depth change places, and
    the sum is split."""
    rate = p[_UNIT] * p[kind * _EACH + _RATE]
    if weight:
        return _tiled(p, kind, rate * WEIGHT_GRADIENT_SHARE, depth, columns, rows, batch, True)
    return _tiled(p, kind, rate, rows, columns, depth, batch, False)


@compiled
def _tiled(
    p: Array, kind: int, rate: float, rows: float, columns: float, depth: float, batch: float, split: bool
) -> float:
    """Seconds of a batch of products in the best tile; `rate` is one unit's FLOP/s. Where `split`, the sum is shared
    out until every unit has a part, and the parts are written and added up."""
    at, depth, parts, added, best = kind * _EACH, np.ceil(depth / 8) * 8, 1.0, 0.0, np.inf
    for tile in range(len(TILES[kind])):
        high, wide = TILES[kind][tile]
        share = p[at + _SHARES + tile - 1] if tile > 0 else 1.0
        blocks = batch * np.ceil(rows / high) * np.ceil(columns / wide) / p[_UNITS]
        if split:
            parts = min(max(np.ceil(1 / blocks), 1.0), np.ceil(depth / SPLIT_DEPTH))
            added = parts * batch * rows * columns * (8.0 / p[_BANDWIDTH])
        one = 2.0 * high * wide * (depth / parts + p[at + _DEPTH]) / (rate * share)
        best = min(best, _waves(blocks * parts, p[at + _SMOOTH]) * one + added)
    return best


@compiled
def _waves(waves: float, smooth: float) -> float:
    """Waves that blocks take: whole ones, or (smooth 1) the last one shared out among the units."""
    return (1 - smooth) * np.ceil(waves) + smooth * max(waves, 1.0)


@compiled
def _moved(p: Array, kind: int, read: float, written: float, weights: float, groups: float) -> float:
    """Seconds in which the elements of a kind of product, or of the transforms around it, pass through memory."""
    at, bandwidth = kind * _EACH, p[_BANDWIDTH]
    streams = read / (p[at + _IN] * bandwidth) + written / (p[at + _OUT] * bandwidth)
    return groups * p[_SIZE] * (streams + weights / (p[at + _WEIGHTS] * bandwidth))
