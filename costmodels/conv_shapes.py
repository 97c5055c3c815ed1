"""The convolutions inside an op: forward, gradient of the input, gradient of the weight, read from tensor shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodels.families import family

if TYPE_CHECKING:
    from costmodels.ops import OpShape

Array = NDArray[np.float64]


class Conv(NamedTuple):
    """One convolution. channels, filters: per group, in and out. in_pixels, out_pixels: per image. taps: of one filter;
    side: its longer edge. height, width: of the output (1 where there is none). winograd: 3x3, stride 1, two dims, one
    group. weight: it is the gradient of a weight."""

    batch: int
    channels: int
    filters: int
    groups: int
    in_pixels: int
    out_pixels: int
    taps: int
    side: int
    height: int
    width: int
    unit_stride: bool
    winograd: bool
    weight: bool = False


def rows_of(convs: Sequence[Conv]) -> Array:
    """Many convolutions as rows of numbers, a column per field of `Conv`."""
    return np.array(convs, float)


@lru_cache(maxsize=4096)
def convs_of(shape: OpShape) -> tuple[Conv, ...]:
    """The convolutions of an op: one forward, or the gradients that a backward returns; empty where shapes are missing.

    >>> from costmodels.ops import OpShape
    >>> image, weight, out = (8, 3, 32, 32), (16, 3, 3, 3), (8, 16, 32, 32)
    >>> convs_of(OpShape("aten.convolution.default", "forward", (image, weight), (out,), "float32", 0, 0, 0))[0].taps
    9
    """
    backward = family(shape.name) == "conv_backward"
    if len(shape.in_shapes) < 2 + backward or not shape.out_shapes:
        return ()
    if backward:
        out, image, weight = shape.in_shapes[:3]
    else:
        image, weight, out = *shape.in_shapes[:2], shape.out_shapes[0]
    if len(image) < 3 or len(weight) != len(image) or len(out) != len(image):
        return ()
    forward = _conv(image, weight, out)
    if not backward:
        return (forward,)
    made = []
    if image in shape.out_shapes:
        made.append(_data_gradient(forward, image))
    if weight in shape.out_shapes:
        made.append(_weight_gradient(forward))
    return tuple(made)


def _conv(image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> Conv:
    """A transposed convolution (more pixels out than in) does the work of the convolution that it transposes."""
    transposed = prod(out[2:]) > prod(image[2:]) and weight[0] == image[1]
    if transposed:
        return _conv(out, weight, image)
    groups = max(image[1] // max(weight[1], 1), 1)
    spatial = tuple(out[2:])
    # Stride 1 leaves about as many pixels as there were, stride 2 half along each edge: shapes cannot tell them apart
    # where a map is hardly larger than the filter, and little depends on it there.
    unit = all(o + k - 1 >= i for o, k, i in zip(spatial, weight[2:], image[2:]))
    flat = len(spatial) == 2 and weight[2:] == (3, 3)
    height, width = (spatial[0], spatial[1]) if len(spatial) == 2 else (1, prod(spatial))
    return Conv(
        image[0], weight[1], max(weight[0] // groups, 1), groups, prod(image[2:]), prod(spatial), prod(weight[2:]),
        max(weight[2:]), height, width, unit, unit and flat and groups == 1,
    )  # fmt: skip


def _data_gradient(c: Conv, image: tuple[int, ...]) -> Conv:
    """A convolution from the output back to the input; at a stride it does no more work than the forward one."""
    height, width = (image[2], image[3]) if len(image) == 4 else (1, c.in_pixels)
    pixels = (c.out_pixels, c.in_pixels) if c.unit_stride else (c.in_pixels, c.out_pixels)
    return Conv(
        c.batch, c.filters, c.channels, c.groups, *pixels, c.taps, c.side, height, width, c.unit_stride, c.winograd
    )


def _weight_gradient(c: Conv) -> Conv:
    return Conv(
        c.batch, c.channels, c.filters, c.groups, c.in_pixels, c.out_pixels, c.taps, c.side, c.height, c.width,
        c.unit_stride, c.winograd, True,
    )  # fmt: skip
