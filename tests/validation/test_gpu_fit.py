"""The GPU suite's fits on made-up sweeps: what a law of ours with known constants made is found again."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodels import tomlfile
from costmodels.attention import calls_of
from costmodels.attention_law import flash_seconds
from costmodels.device import Device, load_device, save_device
from costmodels.gemm_law import Constants, hardware_of, law_seconds, menu
from costmodels.ops import OpShape, price_many
from costmodels.rowwise import seconds_of, work_of
from validation.gpu_files import write_json
from validation.gpu_fit import calibrated_device, catalogue_device, fit_run, op_scores, sections, with_host
from validation.gpu_shapes import Case, attention_cases, cases, held_back

ABOUT = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "at": "2026-11-21"}
FLASH = {
    "launch": 5e-6, "tile": 1.5e-6, "join": 2.5, "tile_stream": 1.2, "short": 0.6, "split": 3e-6, "memory": 1.5,
    "memory_join": 2.0, "head_dims": [32, 64, 96, 128, 256], "rates": [0.25, 0.4, 0.45, 0.5, 0.42], "packs": False,
}  # fmt: skip
STREAM = {"launch": 3e-6, "stream": 0.7, "cached": 1.9, "kept": 0.8}
GEMM = Constants(0.75, 0.25, 90, 0.6, 0.8, 60, 0.2, 4, 3e-6, 2e-6, 0.1, 0.05)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """An H100 without constants of its own, saved where the fits read it."""
    made = replace(load_device("h100-sxm"), kernels={}, cache={})
    save_device(made, tmp_path / "device.toml")
    return made


def row(case: Case, shape: OpShape, seconds: float) -> dict[str, Any]:
    return {"key": case.key, **asdict(case), "held_back": held_back(case), "seconds": float(seconds),
            "shape": asdict(shape)}  # fmt: skip


def shape(name: str, ins: tuple[tuple[int, ...], ...], outs: tuple[tuple[int, ...], ...], dtype: str) -> OpShape:
    size = {"float32": 4, "bfloat16": 2}[dtype]
    read, written = (size * sum(map(prod, shapes)) for shapes in (ins, outs))
    return OpShape(f"aten.{name}.default", "forward", ins, outs, dtype, 0, read, written)


def stream_rows(device: Device) -> list[dict[str, Any]]:
    found = []
    for case in (c for c in cases() if c.op in ("add", "gelu", "mul", "relu") and c.dtype == "float32"):
        ins = (case.dims,) * (2 if case.op in ("add", "mul") else 1)
        one = shape(case.op, ins, (case.dims,), "float32")
        found.append(row(case, one, seconds_of(STREAM, device, "stream", np.array([work_of(one, "stream")]).T)[0]))
    return found


def flash_rows(device: Device) -> list[dict[str, Any]]:
    found = []
    for case in (c for c in attention_cases(quick=False) if c.op == "flash" and not c.dims[6]):
        b, h, kv, s, d, causal, _ = case.dims
        q, k = (b, h, s, d), (b, kv, s, d)
        one = replace(shape("_scaled_dot_product_flash_attention", (q, k, k), (q,), "bfloat16"), causal=bool(causal))
        found.append(row(case, one, flash_seconds(FLASH, device, "bfloat16", calls_of([one]))[0]))
    return found


def gemm_rows(device: Device) -> list[dict[str, Any]]:
    chosen = [c for c in cases(only=("gemm",)) if c.section == "bfloat16"][:240]
    hardware, candidates = hardware_of(device, "bfloat16", 2.0), menu(["64x64", "128x128", "128x256"], [1, 2, 4])
    seconds = law_seconds(GEMM, hardware, candidates, np.array([c.dims for c in chosen], float))
    return [
        row(c, shape("mm", ((c.dims[1], c.dims[3]), (c.dims[3], c.dims[2])), (c.dims[1:3],), "bfloat16"), s)
        for c, s in zip(chosen, seconds)
    ]


def test_bandwidth_launch_and_cache_of_streams_are_found_again(device: Device, tmp_path: Path) -> None:
    section = sections(tmp_path / "device.toml", stream_rows(device), "made up", lambda _: None)["rowwise"]["float32"]
    assert section["error"] < 0.01
    assert section["launch"] == pytest.approx(STREAM["launch"], rel=0.05)
    assert section["stream"] == pytest.approx(STREAM["stream"], rel=0.02)


def test_a_flash_kernels_law_is_found_again(device: Device, tmp_path: Path) -> None:
    rows = flash_rows(device)
    section = sections(tmp_path / "device.toml", rows, "made up", lambda _: None)["attention"]["bfloat16"]
    assert section["error"] < 0.03 and section["kernel"] == "FlashAttention-2"
    assert section["rates"] == pytest.approx(FLASH["rates"], rel=0.1)
    assert section["rows"] == len(rows) and 0.3 < section["held_out"] / len(rows) < 0.7


def test_products_are_found_again_and_price_what_was_not_fitted(device: Device, tmp_path: Path) -> None:
    rows = gemm_rows(device)
    found = sections(tmp_path / "device.toml", rows, "made up", lambda _: None)
    assert found["gemm"]["bfloat16"]["error"] < 0.06  # the law's own menu of tiles is another one
    scores = op_scores(rows, {"own": replace(device, kernels=found, cache={})})
    assert scores[0]["n"] == sum(r["held_back"] for r in rows)
    assert scores[0]["mean"] == pytest.approx(found["gemm"]["bfloat16"]["error"], rel=0.02)


def test_half_of_the_rows_has_no_say_in_a_fit(device: Device, tmp_path: Path) -> None:
    rows = stream_rows(device)
    spoilt = [{**r, "seconds": 10 * r["seconds"]} if r["held_back"] else r for r in rows]
    both = [
        sections(tmp_path / "device.toml", some, "x", lambda _: None)["rowwise"]["float32"] for some in (rows, spoilt)
    ]
    assert both[0]["stream"] == both[1]["stream"] and both[0]["error"] < 0.01 < 0.8 < both[1]["error"]


def test_few_rows_are_not_fitted(device: Device, tmp_path: Path) -> None:
    said: list[str] = []
    assert sections(tmp_path / "device.toml", stream_rows(device)[:3], "x", said.append) == {}
    assert said == ["rowwise float32: 3 rows are too few; other constants price it"]


def test_a_run_replaces_what_it_measured_and_keeps_the_rest_of_the_catalogue(tmp_path: Path) -> None:
    catalogue = load_device("h100-sxm")
    write_json(tmp_path / "environment.json", ABOUT)
    write_json(tmp_path / "ops.json", {"rows": stream_rows(catalogue)})
    write_json(tmp_path / "host.json", {"op": 9e-6, "backward": 5e-6, "view": 1e-6, "module": 2e-6})
    copies = [{"bytes": 2**20, "direction": d, "seconds": s} for d, s in (("to_device", 2e-5), ("to_host", 4e-5))]
    write_json(tmp_path / "copies.json", {"rows": copies})
    scores = fit_run(tmp_path, lambda _: None)["scores"]
    made = calibrated_device(tmp_path)
    assert made.name == catalogue.name and made.host["launch_op"] == 9e-6
    assert made.pcie_bandwidth == pytest.approx(2**20 / 4e-5, rel=1e-5)  # the slower direction
    assert made.kernels["gemm"] == catalogue.kernels["gemm"]  # no product was measured
    assert made.kernels["rowwise"]["float32"] != catalogue.kernels["rowwise"].get("float32")
    assert set(tomlfile.read_toml(tmp_path / "device.kernels.toml")) == {"rowwise"}
    errors = {(s["constants"], s["kind"]): s["mean"] for s in scores}
    assert errors["calibrated", "add float32"] < 0.02 < errors["catalogue", "add float32"]


def test_a_card_that_the_catalogue_does_not_know_gets_a_sheet_of_its_best_rates(device: Device) -> None:
    about = {**ABOUT, "name": "NVIDIA Unheard-Of 9000", "units": 99, "memory_bytes": 10**10, "l2_bytes": 10**7}
    rows = [*stream_rows(device), *gemm_rows(device)]
    for r in rows:
        if r["op"] == "mm":
            r["shape"]["flops"] = 2 * prod(r["dims"])
    made = catalogue_device(about, rows)
    calibrating = [r for r in rows if r["op"] == "mm" and not r["held_back"]]
    best = max(2 * prod(r["dims"]) / r["seconds"] for r in calibrating)
    assert made.peak_flops["bfloat16"] == pytest.approx(1.05 * best) and made.units == 99 and made.kernels == {}
    assert price_many(made, [shape("mm", ((512, 512), (512, 512)), ((512, 512),), "bfloat16")])[0].source != "measured"
    assert with_host(made, {**ABOUT, "device": "cpu"}, {"op": 1e-6}, []).host == {"launch_op": 1e-6}
