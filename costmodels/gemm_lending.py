"""Constants of matrix products for a device: its own section's, or a relative's made to fit.

What a relative lends is its law with the device's own data sheet; its correction, too, within a generation, where it
halves the error (reports/gemm/borrowed.csv). How much of its peak a device reaches in long products is its own: by the
best rate that anyone measured on it, else by what its power limit leaves (`costmodels.power`), else the lender's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import hypot, log

import numpy as np

from costmodels.device import Device, list_devices, load_device
from costmodels.gemm_law import Constants, constants_from, hardware_of, law_seconds, menu
from costmodels.power import BEST_SHARE, DOUBT, LONG, board_ratio, comparable, own_ratio
from costmodels.relatives import SAME, Section, measured, same_generation, vendor

# Mean errors of borrowed constants: measured by predicting each device of a table from its nearest other one
# (reports/gemm/borrowed.csv). generation: 0.05 to 0.14 with the relative's correction; vendor: of another generation,
# 0.13 to 1.7, half of them under 0.35. ASSUMPTIONS: dtype: of another dtype of the device; other: of another maker.
BORROWED_ERROR = {"generation": 0.08, "dtype": 0.25, "vendor": 0.40, "other": 0.50}
TENSOR_TYPES = ("bfloat16", "float16", "float8_e4m3fn", "int8", "tf32")  # the likeliest measured first
LARGE = (2048, 4096, 8192, 16384)  # edges of the products by which a law's best rate is told


@dataclass(frozen=True, slots=True)
class Lent:
    """Constants of matrix products for a device. corrected: whether the section's correction holds for it. error:
    expected relative error; None where the section is the device's own."""

    constants: Constants
    corrected: bool
    error: float | None


def lent(device: Device, dtype: str, section: Section) -> Lent:
    """What a section says of products of a dtype on a device."""
    constants, whose = constants_from(section.values), whose_is(device, dtype, section)
    if whose == "own":
        return Lent(constants, True, None)
    error = BORROWED_ERROR[whose]
    if whose == "other" or _lender(section) is None:
        sisters = _sisters(device, dtype) if whose == "other" else ()
        return Lent(borrowed_constants(device, dtype, constants, sisters), False, error)
    share = sustained(device, section, dtype)
    if not _measured(device, dtype):
        error = hypot(error, DOUBT * log(share))
    return Lent(at_share(constants, share), whose == "generation", error)


def whose_is(device: Device, dtype: str, section: Section) -> str:
    """ "own", or the key of `BORROWED_ERROR` that says how far the constants come from."""
    if section.own:
        return "own"
    relative = _lender(section)
    if relative is None:
        relative = device
    if vendor(relative) != vendor(device):
        return "other"
    if not same_generation(relative, device):
        return "vendor"
    fitted, wanted = section.dtype.removesuffix("_batched"), {dtype}
    return "generation" if fitted in wanted | next((s for s in SAME if dtype in s), set()) else "dtype"


def at_share(constants: Constants, share: float) -> Constants:
    """Constants at `share` times the rate of long products. Where a board is held back less than the lender, its tiles
    run up to `BEST_SHARE` of the peak, and clocks sink less with duration for the rest."""
    compute = constants.compute * share
    most = max(constants.compute, BEST_SHARE)
    if share <= 1.0 or compute <= most:
        return replace(constants, compute=compute)
    sunk = (1.0 + LONG * constants.throttle) * most / compute
    return replace(constants, compute=most, throttle=max(sunk - 1.0, 0.0) / LONG)


def sustained(device: Device, section: Section, dtype: str) -> float:
    """The share of its peak that a device reaches over that of the relative that lends `section`: by the best rates
    that anyone measured, else by their power limits, else 1."""
    relative = _lender(section)
    if relative is None:
        return 1.0
    if own := _best_share(device, dtype):
        return own / (_best_share(relative, dtype) or _best_of_law(relative, dtype, section))
    if comparable(device, relative, dtype):
        return board_ratio(device, relative, dtype, section.values)
    return own_ratio(device, relative, dtype, section.values)


def borrowed_constants(
    device: Device, dtype: str, constants: Constants, sisters: Sequence[Device] = ()
) -> Constants:
    """Constants of a relative, with the best share of its peak that anyone measured on this device in place of the
    relative's (in this dtype, else in another of its tensor cores), or the least that anyone measured on a sister of
    it: a stronger board must not lose to a weaker one for having been measured."""
    own = _best_share(device, dtype)
    if not own and dtype in TENSOR_TYPES:
        shares = (_best_share(device, d) for d in TENSOR_TYPES if d in device.peak_flops)
        own = next((share for share in shares if share), 0.0)
    known = [own] if own else [share for d in sisters if (share := _best_share(d, dtype))]
    return replace(constants, compute=min(*known, 1.0)) if known else constants


def _lender(section: Section) -> Device | None:
    return next((d for d in measured() if d.name == section.device), None)


def _measured(device: Device, dtype: str) -> bool:
    return _best_share(device, dtype) > 0


def _best_share(device: Device, dtype: str) -> float:
    """The best rate measured by anyone over the peak, in this dtype or one that shares its kernels; 0 where unknown."""
    kin = next((group for group in SAME if dtype in group), {dtype})
    best = max((device.best_flops.get(d, 0.0) for d in (dtype, *sorted(kin))), default=0.0)
    return best / hardware_of(device, dtype, 2.0).peak


def _best_of_law(device: Device, dtype: str, section: Section) -> float:
    """The share of its peak that the law of a section gives its device on large products, at best."""
    hardware, constants = hardware_of(device, dtype, 4.0 if dtype == "float32" else 2.0), constants_from(section.values)
    dims = np.array([(1, n, n, n) for n in LARGE], float)
    seconds = law_seconds(constants, hardware, menu(section.values["tiles"], section.values["splits"]), dims)
    return float((2 * dims.prod(axis=1) / hardware.peak / seconds).max())


def _sisters(device: Device, dtype: str) -> tuple[Device, ...]:
    """Devices of its maker and generation with a measured rate."""
    return tuple(d for d in _with_best() if same_generation(d, device) and dtype in d.peak_flops)


@cache
def _with_best() -> tuple[Device, ...]:
    return tuple(d for d in map(load_device, list_devices()) if d.best_flops)
