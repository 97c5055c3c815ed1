"""What a device's file states of its data sheet, and where each value comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from costmodels import tomlfile as toml

if TYPE_CHECKING:
    from costmodels.device import Device

Backing = Literal["stated", "derived", "memory", "unknown"]
TABLES = ("peak_flops", "best_flops")
FIELDS = (
    "memory_bytes", "memory_bandwidth", "unified_memory", "l2_bytes", "units", "boost_clock", "link", "links",
    "link_bandwidth", "pcie_bandwidth", "c2c_bandwidth", "tdp", "spread",
    "price_per_hour",
)  # fmt: skip


def stated(device: Device) -> dict[str, Any]:
    """Every value of the data sheet that the device's file states, by field or "field.key"."""
    values = {f"{name}.{key}": value for name in TABLES for key, value in getattr(device, name).items()}
    return values | {name: getattr(device, name) for name in FIELDS if getattr(device, name)}


def sources_of(device: Device, name: str) -> tuple[int, ...]:
    """Numbers (from 1) of the device's sources that state a field of `stated`; none where that is not recorded.

    >>> from costmodels.device import load_device
    >>> sources_of(load_device("a10g"), "tdp")
    (1,)
    """
    return device.source_of.get(name) or device.source_of.get(name.partition(".")[0], ())


def backing_of(device: Device, name: str) -> Backing:
    """What backs a field of `stated`: stated by a source, derived from one and to be checked, quoted from memory, or
    unknown where the file records neither.

    >>> from costmodels.device import load_device
    >>> backing_of(load_device("a10g"), "tdp"), backing_of(load_device("a10g"), "pcie_bandwidth")
    ('stated', 'memory')
    """
    sourced = bool(sources_of(device, name))
    if name in device.from_memory or name.partition(".")[0] in device.from_memory:
        return "derived" if sourced else "memory"
    return "stated" if sourced else "unknown"


def memory_share(device: Device) -> float | None:
    """Share of the fields of `stated` that are quoted from memory, 0 to 1; none where the file records no provenance,
    as that of a machine that was measured."""
    if not device.source_of and not device.from_memory:
        return None
    marks = [backing_of(device, name) for name in stated(device)]
    return sum(mark == "memory" for mark in marks) / len(marks)


def source_numbers(data: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """The content of a [source_of] table."""
    return {
        name: tuple(toml.whole({name: number}, name, where, least=1) for number in toml.array(data, name, where))
        for name in data
    }


def check(device: Device, where: str) -> None:
    """A ValueError where the provenance names a field that is not stated, or a source that is not listed."""
    known = {*stated(device), *(name for name in TABLES if getattr(device, name))}
    for place, names in (("from_memory", device.from_memory), ("source_of", device.source_of)):
        for name in names:
            if name not in known:
                raise ValueError(f"{where}: '{place}' names '{name}', which the file does not state; take it out")
    for name, numbers in device.source_of.items():
        if max(numbers, default=0) > len(device.sources):
            raise ValueError(
                f"{where}: 'source_of' gives '{name}' source {max(numbers)}, but 'sources' lists {len(device.sources)}"
            )
