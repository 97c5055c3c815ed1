"""Ops that are bound by memory: element-wise, normalisation, softmax, reductions, gathers, copies, optimizer steps.

A kernel takes its launch, and its bytes at the bandwidth that it reaches; bytes that the last cache still holds are
faster. Normalisation and softmax make several passes over a row that the chip holds: what a row costs beyond its bytes
is a sum of non-negative terms (`norm_terms`, `softmax_terms`), each in bytes at the data sheet's bandwidth, so that a
relative of the measured device can use them.

Fitted by `validation.fit_kernels` to the fp32 tables of NeuSight (torch 2.1: A100, V100, T4, P100, P4, L4) and to the
casts in the aiconfigurator tables (H100, H200, B200, B300, GB200, GB300, L40S); errors in `reports/kernels`.
The eager launch on the host is no part of a price: the tables' share of it is kept apart as `host_floor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from costmodels.compiled import compiled
from costmodels.device import Device
from costmodels.families import FREE, base_name, family
from costmodels.features import touched
from costmodels.price import Price
from costmodels.recurrent import layer_price
from costmodels.relatives import Found, find

if TYPE_CHECKING:
    from costmodels.ops import OpShape

Array = NDArray[np.float64]

LAUNCH = 2e-6  # s of an empty kernel where no table says; casts in CUDA graphs: 1.35 (H200) to 2.0 us (GB200)

# Passes over bytes that `touched` counts once. Batch norm reads its input for the moments and again to scale it
# (3 of 2); backward normalisations read gradient and input twice (5 of 3). From the definitions of these ops; that no
# second pass is served by a cache is an ASSUMPTION.
BATCH_NORM_PASSES, NORM_BACKWARD_PASSES = 1.5, 5 / 3

# Share of the streaming bandwidth by family: ASSUMPTIONS from how kernels access memory (reductions and poolings keep
# fewer loads in flight, a scatter goes through atomics, gradients of embeddings sort their indices first).
STREAM_SHARE = {"reduction": 0.9, "pool": 0.8, "pool_backward": 0.6, "loss": 0.8}
SCATTER_SHARE = 0.5
_SCATTERS = frozenset((
    "embedding_dense_backward", "embedding_backward", "scatter", "scatter_add", "index_put", "index_add", "index_copy",
    "_embedding_bag_dense_backward",
))  # fmt: skip
# A radix sort passes over keys (4 bytes) and their places (8) once for every 8 bits of a key, reading and writing both,
# where `touched` counts the keys read and both written: 4 * 24 bytes for 16. ASSUMPTION
SORT_PASSES = 6.0
_SORTS = frozenset(("sort", "argsort", "msort", "topk", "kthvalue", "unique"))
ASSUMED_ERROR = 0.3  # of a price that rests on one of these shares, which no table has. ASSUMPTION
_CELLS = frozenset((
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell_backward_impl",
    "_thnn_differentiable_lstm_cell_backward",
))  # fmt: skip

# A multi-tensor kernel takes 110 to 144 tensors, all lists counted, and 320 blocks of 65,536 elements a launch
# (torch, aten/src/ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_A_LAUNCH, BLOCKS_A_LAUNCH, BLOCK = 128, 320, 65536

BLOCKS_A_UNIT = 0.5  # rows per unit that reach the bandwidth: half of the units suffice. ASSUMPTION


@dataclass(frozen=True, slots=True, eq=False)
class Pricing:
    """All that prices ops of one kind and dtype on one device. law: what `_seconds` takes before the ops."""

    law: tuple[int, Array, Array]
    found: Found


def rowwise_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """The prices of memory-bound ops and of recurrent layers; None where no device of this kind was measured."""
    prices: list[Price | None] = [None] * len(shapes)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, shape in enumerate(shapes):
        if kind := kind_of(shape.name):
            groups.setdefault((kind, shape.dtype), []).append(i)
        elif family(shape.name) in ("rnn", "rnn_backward"):
            prices[i] = layer_price(device, shape)
    for (kind, dtype), members in groups.items():
        pricing = _pricing_of(device, kind, dtype)
        if pricing is not None:
            rows = np.array([work_of(shapes[i], kind) for i in members])
            for i, value in zip(members, _seconds(*pricing.law, rows).tolist()):
                price = pricing.found.price(value)
                assumed = kind == "stream" and _is_assumed(shapes[i].name)
                prices[i] = Price(value, "extrapolated", max(price.error, ASSUMED_ERROR)) if assumed else price
    return prices


def _is_assumed(name: str) -> bool:
    """Whether an op that streams reaches an assumed share of what the tables' element-wise ops reach."""
    return family(name) in STREAM_SHARE or base_name(name) in _SCATTERS | _SORTS


def rowwise_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one memory-bound op."""
    return rowwise_prices(device, [shape])[0]


def _pricing_of(device: Device, kind: str, dtype: str) -> Pricing | None:
    """What prices ops of a kind on a device; kept in the device's cache."""
    key = ("rowwise law", kind, dtype)
    if key not in device.cache:
        found = find(device, "rowwise", dtype, kind)
        device.cache[key] = None if found is None else Pricing(_packed(found.constants, device, kind), found)
    kept: Pricing | None = device.cache[key]
    return kept


def kind_of(name: str) -> str:
    """Which law an op follows: "norm" and "softmax" hold a row, "stream" is any other; "" is no memory-bound op."""
    what = family(name)
    if what in FREE or (what in ("rnn", "rnn_backward") and base_name(name) not in _CELLS):
        return ""
    if what in ("norm", "norm_backward"):
        return "stream" if "batch_norm" in name else "norm"
    return "softmax" if what == "softmax" else "stream"


def work_of(shape: OpShape, kind: str) -> tuple[float, float, float, float]:
    """Bytes that the kernels of an op move, rows, columns, and launches."""
    moved, launches, what, name = float(touched(shape)), 1.0, family(shape.name), base_name(shape.name)
    if what == "norm_backward":
        moved, launches = moved * NORM_BACKWARD_PASSES, 2.0
    elif what == "norm" and kind == "stream":
        moved, launches = moved * BATCH_NORM_PASSES, 2.0
    elif what == "optimizer":
        launches = float(_optimizer_launches(shape))
    moved /= SCATTER_SHARE if name in _SCATTERS else STREAM_SHARE.get(what, 1.0)
    if name in _SORTS:
        moved *= SORT_PASSES
    if kind == "stream":
        return moved, 1.0, 1.0, launches
    shapes = (*shape.in_shapes, *shape.out_shapes)
    rowed = sum(prod(s) for s in shapes if len(s) > 1 and prod(s) >= prod(shapes[0]))  # no weights, no moments
    share = rowed / max(sum(prod(s) for s in shapes), 1) or 1.0
    return moved * share, *_grid(shape, what), launches


def _grid(shape: OpShape, what: str) -> tuple[float, float]:
    """Rows that are normalised one by one, and elements of each. The moments' shape tells the rows of a norm; a softmax
    is taken over the last dim, as every model of the zoo does."""
    x = shape.in_shapes[0] if shape.in_shapes else (1,)
    elements = max(prod(x), 1)
    moments: tuple[int, ...] = ()
    if what == "norm" and len(shape.out_shapes) > 1:
        moments = shape.out_shapes[1]
    elif what == "norm_backward" and len(shape.in_shapes) > 2:
        moments = shape.in_shapes[2]
    rows = prod(moments) if moments else elements // max(x[-1] if x else 1, 1)
    rows = rows if 0 < rows <= elements else 1
    return float(rows), elements / rows


def _optimizer_launches(shape: OpShape) -> int:
    lists = 4 if "adam" in shape.name else 2
    blocks = sum(ceil(prod(s) / BLOCK) for s in shape.in_shapes) // lists
    return max(ceil(len(shape.in_shapes) / TENSORS_A_LAUNCH), ceil(blocks / BLOCKS_A_LAUNCH), 1)


def seconds_of(constants: Mapping[str, Any], device: Device, kind: str, work: Array) -> Array:
    """Seconds of ops of one kind; `work` has rows bytes, rows, columns, launches (`work_of`)."""
    return _seconds(*_packed(constants, device, kind), np.ascontiguousarray(work.T, float))


_STREAM, _NORM, _SOFTMAX = range(3)
_LAUNCH, _RATE, _CACHED, _KEPT, _BANDWIDTH, _CACHE, _BLOCKS = range(7)  # places in what `_packed` makes
NO_TERMS = np.zeros(0)


def _packed(constants: Mapping[str, Any], device: Device, kind: str) -> tuple[int, Array, Array]:
    """Kind, numbers, and weights of the terms of rows, as the compiled law takes them."""
    launch, cache = float(constants.get("launch", LAUNCH)), float(device.l2_bytes)
    device_numbers = [device.memory_bandwidth, cache, BLOCKS_A_UNIT * device.units]
    if kind == "stream":
        rate = float(constants["stream"])
        kept = float(constants.get("kept", 1.0)) * cache
        return _STREAM, np.array([launch, rate, float(constants.get("cached", rate)), kept, *device_numbers]), NO_TERMS
    which = _NORM if kind == "norm" else _SOFTMAX
    return which, np.array([launch, 1.0, 1.0, 0.0, *device_numbers]), np.array(constants[kind], float)


@compiled
def _seconds(kind: int, p: Array, weights: Array, work: Array) -> Array:
    """Seconds of ops, rows of `work_of`."""
    found = np.empty(len(work))
    if kind == _STREAM:
        for i in range(len(work)):
            found[i] = work[i, 3] * p[_LAUNCH] + _streamed(p, work[i, 0]) / p[_BANDWIDTH]
        return found
    moved, rows, columns = work[:, 0].copy(), work[:, 1].copy(), work[:, 2].copy()
    if kind == _NORM:
        terms = norm_terms(moved, rows, columns, p[_CACHE])
    else:
        terms = softmax_terms(moved, rows, columns, p[_CACHE])
    for i in range(len(work)):
        summed = 0.0
        for j in range(len(weights)):
            summed += weights[j] * terms[j, i]
        busy = min(rows[i] / p[_BLOCKS], 1.0)
        found[i] = work[i, 3] * p[_LAUNCH] + summed / p[_BANDWIDTH] / busy
    return found


@compiled
def _streamed(p: Array, moved: float) -> float:
    """Bytes at the data sheet's bandwidth that take as long as `moved`: what takes up to half of what the last cache
    keeps is served by it at its own rate, nothing of what exceeds that, and a share in between."""
    held = min(max(2 * (1 - moved / max(p[_KEPT], 1.0)), 0.0), 1.0)
    return moved * ((1 - held) / p[_RATE] + held / p[_CACHED])


@compiled
def norm_terms(moved: Array, rows: Array, columns: Array, cache: float) -> Array:
    """Terms of layer, group and RMS normalisation, in bytes: all; per row; per 512 columns of a row; what of a row
    exceeds 1024, 2048 and 4096 columns, which a block reads again; what exceeds the last cache."""
    terms = np.empty((7, len(moved)))
    for i in range(len(moved)):
        terms[0, i], terms[1, i], terms[2, i] = moved[i], rows[i], rows[i] * np.ceil(columns[i] / 512)
        for j in range(3):
            terms[3 + j, i] = moved[i] * max(1 - 1024 * 2**j / columns[i], 0.0)
        terms[6, i] = max(moved[i] - cache, 0.0)
    return terms


@compiled
def softmax_terms(moved: Array, rows: Array, columns: Array, cache: float) -> Array:
    """Terms of a softmax, in bytes: rows of up to 1024 columns, which one warp holds in its registers; longer rows
    with 16-byte aligned rows, by byte and by row; longer rows otherwise, likewise; what of a row exceeds 2048 and 4096
    columns; what exceeds the last cache. The three kernels are torch's (SoftMax.cu)."""
    terms = np.zeros((8, len(moved)))
    for i in range(len(moved)):
        if columns[i] <= 1024:
            terms[0, i] = moved[i]
        else:
            first = 1 if columns[i] % 4 == 0 else 3
            terms[first, i], terms[first + 1, i] = moved[i], rows[i]
        for j in range(2):
            terms[5 + j, i] = moved[i] * max(1 - 2048 * 2**j / columns[i], 0.0)
        terms[7, i] = max(moved[i] - cache, 0.0)
    return terms
