"""Attention: flash kernels by their tiles, memory-efficient kernels by a share of them, unfused attention by its parts.

A flash kernel gives each tile of 128 queries of one head to a block of threads, which walks over the keys in steps of
64 (a section may state other tiles); under a causal mask it stops at the diagonal. Its time is the launch, plus the
work of all blocks shared out among the units, joined (a norm) with the longest block, which nothing can shorten but a
split over the keys, and with the memory's time for what exceeds the last cache. What a tile costs beyond its steps
(loading queries, storing results) does not overlap with them.

Fitted by `validation.fit_kernels` to the bfloat16 tables of aiconfigurator-core 0.12 (prefill and encoder attention:
FlashAttention-2 on A100 and L40S, FlashAttention-3 on H100 and H200, TensorRT-LLM's kernels on Blackwell); errors in
`reports/kernels`. Backward passes and the other kernels are ASSUMPTIONS over the fitted law, named below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from costmodels.device import Device
from costmodels.families import base_name, family
from costmodels.relatives import Found, find, section_for

if TYPE_CHECKING:
    from costmodels.ops import OpShape, Price

Array = NDArray[np.float64]
Kernel = Literal["flash", "flash2", "efficient", "math", "decode"]

QUERIES, KEYS = 128, 64  # rows of a tile, and keys of one step, where a section states no `tile_rows`, `tile_keys`
SPLITS = (2, 4, 8)  # parts of the keys that a small grid is split over

# Backward passes make 2.5 times the FLOP of the forward (five products for two) at .75 to .85 of its rate, and move
# twice its bytes (shared/facts/compute.md B3; FlashAttention-3 paper, H100, head dim 128: 550 of 648 TFLOP/s).
BACKWARD_FLOPS, BACKWARD_RATE, BACKWARD_BYTES, BACKWARD_LAUNCHES = 2.5, 0.80, 2.0, 2.0
# Where a machine's backward passes were measured, too, the section of that name has the law's constants for them, with
# rates over BACKWARD_RATE (`validation.fit_machine`).
BACKWARD = "_backward"
# FlashAttention-2 on Hopper and later, of the rate of the tables' kernel: 370 of 648 TFLOP/s at 16k and 309 of 467 at
# 512 (head dim 128, H100), 324 of 497 (head dim 64): FlashAttention-3 paper, in shared/facts/compute.md B3.
FLASH2_SHARE = 0.60
# Memory-efficient attention (CUTLASS), of FlashAttention-2's rate: FlashAttention-1, which works alike, reaches 25 to
# 40 % of an A100's peak where FlashAttention-2 reaches 50 to 73 % (B3).
EFFICIENT_SHARE = 0.55
# Head dims that a device's table lacks: rate over that of head dim 128, the mean of H100, H200 and L40S.
HEAD_DIMS, HEAD_SHARE = (32, 64, 128, 192, 256), (0.40, 0.78, 1.0, 1.05, 1.08)
# Unfused: two products at this share of the peak; the scores pass through memory four times (written, read by softmax,
# written, read), at this share of the bandwidth, in three kernels.
MATH_RATE, MATH_PASSES, MATH_STREAM, MATH_KERNELS = 0.60, 4.0, 0.80, 3
LAUNCH = 2e-6  # s a kernel, as in `costmodels.rowwise`


@dataclass(frozen=True, slots=True)
class Calls:
    """Many calls of attention, an array per dim. width: of queries and keys; value_width: of values."""

    batch: Array
    heads: Array
    kv_heads: Array
    queries: Array
    keys: Array
    width: Array
    value_width: Array
    causal: NDArray[np.bool_]
    backward: NDArray[np.bool_]


def attention_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """The prices of attentions, forward and backward; None where no device of this kind was measured."""
    prices: list[Price | None] = [None] * len(shapes)
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for i, shape in enumerate(shapes):
        if _heads(shape):
            backward = family(shape.name) == "attention_backward"
            groups.setdefault((kernel_of(shape), shape.dtype, backward), []).append(i)
    for (kernel, dtype, backward), members in groups.items():
        found = find(device, "attention", dtype if dtype != "float32" else "bfloat16", "rates")
        if found is None:
            continue
        constants = found.constants
        if backward and found.whose == "own" and kernel == "flash":  # a machine's own table of backward passes
            constants = device.kernels["attention"].get(f"{dtype}{BACKWARD}", constants)
        calls = calls_of([shapes[i] for i in members])
        seconds = kernel_seconds(constants, device, dtype, kernel, calls)
        share = _held(device, found, dtype)
        for i, value in zip(members, (seconds / share).tolist()):
            prices[i] = found.price(value)
    return prices


def _held(device: Device, found: Found, dtype: str) -> float:
    """The share of the lender's rate that a device holds under a lower power limit, as for products: both run on the
    tensor cores (`costmodels.gemm.sustained`)."""
    if found.whose != "relative":
        return 1.0
    from costmodels.gemm import sustained

    section = section_for(device, "gemm", dtype if dtype != "float32" else "bfloat16")
    return min(sustained(device, section, dtype), 1.0) if section is not None and section.device else 1.0


def attention_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one attention."""
    return attention_prices(device, [shape])[0]


def kernel_of(shape: OpShape) -> str:
    """Which kernel an op runs: "flash2" is FlashAttention-2 as torch ships it, "flash" the best that the device's table
    has (cuDNN's on newer devices), "efficient", "math", and "decode" for one query against many keys."""
    name = base_name(shape.name)
    if "_math" in name or name == "scaled_dot_product_attention":
        return "math"
    if "efficient" in name:
        return "efficient"
    queries, keys = (s[-2] for s in _heads(shape)[:2])
    if queries <= 8 and keys >= 16 * queries and family(shape.name) == "attention":
        return "decode"
    return "flash2" if "flash" in name and "for_cpu" not in name else "flash"


def _heads(shape: OpShape) -> tuple[tuple[int, ...], ...]:
    """Shapes of queries, keys and values as (batch, heads, tokens, width); empty where they are not of that form."""
    ins = shape.in_shapes[family(shape.name) == "attention_backward" :][:3]
    if len(ins) < 3 or any(len(s) != 4 or 0 in s for s in ins):
        return ()
    if base_name(shape.name).startswith("_flash_attention"):  # this op keeps tokens before heads
        return tuple((b, h, s, d) for b, s, h, d in ins)
    return ins


def calls_of(shapes: Sequence[OpShape]) -> Calls:
    """The dims of ops that `_heads` understands."""
    rows = []
    for shape in shapes:
        q, k, v = _heads(shape)
        rows.append((q[0], q[1], k[1], q[2], k[2], q[3], v[3]))
    batch, heads, kv_heads, queries, keys, width, value_width = np.array(rows, float).T
    causal = np.array([s.causal for s in shapes], bool)
    backward = np.array([family(s.name) == "attention_backward" for s in shapes], bool)
    return Calls(batch, heads, kv_heads, queries, keys, width, value_width, causal, backward)


def kernel_seconds(constants: Mapping[str, Any], device: Device, dtype: str, kernel: str, calls: Calls) -> Array:
    """Device seconds of one kernel of `kernel_of`."""
    if kernel == "math":
        return math_seconds(device, dtype, calls)
    if kernel == "decode" and "decode_stream" in constants:
        return decode_seconds(constants, device, dtype, calls)
    own = constants.get("kernel", "")
    share = FLASH2_SHARE if kernel in ("flash2", "efficient") and own != "FlashAttention-2" else 1.0
    return flash_seconds(constants, device, dtype, calls, share * (EFFICIENT_SHARE if kernel == "efficient" else 1.0))


def flash_seconds(constants: Mapping[str, Any], device: Device, dtype: str, calls: Calls, share: float = 1.0) -> Array:
    """Seconds of a flash kernel that reaches `share` of the fitted rate. FlashAttention-3 `packs`: where a head has no
    more queries than a tile has rows, query heads of one key head share a tile."""
    c = calls
    step = _step_seconds(constants, device, dtype, c) / share
    high, (steps, along) = tile_rows(constants), _steps(constants, c)
    best = _blocks(constants, device, dtype, c, step, (c.heads, c.queries, steps, along))
    if constants.get("packs"):
        rows = c.queries * c.heads / c.kv_heads
        packed = _blocks(constants, device, dtype, c, step, (c.kv_heads, rows, np.ceil(rows / high) * along, along))
        best = np.where(c.queries <= high, np.minimum(best, packed), best)
    missed = _missed(device, _size(dtype), c) / float(constants["memory"])
    launches = np.where(c.backward, BACKWARD_LAUNCHES, 1.0)
    seconds: Array = launches * float(constants["launch"]) + _joined(float(constants["memory_join"]), best, missed)
    return seconds


def _blocks(
    constants: Mapping[str, Any], device: Device, dtype: str, c: Calls, step: Array,
    grid: tuple[Array, Array, Array, Array],
) -> Array:  # fmt: skip
    """Seconds of all blocks; `grid` is heads, rows of a head, steps of all its tiles, and steps of the longest one."""
    (heads, rows, steps, longest), high = grid, tile_rows(constants)
    tiles = np.ceil(rows / high)
    # A tile of few rows costs less than a full one, by a fitted power: rows that are not there are not computed.
    part = (np.minimum(rows, high) / high) ** float(constants["short"])
    loaded = np.minimum(rows, high) * (c.width + c.value_width) * _size(dtype)
    loaded = loaded * np.where(c.backward, BACKWARD_BYTES, 1.0)
    stream = float(constants["tile_stream"]) * device.memory_bandwidth / device.units
    tile, step = float(constants["tile"]) * part + loaded / stream, step * part
    shared, join = c.batch * heads * (steps * step + tiles * tile) / device.units, float(constants["join"])
    best = _joined(join, shared, longest * step + tile)
    for parts in SPLITS:
        block = np.ceil(longest / parts) * step + tile
        best = np.minimum(best, _joined(join, shared, block) + parts * float(constants["split"]))
    return best


def _joined(power: float, a: Array, b: Array) -> Array:
    """Two times that overlap partly: their norm, between the larger (power infinite) and the sum (1)."""
    high = np.maximum(np.maximum(a, b), 1e-30)
    both: Array = high * ((a / high) ** power + (b / high) ** power) ** (1 / power)
    return both


def _step_seconds(constants: Mapping[str, Any], device: Device, dtype: str, c: Calls) -> Array:
    """Seconds of one step (a tile's queries by a step's keys) on one unit; the wider of the widths sets the rate."""
    from costmodels.ops import peak_of

    pairs = tile_rows(constants) * step_keys(constants, c)
    flops = 2.0 * pairs * (c.width + c.value_width) * np.where(c.backward, BACKWARD_FLOPS / BACKWARD_RATE, 1.0)
    rates = head_rate(constants, np.maximum(c.width, c.value_width))
    seconds: Array = flops / (peak_of(device, dtype) / device.units * rates)
    return seconds


def head_rate(constants: Mapping[str, Any], width: Array) -> Array:
    """Share of the peak by head dim: the table's own, in between by the straight line, and beyond them along
    `HEAD_SHARE` from the nearest that the table has."""
    own, rates = np.array(constants["head_dims"], float), np.array(constants["rates"], float)
    near = np.clip(width, own[0], own[-1])
    beyond = np.interp(width, HEAD_DIMS, HEAD_SHARE) / np.interp(near, HEAD_DIMS, HEAD_SHARE)
    found: Array = np.interp(near, own, rates) * beyond * np.minimum(width / HEAD_DIMS[0], 1.0)
    return found


def tile_rows(constants: Mapping[str, Any]) -> float:
    """Queries of one tile of the kernel that a section describes."""
    return float(constants.get("tile_rows", QUERIES))


def step_keys(constants: Mapping[str, Any], c: Calls) -> Array:
    """Keys of one step: `tile_keys` has one entry for each of `head_dims`; a width takes that of the next larger."""
    if "tile_keys" not in constants:
        return np.full(len(c.keys), float(KEYS))
    own = np.searchsorted(np.array(constants["head_dims"], float), np.maximum(c.width, c.value_width))
    keys: Array = np.array(constants["tile_keys"], float)[np.minimum(own, len(constants["tile_keys"]) - 1)]
    return keys


def _steps(constants: Mapping[str, Any], c: Calls) -> tuple[Array, Array]:
    """Steps of all tiles of one head, and of its longest tile. A causal mask halves them where queries and keys are the
    same tokens; steps on the diagonal are whole."""
    rows, keys = tile_rows(constants), step_keys(constants, c)
    tiles, along = np.ceil(c.queries / rows), np.ceil(c.keys / keys)
    # Steps of tile i: i rows / keys, rounded up: i times `each` where a tile has more rows than a step has keys, else
    # one more for every `shared` tiles.
    each, shared = np.maximum(rows / keys, 1), np.maximum(keys / rows, 1)
    full = np.floor(tiles / shared)
    triangle = each * (shared * full * (full + 1) / 2 + (tiles - full * shared) * (full + 1))
    steps: Array = np.where(c.causal & (c.queries == c.keys), np.minimum(triangle, tiles * along), tiles * along)
    return steps, along


def _missed(device: Device, size: float, c: Calls) -> Array:
    """Seconds of memory, at the data sheet's rate, for the share of the tensors that the last cache cannot hold."""
    moved = size * c.batch * (c.queries * c.heads + c.keys * c.kv_heads) * (c.width + c.value_width)
    moved = moved * np.where(c.backward, BACKWARD_BYTES, 1.0)
    missed: Array = moved * np.clip(moved / max(device.l2_bytes, 1) - 1, 0, 1) / device.memory_bandwidth
    return missed


def decode_seconds(constants: Mapping[str, Any], device: Device, dtype: str, calls: Calls) -> Array:
    """One query (or a few) against many keys: keys and values are read once, split over all units."""
    c = calls
    moved = _size(dtype) * c.batch * c.keys * c.kv_heads * (c.width + c.value_width)
    # Few long rows cannot be split finely enough to use every unit: `decode_grain` keys keep one busy.
    blocks = c.batch * c.kv_heads * np.maximum(c.keys / float(constants["decode_grain"]), 1)
    busy = np.minimum(blocks / device.units, 1.0)
    held = np.clip(2 * (1 - moved / max(device.l2_bytes, 1)), 0, 1)
    shares = (1 - held) / float(constants["decode_stream"]) + held / float(constants["decode_cached"])
    read = moved / device.memory_bandwidth * shares / busy
    rows = c.batch * c.heads * float(constants["decode_row"]) / device.units
    seconds: Array = float(constants["decode_launch"]) + read + rows
    return seconds


def math_seconds(device: Device, dtype: str, calls: Calls) -> Array:
    """Unfused attention: two products, and the scores through memory."""
    from costmodels.ops import peak_of

    c, times = calls, np.where(calls.backward, BACKWARD_FLOPS, 1.0)
    pairs = c.batch * c.heads * c.queries * c.keys
    products = 2.0 * pairs * (c.width + c.value_width) / (peak_of(device, dtype) * MATH_RATE)
    scores = MATH_PASSES * pairs * _size(dtype) / (device.memory_bandwidth * MATH_STREAM)
    seconds: Array = MATH_KERNELS * LAUNCH * times + times * products + np.where(c.backward, 2.0, 1.0) * scores
    return seconds


def _size(dtype: str) -> float:
    from opgraph.graph import DTYPE_BYTES

    return float(DTYPE_BYTES.get(dtype, 2))
