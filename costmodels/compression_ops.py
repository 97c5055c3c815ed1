"""The ops that encode and decode compressed gradients, and their seconds on a device by its own op prices.

Each list is the program of the hooks, op by op (`costmodels.compression` says whose). Nothing is fitted to a
compressor's time. ASSUMPTIONS: `SELECT_PASSES`, `SAMPLE`, and that rank-3 and larger factors are orthogonalised by as
many launches as Gram-Schmidt needs (torch calls a QR there, which also goes column by column).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from costmodels.compression import BLOCK, Compression, Factors, Shapes, elements, factors, kept, payload
from costmodels.device import Device
from costmodels.ops import OpShape, price_many

# Passes of a selection of the k largest over its input: 4 for the digits of a 32-bit radix select and one that gathers
# (torch, aten/src/ATen/native/cuda/TensorTopK.cu, from memory). On CPUs torch copies the input into pairs of value and
# index (3 times its bytes) and partitions them: about as many. ASSUMPTION.
SELECT_PASSES = 5
SAMPLE = 0.01  # share of the elements whose k largest give DGC's threshold (paper: 0.1 to 1 %)
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1, "bool": 1, "int64": 8}
Ops = list[OpShape]


@dataclass(frozen=True, slots=True)
class Codec:
    """Ops of one bucket on one rank. encode: before the first message; between: among PowerSGD's messages; decode:
    after the last."""

    encode: tuple[OpShape, ...]
    between: tuple[OpShape, ...]
    decode: tuple[OpShape, ...]


def codec(compression: Compression, shapes: Shapes, ranks: int) -> Codec:
    """The ops for a bucket that `ranks` share."""
    n = elements(shapes)
    if compression.kind == "none" or not n:
        return Codec((), (), ())
    if compression.kind in ("fp16", "bf16"):
        half = "float16" if compression.kind == "fp16" else "bfloat16"
        encode = [_op("_to_copy", (n, "float32"), (n, half)), _op("div_", (n, half), (n, half))]
        return Codec(tuple(encode), (), (_op("copy_", (n, half), (n, "float32")),))
    if compression.kind == "powersgd":
        return _powersgd(factors(tuple(shapes), compression.rank), n)
    one = {"sign": _sign, "int8": _int8, "topk": _topk, "dgc": _dgc}[compression.kind]
    encode, start, each = one(compression, n)
    encode.append(_op("copy_", (payload(compression, shapes), "uint8"), (payload(compression, shapes), "uint8")))
    return Codec(tuple(encode), (), (*start, *(each * ranks), _op("div_", (n, "float32"), (n, "float32"))))


def seconds(device: Device, ops: Sequence[OpShape], per_op: float) -> float:
    """Seconds of these ops; per_op: of the host for each. On a CPU both add up; a GPU runs while its host launches, and
    whichever is slower sets the time."""
    busy = sum(p.seconds for p in price_many(device, ops))
    issued = per_op * len(ops)
    return busy + issued if device.kind == "cpu" else max(busy, issued)


def _op(name: str, *sides: tuple[int | tuple[int, ...], str], written: int = 1, flops: int = 0) -> OpShape:
    """An op by (elements or shape, dtype) of its arguments; the last `written` of them are what it writes."""
    shapes = [((s,) if isinstance(s, int) else s) for s, _ in sides]
    sizes = [prod(s) * WIDTH[dtype] for s, (_, dtype) in zip(shapes, sides)]
    ins, outs = shapes[: len(shapes) - written], shapes[len(shapes) - written :]
    dtypes = [d for _, d in reversed(sides)]
    dtype = next((d for d in dtypes if "float" in d), "float32")
    read, wrote = sum(sizes[: len(ins)]), sum(sizes[len(ins) :])
    return OpShape(f"aten.{name}.default", "backward", tuple(ins), tuple(outs), dtype, flops, read, wrote)


def _add(n: int) -> OpShape:
    return _op("add_", (n, "float32"), (n, "float32"), (n, "float32"))


def _select(n: int, k: int) -> Ops:
    sides = (n, "float32"), (k, "float32"), (k, "int64")
    return [_op("topk", *sides, written=2)] * SELECT_PASSES


def _sign(compression: Compression, n: int) -> tuple[Ops, Ops, Ops]:
    bits = ceil(n / 8)
    encode = [
        _add(n), _op("linalg_vector_norm", (n, "float32"), (1, "float32")), _op("ge", (n, "float32"), (n, "bool")),
        _op("mul", (n, "uint8"), (n, "uint8")), _op("sum", (n, "uint8"), (bits, "uint8")),
        _op("where", (n, "bool"), (n, "float32")), _op("sub", (n, "float32"), (n, "float32"), (n, "float32")),
    ]  # fmt: skip
    each = [
        _op("bitwise_and", (bits, "uint8"), (n, "uint8")), _op("ne", (n, "uint8"), (n, "bool")),
        _op("where", (n, "bool"), (n, "float32")), _add(n),
    ]  # fmt: skip
    return encode, [_op("zero_", (n, "float32"))], each


def _int8(compression: Compression, n: int) -> tuple[Ops, Ops, Ops]:
    blocks = ceil(n / BLOCK)
    encode = [
        _op("abs", (n, "float32"), (n, "float32")), _op("amax", (n, "float32"), (blocks, "float32")),
        _op("div", (n, "float32"), (n, "float32")), _op("round_", (n, "float32"), (n, "float32")),
        _op("_to_copy", (n, "float32"), (n, "int8")),
    ]  # fmt: skip
    each = [_op("_to_copy", (n, "int8"), (n, "float32")), _op("mul_", (n, "float32"), (n, "float32")), _add(n)]
    return encode, [_op("zero_", (n, "float32"))], each


def _topk(compression: Compression, n: int) -> tuple[Ops, Ops, Ops]:
    k = kept(compression, n)
    encode = [
        _add(n), _op("abs", (n, "float32"), (n, "float32")), *_select(n, k),
        _op("index", (k, "float32"), (k, "int64"), (k, "float32")), _op("copy_", (n, "float32"), (n, "float32")),
        _op("index_fill_", (k, "int64"), (k, "float32")), _op("_to_copy", (k, "int64"), (k, "float32")),
    ]  # fmt: skip
    return encode, *_scattered(n, k)


def _dgc(compression: Compression, n: int) -> tuple[Ops, Ops, Ops]:
    k, sample = kept(compression, n), max(ceil(SAMPLE * n), 1)
    encode = [
        _op("mul_", (n, "float32"), (n, "float32")), _add(n), _add(n), _op("abs", (n, "float32"), (n, "float32")),
        _op("index", (sample, "float32"), (sample, "int64"), (sample, "float32")),
        *_select(sample, max(ceil(compression.density * sample), 1)), _op("ge", (n, "float32"), (n, "bool")),
        _op("nonzero", (n, "bool"), (k, "int64")), *_select(k, k),
        _op("index", (k, "float32"), (k, "int64"), (k, "float32")),
        *[_op("index_fill_", (k, "int64"), (k, "float32"))] * 2, _op("_to_copy", (k, "int64"), (k, "float32")),
    ]  # fmt: skip
    return encode, *_scattered(n, k)


def _scattered(n: int, k: int) -> tuple[Ops, Ops]:
    each = [_op("_to_copy", (k, "float32"), (k, "int64")), _op("index_add_", (k, "int64"), (k, "float32"))]
    return [_op("zero_", (n, "float32"))], each


def _powersgd(found: Factors, n: int) -> Codec:
    """torch's powerSGD_hook with error feedback and warm start: P = M Q, then Q = M' P, then M = P Q'."""
    p, q = found.p, found.q
    encode = [_add(n), _op("clone", (n, "float32"), (n, "float32"))]
    encode.append(_op("cat", (found.vectors, "float32"), (found.vectors, "float32")))
    for _, columns, rank in found.matrices:
        encode += _orthogonal(columns, rank)
    between: Ops = [_op("copy_", (found.vectors, "float32"), (found.vectors, "float32"))]
    for rows, columns, rank in found.matrices:
        encode.append(_product(rows, rank, columns))
        between += _orthogonal(rows, rank)
    between += [_product(columns, rank, rows) for rows, columns, rank in found.matrices]
    decode = [_op("div_", (q, "float32"), (q, "float32"))] if p else []
    decode += [_product(rows, columns, rank) for rows, columns, rank in found.matrices]
    decode.append(_op("sub", (n, "float32"), (n, "float32"), (n, "float32")))
    return Codec(tuple(encode), tuple(between), tuple(decode))


def _product(m: int, n: int, k: int) -> OpShape:
    sides = ((1, m, k), "float32"), ((1, k, n), "float32"), ((1, m, n), "float32")
    return _op("bmm", *sides, flops=2 * m * n * k)


def _orthogonal(rows: int, rank: int) -> Ops:
    """Gram-Schmidt: each column is divided by its norm, and its part taken out of those that follow."""
    ops: Ops = []
    for left in range(rank - 1, -1, -1):
        column, rest = (rows, "float32"), (rows * left, "float32")
        ops += [_op("linalg_vector_norm", column, (1, "float32")), _op("div_", column, column)]
        if left:
            ops += [_op("mul", column, rest, rest), _op("sum", rest, (left, "float32"))]
            ops += [_op("mul", column, rest), _op("sub_", rest, rest, rest)]
    return ops
