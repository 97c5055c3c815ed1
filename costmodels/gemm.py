"""Prices of matrix products (mm, bmm, addmm, linear, grouped) by the tile law and its correction.

The time is the kernel's alone; launching it from Python is the host's, and priced there. Products of a device without a
table of its own borrow constants (`costmodels.gemm_lending`) and are called extrapolated.

Prices need not grow with every dim, as measured times do not: where a library changes kernels, the correction follows.
L40S's bfloat16 products of 1 to 4 rows and up to 150 columns take 2 to 3 times what the law says of them in its table,
those of 256 columns what it says, so that (2, 143, 4986) is priced at 12 us and (2, 286, 4986) at 5.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log, prod

import numpy as np

from costmodels.device import Device
from costmodels.families import base_name, family
from costmodels.features import gemm_dims
from costmodels.gemm_correction import FADE, Packed, correction_from, factors_of
from costmodels.gemm_correction import packed as packed_table
from costmodels.gemm_law import (
    Array,
    Constants,
    Hardware,
    Menu,
    candidates_of,
    fastest,
    hardware_of,
    menu,
    packed,
)
from costmodels.gemm_lending import BORROWED_ERROR, lent
from costmodels.ops import OpShape
from costmodels.price import Price
from costmodels.relatives import SISTER, Section, distance, relatives, section_for

WIDTH = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
REGIONS = (64, 512, 1024)  # upper ends of m of the regions whose errors a section lists; the last has none
# Outside the fitted range an error is taken to be twice as large, as for the other laws, and once more for each factor
# of 4 beyond the first; MOST at most. ASSUMPTION
OUTSIDE, MOST = 2.0, 0.9
THIN = 64  # rows or columns up to which a product's larger operand is taken to come from memory
WIDE = "_wide"  # ending of a second section of a dtype, whose table reaches to fewer rows, columns and steps of k


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
        dtype = _dtype(shape) if family(shape.name) == "gemm" else ""
        if dtype in WIDTH or dtype.startswith("float8"):
            groups.setdefault((dtype, dims[i][0] > 1), []).append(i)
    for (dtype, batched), members in groups.items():
        pricing = pricing_of(device, dtype, batched)
        if pricing is not None:
            for i, price in zip(members, _prices_of(device, pricing, dtype, [dims[i] for i in members])):
                prices[i] = price
    return prices


def _prices_of(
    device: Device, pricing: Pricing, dtype: str, dims: Sequence[tuple[int, int, int, int]]
) -> list[Price]:
    """Prices of products of one dtype and kind: of float32 below the range of their table by the wide one, where there
    is one, and its vectors times matrices, which are reads of the matrix, as 16-bit ones of as many bytes. tf32 takes
    no longer than float32, which a library may always use. A thin product reads its larger operand from memory: tables
    that repeat a product find it in the last cache, where a model's weights do not stay from step to step."""
    prices = _evaluate(pricing, dims)
    if dtype == "tf32" and (plain := pricing_of(device, "float32", dims[0][0] > 1)) is not None:
        return [min(pair, key=lambda p: p.seconds) for pair in zip(prices, _prices_of(device, plain, "float32", dims))]
    if dtype == "float32":
        _below(device, pricing, dims, prices)
    hardware = pricing.hardware
    for i, (b, m, n, k) in enumerate(dims):
        if b == 1 and 0 < min(m, n) <= THIN and k:
            size = (m * k + k * n) * hardware.operand_bytes + m * n * hardware.result_bytes
            if prices[i].seconds < (least := size / hardware.bandwidth):
                prices[i] = replace(prices[i], seconds=least)
    return prices


def _below(device: Device, pricing: Pricing, dims: Sequence[tuple[int, int, int, int]], prices: list[Price]) -> None:
    """Puts better prices in the place of those below the range of float32's table."""
    below = [i for i, d in enumerate(dims) if min(d) > 0 and any(x < low for x, low in zip(d, pricing.low))]
    if below and (wide := wide_of(device, "float32", dims[below[0]][0] > 1)) is not None:
        for i, price in zip(below, _evaluate(wide, [dims[i] for i in below])):
            prices[i] = price
    vectors = [i for i in below if 1 in dims[i][1:3]]
    if vectors and (reads := reads_of(device)) is not None:
        as_read = [(b, m, n, 2 * k) for b, m, n, k in (dims[i] for i in vectors)]
        for i, price in zip(vectors, _evaluate(reads, as_read)):
            if price.seconds < prices[i].seconds:
                prices[i] = Price(price.seconds, "extrapolated", min(OUTSIDE * price.error, MOST))


def _evaluate(pricing: Pricing, dims: Sequence[tuple[int, int, int, int]]) -> list[Price]:
    rows = np.array(dims, float)
    seconds = _seconds(pricing, rows)
    if pricing.correction is not None:
        seconds *= factors_of(pricing.correction, rows)
    prices = []
    for value, product in zip(seconds.tolist(), dims):
        error = pricing.errors[bisect_right(REGIONS, product[1])]
        if all(low <= x <= high for low, x, high in zip(pricing.low, product, pricing.high)):
            prices.append(Price(value, "extrapolated" if pricing.borrowed else "interpolated", error))
        else:
            wider = max(1.0, OUTSIDE - pricing.borrowed) + max(_beyond(pricing, product) / FADE - 1.0, 0.0)
            prices.append(Price(value, "extrapolated", min(error * wider, max(error, MOST))))
    return prices


def _seconds(pricing: Pricing, rows: Array) -> Array:
    """Seconds by the law. A sum that is longer than all of the table's is split until every unit has a part, as
    libraries do (ASSUMPTION); the menu's splits end where the table gained no more. It takes no less than the longest
    sum of the table."""
    seconds, longest = fastest(pricing.law, pricing.candidates, rows), pricing.high[3]
    deep = rows[:, 3] > longest
    if deep.any():
        units, most = pricing.hardware.units, pricing.menu.parts.max()
        parts = sorted({float(p) for p in (units // 4, units // 2, units, 2 * units, 4 * units) if p > most})
        tiles = sorted(set(zip(pricing.menu.rows.tolist(), pricing.menu.columns.tolist())))
        finer = Menu(*np.array([(*tile, p) for tile in tiles for p in parts]).T) if parts else pricing.menu
        split = fastest(pricing.law, candidates_of(pricing.constants, pricing.hardware, finer), rows[deep])
        edge = np.column_stack([rows[deep][:, :3], np.full(int(deep.sum()), longest)])
        least = fastest(pricing.law, pricing.candidates, edge)
        seconds[deep] = np.minimum(seconds[deep], np.maximum(split, least))
    return seconds


def _beyond(pricing: Pricing, product: tuple[int, int, int, int]) -> float:
    """How far a product lies outside the fitted range: ln of the factors by which its dims do, added up."""
    return sum(
        log(low / max(x, 1)) if x < low else log(x / high) if x > high else 0.0
        for low, x, high in zip(pricing.low, product, pricing.high)
    )


def pricing_of(device: Device, dtype: str, batched: bool) -> Pricing | None:
    """What prices products of a dtype on a device; kept in the device's cache."""
    key = ("gemm", dtype, batched)
    if key not in device.cache:
        section = section_for(device, "gemm", dtype + "_batched" * batched)
        device.cache[key] = None if section is None else _pricing(device, dtype, section)
    found: Pricing | None = device.cache[key]
    return found


def wide_of(device: Device, dtype: str, batched: bool) -> Pricing | None:
    """What prices products below the range of `pricing_of`'s table: a second section of the device, or of a sister with
    the rate of long products that the device has by the first one. Other relatives' would be worse than the first
    section beyond its range (A100's from V100 0.10 instead of 0.08 off, V100's from T4 0.33 instead of 0.10). Kept in
    the device's cache."""
    key = ("gemm", dtype + WIDE, batched)
    if key not in device.cache:
        first = dtype + "_batched" * batched
        main = pricing_of(device, dtype, batched)
        sisters = (d for d in relatives(device) if distance(device, d) < SISTER)
        owner = next((d for d in (device, *sisters) if first + WIDE in d.kernels.get("gemm", {})), None)
        if owner is None or main is None:
            device.cache[key] = None
        else:
            own = owner is device
            found = Section(owner.kernels["gemm"][first + WIDE], "" if own else owner.name, first, own)
            device.cache[key] = _pricing(device, dtype, found, None if own else main.constants)
    kept: Pricing | None = device.cache[key]
    return kept


def reads_of(device: Device) -> Pricing | None:
    """What prices products as reads of their operands: the law of 16-bit products without the time of the units. It
    comes from tables that begin at one row. Kept in the device's cache."""
    if ("gemm", "reads") not in device.cache:
        found = pricing_of(device, "bfloat16", False)
        if found is not None:
            hardware = replace(found.hardware, peak=float("inf"), operand_bytes=2.0, result_bytes=2.0)
            law, candidates = packed(found.constants, hardware), candidates_of(found.constants, hardware, found.menu)
            found = replace(found, hardware=hardware, law=law, candidates=candidates)
        device.cache["gemm", "reads"] = found
    kept: Pricing | None = device.cache["gemm", "reads"]
    return kept


def _pricing(device: Device, dtype: str, section: Section, known: Constants | None = None) -> Pricing:
    """`known`: constants of the device whose rate of long products takes the place of the section's."""
    values = section.values
    loan = lent(device, dtype, section)
    constants, correction = loan.constants, correction_from(values) if loan.corrected else None
    if known is not None:
        constants = replace(constants, compute=known.compute, throttle=known.throttle)
    hardware, choices = hardware_of(device, dtype, WIDTH.get(dtype, 1)), menu(values["tiles"], values["splits"])
    return Pricing(
        constants=constants,
        hardware=hardware,
        menu=choices,
        correction=packed_table(correction) if correction else None,
        low=tuple(map(float, values["low"])),
        high=tuple(map(float, values["high"])),
        errors=tuple(values["errors"]) if loan.error is None else (loan.error,) * (len(REGIONS) + 1),
        borrowed=loan.error is not None,
        law=packed(constants, hardware),
        candidates=candidates_of(constants, hardware, choices),
    )


def borrowed_pricing(device: Device, relative: Device, section: str) -> Pricing:
    """What prices products of a device by the constants and the correction of another one; for scoring that."""
    values = relative.kernels["gemm"][section]
    found = Section(values, relative.name, section, True)
    return _pricing(device, section.removesuffix(WIDE).removesuffix("_batched"), found)


def _dtype(shape: OpShape) -> str:
    """The dtype that the operands have: 8-bit products name their result's."""
    return {"_scaled_mm": "float8_e4m3fn", "_int_mm": "int8"}.get(base_name(shape.name), shape.dtype)


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
