"""A device: what its data sheet says, and the laws that were measured on it. TOML in, TOML out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

from costmodels import sheet
from costmodels import tomlfile as toml
from costmodels.families import PARTS, family
from costmodels.features import BYTES, FORMS
from costmodels.neighbours import Neighbours, is_label
from costmodels.signature import Signature, is_written, parsed, written

Kind = Literal["cpu", "gpu", "tpu", "npu"]
CATALOGUE = Path(__file__).parent / "catalogue"
MACHINES = CATALOGUE / "kernels" / "machines"  # constants measured on one machine: its device type's differ
BRIEF_STEP = 0.01  # seconds: a call more or less is a tenth of such a step, so its error says nothing of longer ones


@dataclass(frozen=True, slots=True)
class Law:
    """Seconds of one op, `sum(coefficients * features)`; `form` names the features (`costmodels.features`).

    key: "op/dtype" ("mm/float32") or "family:dtype" of a law that pools all ops of a family.
    low, high: range of each raw dim (see `features.extent`) seen in calibration; outside is extrapolation.
    error: mean absolute relative error on the held-out half of the samples. samples: how many there were.
    """

    key: str
    form: str
    coefficients: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    error: float = 0.0
    samples: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """One device that runs ops, one at a time.

    kind: npu is an accelerator that is neither GPU nor TPU (Gaudi, Trainium, Ascend).
    peak_flops: dense FLOP/s by dtype (an FMA is two). memory_bytes: capacity. memory_bandwidth: bytes/s.
    units: SMs, compute units or cores of a GPU, cores of a CPU device, TensorCores of a TPU.
    floor_seconds: least time of a kernel where no law says more.
    efficiency: share of the peak (FLOP/s for compute families, bandwidth for the others) by op family,
        used by the roofline only.
    laws: measured laws by key. samples: seconds of measured ops, by `ops.signature`.
    neighbours: what measured ops say of the laws around them.
    host: seconds of Python and runtime overhead by kind. anchor_seconds: time of the anchor benchmark
        (`validation.anchor`) at calibration, 0 where there is none.
    kernels: constants of kernel laws that were fitted to tables of measured ops, one section per law and dtype
        ("gemm": {"bfloat16": {...}}), from `catalogue/kernels`; empty where there is none.
    step_error: root mean square relative error of whole training steps predicted by laws that saw none of their ops,
        0 where none were measured. brief_error: the same of steps below `BRIEF_STEP`.
    in_tf32: op families whose float32 ops run in tf32 (`costmodels.rounding`); a device file has none.
    slowest: how many times as long its products, convolutions and attention take as on the device that was measured
        (`costmodels.variability`).

    Of the data sheet, 0 or empty where it is not stated:
    l2_bytes: last cache that all units share, bytes. boost_clock: Hz. link, links: name and number of the links to
        other devices. link_bandwidth: bytes/s in one direction, all links together.
    pcie_bandwidth, c2c_bandwidth: bytes/s in one direction to the host by PCIe and by a coherent chip-to-chip link.
    unified_memory: the host uses the same memory, so that nothing is copied.
    tdp: watts. spread: standard deviation of the time of long products among devices of this model, over its median.
    price_per_hour: USD per device in a cloud. best_flops: best matmul rate measured by anyone, FLOP/s by
        dtype.
    aliases: other names that published tables and drivers use for it (see `costmodels.names`).
    sources: where the values were read. source_of: field, or "field.key" of a table, to the numbers (from 1) of the
        `sources` that state it. from_memory: fields that no source backs, or that are derived: to be checked.
    """

    name: str
    kind: Kind
    peak_flops: dict[str, float]
    memory_bytes: int
    memory_bandwidth: float
    units: int = 1
    floor_seconds: float = 0.0
    efficiency: dict[str, float] = field(default_factory=dict)
    laws: dict[str, Law] = field(default_factory=dict)
    samples: dict[Signature, float] = field(default_factory=dict)
    neighbours: Neighbours = field(default_factory=lambda: Neighbours({}), repr=False)
    kernels: dict[str, Any] = field(default_factory=dict, repr=False)
    host: dict[str, float] = field(default_factory=dict)
    anchor_seconds: float = 0.0
    step_error: float = 0.0
    brief_error: float = 0.0
    in_tf32: tuple[str, ...] = ()
    slowest: float = 1.0
    l2_bytes: int = 0
    boost_clock: float = 0.0
    link: str = ""
    links: int = 0
    link_bandwidth: float = 0.0
    pcie_bandwidth: float = 0.0
    c2c_bandwidth: float = 0.0
    unified_memory: bool = False
    tdp: float = 0.0
    spread: float = 0.0
    price_per_hour: float = 0.0
    best_flops: dict[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    source_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    from_memory: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def calibrated(self) -> bool:
        return bool(self.laws)

    @property
    def host_bandwidth(self) -> float:
        """bytes/s of a copy between host and device in one direction; infinite where they share one memory, 0 where
        it is not stated."""
        return math.inf if self.unified_memory else self.c2c_bandwidth or self.pcie_bandwidth


def rescale(device: Device, ratio: float, parts: Mapping[str, float] | None = None) -> Device:
    """The same device when everything on it takes `ratio` times as long (anchor now / anchor at calibration), and what
    goes by one of the anchor's `parts` (`costmodels.families.PARTS`) as many times as stands there."""
    parts = parts or {}
    if not (ratio > 0 and all(r > 0 for r in parts.values())):
        raise ValueError(f"the ratios of anchor times are {[ratio, *parts.values()]}; they must be more than 0")

    def part_of(key: str) -> str:  # of a law or a kernel: "mm/float32", "pointwise:float32", "gelu.tanh/float32"
        return PARTS.get(key.partition(":")[0] if ":" in key else family(key.partition("/")[0]), "passes")

    def of(key: str) -> float:
        return parts.get(part_of(key), ratio)

    def of_host(key: str) -> float:  # the anchor itself by part; overheads by all of it
        return parts.get(key.removeprefix("anchor_"), ratio)

    def rescaled(law: Law, key: str) -> Law:
        # Of a pass over memory its bytes alone go by the memory's pace: what a call and what lies in caches takes, by
        # that of calls. Memory was 9 to 44 % slower one day than in calibration, and calls as fast as there.
        whole = of(key)
        call = parts.get("calls", whole) if part_of(key) == "passes" else whole
        named = zip(law.coefficients, FORMS[law.form], strict=True)
        return replace(law, coefficients=tuple(c * (whole if f.startswith(BYTES) else call) for c, f in named))

    laws = {k: rescaled(v, k) for k, v in device.laws.items()}
    ratios = {"loaded", "skew"}
    return replace(
        device,
        laws=laws,
        samples={k: v * of(k[0]) for k, v in device.samples.items()},
        host={k: v if k in ratios else v * of_host(k) for k, v in device.host.items()},
        anchor_seconds=device.anchor_seconds * ratio,
        notes=(*device.notes, f"op times rescaled by {ratio:.3f}, the ratio of anchor times"),
        cache={},
    )


def basis_of(device: Device) -> tuple[str, ...]:
    """What a reader of a prediction should know of the device: how this machine was measured, or that a catalogue
    device rests on tables and data sheets (whose own notes `parplan devices` shows)."""
    if device.kind == "cpu":
        return device.notes
    from costmodels.ops import stand_in

    basis = "published op tables and its data sheet" if device.kernels else "its data sheet and measured relatives"
    said = f"{device.name} was not measured here: prices rest on {basis}; sources: parplan devices '{device.name}'"
    missing = stand_in(device, "float32")
    return (said, f"products in float32: {missing}") if missing else (said,)


def local_path() -> Path:
    """Where `parplan calibrate` keeps this machine's device file."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "parplan" / "local.toml"


def list_devices() -> list[str]:
    """Catalogue names, sorted."""
    return sorted(p.stem for p in (CATALOGUE / "devices").glob("*.toml"))


def load_device(path_or_name: str | Path) -> Device:
    """A device from a TOML file, or from the catalogue by name ("h100-sxm")."""
    path = Path(path_or_name)
    if path.suffix != ".toml":
        path = CATALOGUE / "devices" / f"{str(path_or_name).lower()}.toml"
        if not path.is_file():
            raise unknown_device(str(path_or_name), get_close_matches(path.stem, list_devices(), n=4, cutoff=0.5))
    device = device_from(toml.read_toml(path), str(path))
    kernels = kernels_path(path)
    return replace(device, kernels=toml.read_toml(kernels)) if kernels.is_file() else device


def unknown_device(text: str, near: Iterable[str]) -> ValueError:
    """The error for a name that no device has, with those that are nearest to it."""
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    return ValueError(
        f"'{text}' is no known device; {hint}give a path that ends in .toml, or a name that `parplan devices` lists"
    )


def kernels_path(path: Path) -> Path:
    """Where the fitted kernel constants of a device file lie: `../kernels` in the catalogue, else beside it."""
    in_catalogue = path.parent.name == "devices"
    return path.parent.parent / "kernels" / path.name if in_catalogue else path.with_suffix(".kernels.toml")


def on_machine(device: Device, machine: str) -> Device:
    """The device as measured on one machine: laws of `catalogue/kernels/machines/<machine>.toml` replace its own."""
    path = MACHINES / f"{machine}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in MACHINES.glob("*.toml")))
        raise ValueError(f"'{machine}' is no measured machine; use one of: {known}")
    kernels = dict(device.kernels)
    for law, sections in toml.read_toml(path).items():
        if law != "collectives":  # those are the cluster's (`costmodels.cluster.machine_tables`)
            kernels[law] = {**kernels.get(law, {}), **sections}
    note = f"kernels as measured on one machine ({machine})"
    return replace(device, kernels=kernels, notes=(*device.notes, note), cache={})


def device_from(data: dict[str, Any], where: str) -> Device:
    """A device from the content of its TOML file; `where` is the file's name for error sentences."""
    kind = toml.text(data, "kind", where)
    if kind not in get_args(Kind):
        raise ValueError(f"{where}: field 'kind' is '{kind}'; it must be one of {', '.join(get_args(Kind))}")
    peaks = toml.numbers(data, "peak_flops", where, required=True)
    if not peaks or min(peaks.values()) <= 0:
        raise ValueError(
            f"{where}: table [peak_flops] needs at least one dtype with more than 0 FLOP/s (float32 = 1e13)"
        )
    bandwidth = toml.number(data, "memory_bandwidth", where)
    if bandwidth <= 0:
        raise ValueError(f"{where}: field 'memory_bandwidth' is 0; it must be the bytes per second of the memory")
    laws = [_law_from(row, f"{where}: law {i + 1}") for i, row in enumerate(toml.tables(data, "laws", where))]
    device = Device(
        name=toml.text(data, "name", where),
        kind=cast(Kind, kind),
        peak_flops=peaks,
        memory_bytes=whole_bytes(data, where),
        memory_bandwidth=bandwidth,
        units=toml.whole(data, "units", where, 1, least=1),
        floor_seconds=toml.number(data, "floor_seconds", where, 0.0),
        efficiency=toml.numbers(data, "efficiency", where),
        laws={law.key: law for law in laws},
        samples=_samples_from(toml.strings(data, "samples", where), where),
        neighbours=_neighbours_from(toml.strings(data, "neighbours", where), where),
        host=toml.numbers(data, "host", where),
        anchor_seconds=toml.number(data, "anchor_seconds", where, 0.0),
        step_error=toml.number(data, "step_error", where, 0.0),
        brief_error=toml.number(data, "brief_error", where, 0.0),
        l2_bytes=toml.whole(data, "l2_bytes", where, 0),
        boost_clock=toml.number(data, "boost_clock", where, 0.0),
        link=toml.text(data, "link", where, ""),
        links=toml.whole(data, "links", where, 0),
        link_bandwidth=toml.number(data, "link_bandwidth", where, 0.0),
        pcie_bandwidth=toml.number(data, "pcie_bandwidth", where, 0.0),
        c2c_bandwidth=toml.number(data, "c2c_bandwidth", where, 0.0),
        unified_memory=toml.flag(data, "unified_memory", where),
        tdp=toml.number(data, "tdp", where, 0.0),
        spread=toml.number(data, "spread", where, 0.0),
        price_per_hour=toml.number(data, "price_per_hour", where, 0.0),
        best_flops=toml.numbers(data, "best_flops", where),
        aliases=toml.strings(data, "aliases", where),
        sources=toml.strings(data, "sources", where),
        source_of=sheet.source_numbers(toml.table(data, "source_of", where), f"{where}: table [source_of]"),
        from_memory=toml.strings(data, "from_memory", where),
        notes=toml.strings(data, "notes", where),
    )
    sheet.check(device, where)
    return device


def whole_bytes(data: dict[str, Any], where: str) -> int:
    return toml.whole(data, "memory_bytes", where, least=1)


def _law_from(row: dict[str, Any], where: str) -> Law:
    from costmodels.features import FORMS

    form = toml.text(row, "form", where)
    if form not in FORMS:
        raise ValueError(
            f"{where}: field 'form' is '{form}'; it must be one of {', '.join(sorted(FORMS))}; "
            "a file that an earlier Parplan measured is made again by: parplan calibrate"
        )
    coefficients = toml.array(row, "coefficients", where)
    if len(coefficients) != len(FORMS[form]):
        raise ValueError(
            f"{where}: field 'coefficients' has {len(coefficients)} numbers; form '{form}' needs {len(FORMS[form])}"
        )
    return Law(
        key=toml.text(row, "key", where),
        form=form,
        coefficients=coefficients,
        low=toml.array(row, "low", where),
        high=toml.array(row, "high", where),
        error=toml.number(row, "error", where, 0.0),
        samples=toml.whole(row, "samples", where, 0),
    )


def _samples_from(rows: Iterable[str], where: str) -> dict[Signature, float]:
    form = "op/dtype|shapes|shapes=seconds"
    found = _by_text(rows, form, f"{where}: sample", lambda text, seconds: is_written(text) and 0 < seconds < math.inf)
    return {parsed(text): seconds for text, seconds in found.items()}


def _neighbours_from(rows: Iterable[str], where: str) -> Neighbours:
    form = "op/dtype|shapes|shapes@stretches,swept,since=ratio"
    return Neighbours(
        _by_text(rows, form, f"{where}: neighbour", lambda text, ratio: is_label(text) and 0 < ratio < math.inf)
    )


def _by_text(
    rows: Iterable[str], form: str, what: str, good: Callable[[str, float], bool]
) -> dict[str, float]:
    """The number behind the last "=" of each row, by the text before it."""
    found = {}
    for row in rows:
        text, _, number = row.rpartition("=")
        try:
            found[text] = float(number)
            broken = not good(text, found[text])
        except ValueError:
            broken = True
        if broken:
            raise ValueError(f"{what} '{row}' is broken; it must read '{form}'")
    return found


def device_data(device: Device) -> dict[str, Any]:
    """The content of the device's TOML file."""
    data: dict[str, Any] = asdict(replace(device, laws={}, cache={}, kernels={}, neighbours=Neighbours({})))
    del data["cache"], data["kernels"]  # kernel constants have a file of their own
    data["samples"] = [f"{written(signature)}={seconds:.4g}" for signature, seconds in device.samples.items()]
    data["neighbours"] = [f"{label}={ratio:.3g}" for label, ratio in device.neighbours.ratios.items()]
    data["laws"] = [asdict(law) for law in device.laws.values()]
    return {k: v for k, v in data.items() if v or k in ("memory_bytes", "peak_flops")}


def save_device(device: Device, path: Path) -> None:
    """Write the device's TOML file, at once or not at all."""
    toml.write_toml(Path(path), device_data(device))
