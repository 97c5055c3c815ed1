"""Prices of matrix products (mm, bmm, addmm, linear, grouped) by the tile law and its correction.

The time is the kernel's alone; launching it from Python is the host's, and priced there. Products of a device without a
table of its own borrow constants (`costmodels.relatives`) and are called extrapolated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np

from costmodels.device import Device, list_devices, load_device
from costmodels.families import base_name, family
from costmodels.features import gemm_dims
from costmodels.gemm_correction import Packed, correction_from, factors_of
from costmodels.gemm_correction import packed as packed_table
from costmodels.gemm_law import (
    Array,
    Constants,
    Hardware,
    Menu,
    candidates_of,
    constants_from,
    fastest,
    hardware_of,
    menu,
    packed,
)
from costmodels.ops import OpShape
from costmodels.price import Price
from costmodels.relatives import SAME, Section, measured, same_generation, section_for, vendor

WIDTH = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
REGIONS = (64, 512, 1024)  # upper ends of m of the regions whose errors a section lists; the last has none
# Mean errors of borrowed constants: measured by predicting each device of a table from its nearest other one
# (reports/gemm/borrowed.csv). generation: 0.05 to 0.14 with the relative's correction; vendor: of another generation,
# 0.13 to 1.7, half of them under 0.35. ASSUMPTIONS: dtype: of another dtype of the device; other: of another maker.
BORROWED_ERROR = {"generation": 0.08, "dtype": 0.25, "vendor": 0.40, "other": 0.50}
# A board that may draw less power runs the same kernels at a lower clock: time grows as (power / limit) ** 0.4 where
# the limit is 0.6 to 0.9 of what the work would draw. Median over 165 pairs of power limits of training runs on V100,
# A40 and Quadro RTX 6000 (0.43, 0.36, 0.41; eight in ten between P10 and P90): `python -m validation.fit_power` on
# the Zeus project's traces.
POWER = 0.4
OUTSIDE = 2.0  # outside the fitted range an error is taken to be twice as large, as for the other laws


@dataclass(frozen=True, slots=True, eq=False)
class Pricing:
    """All that prices products of one dtype on one device. low, high: the fitted range of (batches, m, n, k).
    errors: mean relative error by region of m. borrowed: whether the constants are another device's or dtype's.
    law, candidates: constants, hardware and menu as the compiled law takes them."""

    constants: Constants
    hardware: Hardware
    menu: Menu
    correction: Packed | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    errors: tuple[float, ...]
    borrowed: bool
    law: Array
    candidates: Array


def gemm_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one matrix product; None where no measured device is like this one, or the op is none."""
    return gemm_prices(device, [shape])[0]


def gemm_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """`[gemm_price(device, s) for s in shapes]`, evaluated at once per dtype and kind."""
    prices: list[Price | None] = [None] * len(shapes)
    dims = [product_dims(s) for s in shapes]
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, shape in enumerate(shapes):
        if family(shape.name) == "gemm" and (shape.dtype in WIDTH or shape.dtype.startswith("float8")):
            groups.setdefault((_dtype(shape), dims[i][0] > 1), []).append(i)
    for (dtype, batched), members in groups.items():
        pricing = pricing_of(device, dtype, batched)
        if pricing is not None:
            found = _evaluate(pricing, [dims[i] for i in members])
            for i, price in zip(members, found):
                prices[i] = price
    return prices


def _evaluate(pricing: Pricing, dims: Sequence[tuple[int, int, int, int]]) -> list[Price]:
    rows = np.array(dims, float)
    seconds = fastest(pricing.law, pricing.candidates, rows)
    if pricing.correction is not None:
        seconds *= factors_of(pricing.correction, rows)
    prices = []
    for value, product in zip(seconds.tolist(), dims):
        error = pricing.errors[bisect_right(REGIONS, product[1])]
        if not pricing.borrowed and all(low <= x <= high for low, x, high in zip(pricing.low, product, pricing.high)):
            prices.append(Price(value, "interpolated", error))
        else:
            prices.append(Price(value, "extrapolated", error * (1 if pricing.borrowed else OUTSIDE)))
    return prices


def pricing_of(device: Device, dtype: str, batched: bool) -> Pricing | None:
    """What prices products of a dtype on a device; kept in the device's cache."""
    key = ("gemm", dtype, batched)
    if key not in device.cache:
        section = section_for(device, "gemm", dtype + "_batched" * batched)
        device.cache[key] = None if section is None else _pricing(device, dtype, section)
    found: Pricing | None = device.cache[key]
    return found


def _pricing(device: Device, dtype: str, section: Section) -> Pricing:
    """A relative of the same generation lends its correction too: it halves the error (reports/gemm/borrowed.csv)."""
    values, whose = section.values, _whose(device, dtype, section)
    constants = constants_from(values)
    if whose == "generation":
        constants = replace(constants, compute=constants.compute * sustained(device, section, dtype))
    elif whose != "own":
        constants = borrowed_constants(device, dtype, constants, _sisters(device, dtype) if whose == "other" else ())
    hardware, choices = hardware_of(device, dtype, WIDTH.get(dtype, 1)), menu(values["tiles"], values["splits"])
    correction = correction_from(values) if whose in ("own", "generation") else None
    return Pricing(
        constants=constants,
        hardware=hardware,
        menu=choices,
        correction=packed_table(correction) if correction else None,
        low=tuple(map(float, values["low"])),
        high=tuple(map(float, values["high"])),
        errors=tuple(values["errors"]) if whose == "own" else (BORROWED_ERROR[whose],) * (len(REGIONS) + 1),
        borrowed=whose != "own",
        law=packed(constants, hardware),
        candidates=candidates_of(constants, hardware, choices),
    )


def _whose(device: Device, dtype: str, section: Section) -> str:
    """ "own", or the key of `BORROWED_ERROR` that says how far the constants come from."""
    if section.own:
        return "own"
    relative = next((d for d in measured() if d.name == section.device), device)
    if vendor(relative) != vendor(device):
        return "other"
    if not same_generation(relative, device):
        return "vendor"
    fitted, wanted = section.dtype.removesuffix("_batched"), {dtype}
    return "generation" if fitted in wanted | next((s for s in SAME if dtype in s), set()) else "dtype"


def borrowed_pricing(device: Device, relative: Device, section: str) -> Pricing:
    """What prices products of a device by the constants and the correction of another one; for scoring that."""
    values = relative.kernels["gemm"][section]
    found = Section(values, relative.name, section, True)
    return _pricing(device, section.removesuffix("_batched"), found)


def borrowed_constants(
    device: Device, dtype: str, constants: Constants, sisters: Sequence[Device] = ()
) -> Constants:
    """Constants of a relative, with the best share of its peak that anyone measured on this device in place of the
    relative's, or the least that anyone measured on a sister of it: a stronger board must not lose to a weaker one for
    having been measured."""
    own = _best_share(device, dtype)
    known = [own] if own else [share for d in sisters if (share := _best_share(d, dtype))]
    return replace(constants, compute=min(*known, 1.0)) if known else constants


def _best_share(device: Device, dtype: str) -> float:
    """The best rate measured by anyone over the peak, in this dtype or one that shares its kernels; 0 where unknown."""
    kin = next((group for group in SAME if dtype in group), {dtype})
    best = max((device.best_flops.get(d, 0.0) for d in (dtype, *sorted(kin))), default=0.0)
    return best / hardware_of(device, dtype, 2.0).peak


def _sisters(device: Device, dtype: str) -> tuple[Device, ...]:
    """Devices of its maker and generation with a measured rate."""
    return tuple(d for d in _with_best() if same_generation(d, device) and dtype in d.peak_flops)


@cache
def _with_best() -> tuple[Device, ...]:
    return tuple(d for d in map(load_device, list_devices()) if d.best_flops)


def sustained(device: Device, section: Section, dtype: str) -> float:
    """The share of its peak that a device reaches over that of the relative of its generation that lends constants:
    by the best rates that anyone measured on both, else by their power limits (`POWER`), else 1."""
    relative = next((d for d in measured() if d.name == section.device), None)
    if relative is None:
        return 1.0
    own, lent = (d.best_flops.get(dtype, 0.0) / hardware_of(d, dtype, 2.0).peak for d in (device, relative))
    if own and lent:
        return own / lent
    if device.tdp and relative.tdp:
        return float(min(device.tdp / relative.tdp, 1.0) ** POWER)
    return 1.0


def _dtype(shape: OpShape) -> str:
    """The dtype that the operands have: scaled 8-bit products name their result's."""
    return "float8_e4m3fn" if base_name(shape.name) == "_scaled_mm" else shape.dtype


def product_dims(shape: OpShape) -> tuple[int, int, int, int]:
    """Batches, m, n, k. Grouped products (experts) count as batches that share the rows evenly, which packs the waves
    of all groups; products of tensors with equal leading dims are batches too."""
    name = base_name(shape.name)
    ins = [s for s in shape.in_shapes if len(s) >= 2]
    if name == "_grouped_mm" and len(ins) >= 2 and shape.out_shapes and 3 in {*map(len, ins), len(shape.out_shapes[0])}:
        return _grouped_dims(ins[0], ins[1], shape.out_shapes[0])
    if name in ("matmul", "einsum") and len(ins) >= 2 and len(ins[1]) > 2 and ins[0][:-2] == ins[1][:-2]:
        return prod(ins[0][:-2]), ins[0][-2], ins[1][-1], ins[0][-1]
    return gemm_dims(shape)


def _grouped_dims(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, int, int, int]:
    """2-D x 3-D shares the rows, 3-D x 2-D the columns, 2-D x 2-D (a weight's gradient) the k of all groups."""
    groups = max(next((s[0] for s in (right, left, out) if len(s) == 3), 1), 1)
    m, n, k = left[-2], right[-1], left[-1]
    if len(left) == 2 and len(right) == 3:
        m = -(-m // groups)
    elif len(left) == 3 and len(right) == 2:
        n = -(-n // groups)
    elif len(left) == 2 and len(right) == 2:
        k = -(-k // groups)
    return groups, max(m, 1), max(n, 1), max(k, 1)


__all__ = ["BORROWED_ERROR", "Pricing", "gemm_price", "gemm_prices", "pricing_of", "product_dims"]
