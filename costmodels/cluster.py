"""A cluster: nodes of equal devices, a link inside the node and one between nodes, and what was measured on them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from costmodels import tomlfile as toml
from costmodels.device import CATALOGUE, Device, device_from, load_device, local_path

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class Link:
    """bandwidth: bytes/s per direction of one port. latency: seconds of an empty message, one way.
    ports: ports per node that its devices share (0: every device has its own)."""

    name: str
    bandwidth: float
    latency: float
    source: str = ""
    ports: int = 0


@dataclass(frozen=True, slots=True)
class CollectiveTable:
    """Measured seconds of one kind of collective among `ranks` ranks of one node, by bytes (as nccl-tests counts);
    `demand` is the host cores that each rank kept busy meanwhile."""

    kind: str
    ranks: int
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    demand: tuple[float, ...]
    error: float = 0.1


@dataclass(frozen=True, eq=False)
class Cluster:
    """`nodes` x `devices_per_node` devices; rank r sits on node r // devices_per_node.

    backend: what moves the messages. cores: host cores of a node that all its ranks share, where the devices are
    those cores (0: devices compute on their own). node_memory: bytes that all ranks of a node share (0: every
    device has its own `device.memory_bytes`). More ranks than devices may run on a node with `cores`.
    """

    name: str
    device: Device
    nodes: int
    devices_per_node: int
    intra: Link
    inter: Link
    backend: Backend = "nccl"
    cores: int = 0
    node_memory: int = 0
    tables: tuple[CollectiveTable, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.nodes * self.devices_per_node

    def node_of(self, rank: int) -> int:
        """The node of a rank; ranks beyond the last device oversubscribe the last node."""
        return min(rank // self.devices_per_node, self.nodes - 1)

    @cached_property
    def curves(self) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """log(bytes), log(seconds), and demand of every table. A small message that took longer than a larger one was
        disturbed: it takes the larger one's time, so that prices never fall."""
        return {
            (t.kind, t.ranks): (
                np.log(t.bytes),
                np.minimum.accumulate(np.log(t.seconds)[::-1])[::-1],
                np.array(t.demand),
            )
            for t in self.tables
        }


def list_clusters() -> list[str]:
    """Catalogue names, and `local`."""
    return [*sorted(p.stem for p in (CATALOGUE / "clusters").glob("*.toml")), "local"]


def load_cluster(name: str | Path) -> Cluster:
    """A cluster by catalogue name ("dgx-h100"), TOML path, with more nodes ("8x dgx-h100"), or this machine ("local").

    >>> load_cluster("8x dgx-h100").size
    64
    """
    text = str(name).strip()
    if match := re.fullmatch(r"(\d+)\s*x\s*(\S.*)", text):
        base = load_cluster(match[2])
        count = int(match[1])
        if count < 1:
            raise ValueError(f"'{text}' has no nodes; write 1x or more")
        return replace(base, name=f"{count}x {base.name}", nodes=count * base.nodes, cache={})
    if text == "local":
        return local_cluster()
    path = Path(text)
    if path.suffix != ".toml":
        path = CATALOGUE / "clusters" / f"{text.lower()}.toml"
        if not path.is_file():
            known = ", ".join(list_clusters())
            raise ValueError(f"'{text}' is no known cluster; give a path that ends in .toml, or one of: {known}")
    return cluster_from(toml.read_toml(path), path)


def cluster_from(data: dict[str, Any], path: Path) -> Cluster:
    """A cluster from the content of its TOML file. A device path is relative to that file."""
    where = str(path)
    backend = toml.text(data, "backend", where, "nccl")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"{where}: field 'backend' is '{backend}'; it must be gloo or nccl")
    device = toml.text(data, "device", where)
    per_node = toml.whole(data, "devices_per_node", where, least=1)
    intra = _link(toml.table(data, "intra", where, required=True), f"{where}: table [intra]")
    return Cluster(
        name=toml.text(data, "name", where),
        device=load_device(path.parent / device if device.endswith(".toml") else device),
        nodes=toml.whole(data, "nodes", where, 1, least=1),
        devices_per_node=per_node,
        intra=intra,
        inter=_link(toml.table(data, "inter", where), f"{where}: table [inter]") if "inter" in data else intra,
        backend=cast(Backend, backend),
        cores=toml.whole(data, "cores", where, 0),
        node_memory=toml.whole(data, "node_memory", where, 0),
        tables=tables_from(data, where),
        sources=toml.strings(data, "sources", where),
        notes=toml.strings(data, "notes", where),
    )


def _link(row: dict[str, Any], where: str) -> Link:
    bandwidth = toml.number(row, "bandwidth", where)
    if bandwidth <= 0:
        raise ValueError(f"{where}: field 'bandwidth' is 0; it must be the bytes per second in one direction")
    return Link(
        toml.text(row, "name", where),
        bandwidth,
        toml.number(row, "latency", where),
        toml.text(row, "source", where, ""),
        toml.whole(row, "ports", where, 0),
    )


def tables_from(data: dict[str, Any], where: str) -> tuple[CollectiveTable, ...]:
    """The [[collectives]] of a TOML file."""
    result = []
    for i, row in enumerate(toml.tables(data, "collectives", where)):
        place = f"{where}: collective {i + 1}"
        sizes, seconds, demand = (toml.array(row, key, place) for key in ("bytes", "seconds", "demand"))
        if not len(sizes) == len(seconds) == len(demand) or not sizes:
            raise ValueError(f"{place}: fields 'bytes', 'seconds' and 'demand' must be arrays of one length, 1 or more")
        if min(seconds) <= 0 or min(sizes) <= 0 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"{place}: 'bytes' must rise from entry to entry, and all 'bytes' and 'seconds' exceed 0")
        kind, ranks = toml.text(row, "kind", place), toml.whole(row, "ranks", place, least=2)
        error = toml.number(row, "error", place, 0.1)
        result.append(CollectiveTable(kind, ranks, sizes, seconds, demand, error))
    return tuple(result)


def tables_data(tables: Sequence[CollectiveTable]) -> list[dict[str, Any]]:
    """The content of [[collectives]]."""
    names = CollectiveTable.__slots__
    return [{name: getattr(t, name) for name in names} for t in tables]


# Loopback without calibration: unshaped veth pair on a 2-core machine, shared/facts/torch.md section 6 (2.8 Gbit/s
# all-reduce of 2 ranks); on loopback itself memory copies decide, taken as 1 GB/s. ASSUMPTION.
LOOPBACK = Link("loopback (assumed)", 1e9, 5e-5, "assumption after shared/facts/torch.md section 6")
# One AVX core without calibration: GEMM 138 GFLOP/s, 25 GB/s beyond L2: shared/facts/torch.md section 7.
CORE_FLOPS = {"float64": 0.6e11, "float32": 1.38e11, "bfloat16": 1.38e11}
CORE_BANDWIDTH = 2.5e10
CORE_HOST = {"op_forward": 2.5e-6, "op_backward": 2.5e-6}


def local_cluster(path: Path | None = None) -> Cluster:
    """This machine: every core is a device. Uses the calibrated file at `path` (default: `local_path()`) if there."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = int(psutil.virtual_memory().total)
    path = path or local_path()
    tables: tuple[CollectiveTable, ...] = ()
    link = LOOPBACK
    if path.is_file():
        data = toml.read_toml(path)
        device = device_from(data, str(path))
        tables = tables_from(data, str(path))
        if "loopback" in data:
            link = _link(toml.table(data, "loopback", str(path)), f"{path}: table [loopback]")
    else:
        device = uncalibrated_core(memory)
    return Cluster(
        "local", device, 1, cores, link, link, "gloo", cores, memory, tables, notes=device.notes, sources=device.sources
    )


def uncalibrated_core(memory: int) -> Device:
    """One core of this machine as long as nothing is measured."""
    note = "this machine is not calibrated: run `parplan calibrate`; until then times are a roofline and may be far off"
    source = "assumption: shared/facts/torch.md section 7, one core of another machine"
    efficiency = {"gemm": 1.0, "conv": 0.8, "conv_backward": 0.8, "attention": 0.6, "attention_backward": 0.5}
    return Device(
        "local core (uncalibrated)", "cpu", dict(CORE_FLOPS), memory, CORE_BANDWIDTH, 1, 1e-6, efficiency,
        host=dict(CORE_HOST), sources=(source,), notes=(note,),
    )  # fmt: skip
