"""`parplan devices`: the devices of the catalogue, with the source of every field."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parplan.arguments import Json
from parplan.console import emit, number, percent, seconds, show, size, table

if TYPE_CHECKING:
    from costmodels.device import Device

Name = Annotated[
    str | None,
    typer.Argument(
        help="One of them in detail: catalogue name, any other name it goes by, local, or a TOML file.",
        show_default=False,
    ),
]
COLUMNS = (
    "name", "kind", "memory", "bandwidth", "bf16", "fp16", "fp32", "units", "link", "TDP", "USD/h", "calibrated from",
    "from memory",
)  # fmt: skip


def devices(name: Name = None, json: Json = False) -> None:
    """List the devices of the catalogue, or show one with the source of every field.

    Peaks are dense. "from memory" is the share of a device's fields that no source backs: check those before relying
    on them.

    Example: parplan devices h100-sxm
    """
    found = _found(name)
    if json:
        emit({"devices": [entry(n, device) for n, device in found.items()]})
    elif name:
        for n, device in found.items():
            _details(n, device)
    else:
        rows = [_row(n, device) for n, device in found.items()]
        show(table("Devices", COLUMNS, rows, left=2))
        show("Rates are dense. `parplan devices NAME` shows every field with its source.")


def _found(name: str | None) -> dict[str, Device]:
    """The devices to show, by the name under which they are found."""
    from costmodels.device import list_devices, load_device, local_path
    from costmodels.names import catalogue_name

    local = {"local": local_path()} if local_path().is_file() else {}
    if name is None:
        return {n: load_device(local.get(n, n)) for n in [*local, *list_devices()]}
    if name in local or name.endswith(".toml"):
        return {name: load_device(local.get(name, name))}
    if name == "local":
        raise ValueError("this machine is not calibrated yet; run `parplan calibrate` first")
    known = catalogue_name(name)
    return {known: load_device(known)}


def entry(name: str, device: Device) -> dict[str, Any]:
    """Everything that is known of a device: `fields` has each value of its data sheet with its sources."""
    from costmodels.sheet import FIELDS, backing_of, memory_share, sources_of, stated

    fields = {
        key: {"value": value, "sources": list(sources_of(device, key)), "backing": backing_of(device, key)}
        for key, value in stated(device).items()
    }
    return {
        "name": name,
        "full_name": device.name,
        "aliases": list(device.aliases),
        "kind": device.kind,
        "peak_flops": device.peak_flops,
        **{key: getattr(device, key) for key in FIELDS},
        "best_flops": device.best_flops,
        "floor_seconds": device.floor_seconds,
        "efficiency": device.efficiency,
        "laws": len(device.laws),
        "samples": len(device.samples),
        "kernels": device.kernels,
        "fields": fields,
        "memory_share": memory_share(device),
        "sources": list(device.sources),
        "notes": list(device.notes),
    }


def calibrated_from(device: Device) -> str:
    """What the prices of its ops rest on: laws measured on it, constants fitted to tables, its best matmul rate."""
    if device.laws:
        return f"{len(device.laws)} laws measured here"
    if tables := [law for law, sections in device.kernels.items() if isinstance(sections, dict)]:
        return "tables: " + ", ".join(tables)
    return "best matmul rate" if device.best_flops else "–"


def _row(name: str, device: Device) -> tuple[str, ...]:
    from costmodels.sheet import memory_share

    peaks = [device.peak_flops.get(d, 0.0) for d in ("bfloat16", "float16", "float32")]
    return (
        name,
        device.kind,
        size(device.memory_bytes),
        _or_dash(device.memory_bandwidth, _rate),
        *(_or_dash(peak / 1e12, lambda v: f"{v:.4g} T") for peak in peaks),
        str(device.units),
        _link(device),
        _or_dash(device.tdp, lambda v: f"{v:g} W"),
        _or_dash(device.price_per_hour, lambda v: f"{v:.2f}"),
        calibrated_from(device),
        "–" if (share := memory_share(device)) is None else f"{share:.0%}",
    )


def _link(device: Device) -> str:
    if device.link_bandwidth:
        return f"{device.link.split(' (')[0]} {_rate(device.link_bandwidth)}"
    return "unified" if device.unified_memory else _or_dash(device.pcie_bandwidth, lambda v: f"PCIe {_rate(v)}")


def _details(name: str, device: Device) -> None:
    from rich.text import Text

    from costmodels.sheet import backing_of, sources_of, stated

    rows = []
    for key, value in stated(device).items():
        backing = backing_of(device, key)
        numbers = ", ".join(map(str, sources_of(device, key))) or "–"
        rows.append((key, plain(key, value), numbers, "" if backing == "stated" else MARKS[backing]))
    show(f"{name}: {device.name}, {device.kind}; also {', '.join(device.aliases) or 'no other names'}")
    show(table("", ("field", "value", "sources", "mark"), rows, left=4))
    assumed = {"floor_seconds": device.floor_seconds} | {f"efficiency.{k}": v for k, v in device.efficiency.items()}
    show(*(f"{key} = {plain(key, value)}" for key, value in assumed.items() if value))
    show(f"calibrated from: {calibrated_from(device)}")
    _kernels(device)
    show(*(Text(f"[{i}] {source}") for i, source in enumerate(device.sources, 1)))
    show(*(Text(f"* {note}") for note in device.notes))


MARKS = {"stated": "", "derived": "derived", "memory": "from memory", "unknown": "not recorded"}


def _kernels(device: Device) -> None:
    """Constants of kernel laws: what they were fitted to, and how far off they are on what they never saw."""
    rows = []
    for law, sections in device.kernels.items():
        for dtype, section in sections.items() if isinstance(sections, dict) else ():
            if isinstance(section, dict):
                error = section.get("error")
                rows.append((f"{law}.{dtype}", str(section.get("data", "–")), str(section.get("rows", "–")),
                             str(section.get("held_out", "–")), percent(error)))  # fmt: skip
    if rows:
        show(table("Kernel constants", ("law", "data", "rows", "held out", "error"), rows, left=2))


def plain(key: str, value: Any) -> str:
    """A field's value for people, with its unit."""
    field = key.partition(".")[0]
    if field in ("memory_bytes", "l2_bytes"):
        return size(value)
    if field == "floor_seconds":
        return seconds(value)
    if field == "spread":
        return f"{value:.2%} of a long product's time"
    if field == "price_per_hour":
        return f"{value:g} USD/h"
    unit = {"peak_flops": "FLOP/s", "best_flops": "FLOP/s", "boost_clock": "Hz", "tdp": "W"}.get(field)
    unit = unit or ("B/s" if field.endswith("bandwidth") else None)
    unit = "OP/s" if key.endswith("int8") else unit
    if field == "unified_memory":
        return "yes: nothing is copied from or to the host"
    return number(value, unit) if unit else str(value)


def _rate(value: float) -> str:
    return number(value, "B/s")


def _or_dash(value: float, text: Callable[[float], str]) -> str:
    return text(value) if value else "–"
