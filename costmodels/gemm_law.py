"""Seconds of matrix products on an accelerator from a handful of constants: tiles, waves, bytes in flight, split-K.

A library computes an m x n product in tiles; each tile is one block of threads that walks along k. The law prices every
tile of a menu with every split of k and takes the fastest, as a library's heuristic would:

* compute: blocks run in waves over the units, a wave takes one tile's time, and a tile has a rate that falls with its
  area (small tiles load more per FLOP) and a fixed part (prologue and epilogue, counted in steps of k);
* memory: operands and result once, more where the operands that a wave walks over do not stay in the last cache; a
  block keeps only so many bytes in flight, so a small grid does not reach the bandwidth;
* power: long products run at a lower clock, a share per decade of duration above `THROTTLE_FROM`;
* a split of k adds a launch and the partial sums; every product has a floor.

Sources: tiles and waves: NVIDIA, "Matrix multiplication background user's guide"; the constants are fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from costmodels.device import Device

Array = NDArray[np.float64]
FULL_TILE = 128 * 256  # elements of the tile whose rate `compute` states
THROTTLE_FROM, THROTTLE_DECADES = 1e-4, 3.0  # seconds at the peak from which clocks sink; decades that tables reach
UNITS_JOIN = 3.0  # exponent of the norm that joins a unit's waves with what a lone block takes; fits give 2.5 to 4
CHUNK = 64  # products priced at once: their candidates stay in a core's own cache (1024: twice as slow)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the law needs of a device for one dtype: units, FLOP/s, bytes/s, bytes of the last cache, and the bytes of
    an operand's and of a result's element."""

    units: int
    peak: float
    bandwidth: float
    cache: float
    operand_bytes: float
    result_bytes: float


@dataclass(frozen=True, slots=True)
class Constants:
    """Constants of one device, dtype and kind of product; shares are of the data sheet.

    compute: share of the peak of the largest tile. area: exponent with which a tile's rate falls with its area.
    prologue: steps of k that a tile costs before its first. smooth: 0 where waves are whole, 1 where a kernel spreads
    the last wave evenly (stream-K). stream: share of the bandwidth. in_flight: tile edge (rows + columns) per unit that
    reaches the bandwidth. reread: share of the operands' repeated reads that miss the last cache. overlap: exponent of
    the norm that joins compute and memory (1 adds them, large takes the larger). floor: seconds of any product.
    split_floor: seconds that a split of k adds. split_bytes: share of the partial sums' bytes that goes to memory.
    throttle: share of the rate lost per decade of duration above `THROTTLE_FROM`. odd: share by which compute slows
    where n or k is no multiple of 16 bytes. resident: share of the last cache up to which operands and result stay
    there from run to run (L40S: 14 of 96 MB); hot: how many times faster than the memory they are then read.
    k_step: elements of k that a block loads at once, k is rounded up to it (tensor cores 32, float32's SIMT kernels 8).
    alone: waves that a unit's lone block takes, because only several blocks at once hide each other's latency
    (Turing's float32: 3); 0: exactly one wave.
    """

    compute: float
    area: float
    prologue: float
    smooth: float
    stream: float
    in_flight: float
    reread: float
    overlap: float
    floor: float
    split_floor: float
    split_bytes: float
    throttle: float
    odd: float = 0.0
    resident: float = 0.0
    hot: float = 1.0
    k_step: float = 32.0
    alone: float = 0.0


CONSTANTS = tuple(f.name for f in fields(Constants))


@dataclass(frozen=True, slots=True)
class Menu:
    """Candidates of the law: rows and columns of the tile and parts of k, one entry each."""

    rows: Array
    columns: Array
    parts: Array


def menu(tiles: list[str], splits: list[int]) -> Menu:
    """Every tile ("128x64": rows x columns) with every split of k; a split only helps while the grid is small, so the
    law never gains from one that is not needed."""
    pairs = [[int(edge) for edge in tile.split("x")] for tile in tiles]
    rows, columns, parts = np.array([(a, b, s) for a, b in pairs for s in splits], float).T
    return Menu(rows, columns, parts)


def constants_from(section: dict[str, Any]) -> Constants:
    """The constants of a section of a kernels file."""
    return Constants(**{name: float(section[name]) for name in CONSTANTS if name in section})


def hardware_of(device: Device, dtype: str, operand_bytes: float) -> Hardware:
    """What the law needs of a device; results of 8-bit products are 16 bits wide."""
    from costmodels.ops import peak_of

    # A last cache that is not stated is taken to hold what the memory delivers in 20 us (A100 20 us, H100 16 us).
    cache = float(device.l2_bytes) or device.memory_bandwidth * 20e-6
    peak = peak_of(device, dtype)
    return Hardware(device.units, peak, device.memory_bandwidth, cache, operand_bytes, max(operand_bytes, 2.0))


def law_seconds(c: Constants, hw: Hardware, candidates: Menu, dims: Array) -> Array:
    """Seconds of products, `dims` = rows of (batches, m, n, k)."""
    parts = [_fastest(c, hw, candidates, dims[i : i + CHUNK]) for i in range(0, len(dims), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0)


def slowdown(c: Constants, hw: Hardware, fewer: Hardware, cand: Menu, dims: Array, static: bool = False) -> Array:
    """How many times longer products take on `fewer` units or bandwidth, in the tiles that are fastest on all of `hw`,
    as a library chooses them without knowing what else runs. Waves are whole: `smooth` describes products whose tile
    was chosen for the units at hand, which is not so here.

    `static`: a kernel starts one block a unit and gives each its tiles beforehand, so the blocks that find no unit wait
    until the first have done all theirs: twice the time, however few units are missing."""
    chosen = _every_tile(c, hw, cand, dims).argmin(axis=1)[:, None]
    whole = replace(c, smooth=0.0)
    free, busy = _every_tile(whole, hw, cand, dims), _every_tile(whole, fewer, cand, dims)
    alone, beside = (np.take_along_axis(x, chosen, 1)[:, 0] for x in (free, busy))
    if static:
        tile = chosen[:, 0]
        across = np.ceil(dims[:, 2] / cand.columns[tile])
        blocks = dims[:, 0] * np.ceil(dims[:, 1] / cand.rows[tile]) * across * cand.parts[tile]
        beside = np.maximum(beside, alone * np.ceil(np.minimum(blocks, hw.units) / fewer.units))
    ratio: Array = (beside + c.floor) / (alone + c.floor)
    return ratio


def _fastest(c: Constants, hw: Hardware, cand: Menu, dims: Array) -> Array:
    fastest: Array = _every_tile(c, hw, cand, dims).min(axis=1) + c.floor
    return fastest


def _every_tile(c: Constants, hw: Hardware, cand: Menu, dims: Array) -> Array:
    """Seconds of every product with every tile and split of the menu, without the floor."""
    b, m, n, k = (dims[:, i : i + 1] for i in range(4))
    down, across = np.ceil(m / cand.rows), np.ceil(n / cand.columns)
    blocks = b * down * across * cand.parts
    fill = blocks / hw.units
    compute = _compute(c, hw, cand, fill, dims)
    operands = b * (m + n) * k * hw.operand_bytes
    results = b * m * n * hw.result_bytes
    moved = operands + results
    if c.reread:
        moved = moved + c.reread * _repeated(hw, cand, b * (down * n + across * m) * k, operands, fill, dims)
    reach = np.minimum(1.0, fill * (cand.rows + cand.columns) / c.in_flight)
    held = 1.0 / (1.0 + np.square(np.square(moved / (c.resident * hw.cache)))) if c.resident else 0.0
    memory = moved / (hw.bandwidth * c.stream * reach * (1.0 + (c.hot - 1.0) * held))
    partial = 8 * cand.parts * b * m * n / hw.bandwidth  # float32 sums, there and back
    extra = np.where(cand.parts > 1, c.split_floor + c.split_bytes * partial, 0.0)
    larger, smaller = np.maximum(compute, memory), np.minimum(compute, memory)
    joined = larger * (1.0 + (smaller / larger) ** c.overlap) ** (1.0 / c.overlap)
    seconds: Array = joined + extra
    return seconds


def _compute(c: Constants, hw: Hardware, cand: Menu, fill: Array, dims: Array) -> Array:
    """Seconds of the waves of tiles."""
    b, m, n, k = (dims[:, i : i + 1] for i in range(4))
    rate = hw.peak / hw.units * c.compute * np.minimum(1.0, cand.rows * cand.columns / FULL_TILE) ** c.area
    steps = np.ceil(k / cand.parts / c.k_step) * c.k_step + c.prologue
    waves = (1 - c.smooth) * np.ceil(fill) + c.smooth * fill
    if c.alone:
        waves = (waves**UNITS_JOIN + c.alone**UNITS_JOIN) ** (1 / UNITS_JOIN)
    else:
        waves = np.maximum(waves, 1.0)
    decades = np.clip(np.log10(2 * b * m * n * k / (hw.peak * THROTTLE_FROM)), 0.0, THROTTLE_DECADES)
    vector = 16 / hw.operand_bytes
    slower = (1 + c.throttle * decades) * (1 + c.odd * ((n % vector != 0) | (k % vector != 0)))
    seconds: Array = waves * steps * (2 * cand.rows * cand.columns / rate) * slower
    return seconds


def _repeated(hw: Hardware, cand: Menu, every_tile: Array, operands: Array, fill: Array, dims: Array) -> Array:
    """Bytes of operands read again: a wave of tiles, laid out as a square, shares its rows and columns of the operands;
    the next wave finds them in the last cache as far as the smaller operand fits there."""
    _, m, n, k = (dims[:, i : i + 1] for i in range(4))
    at_once = np.minimum(fill / cand.parts, 1.0) * hw.units
    wave = np.maximum(fill, 1.0) * 2 * np.sqrt(at_once * cand.rows * cand.columns) * k
    reads = np.minimum(wave, every_tile) * hw.operand_bytes
    missed = np.minimum(1.0, np.minimum(m, n) * k * hw.operand_bytes / hw.cache)
    more: Array = np.maximum(reads - operands, 0.0) * missed
    return more
