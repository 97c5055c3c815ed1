"""Features of an op that its law weighs. All are non-negative and grow with every dim, so prices do too.

A law is `seconds = coefficients . features` with non-negative coefficients; `FORMS` names the features.
Bytes are split into cache tiers (below 1 MiB, 1 to 8 MiB, above: shared/facts/torch.md section 7), as parts of one
range: the first MiB counts in the first tier, the next seven in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from costmodels.families import base_name, family

if TYPE_CHECKING:
    from costmodels.ops import OpShape

MIB = 2**20
TIERS = (0, MIB, 8 * MIB)
Shape = tuple[int, ...]

FORMS: dict[str, tuple[str, ...]] = {
    "gemm": ("one", "batches", "flops", "left", "right", "out"),
    "conv": ("one", "flops", "flops_thin", "flops_depthwise", "input", "weight", "output"),
    "attention": ("one", "flops", "scores", "bytes"),
    "rnn": ("one", "steps", "flops_input", "flops_hidden", "weights", "states"),
    "sides": ("one", "read_1M", "read_8M", "read_more", "written_1M", "written_8M", "written_more"),
    "stream": ("one", "bytes_1M", "bytes_8M", "bytes_more"),
    "optimizer": ("one", "tensors", "bytes_1M", "bytes_8M", "bytes_more"),
}

_FORM_OF_FAMILY = {
    "gemm": "gemm", "conv": "conv", "conv_backward": "conv", "attention": "attention",
    "attention_backward": "attention", "rnn": "rnn", "rnn_backward": "rnn", "optimizer": "optimizer",
    "pool": "sides", "embedding": "sides", "reduction": "sides",
}  # fmt: skip


def form_of(name: str) -> str:
    """The form of law that ops of this name follow."""
    return _FORM_OF_FAMILY.get(family(name), "stream")


def features(shape: OpShape, form: str) -> tuple[float, ...]:
    """The op's features, in the order of `FORMS[form]`."""
    return _FUNCTIONS[form](shape)


def extent(shape: OpShape, form: str) -> tuple[float, ...]:
    """The raw dims by which calibration's range is judged: m, n, k of a matrix product, else work and bytes."""
    if form == "gemm":
        _, m, n, k = gemm_dims(shape)
        return (float(m), float(n), float(k))
    moved = float(touched(shape))
    if form in ("conv", "attention", "rnn"):
        return (float(_FUNCTIONS[form](shape)[1 if form != "rnn" else 3]), moved)
    return (moved,)


def gemm_dims(shape: OpShape) -> tuple[int, int, int, int]:
    """Batches, m, n, k of a matrix product, from its input and output shapes (bias first in the addmm kinds)."""
    matrices = [s for s in shape.in_shapes if len(s) >= 2]
    name = base_name(shape.name)
    if name in ("addmm", "baddbmm", "addbmm") and len(shape.in_shapes) >= 3:
        matrices = [s for s in shape.in_shapes[1:] if len(s) >= 2]
    if not matrices:
        length = max((prod(s) for s in shape.in_shapes), default=1)
        return 1, 1, 1, max(length, 1)
    left = matrices[0]
    out = shape.out_shapes[0] if shape.out_shapes else ()
    if name in ("mm", "addmm", "bmm", "baddbmm") and len(matrices) > 1:
        right = matrices[1]
        return prod(left[:-2]), left[-2], right[-1], left[-1]
    k = left[-1]
    n = out[-1] if len(out) > 1 else 1
    return 1, max(prod(out) // max(n, 1), 1), max(n, 1), max(k, 1)


def touched(shape: OpShape) -> int:
    """Bytes an op really moves: a gather reads the rows that it writes, not the whole table."""
    if _gathers(shape.name):
        return 2 * shape.bytes_written
    return shape.bytes_read + shape.bytes_written


def _gathers(name: str) -> bool:
    return base_name(name) in ("embedding", "index_select", "gather", "index", "take")


def _tiers(nbytes: float) -> tuple[float, float, float]:
    return min(nbytes, TIERS[1]), min(max(nbytes - TIERS[1], 0), TIERS[2] - TIERS[1]), max(nbytes - TIERS[2], 0)


def _gemm(shape: OpShape) -> tuple[float, ...]:
    b, m, n, k = gemm_dims(shape)
    return 1.0, float(b), 2.0 * b * m * n * k, float(b * m * k), float(b * k * n), float(b * m * n)


def conv_flops(shape: OpShape) -> tuple[float, int]:
    """FLOP of a convolution or of its backward from its shapes, and input channels per group."""
    backward = family(shape.name) == "conv_backward"
    image, weight = (shape.in_shapes[1], shape.in_shapes[2]) if backward else (shape.in_shapes[0], shape.in_shapes[1])
    out = shape.in_shapes[0] if backward else shape.out_shapes[0]
    passes = (1 + (image in shape.out_shapes)) if backward else 1
    return 2.0 * passes * prod(out) * prod(weight[1:]), weight[1]


def _conv(shape: OpShape) -> tuple[float, ...]:
    backward = family(shape.name) == "conv_backward"
    if len(shape.in_shapes) < 2 + backward or not shape.out_shapes:
        return 1.0, float(shape.flops), 0.0, 0.0, float(shape.bytes_read), 0.0, float(shape.bytes_written)
    flops, channels = conv_flops(shape)
    image, weight = (shape.in_shapes[1], shape.in_shapes[2]) if backward else (shape.in_shapes[0], shape.in_shapes[1])
    out = shape.in_shapes[0] if backward else shape.out_shapes[0]
    kinds = (flops, 0.0, 0.0) if channels >= 16 else (0.0, flops, 0.0) if channels > 1 else (0.0, 0.0, flops)
    return (1.0, *kinds, float(prod(image)), float(prod(weight)), float(prod(out)))


def _attention(shape: OpShape) -> tuple[float, ...]:
    width = next((s[-1] for s in shape.in_shapes if len(s) == 4), 64)
    return 1.0, float(shape.flops), shape.flops / max(width, 1), float(touched(shape))


def _rnn(shape: OpShape) -> tuple[float, ...]:
    if len(shape.in_shapes) < 3 or len(shape.in_shapes[0]) != 3 or len(shape.in_shapes[2]) != 2:
        return 1.0, 1.0, float(shape.flops), 0.0, 0.0, float(touched(shape))
    steps, batch, width = shape.in_shapes[0]
    gates, hidden = shape.in_shapes[2]
    return (
        1.0, float(steps), 2.0 * steps * batch * gates * width, 2.0 * steps * batch * gates * hidden,
        float(steps * gates * hidden), float(steps * batch * gates),
    )  # fmt: skip


def _sides(shape: OpShape) -> tuple[float, ...]:
    read = shape.bytes_written if _gathers(shape.name) else shape.bytes_read
    return (1.0, *_tiers(read), *_tiers(shape.bytes_written))


def _stream(shape: OpShape) -> tuple[float, ...]:
    return (1.0, *_tiers(touched(shape)))


def _optimizer(shape: OpShape) -> tuple[float, ...]:
    return (1.0, float(len(shape.in_shapes)), *_tiers(touched(shape)))


_FUNCTIONS: dict[str, Callable[[OpShape], tuple[float, ...]]] = {
    "gemm": _gemm, "conv": _conv, "attention": _attention, "rnn": _rnn, "sides": _sides, "stream": _stream,
    "optimizer": _optimizer,
}  # fmt: skip
