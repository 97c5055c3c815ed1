"""A cluster: nodes of equal devices, a link inside the node and one between nodes, and what was measured on them."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate
from math import inf, prod
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from costmodels import tomlfile as toml
from costmodels.device import CATALOGUE, MACHINES, Device, device_from, load_device, local_path

Backend = Literal["gloo", "nccl"]
# How the devices of a node are joined. nvswitch: all to one switch. mesh: every pair by its share of a device's links.
# cube-mesh, pcie: by `wires` (pcie without any: all to one host bridge). torus: a grid with wraparound over the whole
# cluster. loopback: processes of one machine.
Fabric = Literal["nvswitch", "mesh", "cube-mesh", "pcie", "torus", "loopback"]


@dataclass(frozen=True, slots=True)
class Link:
    """bandwidth: bytes/s per direction of one port. latency: seconds of an empty message, one way.
    ports: ports per node that its devices share (0: every device has its own).
    flow_cap: bytes/s of one flow at most (0: no cap). window: bytes that one flow may have under way, so that its rate
    is at most window / round trip (0: no limit). ecmp: share of the bandwidth that is left when several flows are
    spread over parallel links by a hash and some collide (1: they do not)."""

    name: str
    bandwidth: float
    latency: float
    source: str = ""
    ports: int = 0
    flow_cap: float = 0.0
    window: float = 0.0
    ecmp: float = 1.0

    def flow_rate(self, round_trip: float = 0.0) -> float:
        """bytes/s that one flow alone reaches; round_trip: seconds, by default twice the latency of this link."""
        trip = round_trip or 2 * self.latency
        caps = [self.bandwidth, self.flow_cap or inf, self.window / trip if self.window and trip else inf]
        return min(caps)


@dataclass(frozen=True, slots=True)
class Tier:
    """One layer of switches above the nodes, from the bottom up; what the last leaves apart one more switch joins at
    full rate.

    nodes: nodes below one switch of this tier. oversubscription: bandwidth of the links below one switch over that of
    its links upwards. rails: one switch for each port index of the nodes rather than one for all. ecmp: as in `Link`,
    of the links upwards. latency: seconds of passing one switch more, one way.
    """

    name: str
    nodes: int
    oversubscription: float = 1.0
    rails: bool = False
    ecmp: float = 1.0
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class Wire:
    """A connection inside a node: the ends are gpu0, gpu1, ..., nic0, ..., cpu0, ..., or any other name, which is a
    switch."""

    a: str
    b: str
    link: Link


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes of a cluster whose nodes differ; `part` describes them as a cluster of their own."""

    nodes: int
    part: Cluster


@dataclass(frozen=True, slots=True)
class CollectiveTable:
    """Measured seconds of one kind of collective among `ranks` ranks of one node, or spread evenly over `nodes`, by
    bytes (as nccl-tests counts); `demand` is the host cores that each rank kept busy meanwhile."""

    kind: str
    ranks: int
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    demand: tuple[float, ...]
    error: float = 0.1
    nodes: int = 1


@dataclass(frozen=True, eq=False)
class Cluster:
    """`nodes` x `devices_per_node` devices; rank r sits on node r // devices_per_node.

    backend: what moves the messages. cores: host cores of a node that all its ranks share, where the devices are
    those cores (0: devices compute on their own). node_memory: bytes that all ranks of a node share (0: every
    device has its own `device.memory_bytes`). More ranks than devices may run on a node with `cores`.

    fabric, wires: how the devices of a node are joined. dims: the grid of a torus; wraps: which of its axes close (none
    given: all). tiers: the switches between nodes
    (none: one switch that joins all at full rate). groups: empty where all nodes are equal; otherwise nodes in rank
    order, and the other fields say what the weakest of them has, which is what a group over all of them feels.
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
    fabric: Fabric = "nvswitch"
    wires: tuple[Wire, ...] = ()
    dims: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()
    tiers: tuple[Tier, ...] = ()
    groups: tuple[NodeGroup, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.first_ranks[-1]

    def node_of(self, rank: int) -> int:
        """The node of a rank; ranks beyond the last device oversubscribe the last node."""
        if self.groups:
            return min(bisect_right(self.first_ranks, rank) - 1, self.nodes - 1)
        return min(rank // self.devices_per_node, self.nodes - 1)

    def part_of(self, node: int) -> Cluster:
        """The description of one node: the cluster itself where all nodes are equal."""
        for group in self.groups:
            if node < group.nodes:
                return group.part
            node -= group.nodes
        return self

    @cached_property
    def first_ranks(self) -> tuple[int, ...]:
        """The first rank of every node, and the number of ranks."""
        if not self.groups:
            return tuple(range(0, (self.nodes + 1) * self.devices_per_node, self.devices_per_node))
        counts = [g.part.devices_per_node for g in self.groups for _ in range(g.nodes)]
        return (0, *accumulate(counts))

    @cached_property
    def curves(self) -> dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By kind, ranks and nodes: log(bytes), log(seconds), and demand of every table. A small message that took
        longer than a larger one was disturbed: it takes the larger one's time, so that prices never fall."""
        return {
            (t.kind, t.ranks, t.nodes): (
                np.log(t.bytes),
                np.minimum.accumulate(np.log(t.seconds)[::-1])[::-1],
                np.array(t.demand),
            )
            for t in self.tables
        }


def list_clusters() -> list[str]:
    """Catalogue names, and `local`."""
    return [*sorted(p.stem for p in (CATALOGUE / "clusters").glob("*.toml")), "local"]


def load_cluster(name: str | Path, device: str = "") -> Cluster:
    """A cluster by catalogue name ("dgx-h100"), TOML path, with more nodes ("8x dgx-h100"), of nodes that differ
    ("2x dgx-h100 + 2x dgx-a100"), what `nvidia-smi topo -m` printed (.txt), an NCCL topology (.xml), or "local".
    device: of a .txt or .xml, which name none.

    >>> load_cluster("8x dgx-h100").size
    64
    """
    text = str(name).strip()
    if " + " in text:
        from costmodels.mixed_nodes import mixed

        return mixed([load_cluster(part, device) for part in text.split(" + ")])
    if match := re.fullmatch(r"(\d+)\s*x\s*(\S.*)", text):
        base = load_cluster(match[2], device)
        count = int(match[1])
        if count < 1:
            raise ValueError(f"'{text}' has no nodes; write 1x or more")
        if base.dims and count > 1:
            raise ValueError(f"'{text}': a torus does not grow by nodes; give its grid in a file, as tpu-v4-cube has")
        groups = base.groups * count
        return replace(base, name=f"{count}x {base.name}", nodes=count * base.nodes, groups=groups, cache={})
    path = Path(text)
    if path.suffix in (".txt", ".xml"):
        from costmodels.import_topology import read_topology

        return read_topology(path, device)
    if device:
        raise ValueError(f"'{text}' names its device itself; one can be given for a .txt or .xml of a machine")
    if text == "local":
        return local_cluster()
    if path.suffix != ".toml":
        path = CATALOGUE / "clusters" / f"{text.lower()}.toml"
        if not path.is_file():
            known = list_clusters()
            near = get_close_matches(text.lower(), known, n=3)
            hint = f"did you mean {' or '.join(near)}? Else" if near else f"known are {', '.join(known)};"
            raise ValueError(f"'{text}' is no known cluster: {hint} give a path that ends in .toml")
    return cluster_from(toml.read_toml(path), path)


def cluster_from(data: dict[str, Any], path: Path) -> Cluster:
    """A cluster from the content of its TOML file. A device path is relative to that file."""
    where = str(path)
    backend = toml.text(data, "backend", where, "nccl")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"{where}: field 'backend' is '{backend}'; it must be gloo or nccl")
    device = toml.text(data, "device", where)
    fabric = toml.text(data, "fabric", where, "nvswitch")
    if fabric not in get_args(Fabric):
        raise ValueError(f"{where}: field 'fabric' is '{fabric}'; it must be one of {', '.join(get_args(Fabric))}")
    per_node = toml.whole(data, "devices_per_node", where, least=1)
    nodes = toml.whole(data, "nodes", where, 1, least=1)
    dims = tuple(int(d) for d in toml.array(data, "dims", where, least=1)) if "dims" in data else ()
    if (fabric == "torus") != bool(dims) or (dims and prod(dims) != nodes * per_node):
        raise ValueError(
            f"{where}: fabric torus needs 'dims' whose product is the number of devices, {nodes * per_node}"
        )
    intra = _link(toml.table(data, "intra", where, required=True), f"{where}: table [intra]")
    return Cluster(
        name=toml.text(data, "name", where),
        device=load_device(path.parent / device if device.endswith(".toml") else device),
        nodes=nodes,
        devices_per_node=per_node,
        intra=intra,
        inter=_link(toml.table(data, "inter", where), f"{where}: table [inter]") if "inter" in data else intra,
        backend=cast(Backend, backend),
        cores=toml.whole(data, "cores", where, 0),
        node_memory=toml.whole(data, "node_memory", where, 0),
        tables=tables_from(data, where),
        sources=toml.strings(data, "sources", where),
        notes=toml.strings(data, "notes", where),
        fabric=cast(Fabric, fabric),
        wires=tuple(w for row in toml.tables(data, "wires", where) for w in _wires(row, f"{where}: [[wires]]")),
        dims=dims,
        wraps=_wraps(data, dims, where),
        tiers=tuple(_tier(row, f"{where}: [[tiers]]") for row in toml.tables(data, "tiers", where)),
    )


def _wraps(data: dict[str, Any], dims: tuple[int, ...], where: str) -> tuple[bool, ...]:
    closed = data.get("wraps", [])
    if not isinstance(closed, list) or len(closed) not in (0, len(dims)) or any(type(c) is not bool for c in closed):
        raise ValueError(f"{where}: field 'wraps' must hold true or false for each of the {len(dims)} dims")
    return tuple(closed)


def _wires(row: dict[str, Any], where: str) -> list[Wire]:
    link = _link(row, where)
    pairs = [text.split() for text in toml.strings(row, "ends", where)]
    if not pairs or any(len(pair) != 2 or pair[0] == pair[1] for pair in pairs):
        raise ValueError(f"{where}: field 'ends' must be strings of two names each, such as [\"gpu0 gpu1\"]")
    return [Wire(a, b, link) for a, b in pairs]


def _tier(row: dict[str, Any], where: str) -> Tier:
    return Tier(
        toml.text(row, "name", where),
        toml.whole(row, "nodes", where, least=1),
        toml.number(row, "oversubscription", where, 1.0, least=1e-3),
        toml.flag(row, "rails", where),
        _share(row, where),
        toml.number(row, "latency", where, 0.0),
    )


def _share(row: dict[str, Any], where: str) -> float:
    ecmp = toml.number(row, "ecmp", where, 1.0)
    if not 0 < ecmp <= 1:
        raise ValueError(f"{where}: field 'ecmp' is {ecmp:g}; it must be a share above 0 and up to 1")
    return ecmp


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
        toml.number(row, "flow_cap", where, 0.0),
        toml.number(row, "window", where, 0.0),
        _share(row, where),
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
        nodes = toml.whole(row, "nodes", place, 1, least=1)
        result.append(CollectiveTable(kind, ranks, sizes, seconds, demand, error, nodes))
    return tuple(result)


def machine_tables(machine: str) -> tuple[CollectiveTable, ...]:
    """The collectives that were measured on one machine (`costmodels.device.on_machine`); none where it is ""."""
    path = MACHINES / f"{machine}.toml"
    return tables_from(toml.read_toml(path), path.name) if machine else ()


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
        "local", device, 1, cores, link, link, "gloo", cores, memory, tables, device.sources, device.notes, "loopback"
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
