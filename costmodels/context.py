"""What surrounds an op in its step and changes its time on a CPU: which caches the ops before it have emptied, and how
its operands lie in memory.

The same op on the same shapes takes 3 or 30 us in one step. Of the ops below 100 us of calibration's models, and of
sixteen others, one that follows an op which moved more than 8 MiB takes 20 to 30 us longer (its
code, and what the framework walks to call it, have left the caches), one whose kernel has not run for 4 MiB and more
some 5 to 15 us, and a product of heads with a table of angles 10 to 20 ns for every stretch of 32 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from math import log2, prod
from typing import TYPE_CHECKING

from costmodels.families import FREE, base_name, family
from costmodels.features import SINCE, SWEPT, emptied, touched

if TYPE_CHECKING:
    from costmodels.device import Device
    from costmodels.ops import OpShape
    from costmodels.price import Price

LEAST_SWEPT = 2**19  # bytes: what is less counts as nothing
NEVER = 2**40
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides in elements


def in_context(shapes: Sequence[OpShape]) -> list[OpShape]:
    """The ops of a stretch of work that is repeated over and over, each with what the ones before it moved.

    `swept`: bytes of the op before, to a power of two. `since`: bytes since the same kernel (name, dtype and number of
    tensors: a number as second factor is another one) ended, to a power of four. Neither more than empties the caches.
    Coarse, so that few different ops are left to price; views do nothing.
    """
    ends: dict[tuple[str, int, str], int] = {}
    clock = before = 0
    found: list[OpShape] = []
    for last in (False, True):
        for shape in shapes:
            if family(shape.name) in FREE:
                found += [shape] * last
                continue
            kernel = (base_name(shape.name), len(shape.in_shapes), shape.dtype)
            if last:
                swept = min(_power(before, 1), SWEPT)
                since = min(_power(clock - ends.get(kernel, clock - NEVER), 2), SINCE)
                changed = swept != shape.swept or since != shape.since
                found.append(replace(shape, swept=swept, since=since) if changed else shape)
            before = touched(shape)
            clock += before
            ends[kernel] = clock
    return found


def _power(nbytes: int, step: int) -> int:
    """The nearest power of 2 ** step, 0 below `LEAST_SWEPT`."""
    return 0 if nbytes < LEAST_SWEPT else int(2.0 ** (step * round(log2(nbytes) / step)))


def price_in_order(device: Device, shapes: Sequence[OpShape]) -> list[Price]:
    """The prices of ops that run one after the other. Kernels of accelerators go by shapes alone."""
    from costmodels.ops import price_many

    return price_many(device, in_context(shapes) if device.laws else shapes)


def price_with_host(
    device: Device, shapes: Sequence[OpShape], phases: Sequence[str]
) -> tuple[list[Price], list[float]]:
    """`price_in_order`, and the seconds that Python and the framework take beside each of these ops (`per_op`)."""
    from costmodels.ops import price_many

    placed = in_context(shapes) if device.laws else shapes
    return price_many(device, placed), [per_op(device, phase, s.swept) for s, phase in zip(placed, phases, strict=True)]


def per_op(device: Device, phase: str, swept: int = 0) -> float:
    """Seconds of Python and the framework beside an op that follows one which moved `swept` bytes: their code and data
    share the caches with the ops' (`validation.calibrate`). None for an optimizer's, which `Device.host` counts by
    tensors."""
    if phase == "optimizer":
        return 0.0
    key = "op_backward" if phase == "backward" else "op_forward"
    cold = device.host.get(f"{key}_swept", 0.0) if swept else 0.0
    return device.host.get(key, 0.0) + cold * emptied(swept)


def is_stream(name: str) -> bool:
    """Whether an op walks its operands element by element, so that their strides matter."""
    return family(name) == "pointwise" or base_name(name) in ("clone", "copy", "_to_copy", "contiguous")


def runs_of(results: Sequence[Layout], operands: Sequence[Layout]) -> int:
    """`inner_runs` of an op; one that works in place has no result of its own."""
    return inner_runs((results or operands)[0], tuple(operands)) if results or operands else 1


@lru_cache(maxsize=2**16)
def inner_runs(result: Layout, operands: tuple[Layout, ...]) -> int:
    """Stretches that an element-wise kernel walks one by one: dims of the result are joined where all operands allow it
    (broadcast operands have stride 0), and the innermost joined one is a stretch.

    >>> inner_runs(((4, 8, 32), (256, 32, 1)), (((4, 8, 32), (256, 32, 1)),))
    1
    >>> inner_runs(((4, 8, 32), (256, 32, 1)), (((4, 8, 32), (32, 128, 1)),))
    32
    """
    shape, strides = result
    rows = [strides]
    for dims, steps in operands:
        missing = len(shape) - len(dims)
        if missing < 0 or any(d not in (1, n) for d, n in zip(dims, shape[missing:])):
            return 1  # no element-wise op
        own = (0 if d == 1 and n != 1 else s for d, s, n in zip(dims, steps, shape[missing:]))
        rows.append((*(0,) * missing, *own))
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: strides[d])
    if not order:
        return 1
    run = shape[order[0]]
    for inner, outer in pairwise(order):
        if any(row[outer] != row[inner] * shape[inner] for row in rows):
            break
        run *= shape[outer]
    return prod(shape) // run
