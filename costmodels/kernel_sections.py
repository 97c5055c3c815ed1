"""Whose constants a kernel law uses on a device: its own, those of a dtype like this one, or a relative's.

A relative is a catalogue device of the same kind with fitted constants; the nearest is of the same vendor, then of the
generation that computes the same dtypes in tensor cores, then of the most similar data sheet. Nothing is listed by
hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from costmodels.device import CATALOGUE, Device, load_device

# Dtypes that run in the same kind of kernel, nearest first: a 16-bit tensor-core kernel tells more of tf32 than of
# float32, which (without TF32) runs in the plain units.
LIKE = {
    "float16": ("float16", "bfloat16", "tf32", "float8_e4m3fn", "float32"),
    "bfloat16": ("bfloat16", "float16", "tf32", "float8_e4m3fn", "float32"),
    "tf32": ("tf32", "bfloat16", "float16", "float32"),
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64", "float32", "bfloat16"),
    "float8_e4m3fn": ("float8_e4m3fn", "bfloat16", "float16", "float32"),
}
SAME = ({"float16", "bfloat16"},)  # dtypes that share kernels and rates: one's constants are the other's
ONLY_IN_TENSOR_CORES = ("bfloat16", "tf32", "float8_e4m3fn", "float4_e2m1fn_x2")


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Constants for a law on a device. device: name of the relative whose they are, empty where they are its own.
    dtype: what they were fitted to. own: whether they are this device's and of a dtype that shares kernels."""

    values: dict[str, Any]
    device: str
    dtype: str
    own: bool


def section_for(device: Device, law: str, dtype: str) -> Section | None:
    """Constants of `law` ("gemm") for a dtype ("bfloat16", or "float32_batched" where a law has kinds of its own): the
    device's own, else a relative's of the same dtype, else the device's own of the nearest dtype, else a relative's."""
    key = ("kernels", law, dtype)
    if key not in device.cache:
        device.cache[key] = _find(device, law, dtype)
    found: Section | None = device.cache[key]
    return found


def _find(device: Device, law: str, dtype: str) -> Section | None:
    base, _, kind = dtype.partition("_batched")
    kind = "_batched" if kind or dtype.endswith("_batched") else ""
    like = LIKE.get(base, LIKE["float8_e4m3fn"] if base.startswith("float8") or base == "int8" else (base, "float32"))
    same = tuple(d for d in like if d == like[0] or any({d, like[0]} <= group for group in SAME))
    for wanted in (same, like):
        own = _section(device.kernels, law, wanted, kind)
        if own is not None:
            return Section(own[0], "", own[1], own[1].removesuffix("_batched") in same)
        for relative in relatives(device):
            theirs = _section(relative.kernels, law, wanted, kind)
            if theirs is not None:
                return Section(theirs[0], relative.name, theirs[1], False)
    return None


def _section(
    kernels: dict[str, Any], law: str, dtypes: tuple[str, ...], kind: str
) -> tuple[dict[str, Any], str] | None:
    sections = kernels.get(law, {})
    names = [d + k for d in dtypes for k in ((kind, "") if kind else ("",))]
    return next(((sections[name], name) for name in names if name in sections), None)


def relatives(device: Device) -> Iterator[Device]:
    """Catalogue devices of the same kind with fitted constants, nearest first; not the device itself."""
    others = [d for d in measured() if d.kind == device.kind and d.name != device.name]
    yield from sorted(others, key=lambda d: distance(device, d))


@lru_cache(maxsize=1)
def measured() -> tuple[Device, ...]:
    """Catalogue devices with fitted constants."""
    stems = sorted(p.stem for p in (CATALOGUE / "kernels").glob("*.toml"))
    return tuple(load_device(stem) for stem in stems)


def distance(one: Device, other: Device) -> float:
    """How unlike two devices are: vendor outweighs generation, generation outweighs the data sheet.

    >>> near = distance(load_device("h200"), load_device("h100-sxm"))
    >>> near < distance(load_device("h200"), load_device("a100-sxm-80gb"))
    True
    """
    generations = _generation(one) ^ _generation(other)
    apart = 10.0 * (vendor(one) != vendor(other)) + 2.0 * len(generations)
    for of_one, of_other in zip(_sheet(one), _sheet(other)):
        apart += abs(math.log(of_one / of_other))
    return apart


def same_generation(one: Device, other: Device) -> bool:
    """Whether two devices are of one maker, have tensor cores for the same dtypes, and units of about the same rate."""
    alike = vendor(one) == vendor(other) and _generation(one) == _generation(other)
    rates = [_sheet(d)[0] / d.units for d in (one, other)]
    return alike and max(rates) < 1.5 * min(rates)


def vendor(device: Device) -> str:
    """The maker of a device, by the words of its name; a GPU without such a word is NVIDIA's."""
    words = device.name.replace("-", " ").split()
    known = {"Instinct": "AMD", "Apple": "Apple", "Max": "Intel", "Gaudi2": "Intel", "Gaudi3": "Intel", "Arc": "Intel"}
    return next((known[word] for word in words if word in known), "NVIDIA" if device.kind == "gpu" else device.kind)


def _generation(device: Device) -> frozenset[str]:
    """The dtypes for which a device has tensor cores; float16 at more than twice float32's rate is one."""
    peaks = device.peak_flops
    found = {d for d in ONLY_IN_TENSOR_CORES if d in peaks}
    single = peaks.get("float32", 0.0)
    return frozenset(found | {"float16"} if peaks.get("float16", 0.0) > 2.2 * single > 0 else found)


def _sheet(device: Device) -> tuple[float, ...]:
    """Peak, bandwidth and FLOP per byte."""
    known = [device.peak_flops.get(d, 0.0) for d in ("float32", "bfloat16", "float16")]
    peak = max(known) or max(device.peak_flops.values())
    return peak, device.memory_bandwidth, peak / device.memory_bandwidth
