"""Whose constants a kernel law uses on a device: its own, those of another dtype, or of its nearest measured relative.

One rule says who is near, `distance`; nothing is listed by hand. Its weights were chosen by what borrowing costs on
tables of measured ops: each device's held-out rows priced by its nearest other measured device, 66 tables of matrix
products, attention, convolution and memory-bound ops (reports/gemm/borrowed.csv, reports/kernels, "Borrowed").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Any, Literal

from costmodels.device import CATALOGUE, Device, load_device
from costmodels.price import Price

Whose = Literal["own", "dtype", "relative"]

# Dtypes of matrix products that run in the same kind of kernel, nearest first: a 16-bit tensor-core kernel tells more
# of tf32 than of float32, which (without TF32) runs in the plain units.
LIKE = {
    "float16": ("float16", "bfloat16", "tf32", "float8_e4m3fn", "float32"),
    "bfloat16": ("bfloat16", "float16", "tf32", "float8_e4m3fn", "float32"),
    "tf32": ("tf32", "bfloat16", "float16", "float32"),
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64", "float32", "bfloat16"),
    "float8_e4m3fn": ("float8_e4m3fn", "bfloat16", "float16", "float32"),
}
SAME = ({"float16", "bfloat16"},)  # dtypes that share kernels and rates: one's constants are the other's
ANY = "*"  # in an order of dtypes: the first section there is
ONLY_IN_TENSOR_CORES = ("bfloat16", "tf32", "float8_e4m3fn", "float4_e2m1fn_x2")

# Weights of the distance: with them products are borrowed at 26.5 % (every fourth held-out row)
# in the mean of 39 tables and other kernels at 15.4 % of 27; the two rules that this one replaced 26.8 and 17.7 %, 26.9
# and 15.6 %; the best lender of each table 16.1 and 13.8 %. With DTYPE = 2 any UNIT_POWER from 0.5 to 2 chooses the
# same (0: products 32.3 %); with DTYPE = 1 or 0.5 the errors are within 0.3 points.
MAKER, DTYPE, UNIT_POWER, BOARD = 10.0, 2.0, 1.0, 0.1
# How much wider an error gets by borrowing, and the least error of what a relative lends. Where lender and borrower
# were both measured (reports/kernels, table "Borrowed", 27 pairs) errors grew 2.4 times in the mean of all but one; a
# sister (another board or memory of one chip) was 4 to 12 % off where it was 3 to 11 % off itself, another generation
# 10 to 35 %.
WIDER: dict[Whose, float] = {"own": 1.0, "dtype": 1.5, "relative": 2.0}
SISTER = 0.5  # distance up to which devices are sisters: A100 PCIe and SXM 0.35, H100 and H200 0.4, L4 and L40S 0.64
LEAST_FROM_SISTER, LEAST_BORROWED = 0.10, 0.20
_CLOCK = 1.5e9  # Hz, where a device file states none


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Constants for a law on a device. device: name of the relative whose they are, empty where they are its own.
    dtype: what they were fitted to. own: whether they are this device's and of a dtype that shares kernels."""

    values: dict[str, Any]
    device: str
    dtype: str
    own: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A section of kernel constants, whose it is ("own", of another "dtype", of a "relative"), and its expected
    relative error widened accordingly."""

    constants: dict[str, Any]
    whose: Whose
    error: float

    def price(self, seconds: float) -> Price:
        """Seconds by these constants as a price."""
        return Price(seconds, "interpolated" if self.whose == "own" else "extrapolated", self.error)


def section_for(device: Device, law: str, dtype: str) -> Section | None:
    """Constants of `law` ("gemm") for a dtype ("bfloat16", or "float32_batched" where a law has kinds of its own): the
    device's own, else a relative's of the same dtype, else the device's own of the nearest dtype, else a relative's.
    Cached on the device."""
    key = ("kernels", law, dtype)
    if key not in device.cache:
        base, batched = dtype.removesuffix("_batched"), dtype.endswith("_batched")
        eight = base.startswith("float8") or base == "int8"
        like = LIKE.get(base, LIKE["float8_e4m3fn"] if eight else (base, "float32"))
        same = tuple(d for d in like if d == like[0] or any({d, like[0]} <= group for group in SAME))
        kinds = ("_batched", "") if batched else ("",)
        orders = [tuple(d + kind for d in wanted for kind in kinds) for wanted in (same, like)]
        found = _search(device, law, orders)
        if found is not None:
            values, name, lender = found
            own = lender is None and name.removesuffix("_batched") in same
            device.cache[key] = Section(values, lender.name if lender else "", name, own)
        else:
            device.cache[key] = None
    section: Section | None = device.cache[key]
    return section


def find(device: Device, law: str, dtype: str, needs: str = "error") -> Found | None:
    """The section `[law.dtype]` that has the constant `needs`: the device's own, its twin's among the 16-bit floats,
    another dtype's, or that of the nearest relative; None where nothing was measured at all. Cached on the device."""
    key = (law, dtype, needs)
    if key not in device.cache:
        twins = tuple(sorted(d for group in SAME if dtype in group for d in group if d != dtype))
        found = _search(device, law, [(dtype, *twins, ANY)], needs)
        device.cache[key] = None if found is None else _found(device, *found, same=(dtype, *twins))
    section: Found | None = device.cache[key]
    return section


def _found(device: Device, values: dict[str, Any], name: str, lender: Device | None, same: Sequence[str]) -> Found:
    error = float(values["error"])
    if lender is None:
        whose: Whose = "own" if name in same else "dtype"
        return Found(values, whose, WIDER[whose] * error)
    least = LEAST_FROM_SISTER if distance(device, lender) < SISTER else LEAST_BORROWED
    return Found(values, "relative", max(WIDER["relative"] * error, least))


def _search(
    device: Device, law: str, orders: Sequence[tuple[str, ...]], needs: str = ""
) -> tuple[dict[str, Any], str, Device | None] | None:
    """The first section of a law, its dtype and its lender (None: the device itself): for each order of dtypes, the
    device's own and then those of its relatives, nearest first."""
    near: list[Device] = []
    for wanted in orders:
        if (own := _section(device, law, wanted, needs)) is not None:
            return *own, None
        near = near or list(relatives(device))
        for relative in near:
            if (theirs := _section(relative, law, wanted, needs)) is not None:
                return *theirs, relative
    return None


def _section(device: Device, law: str, dtypes: tuple[str, ...], needs: str) -> tuple[dict[str, Any], str] | None:
    sections = {name: v for name, v in device.kernels.get(law, {}).items() if not needs or needs in v}
    for name in dtypes:
        if name == ANY and sections:
            name = next(iter(sections))
        if name in sections:
            return sections[name], name
    return None


def relatives(device: Device) -> Iterator[Device]:
    """Catalogue devices of the same kind with fitted constants, nearest first; not the device itself."""
    others = [d for d in measured() if d.kind == device.kind and d.name != device.name]
    yield from sorted(others, key=lambda d: (distance(device, d), d.name))


@lru_cache(maxsize=1)
def measured() -> tuple[Device, ...]:
    """Catalogue devices with fitted constants."""
    stems = sorted(p.stem for p in (CATALOGUE / "kernels").glob("*.toml"))
    return tuple(load_device(stem) for stem in stems)


def distance(one: Device, other: Device) -> float:
    """How unlike two devices are: another maker, dtypes that only one computes in tensor cores, the absolute log ratios
    of what one unit does per clock (FLOP in 16 and in 32 bits, bytes from memory), of the power that it may draw
    (boards that are held back by theirs run at lower clocks), and a tenth of that of the whole bandwidth, which tells
    apart boards of one generation.

    >>> near = distance(load_device("h200"), load_device("h100-sxm"))
    >>> near < distance(load_device("h200"), load_device("a100-sxm-80gb"))
    True
    """
    apart = MAKER * (vendor(one) != vendor(other)) + DTYPE * len(_generation(one) ^ _generation(other))
    apart += sum(abs(log(x / y)) for x, y in zip(_traits(one), _traits(other)))
    apart += BOARD * abs(log(one.memory_bandwidth / other.memory_bandwidth))
    if one.tdp and other.tdp:
        apart += UNIT_POWER * abs(log((one.tdp / _clocks(one)) / (other.tdp / _clocks(other))))
    return apart


def same_generation(one: Device, other: Device) -> bool:
    """Whether two devices are of one maker, have tensor cores for the same dtypes, and units of about the same rate."""
    alike = vendor(one) == vendor(other) and _generation(one) == _generation(other)
    rates = [_fastest(d) / d.units for d in (one, other)]
    return alike and max(rates) < 1.5 * min(rates)


def vendor(device: Device) -> str:
    """The maker of a device, by the words of its name; a GPU without such a word is NVIDIA's."""
    words = device.name.replace("-", " ").split()
    known = {"Instinct": "AMD", "Apple": "Apple", "Max": "Intel", "Gaudi2": "Intel", "Gaudi3": "Intel", "Arc": "Intel"}
    return next((known[word] for word in words if word in known), "NVIDIA" if device.kind == "gpu" else device.kind)


def has_tensor_cores(device: Device) -> bool:
    """Whether a device computes some dtype in units of their own."""
    return bool(_generation(device))


def rate_per_clock(device: Device, dtype: str) -> float:
    """FLOP of one unit per clock at the peak."""
    from costmodels.ops import peak_of

    return peak_of(device, dtype) / _clocks(device)


def _generation(device: Device) -> frozenset[str]:
    """The dtypes for which a device has tensor cores; float16 at more than twice float32's rate is one."""
    peaks = device.peak_flops
    found = {d for d in ONLY_IN_TENSOR_CORES if d in peaks}
    single = peaks.get("float32", 0.0)
    return frozenset(found | {"float16"} if peaks.get("float16", 0.0) > 2.2 * single > 0 else found)


def _traits(device: Device) -> tuple[float, float, float]:
    from costmodels.ops import peak_of

    clocks = _clocks(device)
    return peak_of(device, "float16") / clocks, peak_of(device, "float32") / clocks, device.memory_bandwidth / clocks


def _clocks(device: Device) -> float:
    """Cycles per second of all units together."""
    return device.units * (device.boost_clock or _CLOCK)


def _fastest(device: Device) -> float:
    known = [device.peak_flops.get(d, 0.0) for d in ("float32", "bfloat16", "float16")]
    return max(known) or max(device.peak_flops.values())
