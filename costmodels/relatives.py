"""Kernel constants of a device that has none of its own: another dtype's, or those of its nearest measured relative."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, log
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from costmodels.device import Device
    from costmodels.ops import Price

Whose = Literal["own", "dtype", "relative"]

# How much wider an error gets by borrowing, and the least error of what a relative lends. Where lender and borrower
# were both measured (reports/kernels, table "Borrowed", 27 pairs) errors grew 2.4 times in the mean of all but one; a
# sister (another board or memory of one chip) was 4 to 12 % off where it was 3 to 11 % off itself, another generation
# 10 to 35 %.
WIDER: dict[Whose, float] = {"own": 1.0, "dtype": 1.5, "relative": 2.0}
SISTER = 0.5  # distance up to which devices are sisters: A100 PCIe and SXM 0.3, H100 and H200 0.4, V100 and T4 0.6
LEAST_FROM_SISTER, LEAST_BORROWED = 0.10, 0.20
_TWINS = {"float16": "bfloat16", "bfloat16": "float16"}  # one rate and one width: nothing is lost between them
_CLOCK = 1.5e9  # Hz, where a device file states none


@dataclass(frozen=True, slots=True)
class Found:
    """A section of kernel constants, whose it is ("own", of another "dtype", of a "relative"), and its expected
    relative error widened accordingly."""

    constants: dict[str, Any]
    whose: Whose
    error: float

    def price(self, seconds: float) -> Price:
        """Seconds by these constants as a price."""
        from costmodels.ops import Price

        return Price(seconds, "interpolated" if self.whose == "own" else "extrapolated", self.error)


def find(device: Device, law: str, dtype: str, needs: str = "error") -> Found | None:
    """The section `[law.dtype]` that has the constant `needs`: the device's own, its twin's among the 16-bit floats,
    another dtype's, or that of the nearest relative; None where nothing was measured at all. Cached on the device."""
    key = (law, dtype, needs)
    if key not in device.cache:
        device.cache[key] = _find(device, law, dtype, needs)
    found: Found | None = device.cache[key]
    return found


def _find(device: Device, law: str, dtype: str, needs: str) -> Found | None:
    if (section := _section(device, law, dtype, needs)) is not None:
        whose: Whose = "own" if dtype in section["of"] else "dtype"
        return Found(section, whose, WIDER[whose] * float(section["error"]))
    near = nearest(device, law, needs)
    section = None if near is None else _section(near, law, dtype, needs)
    if near is None or section is None:
        return None
    least = LEAST_FROM_SISTER if distance(device, near) < SISTER else LEAST_BORROWED
    return Found(section, "relative", max(WIDER["relative"] * float(section["error"]), least))


def _section(device: Device, law: str, dtype: str, needs: str) -> dict[str, Any] | None:
    sections = {k: v for k, v in device.kernels.get(law, {}).items() if needs in v and not k.endswith("_backward")}
    for name in (dtype, _TWINS.get(dtype, "")):
        if name in sections:
            return {**sections[name], "of": (dtype, name)}
    return {**next(iter(sections.values())), "of": ()} if sections else None


def nearest(device: Device, law: str, needs: str = "error") -> Device | None:
    """The catalogue device of the same kind with measured constants of this law that is built most alike."""
    known = [d for d in measured() if d.kind == device.kind and _section(d, law, "", needs) is not None]
    return min(known, key=lambda d: (distance(device, d), d.name), default=None)


def distance(a: Device, b: Device) -> float:
    """How unlike two devices are built: the sum of absolute log ratios of what one unit does per clock (FLOP in 16 and
    in 32 bits, bytes from memory), and a tenth of the log ratio of their whole bandwidths, which tells apart boards of
    one generation. Generations differ by factors of two in the first."""
    pairs = zip(_traits(a), _traits(b))
    return sum(abs(log(x / y)) if x and y else inf for x, y in pairs) + 0.1 * abs(
        log(a.memory_bandwidth / b.memory_bandwidth)
    )


def _traits(device: Device) -> tuple[float, float, float]:
    from costmodels.ops import peak_of

    per_clock = device.units * (device.boost_clock or _CLOCK)
    rates = (peak_of(device, "float16"), peak_of(device, "float32"), device.memory_bandwidth)
    return rates[0] / per_clock, rates[1] / per_clock, rates[2] / per_clock


@lru_cache(maxsize=1)
def measured() -> tuple[Device, ...]:
    """The catalogue devices that have kernel constants of their own."""
    from costmodels.device import CATALOGUE, load_device

    names = sorted(p.stem for p in (CATALOGUE / "kernels").glob("*.toml"))
    return tuple(load_device(name) for name in names)
