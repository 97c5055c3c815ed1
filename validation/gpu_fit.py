"""Constants of the kernel laws from a run's sweeps, by the fits that published tables go through, and their scores.

Half of the shapes (`gpu_shapes.held_back`) is fitted, the other half scored, beside the catalogue's constants. What a
section is not fitted to (backward passes, other kernels, tensor-core convolutions) follows the law's assumptions; the
scores show how well. Needs no GPU: only the files that `environment` and `calibrate` left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodels import tomlfile
from costmodels.attention import calls_of
from costmodels.attention_law import flash_seconds
from costmodels.conv_shapes import convs_of, rows_of
from costmodels.convolution import seconds_by_algorithm
from costmodels.convolution_law import chosen
from costmodels.device import Device, load_device, save_device
from costmodels.families import family
from costmodels.names import device_named
from costmodels.ops import OpShape, price_many
from costmodels.relatives import find
from costmodels.rowwise import kind_of, norm_terms, seconds_of, softmax_terms, work_of
from planner.host_thread import MEASURED
from validation.fit_attention import CONSTANTS, STARTS, section_of
from validation.fit_common import Array, Constant, Flags, fit_constants, fit_terms, score
from validation.fit_conv import algorithm_constants
from validation.fit_gemm_law import fit, section_values
from validation.gpu_files import Row, Rows, read_json, utc, write_json
from validation.gpu_shapes import case_of
from validation.tables_gemm import Table

LEAST = {"gemm": 80, "attention": 24, "conv": 16, "rowwise": 12}  # rows that a section is fitted to at the least
KINDS = ("stream", "norm", "softmax")


def fit_run(out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes device.toml, device.kernels.toml and fit.json."""
    about = read_json(out / "environment.json")
    rows = measured_rows(out)
    if not rows:
        raise ValueError(f"{out / 'ops.json'} holds no measured op; run the piece calibrate first")
    before = catalogue_device(about, rows)
    host, copies = read_json(out / "host.json"), read_json(out / "copies.json")["rows"]
    calibrated = with_host(before, about, host, copies)
    path = out / "device.toml"
    (out / "device.kernels.toml").unlink(missing_ok=True)
    save_device(calibrated, path)
    fitted = sections(path, rows, f"this suite, {about['name']}, torch {about['torch']}, {about['at'][:10]}", say)
    tomlfile.write_toml(out / "device.kernels.toml", fitted)
    scores = op_scores(rows, {"catalogue": before, "calibrated": calibrated_device(out)})
    result = {"at": utc(), "device": before.name, "scores": scores}
    write_json(out / "fit.json", result)
    return result


def measured_rows(out: Path) -> list[Row]:
    """The rows of ops.json that have a time."""
    return [r for r in Rows(out / "ops.json").rows.values() if r.get("seconds")]


def shape_of_row(row: Row) -> OpShape:
    """The priced shape as ops.json holds it."""
    data = dict(row["shape"])
    for name in ("in_shapes", "out_shapes"):
        data[name] = tuple(tuple(s) for s in data[name])
    return OpShape(**data)


# -- devices --------------------------------------------------------------------------------------------------


def catalogue_device(about: dict[str, Any], rows: Sequence[Row]) -> Device:
    """The catalogue's device by the name that the driver gives; for a name that it does not know (and for a CPU, which
    stands for a GPU in tests) a sheet from the best rates of the sweep, without constants, so that they are borrowed.
    """
    if about["device"] == "cuda":
        try:
            return device_named(about["name"])
        except ValueError:
            pass
    return sheet_from(about, rows)


def sheet_from(about: dict[str, Any], rows: Sequence[Row]) -> Device:
    """A device of kind gpu whose peaks and bandwidth are the best rates of the calibrating half of a sweep."""
    peaks: dict[str, float] = {}
    bandwidth = 1e9
    for row in rows:
        shape = shape_of_row(row)
        if row["held_back"]:
            continue
        if family(shape.name) == "gemm":
            dtype = row["dtype"]
            peaks[dtype] = max(peaks.get(dtype, 1e9), 1.05 * shape.flops / row["seconds"])
        elif kind_of(shape.name) == "stream":
            bandwidth = max(bandwidth, (shape.bytes_read + shape.bytes_written) / row["seconds"])
    peaks.setdefault("float32", max(peaks.values(), default=1e10))
    return Device(
        name=f"{about['name']} ({about['device']})", kind="gpu", peak_flops=peaks,
        memory_bytes=int(about.get("memory_bytes", 16 * 2**30)), memory_bandwidth=bandwidth,
        units=int(about.get("units", 1)), l2_bytes=int(about.get("l2_bytes", 2**20)),
        notes=("data sheet: best rates of a sweep of the GPU suite (products x 1.05)",),
    )  # fmt: skip


def with_host(device: Device, about: dict[str, Any], host: dict[str, float], copies: Sequence[Row]) -> Device:
    """The device with the measured host thread, and with the measured link to the host where there is one."""
    from validation.gpu_calibrate import copy_bandwidth

    named = {MEASURED[kind]: seconds for kind, seconds in host.items() if kind in MEASURED}
    pcie = copy_bandwidth(copies) if about["device"] == "cuda" else device.pcie_bandwidth
    note = f"host thread and copies measured on {about['name']} by validation.gpu_suite"
    return replace(
        device, kernels={}, host={**device.host, **named}, pcie_bandwidth=pcie, notes=(*device.notes, note), cache={}
    )


def calibrated_device(out: Path) -> Device:
    """The device file of a run with its constants. A law that was not fitted keeps the catalogue's constants."""
    device = load_device(out / "device.toml")
    try:
        known = device_named(device.name).kernels
    except ValueError:
        known = {}
    joined = {law: {**known.get(law, {}), **device.kernels.get(law, {})} for law in {*known, *device.kernels}}
    return replace(device, kernels=joined, cache={})


# -- fits -----------------------------------------------------------------------------------------------------


def sections(path: Path, rows: Sequence[Row], data: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The content of a kernels file: every section that has rows enough."""
    device = load_device(path)
    found: dict[str, Any] = {}
    fits: dict[str, Callable[..., dict[str, Any]]] = {
        "gemm": gemm_section, "attention": attention_section, "conv": conv_section, "rowwise": rowwise_section,
    }  # fmt: skip
    for law, fit_section in fits.items():
        mine = [r for r in rows if r["group"] == law]
        for name in sorted({case_of(r).section for r in mine}):
            some = [r for r in mine if case_of(r).section == name and _fits(r)]
            half = sum(not r["held_back"] for r in some)
            if half < LEAST[law] // 2 or half == len(some):
                say(f"{law} {name}: {len(some)} rows are too few; other constants price it")
                continue
            section = fit_section(path if law == "gemm" else device, name, some, data)
            if section:
                found.setdefault(law, {})[name] = section
                say(f"{law} {name}: {half} rows fitted, held-out error {section['error']:.1%}")
    return found


def _fits(row: Row) -> bool:
    """What the laws have constants for: forward flash attention, forward convolutions outside tensor cores."""
    if row["group"] == "attention":
        return bool(row["op"] == "flash" and not row["dims"][6])
    if row["group"] == "conv":
        return bool(row["dtype"] == "float32" and not row["dims"][7])
    return True


def _halves(rows: Sequence[Row]) -> tuple[Array, Flags]:
    return np.array([r["seconds"] for r in rows]), np.array([bool(r["held_back"]) for r in rows])


def _about(data: str, predicted: Array, measured: Array, scored: Flags) -> dict[str, Any]:
    errors = predicted[scored] / measured[scored] - 1
    return {"data": data, "rows": len(measured), "held_out": int(scored.sum()), "error": float(np.abs(errors).mean())}


def gemm_section(path: Path, name: str, rows: Sequence[Row], data: str) -> dict[str, Any]:
    """Tiles and waves with the correction, as `validation.fit_gemm` fits them."""
    measured, scored = _halves(rows)
    dims = np.array([r["dims"] for r in rows], float)
    table = Table(str(path), name, "suite", data, dims, measured, eager=False)
    return section_values(table, fit(table, ~scored), ~scored)


def attention_section(device: Device, name: str, rows: Sequence[Row], data: str) -> dict[str, Any]:
    """The flash law of torch's kernel, FlashAttention-2, without the cache of keys that inference tables have."""
    measured, scored = _halves(rows)
    calls = calls_of([shape_of_row(r) for r in rows])
    widths = sorted({int(r["dims"][4]) for r in rows})
    wanted = (*(c for c in CONSTANTS if c.name != "cache_stream"), *(Constant(f"rate{w}", 0.5, True) for w in widths))

    def seconds(x: dict[str, float], some: Array) -> Array:
        return flash_seconds(section_of(x, widths, {"packs": False}), device, name, some)

    found = fit_constants(wanted, lambda x: seconds(x, calls[~scored]), measured[~scored], STARTS[:3])
    about = _about(data, seconds(found, calls), measured, scored)
    return {**about, **section_of(found, widths, {"packs": False}), "kernel": "FlashAttention-2"}


def conv_section(device: Device, name: str, rows: Sequence[Row], data: str) -> dict[str, Any]:
    """Implicit GEMM and Winograd by the kernels' names; an algorithm with too few rows borrows a relative's."""
    measured, scored = _halves(rows)
    some = rows_of([convs_of(shape_of_row(r))[0] for r in rows])
    taken = np.array([r.get("algorithm", "implicit_gemm") for r in rows])
    own = algorithm_constants(device, some, taken, measured, ~scored, LEAST["conv"] // 2)
    if "implicit_rate" not in own:
        return {}
    lent = find(device, "conv", name, "implicit_rate")
    kept = {k: v for k, v in (lent.constants if lent else {}).items() if k not in ("of", "data", "rows", "error")}
    constants = {**kept, **own}
    times = seconds_by_algorithm(constants, device, name, some)
    predicted = times[chosen(times), np.arange(times.shape[1])]
    return {**constants, **_about(data, predicted, measured, scored)}


def rowwise_section(device: Device, name: str, rows: Sequence[Row], data: str) -> dict[str, Any]:
    """Launch, bandwidth and last cache of streams; passes of norms and softmaxes. Backward kinds are only scored."""
    measured, scored = _halves(rows)
    shapes = [shape_of_row(r) for r in rows]
    kinds = np.array([kind_of(s.name) if s.phase != "backward" else "" for s in shapes])
    work = np.array([work_of(s, k or "stream") for s, k in zip(shapes, kinds)]).T
    constants: dict[str, Any] = {}
    for kind in KINDS:
        mine = (kinds == kind) & ~scored
        if mine.sum() >= LEAST["rowwise"] // 4:
            constants |= _kind_constants(device, kind, work[:, mine], measured[mine], constants)
    if "stream" not in constants:
        return {}
    predicted = np.array(measured)
    for kind in (k for k in KINDS if k in constants):
        mine = kinds == kind
        predicted[mine] = seconds_of(constants, device, kind, work[:, mine])
    known = scored & np.isin(kinds, list(constants))
    return {**_about(data, predicted, measured, known), **constants}


def _kind_constants(device: Device, kind: str, work: Array, measured: Array, known: dict[str, Any]) -> dict[str, Any]:
    if kind == "stream":
        wanted = (Constant("launch", 2e-6), Constant("stream", 0.85), Constant("cached", 1.5), Constant("kept", 1.0))
        starts = [{"cached": c, "kept": k} for c in (0.7, 1.5, 4.0) for k in (0.5, 1.0)]
        return fit_constants(wanted, lambda x: seconds_of(x, device, "stream", work), measured, starts)
    moved, lines, columns, launches = work
    terms = (norm_terms if kind == "norm" else softmax_terms)(moved, lines, columns, float(device.l2_bytes))
    busy = np.minimum(lines / (0.5 * device.units), 1.0)
    left = np.maximum(measured - launches * known.get("launch", 2e-6), 0.2 * measured)
    weights = fit_terms(terms / device.memory_bandwidth / busy, left)
    if kind == "softmax" and not terms[3:5].any():
        weights[3:5] = weights[1:3]  # no odd rows among these: they are taken to cost what aligned ones do
    return {kind: weights.tolist()}


# -- scores ---------------------------------------------------------------------------------------------------


def op_scores(rows: Sequence[Row], devices: dict[str, Device]) -> list[dict[str, Any]]:
    """Errors of every device's prices on the held-back half, by op, dtype and direction."""
    scored = [r for r in rows if r["held_back"]]
    shapes = [replace(shape_of_row(r), dtype=r["dtype"]) for r in scored]
    measured = np.array([r["seconds"] for r in scored])
    kinds = [f"{s.name.removeprefix('aten.').removesuffix('.default')} {s.dtype}" for s in shapes]
    found = []
    for name, device in devices.items():
        prices = np.array([p.seconds for p in price_many(device, shapes)])
        for kind in sorted(set(kinds)):
            mine = np.array([k == kind for k in kinds])
            found.append({"constants": name, "kind": kind, **score(prices[mine] / measured[mine] - 1)})
    return found
