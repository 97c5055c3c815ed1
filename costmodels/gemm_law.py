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

from costmodels.compiled import compiled

if TYPE_CHECKING:
    from costmodels.device import Device

Array = NDArray[np.float64]
FULL_TILE = 128 * 256  # elements of the tile whose rate `compute` states
THROTTLE_FROM, THROTTLE_DECADES = 1e-4, 3.0  # seconds at the peak from which clocks sink; decades that tables reach
UNITS_JOIN = 3.0  # exponent of the norm that joins a unit's waves with what a lone block takes; fits give 2.5 to 4


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
    return fastest(packed(c, hw), candidates_of(c, hw, candidates), dims)


def packed(c: Constants, hw: Hardware) -> Array:
    """Constants and hardware as the compiled law takes them."""
    return np.array([*(getattr(c, name) for name in CONSTANTS), *(getattr(hw, f.name) for f in fields(hw))], float)


def candidates_of(c: Constants, hw: Hardware, cand: Menu) -> Array:
    """f8[4, candidates]: rows, columns, parts, and the seconds of one step of k of a whole wave of such tiles."""
    area = cand.rows * cand.columns
    rate = hw.peak / hw.units * c.compute * np.minimum(1.0, area / FULL_TILE) ** c.area
    return np.array([cand.rows, cand.columns, cand.parts, 2 * area / rate])


def slowdown(c: Constants, hw: Hardware, fewer: Hardware, cand: Menu, dims: Array, static: bool = False) -> Array:
    """How many times longer products take on `fewer` units or bandwidth, in the tiles that are fastest on all of `hw`,
    as a library chooses them without knowing what else runs. Waves are whole: `smooth` describes products whose tile
    was chosen for the units at hand, which is not so here.

    `static`: a kernel starts one block a unit and gives each its tiles beforehand, so the blocks that find no unit wait
    until the first have done all theirs: twice the time, however few units are missing."""
    whole, all_of_them = replace(c, smooth=0.0), candidates_of(c, hw, cand)
    tile = chosen(packed(c, hw), all_of_them, dims)
    alone = seconds_in(packed(whole, hw), all_of_them, tile, dims)
    beside = seconds_in(packed(whole, fewer), candidates_of(whole, fewer, cand), tile, dims)
    if static:
        across = np.ceil(dims[:, 2] / cand.columns[tile])
        blocks = dims[:, 0] * np.ceil(dims[:, 1] / cand.rows[tile]) * across * cand.parts[tile]
        beside = np.maximum(beside, alone * np.ceil(np.minimum(blocks, hw.units) / fewer.units))
    ratio: Array = (beside + c.floor) / (alone + c.floor)
    return ratio


# Places in what `packed` makes: the constants in their order, then the hardware.
(
    _COMPUTE, _AREA, _PROLOGUE, _SMOOTH, _STREAM, _IN_FLIGHT, _REREAD, _OVERLAP, _FLOOR, _SPLIT_FLOOR, _SPLIT_BYTES,
    _THROTTLE, _ODD, _RESIDENT, _HOT, _K_STEP, _ALONE, _UNITS, _PEAK, _BANDWIDTH, _CACHE, _OPERAND, _RESULT,
) = range(len(CONSTANTS) + len(fields(Hardware)))  # fmt: skip


@compiled
def fastest(p: Array, cand: Array, dims: Array) -> Array:
    """Seconds of products by the fastest candidate; `p` as `packed`, `cand` as `candidates_of` makes it. A product with
    an empty side is its launch."""
    found = np.empty(len(dims))
    for i in range(len(dims)):
        found[i] = p[_FLOOR]
        if dims[i].min() > 0:
            found[i] += _choose(p, cand, dims[i])[1]
    return found


@compiled
def chosen(p: Array, cand: Array, dims: Array) -> NDArray[np.int64]:
    """Which candidate is the fastest for each product."""
    found = np.empty(len(dims), np.int64)
    for i in range(len(dims)):
        found[i] = _choose(p, cand, dims[i])[0]
    return found


@compiled
def seconds_in(p: Array, cand: Array, tiles: NDArray[np.int64], dims: Array) -> Array:
    """Seconds of products, each in the candidate given for it, without the floor."""
    found = np.zeros(len(dims))
    for i in range(len(dims)):
        if dims[i].min() > 0:
            compute, memory, extra = _parts(p, cand, tiles[i], dims[i], _slower(p, dims[i]))
            found[i] = _joined(compute, memory, p[_OVERLAP]) + extra
    return found


@compiled
def _choose(p: Array, cand: Array, dims: Array) -> tuple[int, float]:
    """The fastest candidate and its seconds without the floor."""
    best, least, slower = 0, np.inf, _slower(p, dims)
    for j in range(cand.shape[1]):
        compute, memory, extra = _parts(p, cand, j, dims, slower)
        if max(compute, memory) + extra < least:  # what it takes at least; powers are slow
            seconds = _joined(compute, memory, p[_OVERLAP]) + extra
            if seconds < least:
                best, least = j, seconds
    return best, least


@compiled
def _parts(p: Array, cand: Array, j: int, dims: Array, slower: float) -> tuple[float, float, float]:
    """Seconds of the waves of tiles, of memory, and of what a split adds, of one product in one candidate."""
    b, m, n, k = dims[0], dims[1], dims[2], dims[3]
    rows, columns, parts, step = cand[0, j], cand[1, j], cand[2, j], cand[3, j]
    down, across = np.ceil(m / rows), np.ceil(n / columns)
    fill = b * down * across * parts / p[_UNITS]
    steps = np.ceil(k / parts / p[_K_STEP]) * p[_K_STEP] + p[_PROLOGUE]
    waves = (1 - p[_SMOOTH]) * np.ceil(fill) + p[_SMOOTH] * fill
    if p[_ALONE] > 0:
        waves = (waves**UNITS_JOIN + p[_ALONE] ** UNITS_JOIN) ** (1 / UNITS_JOIN)
    else:
        waves = max(waves, 1.0)
    compute = waves * steps * step * slower

    moved = operands = b * (m + n) * k * p[_OPERAND]
    moved += b * m * n * p[_RESULT]
    if p[_REREAD] > 0:
        every_tile = b * (down * n + across * m) * k
        moved += p[_REREAD] * _repeated(p, rows * columns, parts, every_tile, operands, fill, dims)
    reach = min(1.0, fill * (rows + columns) / p[_IN_FLIGHT])
    held = 1.0
    if p[_RESIDENT] > 0:
        over = moved / (p[_RESIDENT] * p[_CACHE])
        held += (p[_HOT] - 1.0) / (1.0 + over * over * over * over)
    memory = moved / (p[_BANDWIDTH] * p[_STREAM] * reach * held)
    extra = 0.0
    if parts > 1:  # float32 sums, there and back
        extra = p[_SPLIT_FLOOR] + p[_SPLIT_BYTES] * 8 * parts * b * m * n / p[_BANDWIDTH]
    return compute, memory, extra


@compiled
def _slower(p: Array, dims: Array) -> float:
    """How many times the waves of a product take by lower clocks and by rows that are not aligned."""
    b, m, n, k = dims[0], dims[1], dims[2], dims[3]
    decades = min(max(np.log10(2 * b * m * n * k / (p[_PEAK] * THROTTLE_FROM)), 0.0), THROTTLE_DECADES)
    vector = 16 / p[_OPERAND]
    odd = p[_ODD] if n % vector != 0 or k % vector != 0 else 0.0
    return (1 + p[_THROTTLE] * decades) * (1 + odd)


@compiled
def _repeated(
    p: Array, area: float, parts: float, every_tile: float, operands: float, fill: float, dims: Array
) -> float:
    """Bytes of operands read again: a wave of tiles, laid out as a square, shares its rows and columns of the operands;
    the next wave finds them in the last cache as far as the smaller operand fits there."""
    at_once = min(fill / parts, 1.0) * p[_UNITS]
    wave = max(fill, 1.0) * 2 * np.sqrt(at_once * area) * dims[3]
    missed = min(1.0, min(dims[1], dims[2]) * dims[3] * p[_OPERAND] / p[_CACHE])
    return max(min(wave, every_tile) * p[_OPERAND] - operands, 0.0) * missed


@compiled
def _joined(compute: float, memory: float, power: float) -> float:
    """Two times that overlap partly: their norm, between the larger (power infinite) and the sum (1)."""
    larger, smaller = max(compute, memory), min(compute, memory)
    return larger * (1.0 + (smaller / larger) ** power) ** (1.0 / power)
