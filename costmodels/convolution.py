"""Prices of convolutions: the seconds of the algorithm that a library would choose, and what that one holds meanwhile.

The law is `costmodels.convolution_law`. Its constants were fitted by `validation.fit_kernels` to NeuSight's fp32 table
(3x3, stride 1; cuDNN 8.9); errors in `reports/kernels`. Other filters, strides, backward passes and tensor cores follow
the same law with assumptions that are named here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.conv_shapes import Conv, convs_of, rows_of
from costmodels.convolution_law import (
    ALGORITHMS,
    FFT,
    FFT_SIDE,
    FFT_TILES,
    IMPLICIT_CONSTANTS,
    Algorithm,
    Array,
    Hardware,
    by_algorithm,
    chosen,
    fastest,
    packed,
)
from costmodels.device import Device
from costmodels.families import family
from costmodels.ops import OpShape
from costmodels.price import Price, Source
from costmodels.relatives import Found, find, relatives, vendor
from opgraph.graph import DTYPE_BYTES

SIDE = Conv._fields.index("side")
# ASSUMPTIONS. Tensor cores run implicit GEMM alone, at this share of the rate of a plain product.
TENSOR_SHARE, PLAIN_PRODUCT_SHARE = 0.75, 0.80
# How compute and memory of implicit GEMM overlap on tensor cores: as in plain products there, whose exponents are 3.0
# to 5.5 on nine devices; the constants of float32, where memory takes little of the time, were fitted as a sum.
TENSOR_OVERLAP = 3.0
TENSOR_CHANNELS = 8  # channels are padded to a multiple of it there
TENSOR_ERROR = 0.35  # expected relative error of convolutions on tensor cores: no table has any
# Expected relative error where FFT is chosen for filters that no table has: between the rate of a direct convolution
# (0.6 to 0.9 of the peak) and `FFT_MOST`. ASSUMPTION
FFT_ERROR = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Pricing:
    """All that prices convolutions of one dtype on one device. law: constants and hardware as the compiled law takes
    them. source, error: of its prices."""

    law: Array
    source: Source
    error: float


def conv_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """The prices of convolutions and of their backward passes; None where no device of this kind was measured."""
    prices: list[Price | None] = [None] * len(shapes)
    lists = [convs_of(shape) for shape in shapes]
    by_dtype: dict[str, list[int]] = {}
    for i, shape in enumerate(shapes):
        if lists[i]:
            by_dtype.setdefault(shape.dtype, []).append(i)
    for dtype, members in by_dtype.items():
        pricing = pricing_of(device, dtype)
        if pricing is None:
            continue
        rows = rows_of([c for i in members for c in lists[i]])
        each = iter(fastest(pricing.law, rows).tolist())
        unseen = iter(beyond_tables(pricing.law, rows).tolist() if rows[:, SIDE].max() > FFT_SIDE else repeat(False))
        biases = _bias_seconds(device, [shapes[i] for i in members])
        for i, bias in zip(members, biases):
            seconds = sum(islice(each, len(lists[i]))) + bias
            if any(list(islice(unseen, len(lists[i])))):
                prices[i] = Price(seconds, "extrapolated", max(pricing.error, FFT_ERROR))
            else:
                prices[i] = Price(seconds, pricing.source, pricing.error)
    return prices


def _bias_seconds(device: Device, shapes: Sequence[OpShape]) -> list[float]:
    """What the biases of convolutions take, which cuDNN's kernels leave out: a pass that adds them to the result, and
    one that sums the result's gradient (`_convolution` of torch's ATen/native/Convolution.cpp; `bias_add` and its
    gradient in TensorFlow)."""
    from costmodels.ops import OpShape, price_many

    found, passes = [0.0] * len(shapes), dict[int, OpShape]()
    for i, shape in enumerate(shapes):
        backward = family(shape.name) == "conv_backward"
        result = shape.in_shapes[0] if backward else shape.out_shapes[0]
        size, own = prod(result), ((result,), (result,))
        if backward and any(len(s) == 1 for s in shape.out_shapes):
            moved = size * DTYPE_BYTES.get(shape.dtype, 4)
            sums = (result, (result[1],))
            passes[i] = OpShape("aten.sum.dim_IntList", shape.phase, sums[:1], sums[1:], shape.dtype, 0, moved, 0)
        elif not backward and len(shape.in_shapes) > 2 and len(shape.in_shapes[2]) == 1:
            moved = size * DTYPE_BYTES.get(shape.dtype, 4)
            passes[i] = OpShape("aten.add_.Tensor", shape.phase, *own, shape.dtype, 0, moved, moved)
    for i, price in zip(passes, price_many(device, list(passes.values()))):
        found[i] = price.seconds
    return found


def beyond_tables(law: Array, rows: Array) -> NDArray[np.bool_]:
    """Whether FFT is chosen for a filter that no table has."""
    return (chosen(by_algorithm(law, rows)) == FFT) & (rows[:, SIDE] > FFT_SIDE)


def conv_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one convolution, or of one backward pass: the sum of the gradients that it returns."""
    return conv_prices(device, [shape])[0]


def pricing_of(device: Device, dtype: str) -> Pricing | None:
    """What prices convolutions of a dtype: constants fitted to float32, the device's own or a relative's. Cached on the
    device."""
    key = ("conv law", dtype)
    if key not in device.cache:
        found = find(device, "conv", "float32", "implicit_rate")
        device.cache[key] = None if found is None else _pricing(device, dtype, found)
    pricing: Pricing | None = device.cache[key]
    return pricing


def _pricing(device: Device, dtype: str, found: Found) -> Pricing:
    law = _packed(_reached(device, found), device, dtype)
    if on_tensor_cores(device, dtype):
        return Pricing(law, "extrapolated", max(found.error, TENSOR_ERROR))
    priced = found.price(0.0)
    return Pricing(law, priced.source, priced.error)


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
    return {k: v * share if k in rates else v for k, v in found.constants.items()} | {"reached": share}


def algorithm_of(device: Device, shape: OpShape) -> Algorithm | None:
    """The algorithm that the price of a forward convolution assumes."""
    pricing = pricing_of(device, shape.dtype)
    if pricing is None or not convs_of(shape):
        return None
    return ALGORITHMS[int(chosen(by_algorithm(pricing.law, rows_of(convs_of(shape)[:1])))[0])]


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
    """Whether a dtype runs on matrix units: tf32, 16-bit floats where there is tf32, or at well above the fp32 rate."""
    from costmodels.ops import peak_of

    if dtype in ("tf32", "float16", "bfloat16") and "tf32" in device.peak_flops:
        return True
    return dtype not in ("float32", "float64") and peak_of(device, dtype) > 2.5 * peak_of(device, "float32")


def seconds_by_algorithm(constants: Mapping[str, Any], device: Device, dtype: str, rows: Array) -> Array:
    """Device seconds by algorithm (rows as in `ALGORITHMS`, infinite where one does not apply) and convolution (rows as
    of `conv_shapes.rows_of`)."""
    return by_algorithm(_packed(constants, device, dtype), rows)


def _packed(constants: Mapping[str, Any], device: Device, dtype: str) -> Array:
    """Winograd and FFT are run where a library has them: not in bfloat16 (cuDNN's API reference lists implicit GEMM
    alone for it, and FFT and Winograd for float32 and float16; from memory), and not on Apple's GPUs (ASSUMPTION)."""
    hardware = hardware_of(device, dtype)
    known = {name: value for name, value in constants.items() if name in IMPLICIT_CONSTANTS}
    if on_tensor_cores(device, dtype):
        product = device.kernels.get("gemm", {}).get("bfloat16", {})
        hardware = replace(hardware, overlap=float(product.get("overlap", TENSOR_OVERLAP)))
        rate = TENSOR_SHARE * float(product.get("compute", PLAIN_PRODUCT_SHARE))
        constants = {**known, "implicit_rate": rate}
    elif dtype == "bfloat16" or vendor(device) == "Apple":
        constants = known
    return packed(constants, replace(hardware, reached=float(constants.get("reached", 1.0))))


def hardware_of(device: Device, dtype: str) -> Hardware:
    """What the law needs of a device."""
    from costmodels.ops import peak_of

    peak, multiple = peak_of(device, dtype), TENSOR_CHANNELS if on_tensor_cores(device, dtype) else 1
    plain, size = min(peak, peak_of(device, "float32")), DTYPE_BYTES.get(dtype, 4)
    return Hardware(device.units, peak / device.units, device.memory_bandwidth, size, plain, multiple)


def direct_flops(shape: OpShape) -> int:
    """FLOP of the convolutions of an op if they were computed directly: what effective FLOP/s are counted with."""
    return sum(2 * c.groups * c.batch * c.out_pixels * c.filters * c.channels * c.taps for c in convs_of(shape))
