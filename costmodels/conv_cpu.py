"""Convolutions on one core of a CPU: which of torch's two ways one takes, and the features of each that a law weighs.

torch (`ConvParams::use_mkldnn`, aten/src/ATen/native/Convolution.cpp) leaves a float32 convolution to its own code,
which unfolds every image and multiplies it by the weight (GEMM), where one thread is taken to be faster that way: 1x1
kernels without a stride in batches below 16, and single small images. All others go to oneDNN, which copies image,
weight and result into blocks of 16 channels and back.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from costmodels.families import family

if TYPE_CHECKING:
    from costmodels.ops import OpShape

Shape = tuple[int, ...]
LEAST_BATCH, LEAST_KERNEL, LEAST_IMAGE = 16, 4, 20481  # images, taps along a side, elements: from here on oneDNN
BLOCK = 16  # channels
FEW_CHANNELS = 16
TINY_MAP = (4, 9)  # pixels
NATIVE = (
    "one", "swept", "since", "images", "flops", "unfolded", "input", "weight", "weight_per_image", "output",
    "flops_tiny_map",
)  # fmt: skip
ONEDNN = (
    "one", "swept", "since", "images", "flops", "flops_point", "flops_thin", "flops_depthwise", "flops_stride",
    "flops_depthwise_stride", "flops_blocks", "taps", "input", "input_skipped", "weight", "output",
)  # fmt: skip


def way(shape: OpShape) -> str:
    """"native" or "onednn" for a convolution, else ""."""
    if family(shape.name) not in ("conv", "conv_backward"):
        return ""
    sizes = _sizes(shape)
    if sizes is None:
        return "onednn"
    image, weight, out = sizes
    if "float" in shape.dtype and shape.dtype != "float32":
        return "native" if shape.dtype == "float64" else "onednn"
    sides = (1, *weight[2:])[-2:]  # of the kernel; one of one dim is seen as 1 x k
    if sides == (1, 1) and prod(out[2:]) == prod(image[2:]) and image[0] < LEAST_BATCH:
        return "native"
    grouped = image[1] > weight[1]
    many = image[0] > 1 or prod(image[:4]) >= LEAST_IMAGE
    return "onednn" if grouped or min(sides) >= LEAST_KERNEL or many else "native"


def conv_flops(shape: OpShape) -> tuple[float, int]:
    """FLOP of a convolution or of its backward from its shapes, and input channels per group; where shapes do not say,
    its stated FLOP and 1."""
    sizes = _sizes(shape)
    if sizes is None:
        return float(shape.flops), 1
    image, weight, out = sizes
    return _flops(_passes(shape, image), weight, out), weight[1]


def _flops(passes: int, weight: Shape, out: Shape) -> float:
    return 2.0 * passes * prod(out) * prod(weight[1:])


def native_features(shape: OpShape, swept: float, since: float) -> tuple[float, ...]:
    """Context; products of every image with the weight: their work, the elements that unfolding writes (none for 1x1
    kernels), image, weight, weight once an image, and result; and the work of 1x1 kernels on maps of 2x2 or 3x3, whose
    products are narrower than any kernel of a library (torch 2.13, EPYC: 14 against 50 GFLOP/s on 4x4, 128 to 2048
    channels)."""
    sizes = _sizes(shape)
    if sizes is None:
        return _unknown(shape, NATIVE)
    image, weight, out = sizes
    passes = _passes(shape, image)
    pixels = prod(out[2:])
    flops = _flops(passes, weight, out)
    point = prod(weight[2:]) == 1
    unfolded = 0.0 if point else float(passes * out[0] * pixels * prod(weight[1:]))
    through = family(shape.name) == "conv" or image in shape.out_shapes
    tiny = flops / passes if point and through and TINY_MAP[0] <= pixels <= TINY_MAP[1] else 0.0
    return (
        1.0, swept, since, float(image[0] * passes), flops, unfolded, float(prod(image)), float(prod(weight)),
        float(prod(weight) * image[0]), float(prod(out)), tiny,
    )  # fmt: skip


def onednn_features(shape: OpShape, swept: float, since: float) -> tuple[float, ...]:
    """Context; images; work in one of four kinds of kernel (1x1, few input channels, depthwise, other), again where
    there is a stride, and in whole blocks of channels; elements of the unfolded image ("taps": cost per tap that more
    output channels do not raise), of the image under a kernel and of the rest that a 1x1 kernel with a stride skips
    (blocked and unblocked all the same), of the weight and of the result."""
    sizes = _sizes(shape)
    if sizes is None:
        return _unknown(shape, ONEDNN)
    image, weight, out = sizes
    flops, channels = _flops(_passes(shape, image), weight, out), weight[1]
    depthwise = channels == 1 and weight[0] > 1 and image[1] > 1
    thin, point = channels < FEW_CHANNELS and not depthwise, prod(weight[2:]) == 1
    kinds = [0.0] * 4
    kinds[3 if depthwise else 2 if thin else 1 if point else 0] = flops
    strided = prod(image[2:]) > 2 * prod(out[2:])
    blocks = flops * _blocks(weight[0]) * _blocks(channels) if not (thin or depthwise) else 0.0
    pixels = prod(out[2:])
    seen = min(prod(image), prod(image[:2]) * pixels) if point else prod(image)
    return (
        1.0, swept, since, float(out[0]), *kinds,
        flops if strided and not (point or depthwise) else 0.0, flops if strided and depthwise else 0.0, blocks,
        flops / (2 * max(weight[0], 1)), float(seen), float(prod(image) - seen), float(prod(weight)), float(prod(out)),
    )  # fmt: skip


@lru_cache(maxsize=64)  # asked three times for every op
def _sizes(shape: OpShape) -> tuple[Shape, Shape, Shape] | None:
    """Image, weight and result of a convolution or of its backward; None where the shapes do not say."""
    backward = family(shape.name) == "conv_backward"
    if len(shape.in_shapes) < 2 + backward or not shape.out_shapes:
        return None
    image, weight = shape.in_shapes[1:3] if backward else shape.in_shapes[:2]
    out = shape.in_shapes[0] if backward else shape.out_shapes[0]
    return (image, weight, out) if min(len(image), len(weight), len(out)) > 2 else None


def _passes(shape: OpShape, image: Shape) -> int:
    """Products over all pixels: backward makes the weight's gradient, and the image's where it is wanted."""
    return 1 + (family(shape.name) == "conv_backward" and image in shape.out_shapes)


def _blocks(channels: int) -> float:
    """Channels in whole blocks over channels."""
    return -(-channels // BLOCK) * BLOCK / max(channels, 1)


def _unknown(shape: OpShape, names: tuple[str, ...]) -> tuple[float, ...]:
    """What a convolution without shapes still says of itself."""
    known = {
        "one": 1.0, "flops": float(shape.flops), "input": float(shape.bytes_read), "output": float(shape.bytes_written),
    }  # fmt: skip
    return tuple(known.get(name, 0.0) for name in names)
