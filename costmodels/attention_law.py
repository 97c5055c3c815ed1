"""The law of attention kernels, compiled: flash kernels by their tiles, decoding by bytes, unfused attention by parts.

A flash kernel gives each tile of 128 queries of one head to a block of threads, which walks over the keys in steps of
64 (a section may state other tiles); under a causal mask it stops at the diagonal. Its time is the launch, plus the
work of all blocks shared out among the units, joined (a norm) with the longest block, which nothing can shorten but a
split over the keys, and with the memory's time for what exceeds the last cache. What a tile costs beyond its steps
(loading queries, storing results) does not overlap with them.

A call is a row of numbers, `FIELDS`; a law is packed once for all calls of a device and dtype. Where its constants come
from: `costmodels.attention`. Backward passes, unfused attention and head dims of no table are ASSUMPTIONS, named below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodels.compiled import compiled
from costmodels.device import Device
from costmodels.ops import peak_of

Array = NDArray[np.float64]

TILE_ROWS, STEP_KEYS = 128, 64  # where a section states no `tile_rows`, `tile_keys`
SPLITS = (2.0, 4.0, 8.0)  # parts of the keys that a small grid is split over

# Backward passes make 2.5 times the FLOP of the forward (five products for two) at .75 to .85 of its rate, and move
# twice its bytes (shared/facts/compute.md B3; FlashAttention-3 paper, H100, head dim 128: 550 of 648 TFLOP/s).
BACKWARD_FLOPS, BACKWARD_RATE, BACKWARD_BYTES, BACKWARD_LAUNCHES = 2.5, 0.80, 2.0, 2.0
# Head dims that a device's table lacks: rate over that of head dim 128, the mean of H100, H200 and L40S.
HEAD_DIMS, HEAD_SHARE = np.array([32.0, 64.0, 128.0, 192.0, 256.0]), np.array([0.40, 0.78, 1.0, 1.05, 1.08])
# Unfused: two products at this share of the peak; the scores pass through memory four times (written, read by softmax,
# written, read), at this share of the bandwidth, in three kernels.
MATH_RATE, MATH_PASSES, MATH_STREAM, MATH_KERNELS = 0.60, 4.0, 0.80, 3.0
LAUNCH = 2e-6  # s a kernel, as in `costmodels.rowwise`

# Numbers of a call. width: of queries and keys; value_width: of values; causal, backward: 1 or 0.
FIELDS = ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width", "causal", "backward")
FLASH_CONSTANTS = ("launch", "tile", "join", "tile_stream", "short", "split", "memory", "memory_join")
DECODE_CONSTANTS = ("decode_launch", "decode_stream", "decode_cached", "decode_grain", "decode_row")
FLASH, DECODE, MATH = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """A law as the compiled code takes it. kind: FLASH, DECODE or MATH. numbers: the device's, then the kind's
    constants. heads: f8[3, head dims]: dims, rates, keys of a step; empty where the kind has none."""

    kind: int
    numbers: Array
    heads: Array

    def seconds(self, calls: Array) -> Array:
        """Device seconds of calls, rows of `FIELDS`."""
        return _seconds(self.kind, self.numbers, self.heads, calls)


def calls_from(
    batch: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, queries: ArrayLike, keys: ArrayLike, width: ArrayLike,
    value_width: ArrayLike, causal: ArrayLike, backward: ArrayLike,
) -> Array:  # fmt: skip
    """Many calls from an array, or a number that all share, per field."""
    columns = (batch, heads, kv_heads, queries, keys, width, value_width, causal, backward)
    return np.column_stack(np.broadcast_arrays(*columns)).astype(float)


def flash_seconds(constants: Mapping[str, Any], device: Device, dtype: str, calls: Array) -> Array:
    """Seconds of a flash kernel by constants that are yet to be fitted."""
    return flash_law(constants, device, dtype).seconds(calls)


def decode_seconds(constants: Mapping[str, Any], device: Device, dtype: str, calls: Array) -> Array:
    """Seconds of one query against many keys by constants that are yet to be fitted."""
    return decode_law(constants, device, dtype).seconds(calls)


def flash_law(constants: Mapping[str, Any], device: Device, dtype: str, share: float = 1.0) -> Law:
    """A flash kernel that reaches `share` of the fitted rate."""
    stated = [float(constants.get("tile_rows", TILE_ROWS)), float(bool(constants.get("packs"))), share]
    numbers = [*_hardware(device, dtype), *(float(constants[name]) for name in FLASH_CONSTANTS), *stated]
    return Law(FLASH, np.array(numbers), head_table(constants))


def decode_law(constants: Mapping[str, Any], device: Device, dtype: str) -> Law:
    """One query (or a few) against many keys."""
    numbers = [*_hardware(device, dtype), *(float(constants[name]) for name in DECODE_CONSTANTS)]
    return Law(DECODE, np.array(numbers), np.empty((3, 0)))


def math_law(device: Device, dtype: str) -> Law:
    """Unfused attention."""
    return Law(MATH, np.array(_hardware(device, dtype)), np.empty((3, 0)))


def head_table(constants: Mapping[str, Any]) -> Array:
    """`heads` of a law: `tile_keys` has one entry for each of `head_dims`."""
    dims, keys = constants["head_dims"], constants.get("tile_keys", [STEP_KEYS])
    return np.array([dims, constants["rates"], [keys[min(i, len(keys) - 1)] for i in range(len(dims))]], float)


def _hardware(device: Device, dtype: str) -> list[float]:
    """Units, FLOP/s, bytes/s, bytes of the last cache, and the bytes of an element."""
    from opgraph.graph import DTYPE_BYTES

    cache, size = float(max(device.l2_bytes, 1)), float(DTYPE_BYTES.get(dtype, 2))
    return [float(device.units), peak_of(device, dtype), device.memory_bandwidth, cache, size]


# Places in a call, and in `numbers`: the hardware, then what the kind of law has.
_BATCH, _HEADS, _KV_HEADS, _QUERIES, _KEYS, _WIDTH, _VALUE_WIDTH, _CAUSAL, _BACKWARD = range(len(FIELDS))
_UNITS, _PEAK, _BANDWIDTH, _CACHE, _SIZE = range(5)
(
    _LAUNCH, _TILE, _JOIN, _TILE_STREAM, _SHORT, _SPLIT, _MEMORY, _MEMORY_JOIN, _TILE_ROWS, _PACKS, _SHARE,
) = range(5, 5 + len(FLASH_CONSTANTS) + 3)  # fmt: skip
_DECODE_LAUNCH, _DECODE_STREAM, _DECODE_CACHED, _DECODE_GRAIN, _DECODE_ROW = range(5, 5 + len(DECODE_CONSTANTS))


@compiled
def _seconds(kind: int, p: Array, heads: Array, calls: Array) -> Array:
    found = np.empty(len(calls))
    for i in range(len(calls)):
        if kind == FLASH:
            found[i] = _flash(p, heads, calls[i])
        elif kind == DECODE:
            found[i] = _decode(p, calls[i])
        else:
            found[i] = _math(p, calls[i])
    return found


@compiled
def _flash(p: Array, heads: Array, c: Array) -> float:
    """FlashAttention-3 `packs`: where a head has no more queries than a tile has rows, query heads of one key head
    share a tile."""
    high, wider, backward = p[_TILE_ROWS], max(c[_WIDTH], c[_VALUE_WIDTH]), c[_BACKWARD] != 0
    keys = step_keys(heads, wider)
    # One step, a tile's queries by a step's keys, on one unit; the wider of the widths sets the rate.
    flops = 2.0 * high * keys * (c[_WIDTH] + c[_VALUE_WIDTH]) * (BACKWARD_FLOPS / BACKWARD_RATE if backward else 1.0)
    step = flops / (p[_PEAK] / p[_UNITS] * head_rate(heads, wider)) / p[_SHARE]
    steps, along = steps_of(high, keys, c[_QUERIES], c[_KEYS], c[_CAUSAL] != 0)
    best = _blocks(p, c, step, c[_HEADS], c[_QUERIES], steps, along)
    if p[_PACKS] != 0 and c[_QUERIES] <= high:
        rows = c[_QUERIES] * c[_HEADS] / c[_KV_HEADS]
        best = min(best, _blocks(p, c, step, c[_KV_HEADS], rows, np.ceil(rows / high) * along, along))
    launches = BACKWARD_LAUNCHES if backward else 1.0
    return launches * p[_LAUNCH] + _joined(p[_MEMORY_JOIN], best, _missed(p, c) / p[_MEMORY])


@compiled
def _blocks(p: Array, c: Array, step: float, heads: float, rows: float, steps: float, longest: float) -> float:
    """Seconds of all blocks: `rows` of a head, steps of all its tiles, and steps of the longest one."""
    high = p[_TILE_ROWS]
    tiles, filled = np.ceil(rows / high), min(rows, high)
    # A tile of few rows costs less than a full one, by a fitted power: rows that are not there are not computed.
    part = (filled / high) ** p[_SHORT]
    loaded = filled * (c[_WIDTH] + c[_VALUE_WIDTH]) * p[_SIZE] * (BACKWARD_BYTES if c[_BACKWARD] != 0 else 1.0)
    tile = p[_TILE] * part + loaded / (p[_TILE_STREAM] * p[_BANDWIDTH] / p[_UNITS])
    step = step * part
    shared = c[_BATCH] * heads * (steps * step + tiles * tile) / p[_UNITS]
    best = _joined(p[_JOIN], shared, longest * step + tile)
    for parts in SPLITS:
        block = np.ceil(longest / parts) * step + tile
        if max(shared, block) + parts * p[_SPLIT] < best:  # what it takes at least; powers are slow
            best = min(best, _joined(p[_JOIN], shared, block) + parts * p[_SPLIT])
    return best


@compiled
def _joined(power: float, a: float, b: float) -> float:
    """Two times that overlap partly: their norm, between the larger (power infinite) and the sum (1)."""
    larger, smaller = max(a, b), min(a, b)
    if smaller <= 0:
        return larger
    return larger * (1.0 + (smaller / larger) ** power) ** (1.0 / power)


@compiled
def head_rate(heads: Array, width: float) -> float:
    """Share of the peak by head dim: the table's own, in between by the straight line, and beyond them along
    `HEAD_SHARE` from the nearest that the table has."""
    near = min(max(width, heads[0, 0]), heads[0, -1])
    beyond = _between(width, HEAD_DIMS, HEAD_SHARE) / _between(near, HEAD_DIMS, HEAD_SHARE)
    return _between(near, heads[0], heads[1]) * beyond * min(width / HEAD_DIMS[0], 1.0)


@compiled
def _between(x: float, at: Array, values: Array) -> float:
    """The straight line between the nearest points; the outer values beyond them."""
    if x <= at[0]:
        return values[0]
    for i in range(1, len(at)):
        if x < at[i]:
            return values[i - 1] + (values[i] - values[i - 1]) / (at[i] - at[i - 1]) * (x - at[i - 1])
    return values[-1]


@compiled
def step_keys(heads: Array, width: float) -> float:
    """Keys of one step; a width takes that of the next larger head dim."""
    for i in range(heads.shape[1]):
        if width <= heads[0, i]:
            return heads[2, i]
    return heads[2, -1]


@compiled
def steps_of(rows: float, each_keys: float, queries: float, keys: float, causal: bool) -> tuple[float, float]:
    """Steps of all tiles of one head, and of its longest tile. A causal mask halves them where queries and keys are the
    same tokens; steps on the diagonal are whole."""
    tiles, along = np.ceil(queries / rows), np.ceil(keys / each_keys)
    if not causal or queries != keys:
        return tiles * along, along
    # Steps of tile i: i rows / keys, rounded up: i times `each` where a tile has more rows than a step has keys, else
    # one more for every `shared` tiles.
    each, shared = max(rows / each_keys, 1.0), max(each_keys / rows, 1.0)
    full = np.floor(tiles / shared)
    triangle = each * (shared * full * (full + 1) / 2 + (tiles - full * shared) * (full + 1))
    return min(triangle, tiles * along), along


@compiled
def _missed(p: Array, c: Array) -> float:
    """Seconds of memory, at the data sheet's rate, for the share of the tensors that the last cache cannot hold."""
    rows = c[_QUERIES] * c[_HEADS] + c[_KEYS] * c[_KV_HEADS]
    moved = p[_SIZE] * c[_BATCH] * rows * (c[_WIDTH] + c[_VALUE_WIDTH]) * (BACKWARD_BYTES if c[_BACKWARD] != 0 else 1.0)
    return moved * min(max(moved / p[_CACHE] - 1.0, 0.0), 1.0) / p[_BANDWIDTH]


@compiled
def _decode(p: Array, c: Array) -> float:
    """One query (or a few) against many keys: keys and values are read once, split over all units."""
    moved = p[_SIZE] * c[_BATCH] * c[_KEYS] * c[_KV_HEADS] * (c[_WIDTH] + c[_VALUE_WIDTH])
    # Few long rows cannot be split finely enough to use every unit: `decode_grain` keys keep one busy.
    blocks = c[_BATCH] * c[_KV_HEADS] * max(c[_KEYS] / p[_DECODE_GRAIN], 1.0)
    busy = min(blocks / p[_UNITS], 1.0)
    held = min(max(2.0 * (1.0 - moved / p[_CACHE]), 0.0), 1.0)
    shares = (1.0 - held) / p[_DECODE_STREAM] + held / p[_DECODE_CACHED]
    rows = c[_BATCH] * c[_HEADS] * p[_DECODE_ROW] / p[_UNITS]
    return p[_DECODE_LAUNCH] + moved / p[_BANDWIDTH] * shares / busy + rows


@compiled
def _math(p: Array, c: Array) -> float:
    """Unfused attention: two products, and the scores through memory."""
    backward = c[_BACKWARD] != 0
    pairs = c[_BATCH] * c[_HEADS] * c[_QUERIES] * c[_KEYS]
    products = 2.0 * pairs * (c[_WIDTH] + c[_VALUE_WIDTH]) / (p[_PEAK] * MATH_RATE)
    scores = MATH_PASSES * pairs * p[_SIZE] / (p[_BANDWIDTH] * MATH_STREAM)
    products = (MATH_KERNELS * LAUNCH + products) * (BACKWARD_FLOPS if backward else 1.0)
    return products + (BACKWARD_BYTES if backward else 1.0) * scores
