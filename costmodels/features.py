"""Features of an op that its law weighs. All are non-negative and grow with every dim as long as an op
takes the same kernel (`costmodels.conv_cpu.way`; `flops_tiny_map` is a kernel of its own), so prices do too.

A law is `seconds = coefficients . features` with non-negative coefficients; `FORMS` names the features.
Bytes count once as they are and again as far as they exceed 1, 8 and 64 MiB (the caches of a core: shared/facts,
torch.md section 7; the last is where an EPYC's shared cache has ended for good: zeroing 94 MB took three times as long
a byte as 49 MB), so that a byte never costs less because there are more of them: laws that priced the tiers apart gave
nothing to a tier of which calibration had seen little, and were half too low there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from costmodels.conv_cpu import NATIVE, ONEDNN, conv_flops, native_features, onednn_features
from costmodels.families import base_name, family

if TYPE_CHECKING:
    from costmodels.ops import OpShape

MIB = 2**20
TIERS = (MIB, 8 * MIB, 64 * MIB)
GATHERS = frozenset({"embedding", "index_select", "gather", "index", "take"})
LEAST_DEPTH = 32  # found on an EPYC core: 0.76 ns per element for depths 2 to 8, the time of 32 terms
REGISTER = 16  # float32 numbers of a 512-bit register
Shape = tuple[int, ...]
CONTEXT = ("swept", "since", "bytes_swept", "bytes_cold")  # see `_emptied` and `_context`
# Bytes after which nothing is left in the caches. Of seven pairs (2 to 32, 4 to 64) this one is 0.2 points from the
# best on calibration's own models, a quarter left out at a time (reports/README.md).
SWEPT, SINCE = 8 * MIB, 16 * MIB

FORMS: dict[str, tuple[str, ...]] = {
    "gemm": ("one", "swept", "since", "batches", "flops", "flops_columns", "left", "right", "out", "bytes_more"),
    "conv_native": NATIVE,
    "conv_onednn": ONEDNN,
    "attention": ("one", "flops", "scores", "bytes"),
    "rnn": ("one", "steps", "flops_input", "flops_hidden", "weights_input", "weights", "states"),
    "rows": (
        "one", *CONTEXT, "rows", "rows_cold", "read", "read_over_1M", "read_over_8M", "read_over_64M", "written",
        "written_over_1M", "written_over_8M", "written_over_64M",
    ),
    "reduce": (
        "one", *CONTEXT, "read_along", "read_across", "read_over_1M", "read_over_8M", "read_over_64M", "written",
    ),
    "norm": ("one", *CONTEXT, "rows", "bytes", "bytes_over_1M", "bytes_over_8M", "bytes_over_64M"),
    "pool_taps": ("one", *CONTEXT, "taps", "large", "small"),
    "stream": ("one", *CONTEXT, "runs", "bytes", "bytes_over_1M", "bytes_over_8M", "bytes_over_64M"),
    "optimizer": ("one", "tensors", "bytes", "bytes_over_1M", "bytes_over_8M", "bytes_over_64M"),
}  # fmt: skip
BYTES = ("bytes", "read", "written")  # features that are bytes, or bytes over a size, begin so

_FORM_OF_FAMILY = {
    "gemm": "gemm", "conv": "conv_onednn", "conv_backward": "conv_onednn", "attention": "attention",
    "attention_backward": "attention", "rnn": "rnn", "rnn_backward": "rnn", "optimizer": "optimizer",
    "pool": "pool_taps", "pool_backward": "pool_taps", "embedding": "rows", "reduction": "reduce", "norm": "norm",
    "norm_backward": "norm",
}  # fmt: skip


def form_of(name: str, variant: str = "") -> str:
    """The form of law that ops of this name follow, or this kernel of theirs (`costmodels.ops.kernel_key`)."""
    if variant == "native":
        return "conv_native"
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
    if form in ("conv_native", "conv_onednn"):
        return conv_flops(shape)[0], moved
    return (float(shape.flops), moved) if form in ("attention", "rnn") else (moved,)


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
    if gathers(shape.name):
        return 2 * shape.bytes_written
    return shape.bytes_read + shape.bytes_written


@lru_cache(maxsize=4096)
def gathers(name: str) -> bool:
    """Whether an op reads only those rows of its first input that it writes."""
    return base_name(name) in GATHERS


def _tiers(nbytes: float) -> tuple[float, float, float, float]:
    """Bytes, and bytes over 1, 8 and 64 MiB."""
    if nbytes <= MIB:  # most ops
        return float(nbytes), 0.0, 0.0, 0.0
    over_1, over_8, over_64 = [float(max(nbytes - tier, 0)) for tier in TIERS]
    return float(nbytes), over_1, over_8, over_64


def _gemm(shape: OpShape) -> tuple[float, ...]:
    """Context; work, again as if columns came in whole registers, and the elements of both factors and of the product:
    packing and writing them costs what work does not say. A product over fewer than `LEAST_DEPTH` terms takes as long
    as one over so many."""
    b, m, n, k = gemm_dims(shape)
    left, right, out = float(b * m * k), float(b * k * n), float(b * m * n)
    more = _tiers(touched(shape))[2]
    columns = -(-n // REGISTER) * REGISTER
    swept, since = _emptied(shape)
    work = 2.0 * out * max(k, LEAST_DEPTH)
    return 1.0, swept, since, float(b), work, 2.0 * b * m * columns * k, left, right, out, more


def _attention(shape: OpShape) -> tuple[float, ...]:
    width = next((s[-1] for s in shape.in_shapes if len(s) == 4), 64)
    return 1.0, float(shape.flops), shape.flops / max(width, 1), float(touched(shape))


def _rnn(shape: OpShape) -> tuple[float, ...]:
    """The input's product with its weight, which is read once, and a product with the hidden weight at every step."""
    if len(shape.in_shapes) < 3 or len(shape.in_shapes[0]) != 3 or len(shape.in_shapes[2]) != 2:
        return 1.0, 1.0, float(shape.flops), 0.0, 0.0, 0.0, float(touched(shape))
    steps, batch, width = shape.in_shapes[0]
    gates, hidden = shape.in_shapes[2]
    return (
        1.0, float(steps), 2.0 * steps * batch * gates * width, 2.0 * steps * batch * gates * hidden,
        float(gates * width), float(steps * gates * hidden), float(steps * batch * gates),
    )  # fmt: skip


def _emptied(shape: OpShape) -> tuple[float, float]:
    """How far the op before has emptied the caches, and how far this op's own code has left them. The first MiB takes
    more with it than the next: float32 adds of a few KB take 7 us at once, 15 after 1 MiB, 20 after 4 and 22 after 16
    (medians of 40 on a Xeon), so both are square roots (ops of 112 models, a quarter left out at a time: 9.9 % in the
    mean become 9.7; no further with fourth roots)."""
    return emptied(shape.swept), emptied(shape.since, SINCE)


def emptied(nbytes: int, whole: int = SWEPT) -> float:
    """The share of the caches that so many bytes empty, of which `whole` leave nothing; see `_emptied`."""
    share: float = min(nbytes / whole, 1.0) ** 0.5
    return share


def _context(shape: OpShape, moved: int) -> tuple[float, float, float, float]:
    """`_emptied`; of the bytes that an op moves, those of an op of less than a MiB that it then has to fetch again, and
    those that the op before has not touched either (0 where nothing is known of what ran before)."""
    cold = float(max(moved - shape.swept, 0)) if shape.swept or shape.since else 0.0
    return *_emptied(shape), min(moved, MIB) * min(shape.swept / SWEPT, 1.0), cold


def _rows(shape: OpShape) -> tuple[float, ...]:
    """Rows that are taken or added one by one, and how many of them lie in no cache: a table beyond the first tier is
    met cold, but for as many of its rows as fit."""
    gather = gathers(shape.name)
    moved = shape.out_shapes if gather else shape.in_shapes
    rows = float(prod(moved[0][:-1])) if moved and moved[0] else 1.0
    held = shape.bytes_read if gather else shape.bytes_written
    cold = rows * max(0.0, 1 - MIB / held) if held else 0.0
    read = shape.bytes_written if gather else shape.bytes_read
    context = _context(shape, touched(shape))
    return (1.0, *context, rows, cold, *_tiers(read), *_tiers(shape.bytes_written))


def _reduce(shape: OpShape) -> tuple[float, ...]:
    """Bytes read by sums along the last dim, or across the others, where a partial result is read and written for every
    element (measured: 0.15 against 0.25 to 0.6 ns an element)."""
    whole = shape.in_shapes[0] if shape.in_shapes else ()
    result = shape.out_shapes[0] if shape.out_shapes else ()
    across = bool(whole and result) and whole[-1] == result[-1]
    read, *over = _tiers(shape.bytes_read)
    context = _context(shape, touched(shape))
    return (1.0, *context, 0.0 if across else read, read if across else 0.0, *over, float(shape.bytes_written))


def _norm(shape: OpShape) -> tuple[float, ...]:
    """What is normalised by itself counts too: a map of a channel (batch, group), a token (layer). Maps of 3x3 to 6x6
    took 20 to 50 ns each in a backward pass, as long as 50 of their elements in a large map."""
    whole = next((s for s in shape.in_shapes if len(s) >= 2), (1, 1))
    by_channel = any(kind in shape.name for kind in ("batch_norm", "group_norm"))
    moved = touched(shape)
    return (1.0, *_context(shape, moved), float(prod(whole[:2] if by_channel else whole[:-1])), *_tiers(moved))


def _pool(shape: OpShape) -> tuple[float, ...]:
    """Elements under all windows of a forward pass (2.2 to 3.5 ns each), and of the larger and the smaller map. The
    window is the op's variant; where that is not known, as many elements as the map shrinks by, or 9 if it does not."""
    maps = [prod(s) for s in (*shape.in_shapes, *shape.out_shapes) if len(s) >= 3]
    large, small = float(max(maps, default=1)), float(min(maps, default=1))
    window = prod(int(n) for n in shape.variant.split("x")) if shape.variant else large / small if large > small else 9
    forward = family(shape.name) == "pool"
    return (1.0, *_context(shape, touched(shape)), window * small if forward else 0.0, large, small)


def _stream(shape: OpShape) -> tuple[float, ...]:
    moved = touched(shape)
    return (1.0, *_context(shape, moved), float(shape.runs if shape.runs > 1 else 0), *_tiers(moved))


def _optimizer(shape: OpShape) -> tuple[float, ...]:
    return (1.0, float(len(shape.in_shapes)), *_tiers(touched(shape)))


_FUNCTIONS: dict[str, Callable[[OpShape], tuple[float, ...]]] = {
    "gemm": _gemm, "conv_native": lambda s: native_features(s, *_emptied(s)),
    "conv_onednn": lambda s: onednn_features(s, *_emptied(s)),
    "attention": _attention, "rnn": _rnn, "rows": _rows, "reduce": _reduce,
    "norm": _norm, "pool_taps": _pool, "stream": _stream, "optimizer": _optimizer,
}  # fmt: skip
