"""Which ops the GPU suite measures: shapes drawn once and for all, in an order that leaves any part of them balanced.

Half of the shapes calibrates and the other half scores (`held_back`), by a hash of the shape: the same half on every
device, so that constants of one machine can be scored on another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

import numpy as np

from validation.fit_common import held_out
from validation.fit_gemm_law import calibration_half

REGIONS = ((1, 64), (64, 512), (512, 1024), (1024, 16385))  # of m: those of `costmodels.gemm`
WIDTHS = (64, 128, 256, 512, 768, 1000, 1024, 1280, 1600, 2048, 2560, 3072, 4096, 5120, 8192, 11008, 14336, 50257)
BATCHES = (4, 12, 16, 32, 48, 64, 96, 128, 192, 256)
MOST_FLOPS = {"float32": 1e12, "tf32": 3e12}  # of one product; others:
MOST_FLOPS_ELSE, MOST_ELEMENTS = 6e12, 4e8
COUNTS = {
    "float32": 60, "tf32": 70, "bfloat16": 110, "float16": 18, "float8_e4m3fn": 45,
    "float32_batched": 16, "bfloat16_batched": 30,
}  # fmt: skip  # products per region and section
HEADS = ((64, 12, 12), (64, 32, 8), (128, 16, 16), (128, 32, 8), (96, 16, 16), (32, 8, 8), (256, 8, 8))
ROWWISE = (
    "add", "mul", "gelu", "relu", "cast", "layer_norm", "layer_norm_backward", "softmax", "log_softmax", "sum",
    "embedding", "embedding_backward", "cat", "batch_norm", "max_pool", "adamw", "nll_loss",
)  # fmt: skip
ONLY_FLOAT32 = ("adamw", "cast", "batch_norm", "nll_loss")


@dataclass(frozen=True, slots=True)
class Case:
    """One op to measure. group: gemm, attention, conv, rowwise. op: which (`validation.gpu_ops`). dims: by group:
    (batches, m, n, k); (batch, heads, key heads, tokens, width, causal, backward); (batch, channels, filters, edge,
    side, stride, groups, backward); (rows, columns)."""

    group: str
    op: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.op}/{self.dtype}/{','.join(map(str, self.dims))}"

    @property
    def section(self) -> str:
        """Of a kernels file: products of many matrices have sections of their own."""
        return self.dtype + "_batched" * (self.group == "gemm" and self.dims[0] > 1)


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a row of ops.json."""
    return Case(row["group"], row["op"], row["dtype"], tuple(row["dims"]))


def held_back(case: Case) -> bool:
    """Whether a case scores (True) or calibrates. Forward and backward, and all kernels and dtypes of a shape, lie on
    one side."""
    if case.group == "gemm":
        return not calibration_half(np.array([case.dims], float))[0]
    dims = case.dims[:5] if case.group == "attention" else case.dims[:7]
    return bool(held_out(*([d] for d in dims))[0])


def cases(quick: bool = False, only: tuple[str, ...] = ()) -> list[Case]:
    """All cases, shuffled by a hash, so that a sweep that ran out of time has some of everything."""
    found = [*gemm_cases(quick), *attention_cases(quick), *conv_cases(quick), *rowwise_cases(quick)]
    chosen = [c for c in dict.fromkeys(found) if not only or c.group in only]
    return sorted(chosen, key=lambda c: hashlib.sha256(c.key.encode()).digest())


def gemm_cases(quick: bool) -> Iterator[Case]:
    """Products over the four regions of m. Those of 8 bits need multiples of 16."""
    counts = {"float32": 24} if quick else COUNTS
    for section, count in counts.items():
        dtype = section.removesuffix("_batched")
        random, most = Random(section), MOST_FLOPS.get(dtype, MOST_FLOPS_ELSE)
        for low, high in REGIONS:
            made = 0
            while made < count:
                b = random.choice(BATCHES) if section != dtype else 1
                m, n, k = _rows(random, low, high), random.choice(WIDTHS), random.choice(WIDTHS)
                if quick:
                    m, n, k = min(m, 2 * low), random.choice((16, 32, 64, 96)), random.choice((16, 32, 64, 96))
                if b > 1:  # attention's products: heads are narrow
                    n, k = (m, random.choice((64, 128))) if random.random() < 0.5 else (random.choice((64, 128)), m)
                if dtype == "float8_e4m3fn":
                    m, n, k = (-(-x // 16) * 16 for x in (m, n, k))
                if 2.0 * b * m * n * k <= most and b * max(m * n, m * k, n * k) <= MOST_ELEMENTS:
                    made += 1
                    yield Case("gemm", "mm" if b == 1 else "bmm", dtype, (b, m, n, k))


def _rows(random: Random, low: int, high: int) -> int:
    """m, log-uniform over a region; three in four are multiples of 8, as batches times tokens are."""
    m = int(low * (high / low) ** random.random())
    rounded = max(m // 8 * 8, 1)
    return rounded if low <= rounded and random.random() < 0.75 else max(min(m, high - 1), low)


def attention_cases(quick: bool) -> Iterator[Case]:
    """Self-attention: flash in two dtypes, the memory-efficient kernel and cuDNN's, unfused; causal or not; forward
    and backward."""
    if quick:
        for tokens, causal in product((16, 32, 48, 64, 80, 96, 112, 128), (0, 1)):
            for width, backward in ((16, 0), (32, 0), (32, 1)):
                yield Case("attention", "flash", "float32", (2, 4, 4, tokens, width, causal, backward))
        return
    random = Random("attention")
    for width, heads, kv_heads in HEADS:
        for tokens in (128, 512, 1024, 2048, 4096, 8192, 16384):
            batch = max(min(32768 // tokens, 64) // random.choice((1, 2, 4)), 1)
            for causal in (0, 1):
                for op, dtype in (("flash", "bfloat16"), ("cudnn", "bfloat16"), ("efficient", "float32")):
                    if op != "flash" and (kv_heads != heads or tokens > 4096):
                        continue
                    for backward in (0, 1):
                        yield Case("attention", op, dtype, (batch, heads, kv_heads, tokens, width, causal, backward))
            if tokens <= 1024 and kv_heads == heads:
                yield Case("attention", "math", "bfloat16", (batch, heads, kv_heads, tokens, width, 0, 0))


def conv_cases(quick: bool) -> Iterator[Case]:
    """Convolutions of CNNs: 1x1, 3x3, 5x5, 7x7, 11x11, strides 1, 2 and 4, grouped and depthwise."""
    if quick:
        for batch, channels, edge, side in product((1, 2), (4, 8), (8, 10, 12), (1, 3)):
            for backward in (0, 1):
                yield Case("conv", "conv", "float32", (batch, channels, 2 * channels, edge, side, 1, 1, backward))
        return
    random = Random("conv")
    stages = ((64, 56), (128, 28), (256, 14), (512, 7), (64, 224), (128, 112), (96, 28), (192, 14))
    layers = [(c, c * random.choice((1, 2, 4)), e, random.choice((1, 3, 3, 3, 5)), 1, 1) for c, e in stages * 5]
    layers += [(3, 64, 224, 7, 2, 1), (3, 64, 224, 11, 4, 1), (3, 64, 224, 3, 1, 1), (3, 768, 224, 16, 16, 1)]
    layers += [(c, 2 * c, e, s, 2, 1) for c, e in stages[:4] for s in (1, 3)]
    layers += [(c, c, e, 3, 1, c) for c, e in stages[:4]] + [(c, c, e, 3, 1, 32) for c, e in stages[:4]]
    for channels, filters, edge, side, stride, groups in layers:
        batch = random.choice((4, 8, 16, 32, 64))
        if batch * edge * edge * max(channels, filters) > MOST_ELEMENTS // 2:
            batch = 4
        for dtype in ("float32", "tf32", "bfloat16"):
            for backward in (0, 1):
                yield Case("conv", "conv", dtype, (batch, channels, filters, edge, side, stride, groups, backward))


def rowwise_cases(quick: bool) -> Iterator[Case]:
    """Memory-bound ops over rows and columns, from what fits the last cache to a thousand times that."""
    grid = [(rows, columns) for columns in (256, 768, 1024, 2048, 4096, 16384) for rows in (64, 2048, 8192, 32768)]
    ops: tuple[str, ...] = ROWWISE
    if quick:
        grid = [(rows, columns) for columns in (32, 64, 128) for rows in (16, 64, 128)]
        ops = ("add", "gelu", "layer_norm", "softmax", "adamw", "sum")
    for op in ops:
        for rows, columns in grid:
            for dtype in ("float32",) if quick or op in ONLY_FLOAT32 else ("float32", "bfloat16"):
                if rows * columns <= MOST_ELEMENTS // 2:
                    yield Case("rowwise", op, dtype, (rows, columns))
