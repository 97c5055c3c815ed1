"""Measured matrix products of devices that are not here: read from published tables, which are never committed.

* `aiconfigurator-core` (Apache-2.0), parquet tables of bfloat16 and fp8 products on NVIDIA's data-centre GPUs: times of
  the kernels alone, in CUDA graphs, by up to three inference libraries. The same shape differs by 4 to 6 % between them
  although they call the same BLAS (power, clocks, choice of kernel), so a shape's time is the median of the libraries.
  For fp8 it is the least: some of the libraries' rows contain the quantisation of the activations.
* NeuSight's operator tables (MIT), float32 without TF32, eager: the launch from Python is in the times. Each device has
  up to two campaigns, random shapes and shapes of real models. They are kept apart: the same kernel runs at another
  pace (T4: 0.39 and 0.48 of the peak at equal size and alignment), and P4's even call different kernels.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
WHEEL = "aiconfigurator-core==0.12.0"
SYSTEMS = {
    "a100_sxm": "a100-sxm-80gb", "h100_sxm": "h100-sxm", "h200_sxm": "h200", "b200_sxm": "b200", "b300_sxm": "b300",
    "gb200": "gb200", "gb300": "gb300", "l40s": "l40s",
}  # fmt: skip
OLDER = ("0.5.6.post2",)  # an older version's table beside a newer one of the same library
NEUSIGHT = {
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb", "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA L4": "l4", "Tesla P100-PCIE-16GB": "p100-pcie", "Tesla P4": "p4",
    "Tesla T4": "t4", "Tesla V100-PCIE-32GB": "v100-pcie-32gb", "AMD Instinct MI100": "mi100",
    "AMD Instinct MI210": "mi210",
}  # fmt: skip
CAMPAIGNS = {"test": "models", "train": "random"}  # the first that a device has gives the constants that are kept
LEAST_ROWS = 300  # of a campaign: below, half of it does not carry twelve constants


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Products of one device and dtype. section: dtype as kernels files name it, with "_batched" for products of many
    matrices. campaign: which measurements of the device, where a source has several. dims: rows of (batches, m, n, k).
    seconds: measured. eager: whether the launch is in the times. tiles: tile of each row's kernel ("128x64", rows x
    columns) where the table names it, else "".
    """

    device: str
    section: str
    campaign: str
    data: str
    dims: Array
    seconds: Array
    eager: bool
    tiles: tuple[str, ...] = ()


def download(folder: Path) -> Path:
    """Fetch and unpack the wheel of tables into a folder, without what it depends on (it is read, never run)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("aiconfigurator_core-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if "/gemm/" in n or "/nccl/" in n])
    return folder


def kernel_tables(folder: Path) -> Iterator[Table]:
    """Tables of the unpacked wheel below `folder`: bfloat16, then fp8, of each device that has a device file."""
    files = sorted(f for f in folder.rglob("gemm_perf.parquet") if f.parent.name not in OLDER)
    if not files:
        raise ValueError(f"{folder} holds no gemm_perf.parquet; unpack {WHEEL} there, or add --download")
    for system, device in SYSTEMS.items():
        frames = [_read(f) for f in files if f.parts[-5] == system]
        rows = pd.concat(frames) if frames else pd.DataFrame(columns=["gemm_dtype", "m", "n", "k", "latency"])
        for dtype, section, choose in (("bfloat16", "bfloat16", "median"), ("fp8", "float8_e4m3fn", "min")):
            one = rows[rows.gemm_dtype == dtype].groupby(["m", "n", "k"]).latency.agg(choose).reset_index()
            if len(one):
                dims = np.column_stack([np.ones(len(one)), one[["m", "n", "k"]].to_numpy(float)])
                data = f"{WHEEL}, {system}, {choose} of {len(frames)} libraries"
                yield Table(device, section, "kernels", data, dims, one.latency.to_numpy(float) / 1e3, eager=False)


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=["gemm_dtype", "m", "n", "k", "latency"])
    except ImportError:
        raise ValueError("parquet tables need pyarrow; install it (pip install pyarrow) and start again") from None


def library_rows(folder: Path, device: str) -> dict[str, tuple[Array, Array]]:
    """(dims, seconds) of each library's own bfloat16 rows: what the spread between libraries is measured on."""
    found = {}
    for path in sorted(folder.rglob("gemm_perf.parquet")):
        if SYSTEMS.get(path.parts[-5]) == device and path.parent.name not in OLDER:
            rows = _read(path)
            rows = rows[rows.gemm_dtype == "bfloat16"]
            dims = np.column_stack([np.ones(len(rows)), rows[["m", "n", "k"]].to_numpy(float)])
            found[path.parts[-3]] = dims, rows.latency.to_numpy(float) / 1e3
    return found


def eager_tables(folder: Path) -> Iterator[Table]:
    """NeuSight's float32 tables: linear (x[B*M, K] @ W[N, K]) and products of many matrices, per device."""
    path = folder / "gemm_fp32.csv.gz"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the folder that holds gemm_fp32.csv.gz")
    rows = pd.read_csv(path)
    # cuBLAS computes the transposed product, so the first edge in a kernel's name runs along our columns.
    edges = rows.kernel_name.str.extract(r"(\d{2,3})x(\d{2,3})")
    rows["tile"] = (edges[1] + "x" + edges[0]).fillna("")
    kinds = (("linear", "float32"), ("bmm", "float32_batched"))
    for (name, device), (op, section), (origin, campaign) in product(NEUSIGHT.items(), kinds, CAMPAIGNS.items()):
        one = rows[(rows.device == name) & (rows.op == op) & (rows.origin == origin)]
        if len(one) < LEAST_ROWS:
            continue
        dims = one[["B", "M", "K", "N"]].to_numpy(float)  # the columns' N is the length that is summed over
        if op == "linear":
            dims = np.column_stack([np.ones(len(one)), dims[:, 0] * dims[:, 1], dims[:, 2:]])
        data = f"NeuSight gemm_fp32, {name}, {op}, {campaign}"
        yield Table(device, section, campaign, data, dims, one.latency_ms.to_numpy(float) / 1e3, True, tuple(one.tile))
