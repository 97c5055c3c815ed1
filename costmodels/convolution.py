"""Convolutions: the time of each algorithm that a library may choose, and the choice: the fastest one that applies.

* implicit GEMM: one product of batch x pixels by filters over channels x taps, in tiles that fill the units in waves.
* Winograd F(2x2,3x3), fused: 2.25 times fewer multiplications; transforms in registers, no workspace.
* Winograd F(4x4,3x3), in steps: 4 times fewer; input, filters and output pass through memory transformed (workspace).
* FFT, in overlapping tiles of 32x32: few multiplications for any filter, much traffic.
* direct: convolutions with few channels per group (depthwise), bound by what they move.

Counts of multiplications: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016. Constants were
fitted by `validation.fit_kernels` to NeuSight's fp32 table (3x3, stride 1; cuDNN 8.9); errors in `reports/kernels`.
Other filters, strides, backward passes and tensor cores follow the same law with assumptions that are named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from costmodels.conv_shapes import Convs, convs_of, stacked
from costmodels.device import Device
from costmodels.relatives import Found, find, relatives

if TYPE_CHECKING:
    from costmodels.ops import OpShape, Price

Array = NDArray[np.float64]
Algorithm = Literal["implicit_gemm", "winograd", "winograd_fused", "fft", "direct"]
ALGORITHMS: tuple[Algorithm, ...] = ("implicit_gemm", "winograd", "winograd_fused", "fft", "direct")

LAUNCH = 2e-6  # s a kernel, as in `costmodels.rowwise`
KERNELS = {"implicit_gemm": 1, "winograd": 4, "winograd_fused": 2, "fft": 4, "direct": 1}  # launches of each

# ASSUMPTIONS. Gradients of the weights reach this share of the forward rate (their sum runs over batch x pixels and is
# split over blocks). Tensor cores run implicit GEMM alone, at this share of the rate of a plain product.
WEIGHT_GRADIENT_SHARE = 0.85
TENSOR_SHARE, PLAIN_PRODUCT_SHARE = 0.75, 0.80
TENSOR_CHANNELS = 8  # channels are padded to a multiple of it there
TENSOR_ERROR = 0.35  # expected relative error of convolutions on tensor cores: no table has any
SPLIT_DEPTH = 256  # least depth of a part of a split sum
DIRECT_STREAM, DIRECT_RATE = 0.5, 0.25  # shares of bandwidth and of the fp32 rate of depthwise kernels
FFT_TILES = (16, 32)
# cuDNN's heuristic takes FFT where its predicted time is below half of the others': chosen on the fitting halves of all
# five devices from 0.5 to 8 for agreement with the table's algorithms.
FFT_WEIGHT = 2.0


def conv_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """The prices of convolutions and of their backward passes; None where no device of this kind was measured."""
    prices: list[Price | None] = [None] * len(shapes)
    by_dtype: dict[str, list[int]] = {}
    for i, shape in enumerate(shapes):
        if convs_of(shape):
            by_dtype.setdefault(shape.dtype, []).append(i)
    for dtype, members in by_dtype.items():
        found = find(device, "conv", "float32", "implicit_rate")
        if found is None:
            continue
        lists = [convs_of(shapes[i]) for i in members]
        constants = _reached(device, found)
        times = seconds_by_algorithm(constants, device, dtype, stacked([c for cs in lists for c in cs]))
        each = times[chosen(times), np.arange(times.shape[1])]
        ends = np.cumsum([len(cs) for cs in lists])
        for i, part in zip(members, np.split(each, ends[:-1])):
            prices[i] = _priced(found, device, dtype, float(part.sum()))
    return prices


def conv_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one convolution, or of one backward pass: the sum of the gradients that it returns."""
    return conv_prices(device, [shape])[0]


def _reached(device: Device, found: Found) -> Mapping[str, Any]:
    """Constants for a device; a relative's rates are scaled where this device's products are known to reach another
    share of its peak (`Device.best_flops`): a Kepler SMX issues 128 of its 192 lanes a clock unless instructions pair
    up, so that products reach 0.65 of the peak where the lender's reach `compute`."""
    best = device.best_flops.get("float32", 0.0)
    if found.whose != "relative" or not best:
        return found.constants
    lender = next((d for d in relatives(device) if "float32" in d.kernels.get("conv", {})), None)
    product = lender.kernels.get("gemm", {}).get("float32") if lender else None
    if product is None:
        return found.constants
    share = min(best / device.peak_flops["float32"] / float(product["compute"]), 1.0)
    rates = ("implicit_rate", "product_rate", "fused_rate")
    return {k: v * share if k in rates else v for k, v in found.constants.items()}


def _priced(found: Found, device: Device, dtype: str, seconds: float) -> Price:
    from costmodels.ops import Price

    if on_tensor_cores(device, dtype):
        return Price(seconds, "extrapolated", max(found.error, TENSOR_ERROR))
    return found.price(seconds)


def algorithm_of(device: Device, shape: OpShape) -> Algorithm | None:
    """The algorithm that the price of a forward convolution assumes."""
    found = find(device, "conv", "float32", "implicit_rate")
    if found is None or not convs_of(shape):
        return None
    times = seconds_by_algorithm(_reached(device, found), device, shape.dtype, stacked(convs_of(shape)[:1]))
    return ALGORITHMS[int(chosen(times)[0])]


def chosen(times: Array) -> NDArray[np.intp]:
    """Which algorithm (an index into `ALGORITHMS`) is taken, by the seconds of each: the fastest, FFT reluctantly."""
    weights = np.array([[FFT_WEIGHT if a == "fft" else 1.0] for a in ALGORITHMS])
    return np.argmin(times * weights, 0)


def workspace_bytes(algorithm: Algorithm, shape: OpShape) -> int:
    """Bytes that an algorithm holds beyond the op's inputs and outputs (the largest of a backward pass's parts), fp32
    for what is transformed: 36 values per tile of 4x4 and channel or filter, half a complex tile for FFT."""
    largest = 0
    for c in convs_of(shape):
        if algorithm == "winograd":
            tiles = c.batch * -(-c.height // 4) * -(-c.width // 4)
            largest = max(largest, 4 * 36 * (tiles * (c.channels + c.filters) + c.channels * c.filters))
        elif algorithm == "fft":
            edge = FFT_TILES[c.side >= FFT_TILES[0] // 2]
            step = max(edge - c.side + 1, 1)
            tiles = c.batch * -(-c.height // step) * -(-c.width // step)
            points = 8 * edge * (edge // 2 + 1)
            largest = max(largest, points * (tiles * (c.channels + c.filters) + c.channels * c.filters))
    return largest


def on_tensor_cores(device: Device, dtype: str) -> bool:
    """Whether a dtype runs on matrix units: 16-bit floats (and "tf32") at well above the fp32 rate."""
    from costmodels.ops import peak_of

    return dtype not in ("float32", "float64") and peak_of(device, dtype) > 2.5 * peak_of(device, "float32")


def seconds_by_algorithm(constants: Mapping[str, Any], device: Device, dtype: str, c: Convs) -> Array:
    """Device seconds by algorithm (rows as in `ALGORITHMS`, infinite where one does not apply) and convolution."""
    from costmodels.ops import peak_of
    from opgraph.graph import DTYPE_BYTES

    size = float(DTYPE_BYTES.get(dtype, 4))
    unit = peak_of(device, dtype) / device.units
    if on_tensor_cores(device, dtype):
        share = device.kernels.get("gemm", {}).get("bfloat16", {}).get("compute", PLAIN_PRODUCT_SHARE)
        constants = {**constants, "implicit_rate": TENSOR_SHARE * float(share)}
        never = np.full(len(c.batch), np.inf)
        rows = [implicit_seconds(constants, device, unit, size, c, TENSOR_CHANNELS), never, never, never]
    else:
        rows = [
            implicit_seconds(constants, device, unit, size, c), winograd_seconds(constants, device, unit, size, c),
            fused_seconds(constants, device, unit, size, c), fft_seconds(constants, device, unit, size, c),
        ]  # fmt: skip
    rows.append(_direct_seconds(device, dtype, size, c))
    launches = LAUNCH * np.array([[KERNELS[a]] for a in ALGORITHMS])
    times: Array = np.stack(rows) + launches
    return times


def implicit_seconds(
    constants: Mapping[str, Any], device: Device, unit: float, size: float, c: Convs, multiple: int = 1
) -> Array:
    """Implicit GEMM: rows are batch x pixels, columns filters, the sum runs over channels x taps; for a gradient of
    weights rows are channels x taps and the sum runs over batch x pixels. Tensor cores take channels in a `multiple`.
    """
    pixels, inner = c.batch * c.out_pixels, np.ceil(c.channels / multiple) * multiple * c.taps
    rows, depth = np.where(c.weight, inner, pixels), np.where(c.weight, pixels, inner)
    rate = unit * float(constants["implicit_rate"]) * np.where(c.weight, WEIGHT_GRADIENT_SHARE, 1.0)
    compute = _tiled(constants, "implicit", device, rate, (rows, c.filters, depth), c.groups, c.weight)
    moved = [c.batch * c.in_pixels * c.channels, pixels * c.filters, c.channels * c.filters * c.taps]
    shares = ("implicit_in", "implicit_out", "implicit_weight")
    return compute + _moved(constants, shares, device, size, c.groups, moved)


def winograd_seconds(constants: Mapping[str, Any], device: Device, unit: float, size: float, c: Convs) -> Array:
    """F(4x4,3x3) in steps: 36 products over the tiles, and the transforms' traffic."""
    tiles = c.batch * np.ceil(c.height / 4) * np.ceil(c.width / 4)
    rate = unit * float(constants["product_rate"]) * np.where(c.weight, WEIGHT_GRADIENT_SHARE, 1.0)
    depth, rows = np.where(c.weight, tiles, c.channels), np.where(c.weight, c.channels, tiles)
    compute = _tiled(constants, "product", device, rate, (rows, c.filters, depth), 36.0, c.weight)
    moved = [
        c.batch * c.in_pixels * c.channels + 36 * tiles * c.channels,
        36 * tiles * c.filters + c.batch * c.out_pixels * c.filters, 45 * c.channels * c.filters,
    ]  # fmt: skip
    seconds = compute + _moved(constants, ("tile_in", "tile_out", "tile_weight"), device, size, 1.0, moved)
    return np.where(c.winograd, seconds, np.inf)


def fused_seconds(constants: Mapping[str, Any], device: Device, unit: float, size: float, c: Convs) -> Array:
    """F(2x2,3x3) fused: a block holds 32 tiles and 64 or 32 filters and walks over the channels, eight at a time."""
    tiles = c.batch * np.ceil(c.height / 2) * np.ceil(c.width / 2)
    depth = np.ceil(c.channels / 8) * 8 + float(constants["fused_depth"])
    best = np.full(len(tiles), np.inf)
    for filters, share in ((64, 1.0), (32, float(constants["fused_narrow"]))):
        blocks = np.ceil(c.filters / filters) * np.ceil(tiles / 32)
        rate = unit * float(constants["fused_rate"]) * share
        one = 2.0 * 16 * 32 * filters * depth / rate
        best = np.minimum(best, _waves(blocks / device.units, float(constants["fused_smooth"])) * one)
    moved = [c.batch * c.in_pixels * c.channels + c.batch * c.out_pixels * c.filters + 25 * c.channels * c.filters]
    seconds = best + _moved(constants, ("fused_stream",), device, size, 1.0, moved)
    return np.where(c.winograd & ~c.weight, seconds, np.inf)


def fft_seconds(constants: Mapping[str, Any], device: Device, unit: float, size: float, c: Convs) -> Array:
    """FFT in tiles of 32x32 that overlap by the filter: a complex product per point (8 FLOP), transforms through
    memory. The constants of the Winograd steps serve, which are the same two kinds of kernel."""
    rate, best = unit * float(constants["product_rate"]), np.full(len(c.batch), np.inf)
    for edge in FFT_TILES:
        step = np.maximum(edge - (c.side - 1), 1)
        tiles = c.batch * np.ceil(c.height / step) * np.ceil(c.width / step)
        points = edge * (edge // 2 + 1)
        dims = (tiles, c.filters, 4 * c.channels)
        compute = _tiled(constants, "product", device, rate, dims, float(points), c.weight)
        moved = [2.0 * points * n for n in (tiles * c.channels, tiles * c.filters, c.channels * c.filters)]
        traffic = _moved(constants, ("tile_in", "tile_out", "tile_weight"), device, size, 1.0, moved)
        best = np.where(c.side < edge // 2, np.minimum(best, compute + traffic), best)
    return np.where(c.unit_stride & ~c.weight & (c.side > 1) & (c.groups == 1), best, np.inf)


def _direct_seconds(device: Device, dtype: str, size: float, c: Convs) -> Array:
    from costmodels.ops import peak_of

    maps = c.batch * (c.in_pixels * c.channels + c.out_pixels * c.filters)
    moved = c.groups * (maps + c.channels * c.filters * c.taps)
    flops = 2.0 * c.groups * c.batch * c.out_pixels * c.filters * c.channels * c.taps
    memory = moved * size / (device.memory_bandwidth * DIRECT_STREAM)
    compute = flops / (min(peak_of(device, dtype), peak_of(device, "float32")) * DIRECT_RATE)
    return np.where((c.groups > 1) & (c.channels < 8), np.maximum(memory, compute), np.inf)


def _tiled(
    constants: Mapping[str, Any], kind: str, device: Device, rate: Array | float, dims: tuple[Array, Array, Array],
    batch: Array | float, split: NDArray[np.bool_],
) -> Array:  # fmt: skip
    """Seconds of a batch of products in the best tile; `rate` is one unit's FLOP/s. Where `split`, the sum is shared
    out until every unit has a part, and the parts are written and added up."""
    per_part = np.where(split, 8.0 / device.memory_bandwidth, 0.0)
    rows, columns, depth = dims
    depth = np.ceil(depth / 8) * 8
    more, smooth, best = float(constants[f"{kind}_depth"]), float(constants[f"{kind}_smooth"]), np.inf
    for (high, wide), share in zip(TILES[kind], (1.0, *constants[f"{kind}_tiles"])):
        blocks = batch * np.ceil(rows / high) * np.ceil(columns / wide) / device.units
        parts = np.where(split, np.clip(np.ceil(1 / blocks), 1, np.ceil(depth / SPLIT_DEPTH)), 1.0)
        one = 2.0 * high * wide * (depth / parts + more) / (rate * share)
        best = np.minimum(best, _waves(blocks * parts, smooth) * one + parts * batch * rows * columns * per_part)
    found: Array = np.asarray(best)
    return found


TILES: dict[str, tuple[tuple[int, int], ...]] = {
    "implicit": ((128, 128), (128, 64), (64, 64), (128, 32)), "product": ((128, 128), (128, 64), (64, 64), (32, 32)),
}  # fmt: skip


def _waves(waves: Array, smooth: float) -> Array:
    """Waves that blocks take: whole ones, or (smooth 1) the last one shared out among the units."""
    filled: Array = (1 - smooth) * np.ceil(waves) + smooth * np.maximum(waves, 1.0)
    return filled


def _moved(
    constants: Mapping[str, Any], names: tuple[str, ...], device: Device, size: float, groups: Array | float,
    elements: Sequence[Array],
) -> Array:  # fmt: skip
    shares = [float(constants[name]) * device.memory_bandwidth for name in names]
    seconds: Array = groups * size * sum((e / s for e, s in zip(elements, shares)), np.zeros(len(elements[0])))
    return seconds


def direct_flops(shape: OpShape) -> int:
    """FLOP of the convolutions of an op if they were computed directly: what effective FLOP/s are counted with."""
    return sum(2 * c.groups * c.batch * c.out_pixels * c.filters * c.channels * c.taps for c in convs_of(shape))
