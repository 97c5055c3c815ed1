"""Fit the laws of memory-bound ops: NeuSight's fp32 table (element-wise, layer norm, softmax), and casts to fp8.

The casts (bfloat16 in, float8 out, one scale: an element-wise kernel) were timed in CUDA graphs, so their fixed time is
the device's launch; NeuSight's rows are eager, so theirs is mostly the host's and is kept apart as `host_floor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from costmodels.device import Device, load_device
from costmodels.rowwise import norm_terms, seconds_of, softmax_terms
from validation.fit_common import Array, Constant, Fitted, fit_constants, fit_terms, held_out

DATA = "rowwise_fp32 (NeuSight, ASPLOS 2025: torch 2.1, fp32, eager)"
CASTS = "quantize/scale_matrix_perf (aiconfigurator-core 0.12, the fastest of three libraries' kernels)"
STEM_OF = {
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb", "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb", "NVIDIA L4": "l4",
    "Tesla P100-PCIE-16GB": "p100-pcie", "Tesla P4": "p4", "Tesla T4": "t4", "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "AMD Instinct MI100": "mi100", "AMD Instinct MI210": "mi210",
}  # fmt: skip
SYSTEMS = {
    "h100_sxm": "h100-sxm", "h200_sxm": "h200", "b200_sxm": "b200", "b300_sxm": "b300", "gb200": "gb200",
    "gb300": "gb300", "l40s": "l40s",
}  # fmt: skip
TWO_INPUTS = ("add", "mul", "div", "pow")  # 12 bytes an element; the others read one tensor and write one: 8
_CAST_BYTES = 3.0  # an element: 2 in, 1 out


def fit_eager(ops: Path) -> list[Fitted]:
    """The fp32 laws of every device of NeuSight's table."""
    table = pd.read_csv(ops / "rowwise_fp32.csv.gz")
    return [_fit_device(STEM_OF[str(name)], rows) for name, rows in table.groupby("device")]


def _fit_device(stem: str, rows: pd.DataFrame) -> Fitted:
    device = load_device(stem)
    scored = held_out(rows.op, rows.rows, rows.cols)
    measured = rows.latency_ms.to_numpy() * 1e-3
    constants: dict[str, Any] = {}
    predicted = np.zeros(len(rows))
    hosts = {}
    for kind, mine in _kinds(rows).items():
        work = _work(rows[mine], kind)
        terms = _terms(kind, work, device) / device.memory_bandwidth
        terms = np.vstack([np.ones(terms.shape[1]), terms])
        weights = fit_terms(terms[:, ~scored[mine]], measured[mine & ~scored])
        if kind == "softmax" and not terms[4:6, ~scored[mine]].any():
            weights[4:6] = weights[2:4]  # this table has no odd rows: they are taken to cost what aligned ones do
        hosts[kind] = float(weights[0])
        constants[kind] = 1 / float(weights[1]) if kind == "stream" else [float(w) for w in weights[1:]]
        # What is scored is the law that prices ops, with its launch counted inside the fitted fixed time.
        law = {**constants, "launch": 0.0}
        predicted[mine] = hosts[kind] + seconds_of(law, device, kind, work)
    constants |= {"host_floor": hosts["stream"], "norm_host_floor": hosts["norm"],
                  "softmax_host_floor": hosts["softmax"]}  # fmt: skip

    def again(lent: Mapping[str, Any]) -> Array:
        seconds = np.zeros(len(rows))
        for kind, mine in _kinds(rows).items():
            law = {**lent, "launch": 0.0}
            seconds[mine] = hosts[kind] + seconds_of(law, device, kind, _work(rows[mine], kind))
        return seconds[scored]

    kinds = rows.op.to_numpy().astype(str)
    return Fitted(stem, "rowwise", "float32", constants, DATA, len(rows), predicted[scored], measured[scored],
                  kinds[scored], again)  # fmt: skip


def _kinds(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    op = rows.op.to_numpy().astype(str)
    return {"norm": op == "ln", "softmax": op == "softmax", "stream": (op != "ln") & (op != "softmax")}


def _work(rows: pd.DataFrame, kind: str) -> Array:
    """As `costmodels.rowwise.work_of` makes it of ops."""
    lines, columns = rows.rows.to_numpy(float), rows.cols.to_numpy(float)
    size = np.where(rows.op.isin(TWO_INPUTS), 12.0, 8.0)
    moved = lines * columns * size
    ones = np.ones(len(rows))
    return np.stack([moved, ones if kind == "stream" else lines, ones if kind == "stream" else columns, ones])


def _terms(kind: str, work: Array, device: Device) -> Array:
    moved, lines, columns, _ = work
    if kind == "stream":
        one: Array = moved[None, :]
        return one
    terms = (norm_terms if kind == "norm" else softmax_terms)(moved, lines, columns, float(device.l2_bytes))
    if moved.min() > device.l2_bytes:
        terms[-1] = 0  # no row fits the cache, so this table cannot tell its term from that of all bytes
    return terms


def fit_casts(tables: Path) -> list[Fitted]:
    """Launch, bandwidth and last cache of the devices in the tables of casts."""
    fits = []
    for system, stem in SYSTEMS.items():
        parts = [pd.read_parquet(p).set_index(["m", "k"]).latency for p in _cast_files(tables, system)]
        if parts:
            fits.append(_fit_casts(stem, pd.concat(parts, axis=1).min(axis=1).rename("latency").reset_index()))
    return fits


def _cast_files(tables: Path, system: str) -> Iterator[Path]:
    for framework in ("trtllm", "vllm", "sglang"):
        yield from sorted(tables.rglob(f"{system}/quantize/{framework}/*/scale_matrix_perf.parquet"))[-1:]


def _fit_casts(stem: str, rows: pd.DataFrame) -> Fitted:
    device = load_device(stem)
    rows = rows[rows.latency > 0]
    scored = held_out(rows.m, rows.k)
    measured = rows.latency.to_numpy() * 1e-3
    moved = _CAST_BYTES * rows.m.to_numpy(float) * rows.k.to_numpy(float)
    work = np.stack([moved, np.ones(len(rows)), np.ones(len(rows)), np.ones(len(rows))])
    wanted = (Constant("launch", 2e-6), Constant("stream", 0.85), Constant("cached", 1.5), Constant("kept", 1.0))
    starts = [{"cached": c, "kept": k} for c in (0.7, 1.5, 4.0) for k in (0.5, 1.0, 1.6)]

    def seconds(x: dict[str, float]) -> Array:
        return seconds_of(x, device, "stream", work[:, ~scored])

    constants = fit_constants(wanted, seconds, measured[~scored], starts)
    predicted = seconds_of(constants, device, "stream", work)
    kinds = np.where(moved < device.l2_bytes / 2, "in the last cache", "memory")
    return Fitted(stem, "rowwise", "bfloat16", dict(constants), CASTS, len(rows), predicted[scored], measured[scored],
                  kinds[scored], lambda lent: seconds_of(lent, device, "stream", work[:, scored]))  # fmt: skip
