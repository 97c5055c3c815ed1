"""Measured collectives of devices that are not here: read from a published wheel of tables, which is never committed.

`aiconfigurator-core` (Apache-2.0) holds times of NCCL's all_reduce, all_gather, reduce_scatter and all-to-all on one
node of 2, 4 and 8 NVIDIA GPUs, several versions of NCCL beside each other. They are nccl-tests' out-of-place times (its
collector starts `all_reduce_perf -t GPUS -w 40 -n 100..1000`, github ai-dynamo/aiconfigurator, collector/
collect_nccl.py): no captured graphs, and no host time beyond that of other nccl-tests: 8 B200 take 25.1 to 25.9 us for
512 bytes in its versions, 25.2 us in a sweep of nccl-tests published elsewhere. So there is no offset of the source.
message_size counts elements of the whole buffer as nccl-tests does: 8 H100 gather 512 MiB at 384 GB/s, a bus bandwidth
of 336 of 450 GB/s; were it the part of each rank, that would be 2.7 TB/s.

The rows of one system, collective and number of GPUs become one sweep: the median over versions from `OLDEST` on and
over half and int8, which agree where nothing is added up. Sums are of half alone: int8 takes 5 % longer in the
median (13 % at the 90th percentile), and NVLink's switches cannot add it (rings where half goes by NVLS).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from validation.collective_cases import Sweep
from validation.tables_gemm import WHEEL

if TYPE_CHECKING:
    import pandas as pd

NVLINK, GEN4, GEN5 = "NVLink/NVSwitch", "PCIe Gen4", "PCIe Gen5"
SYSTEMS = {
    "a100_sxm": ("A100 SXM4 80GB", NVLINK), "h100_sxm": ("H100 SXM5 80GB", NVLINK),
    "h200_sxm": ("H200 SXM 141GB", NVLINK), "b200_sxm": ("B200 SXM 180GB", NVLINK),
    "b300_sxm": ("B300 SXM6", NVLINK), "gb200": ("GB200", NVLINK), "gb300": ("GB300", NVLINK),
    "l40s": ("L40S", GEN4), "rtx_pro_6000_server": ("RTX PRO 6000", GEN5),
}  # fmt: skip
# L40S: the bus bandwidth falls from 20 to 5 to 1.4 GB/s from 2 to 4 to 8 devices. That is one server whose devices do
# not reach each other, no property of the device: only its pairs are taken.
MOST = {"l40s": 2}
OLDEST = (2, 24)  # older tables are another campaign: all-to-all of 8 H100 takes 13.7 instead of 7.9 us


def table_sweeps(folder: Path) -> list[Sweep]:
    """The sweeps of the unpacked wheel below `folder`; ValueError where it holds none."""
    files = sorted(folder.rglob("nccl_perf.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no nccl_perf.parquet; unpack {WHEEL} there, or add --download")
    found: list[Sweep] = []
    for system in SYSTEMS:
        mine = [f for f in files if f.parts[-5] == system and version_of(f.parent.name) >= OLDEST]
        if mine:
            found += _system_sweeps(system, mine)
    return found


def version_of(text: str) -> tuple[int, ...]:
    """A version of NCCL as numbers: "2.27.3" -> (2, 27, 3)."""
    return tuple(int(part) for part in text.split("."))


def _system_sweeps(system: str, files: list[Path]) -> Iterator[Sweep]:
    import pandas as pd

    rows = pd.concat([_read(f) for f in files])
    rows = rows[rows.num_gpus <= MOST.get(system, 8)]
    versions = ", ".join(f.parent.name for f in files)
    gpu, wires = SYSTEMS[system]
    for key, one in rows.groupby(["op_name", "num_gpus"]):
        op, count = str(key[0]), int(str(key[1]))
        adds = op in ("all_reduce", "reduce_scatter")
        notes = f"{'half' if adds else 'half and int8'}, NCCL {versions}"
        times = (one[one.nccl_dtype == "half"] if adds else one).groupby("bytes").seconds.median()
        sizes, seconds = tuple(map(float, times.index)), tuple(times.tolist())
        yield Sweep(f"{system}-{count}g-{op}", gpu, count, 1, wires, op, sizes, seconds, WHEEL, notes)


def _read(path: Path) -> pd.DataFrame:
    """Rows with bytes and seconds beside the columns of the table."""
    import pandas as pd

    try:
        rows = pd.read_parquet(path, columns=["nccl_dtype", "num_gpus", "message_size", "op_name", "latency"])
    except ImportError:
        raise ValueError("parquet tables need pyarrow; install it (pip install pyarrow) and start again") from None
    width = rows.nccl_dtype.map({"half": 2, "int8": 1})
    return rows.assign(bytes=rows.message_size * width, seconds=rows.latency / 1e3)
