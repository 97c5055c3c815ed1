"""Compressed gradients: bytes on the wire, ops that encode and decode, and memory that they keep. Exact counts.

A bucket is the shapes of the gradients that travel together, n elements of 4 bytes in all; P ranks share it. What a
kind does is what torch's DDP hooks do (fp16, bf16, PowerSGD: torch/distributed/algorithms/ddp_comm_hooks, torch 2.13)
or what the hooks of `validation.compression_hooks` do (int8, sign, topk), op by op; tests run them and compare bytes
and memory. dgc is counted from its paper and executed nowhere.

kind       payload of one rank, bytes             exchange     source
fp16/bf16  2 n                                    all_reduce   torch fp16_compress_hook, bf16_compress_hook
int8       n + 4 ceil(n / 2048)                   all_gather   a scale for every 2048 (Dettmers et al., 2110.02861)
sign       ceil(n / 8) + 4                        all_gather   one scale, error feedback (Karimireddy, 1901.09847)
topk       8 ceil(density n)                      all_gather   value and 32-bit index (Aji and Heafield, 1704.05021)
dgc        8 ceil(density n)                      all_gather   momentum correction, sampled threshold (Lin, 1712.01887)
powersgd   4 rank (rows + columns) of a matrix,   all_reduce   Vogels et al., 1905.13727
           4 n of vectors and small matrices

What cannot be added in its encoded form is gathered by everyone: its bytes grow with P, and so does decoding.
How compression changes convergence is not modelled anywhere here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Literal, cast, get_args

Kind = Literal["none", "fp16", "bf16", "int8", "sign", "topk", "dgc", "powersgd"]
Shapes = Sequence[tuple[int, ...]]
BLOCK = 2048  # elements that share a scale in int8
FLOAT, INDEX, SCALE = 4, 4, 4  # bytes
WORTH = 2  # torch compresses a matrix by PowerSGD where that makes it more than twice as small (min_compression_rate)
EXACT: tuple[Kind, ...] = ("none", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Compression:
    """kind; rank of PowerSGD; density: share of the elements that topk and dgc send."""

    kind: Kind = "none"
    rank: int = 0
    density: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "powersgd" and self.rank < 1:
            raise ValueError(f"powersgd of rank {self.rank}; the rank must be 1 or more, as in powersgd4")
        if self.kind in ("topk", "dgc") and not 0 < self.density <= 1:
            raise ValueError(f"{self.kind} of density {self.density:g}; give a share in (0, 1], as in {self.kind}0.01")

    @property
    def name(self) -> str:
        return f"{self.kind}{self.rank or ''}{f'{self.density:g}' if self.density else ''}"

    @property
    def summable(self) -> bool:
        """Whether encoded gradients can be added, so that an all-reduce or a server can work on them."""
        return self.kind in ("none", "fp16", "bf16", "powersgd")

    @property
    def lossy(self) -> bool:
        """Whether a gradient changes by more than one rounding to 16 bits. DECISION: fp16 and bf16 do not count, as
        mixed precision rounds gradients that way anyway; whoever disagrees leaves them out."""
        return self.kind not in EXACT

    @property
    def feedback(self) -> bool:
        """Whether what was not sent is kept and added to the next gradient."""
        return self.kind in ("sign", "topk", "dgc", "powersgd")


NONE = Compression()
DEFAULTS = ("none", "fp16", "int8", "sign", "topk0.01", "dgc0.001", "powersgd2", "powersgd4")


@dataclass(frozen=True, slots=True)
class Message:
    """One collective of a bucket; bytes as nccl-tests counts them (all_gather: what all ranks send together)."""

    kind: Literal["all_reduce", "all_gather"]
    bytes: int


def compression_from(name: str) -> Compression:
    """The compression of a name: "none", "fp16", "bf16", "int8", "sign", "topk0.01", "dgc0.001", "powersgd4"; a density
    of topk and dgc, or a rank of powersgd, that is left out is 0.01, 0.001 and 4.

    >>> compression_from("powersgd2").rank, compression_from("topk0.05").density
    (2, 0.05)
    """
    found = re.fullmatch(r"(fp16|bf16|int8|[a-z]+)([0-9.]*(?:e-?\d+)?)", name.strip().lower())
    if found is None or found[1] not in get_args(Kind):
        raise ValueError(f"'{name}' is no known compression; use one of {', '.join(DEFAULTS)}, bf16")
    kind, number = cast(Kind, found[1]), found[2]
    try:
        if kind == "powersgd":
            if not (number or "4").isdecimal():
                raise ValueError(f"powersgd of rank {number}; give a whole number, as in powersgd4")
            return Compression(kind, rank=int(number or 4))
        if kind in ("topk", "dgc"):
            return Compression(kind, density=float(number or (0.01 if kind == "topk" else 0.001)))
    except ValueError as error:
        raise ValueError(f"compression '{name}': {error}") from None
    if number:
        raise ValueError(f"'{name}': {kind} takes no number; write {kind}")
    return Compression(kind)


def elements(shapes: Shapes) -> int:
    return sum(prod(s) for s in shapes)


def kept(compression: Compression, n: int) -> int:
    """Elements of n that topk or dgc sends, one at least."""
    return min(max(ceil(compression.density * n - 1e-9), 1), n) if n else 0


@dataclass(frozen=True, slots=True)
class Factors:
    """What PowerSGD makes of a bucket. matrices: (rows, columns, rank) of what it compresses; vectors: elements of what
    it leaves; p, q: elements of the two factors."""

    matrices: tuple[tuple[int, int, int], ...]
    vectors: int

    @property
    def p(self) -> int:
        return sum(rows * rank for rows, _, rank in self.matrices)

    @property
    def q(self) -> int:
        return sum(columns * rank for _, columns, rank in self.matrices)


@lru_cache(maxsize=4096)
def factors(shapes: tuple[tuple[int, ...], ...], rank: int) -> Factors:
    """Tensors as torch's hook sees them: dim 0 by all others; one that would not become WORTH times smaller stays."""
    matrices: list[tuple[int, int, int]] = []
    vectors = 0
    for shape in shapes:
        rows = shape[0] if shape else 1
        columns = prod(shape[1:])
        least = min(rows, columns, rank)
        if (rows + columns) * least * WORTH < rows * columns:
            matrices.append((rows, columns, least))
        else:
            vectors += rows * columns
    return Factors(tuple(matrices), vectors)


def payload(compression: Compression, shapes: Shapes) -> int:
    """Bytes of one rank's encoded bucket."""
    n = elements(shapes)
    match compression.kind:
        case "none":
            return FLOAT * n
        case "fp16" | "bf16":
            return 2 * n
        case "int8":
            return n + SCALE * ceil(n / BLOCK)
        case "sign":
            return ceil(n / 8) + SCALE
        case "topk" | "dgc":
            return kept(compression, n) * (FLOAT + INDEX)
        case "powersgd":
            found = factors(tuple(shapes), compression.rank)
            return FLOAT * (found.vectors + found.p + found.q)


def messages(compression: Compression, shapes: Shapes, ranks: int) -> tuple[Message, ...]:
    """The collectives of a bucket among `ranks`, in order; empty ones are left out."""
    if compression.kind == "powersgd":
        found = factors(tuple(shapes), compression.rank)
        return tuple(Message("all_reduce", FLOAT * n) for n in (found.vectors, found.p, found.q) if n)
    size = payload(compression, shapes)
    return (Message("all_reduce", size) if compression.summable else Message("all_gather", ranks * size),)


def wire_bytes(compression: Compression, shapes: Shapes, ranks: int) -> float:
    """Bytes that each rank sends for a bucket by rings: 2 (P - 1) / P of an all_reduce, (P - 1) / P of an all_gather"""
    share = (ranks - 1) / ranks
    return sum((2 if m.kind == "all_reduce" else 1) * share * m.bytes for m in messages(compression, shapes, ranks))


def reply_bytes(compression: Compression, shapes: Shapes, ranks: int) -> int:
    """Bytes of the sum that a server sends back without losing more: encoded where codes can be added, the union of all
    ranks' elements of topk and dgc, else 4 n."""
    size, whole = payload(compression, shapes), FLOAT * elements(shapes)
    if compression.summable:
        return size
    return min(ranks * size, whole) if compression.density else whole


def state_bytes(compression: Compression, shapes: Shapes) -> int:
    """Bytes that a rank keeps from step to step: what was not sent (4 n); for dgc also its momentum (4 n), for PowerSGD
    the factors from which the next step starts."""
    n = elements(shapes)
    if compression.kind == "dgc":
        return 2 * FLOAT * n
    if compression.kind == "powersgd":
        found = factors(tuple(shapes), compression.rank)
        return FLOAT * (n + found.p + found.q)
    return FLOAT * n if compression.feedback else 0


def buffer_bytes(compression: Compression, shapes: Shapes, ranks: int) -> int:
    """Bytes of encoded gradients that a rank holds while a bucket travels."""
    if compression.kind == "none":
        return 0
    size = payload(compression, shapes)
    return size if compression.summable else (ranks + 1) * size
