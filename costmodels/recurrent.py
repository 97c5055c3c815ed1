"""Recurrent layers on accelerators: one product for all inputs, then a chain of steps that nothing can shorten.

A step is a product of the hidden state with its weights (they stay in the last cache, but are read in every step) and
an element-wise cell. Assumed: two kernels a step, as libraries run layers that they cannot keep resident; no table
of recurrent layers was at hand, so prices say "roofline" with `ERROR`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from costmodels.device import Device
from costmodels.families import family

if TYPE_CHECKING:
    from costmodels.ops import OpShape, Price

ERROR = 0.40
LAUNCH = 2e-6  # s of the cell's kernel, as in `costmodels.rowwise`
CELL_STREAM = 0.8  # share of the bandwidth of the cell: gates in, states in and out. ASSUMPTION
BACKWARD_PRODUCTS = 2.0  # gradients of the state and of the weights; the latter are one product for all steps


def layer_price(device: Device, shape: OpShape) -> Price | None:
    """The price of a layer, or of its backward pass: inputs (steps, batch, width), weights of the inputs
    (gates, width), weights of the state (gates, hidden), and so on for further layers; None for other shapes."""
    from costmodels.ops import Price

    x = shape.in_shapes[0] if shape.in_shapes else ()
    weights = [s for s in shape.in_shapes[1:] if len(s) == 2]
    pairs = [(a, b) for a, b in zip(weights[::2], weights[1::2]) if a[0] == b[0]]
    if len(x) != 3 or not pairs or 0 in x or pairs[0][0][1] != x[2]:
        return None
    seconds = sum(_layer_seconds(device, shape.dtype, x[0], x[1], a, b) for a, b in pairs)
    factor = BACKWARD_PRODUCTS if family(shape.name) == "rnn_backward" else 1.0
    return Price(factor * seconds, "roofline", ERROR)


def _layer_seconds(
    device: Device, dtype: str, steps: int, batch: int, inputs: tuple[int, ...], state: tuple[int, ...]
) -> float:
    from opgraph.graph import DTYPE_BYTES

    gates, hidden = state
    cell = DTYPE_BYTES.get(dtype, 4) * batch * (gates + 4 * hidden) / (device.memory_bandwidth * CELL_STREAM)
    chain = steps * (_product(device, dtype, batch, gates, hidden) + LAUNCH + cell)
    return _product(device, dtype, steps * batch, gates, inputs[1]) + chain


def _product(device: Device, dtype: str, m: int, n: int, k: int) -> float:
    from costmodels.ops import OpShape, price
    from opgraph.graph import DTYPE_BYTES

    ins, out, size = ((m, k), (k, n)), (m, n), DTYPE_BYTES.get(dtype, 4)
    read, flops = size * sum(prod(s) for s in ins), 2 * m * n * k
    shape = OpShape("aten.mm.default", "forward", ins, (out,), dtype, flops, read, size * m * n)
    return price(device, shape).seconds
