"""Recurrent layers on accelerators: one product for all inputs, then a chain of steps that nothing can shorten.

A step is a product of the hidden state with its weights (they stay in the last cache, but are read in every step) and
an element-wise cell. ASSUMPTIONS: two kernels a step, as libraries run layers that they cannot keep resident; layers
and directions one after the other (cuDNN overlaps some). No table of recurrent layers was at hand, so prices say
"roofline" with `ERROR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from costmodels.device import Device
from costmodels.families import family
from costmodels.price import Price

if TYPE_CHECKING:
    from costmodels.ops import OpShape

ERROR = 0.40
LAUNCH = 2e-6  # s of the cell's kernel, as in `costmodels.rowwise`
CELL_STREAM = 0.8  # share of the bandwidth of the cell: gates in, states in and out. ASSUMPTION
BACKWARD_PRODUCTS = 2.0  # gradients of the state and of the weights; the latter are one product for all steps


def layer_price(device: Device, shape: OpShape) -> Price | None:
    """The price of the layers of one call, or of their backward pass; None for other shapes.

    Inputs: the sequence (steps, batch, width), then of every layer and direction weights of the inputs (gates, width)
    and of the state (gates, hidden), and of a projection (out, hidden) where there is one. A call of all layers
    (`_cudnn_rnn`) has the states (layers, batch, hidden) too, which tell the batch where that comes first.
    """
    x, cells = shape.in_shapes[0] if shape.in_shapes else (), _cells(shape.in_shapes[1:])
    if len(x) != 3 or not cells or 0 in x or cells[0].inputs != x[2]:
        return None
    states = [s for s in shape.in_shapes[1:] if len(s) == 3] if "cudnn" in shape.name else []
    batch = states[0][1] if states else x[1]
    steps = x[0] * x[1] // batch
    seconds = sum(_cell_seconds(device, shape.dtype, steps, batch, cell) for cell in cells)
    if batch != x[1]:  # the kernels go by steps: a sequence that puts its samples first is copied
        seconds += 2 * prod(x) * _itemsize(shape.dtype) / (device.memory_bandwidth * CELL_STREAM) + LAUNCH
    factor = BACKWARD_PRODUCTS if family(shape.name) == "rnn_backward" else 1.0
    return Price(factor * seconds, "roofline", ERROR)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One layer in one direction: rows of its gates, widths of its input, its state and its cell (`hidden` is more than
    `state` where a projection makes the state narrower)."""

    gates: int
    inputs: int
    state: int
    hidden: int


def _cells(shapes: Sequence[tuple[int, ...]]) -> list[_Cell]:
    weights = [s for s in shapes if len(s) == 2]
    rows = [s for s in weights if s[0] == weights[0][0]]
    if len(rows) < 2:
        return []
    projection = (rows[1][1], rows[1][0] // 4)
    projected = projection[0] < projection[1] and projection in weights
    return [_Cell(a[0], a[1], b[1], projection[1] if projected else b[1]) for a, b in zip(rows[::2], rows[1::2])]


def _cell_seconds(device: Device, dtype: str, steps: int, batch: int, cell: _Cell) -> float:
    moved = _itemsize(dtype) * batch * (cell.gates + 4 * cell.hidden)
    step = _product(device, dtype, batch, cell.gates, cell.state) + LAUNCH
    step += moved / (device.memory_bandwidth * CELL_STREAM)
    if cell.state != cell.hidden:
        step += _product(device, dtype, batch, cell.state, cell.hidden)
    return _product(device, dtype, steps * batch, cell.gates, cell.inputs) + steps * step


def _itemsize(dtype: str) -> int:
    from opgraph.graph import DTYPE_BYTES

    return DTYPE_BYTES.get(dtype, 4)


def _product(device: Device, dtype: str, m: int, n: int, k: int) -> float:
    from costmodels.ops import OpShape, price

    ins, out, size = ((m, k), (k, n)), (m, n), _itemsize(dtype)
    read, flops = size * sum(prod(s) for s in ins), 2 * m * n * k
    shape = OpShape("aten.mm.default", "forward", ins, (out,), dtype, flops, read, size * m * n)
    return price(device, shape).seconds
