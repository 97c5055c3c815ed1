"""Which kernel law prices an op: the laws of matrix products, attention, convolution and row-wise ops, by family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from costmodels.device import Device
from costmodels.families import family

if TYPE_CHECKING:
    from costmodels.ops import OpShape
    from costmodels.price import Price

    Law = Callable[[Device, Sequence[OpShape]], list[Price | None]]

_MODULE_OF_FAMILY = {
    "gemm": "gemm", "attention": "attention", "attention_backward": "attention", "conv": "convolution",
    "conv_backward": "convolution",
}  # fmt: skip
_LAW_OF_MODULE = {"gemm": "gemm", "attention": "attention", "convolution": "conv", "rowwise": "rowwise"}


def kernel_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one op by the kernel law of its family; None where no law knows the device or the op."""
    if device.kind == "cpu":
        return None
    return _law(_MODULE_OF_FAMILY.get(family(shape.name), "rowwise"))(device, [shape])[0]


def kernel_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """`[kernel_price(device, s) for s in shapes]`, with all ops of one law priced at once. A CPU follows the laws that
    `parplan calibrate` measures, so no kernel law speaks for it."""
    if device.kind == "cpu":
        return [None] * len(shapes)
    prices: list[Price | None] = [None] * len(shapes)
    groups: dict[str, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(_MODULE_OF_FAMILY.get(family(shape.name), "rowwise"), []).append(i)
    for module, members in groups.items():
        for i, price in zip(members, _law(module)(device, [shapes[i] for i in members])):
            prices[i] = price
    return prices


@lru_cache(maxsize=8)
def _law(module: str) -> Law:
    """The function of a module that prices a list of ops; imported at the first op that needs it, because most
    commands price none."""
    law: Law = getattr(import_module(f"costmodels.{module}"), f"{_LAW_OF_MODULE[module]}_prices")
    return law
