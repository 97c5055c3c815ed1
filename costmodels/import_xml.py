"""A node from the topology XML of NCCL and RCCL: CPUs, PCIe switches, GPUs with NVLinks or xGMI, network ports."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from math import inf

from costmodels.cluster import Cluster, Link, Wire
from costmodels.device import load_device
from costmodels.import_device import COUNTED, Hint, Joined, guess, named
from costmodels.import_node import HOP, SOCKETS, Found, Port, node_of
from costmodels.names import catalogue_name

GIGATRANSFERS = {2.5: 0.25, 5.0: 0.5, 8.0: 1.0, 16.0: 2.0, 32.0: 4.0, 64.0: 8.0}  # to Gen3's rate
LANE = COUNTED / 16  # bytes/s of a lane of PCIe 3.0
SOURCE = "NCCL topology: link_speed and link_width, at NCCL's 12 GB/s for Gen3 x16"
FROM = "give what NCCL_TOPO_DUMP_FILE wrote"
SWITCH, BRIDGE, GPU, NETWORK = "0x0680", "0x068001", "0x03", "0x02"  # PCI classes; BRIDGE: NVLink to a POWER9 CPU
AMAZON = "0x1d0f"  # PCI vendor of EFA
GFX = {"910": "90a", "940": "942", "941": "942"}  # how RCCL once counted, and samples of the same GPU
FASTEST = 1.6e6  # Mb/s; drivers that say more count in another unit


@dataclass(slots=True)
class _Seen:
    where: str
    wires: list[Wire] = field(default_factory=list)
    gpus: dict[str, int] = field(default_factory=dict)  # by bus id
    ways: list[tuple[str, ...]] = field(default_factory=list)  # of every GPU: what it hangs on, from the CPU down
    links: list[tuple[int, str, int, str]] = field(default_factory=list)  # GPU, target bus id, count, class
    ports: list[Port] = field(default_factory=list)
    ways_of_ports: list[tuple[str, ...]] = field(default_factory=list)
    kinds: dict[Hint, None] = field(default_factory=dict)  # in order
    told: bool = False  # there is a <gpu>, which lists its links
    switches: int = 0


def from_xml(text: str, where: str, device: str = "") -> Cluster:
    """The node of a topology file (NCCL_TOPO_DUMP_FILE); device: a name that goes before the file's own."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: no well-formed XML ({error}); {FROM}") from None
    hosts = root.findall("cpu") if root.tag == "system" else []
    if not hosts:
        raise ValueError(f"{where}: no <system> with <cpu> in it; {FROM}")
    if len({h.get("host_hash") for h in hosts}) > 1:
        raise ValueError(
            f"{where}: holds CPUs of several hosts; dump the topology of one, and write '4x FILE' for more"
        )
    seen = _Seen(where)
    for i, host in enumerate(hosts):
        for below in host:
            _walk(below, (f"cpu{i}",), seen)
        if i:
            rate = 1.6e10 if "AMD" in host.get("vendor", "") else SOCKETS
            seen.wires.append(Wire("cpu0", f"cpu{i}", Link("link between CPUs", rate, HOP, "NCCL's table")))
    if not seen.gpus:
        raise ValueError(f"{where}: no <gpu> in it; dump the topology on a machine with GPUs")
    joined = _joined(seen)
    grace = any(h.get("arch", "").startswith(("arm", "aarch")) for h in hosts)
    hint = replace(next(iter(seen.kinds)), grace=grace)
    given = catalogue_name(device) if device else named(text)
    assumed, note = guess(joined, hint)
    notes = [] if given else [note]
    if len(seen.kinds) > 1:
        notes.append("the GPUs of the file are of several kinds; all are taken as the first is")
    if not seen.told:
        notes.append("the file lists no links of its GPUs, as those of clouds do not: NVLink is not priced; dump one")
    near = tuple(tuple(_far(way, port) for port in seen.ways_of_ports) for way in seen.ways)
    found = Found(where, "NCCL topology", joined, tuple(seen.wires), tuple(seen.ports), near, hint)
    return node_of(found, load_device(given or assumed), notes)


def _walk(item: ElementTree.Element, way: tuple[str, ...], seen: _Seen) -> None:
    """One PCI device and what hangs below it; way: the CPU and switches above."""
    if item.tag == "nic":  # virtual machines hang ports on the CPU itself
        _add_ports(item, way, 0.0, "", seen)
    if item.tag != "pci":
        return
    rate, bus = _pcie_rate(item), item.get("busid", "").lower()
    gpu, nic, below, kind = item.find("gpu"), item.find("nic"), item.findall("pci"), item.get("class", "")
    if gpu is not None or (kind.startswith(GPU) and not below):
        if bus in seen.gpus:
            raise ValueError(f"{seen.where}: two GPUs have busid '{bus}'; {FROM} on one machine")
        seen.wires.append(Wire(f"gpu{len(seen.gpus)}", way[-1], Link("PCIe", rate, HOP / 2, SOURCE)))
        seen.ways.append(way)
        _add_gpu(item, gpu, len(seen.gpus), seen)
        seen.gpus[bus] = len(seen.gpus)
    if nic is not None:
        _add_ports(nic, way, rate, bus, seen)
    elif kind.startswith(NETWORK) and gpu is None and not below:  # files of clouds list no <nic>
        name = "efa" if item.get("vendor") == AMAZON else "port"
        seen.ports.append(Port(f"{name} at {bus}", 0.0, way[-1], rate))
        seen.ways_of_ports.append(way)
    if below:
        switch = f"plx{seen.switches}"
        seen.switches += 1
        if item.get("link_speed", "").startswith("2.5 ") and item.get("link_width") in ("0", "1"):
            rate = max(_pcie_rate(other) for other in below)  # switches that hypervisors pretend
        seen.wires.append(Wire(switch, way[-1], Link("PCIe", rate, HOP / 2, SOURCE)))
        for other in below:
            _walk(other, (*way, switch), seen)


def _add_gpu(item: ElementTree.Element, gpu: ElementTree.Element | None, index: int, seen: _Seen) -> None:
    """Its kind and its links. NVIDIA writes sm="90"; RCCL gcn="gfx942" or "942" beside an sm of its own."""
    pci = ":".join(item.get(key, "").lower().removeprefix("0x") for key in ("vendor", "device"))
    if gpu is None:
        seen.kinds[Hint(pci=pci)] = None
        return
    seen.told = True
    gfx = gpu.get("gcn", "").removeprefix("gfx").partition(":")[0]
    sm = int(_figure(gpu, "sm", seen.where)) if gpu.get("sm") and not gfx else 0
    seen.kinds[Hint(sm, GFX.get(gfx, gfx), pci)] = None
    for wire in (*gpu.findall("nvlink"), *gpu.findall("xgmi")):
        if wire.get("target"):
            count = int(_figure(wire, "count", seen.where, least=1))
            seen.links.append((index, wire.get("target", "").lower(), count, wire.get("tclass", "").lower()))


def _add_ports(nic: ElementTree.Element, way: tuple[str, ...], rate: float, card: str, seen: _Seen) -> None:
    """Its ports. Those of one PCI function share its link, as those of one guid do that hang on a CPU."""
    for net in nic.findall("net"):
        name = net.get("name") or f"port {len(seen.ports)}"
        if net.get("keep", "1") == "0" or name in {p.name for p in seen.ports}:  # sockets are listed below every CPU
            continue
        guid = net.get("guid", "")
        shared = card or (guid if guid.strip("0x") else "")
        seen.ports.append(Port(name, _speed(net, seen.where), way[-1], rate, shared))
        seen.ways_of_ports.append(way)


def _speed(net: ElementTree.Element, where: str) -> float:
    """bytes/s from Mb/s; 0 where the driver did not know (-1, 0) or cannot mean it."""
    mbits = _figure(net, "speed", where, least=-inf) if net.get("speed") else 0.0
    return mbits * 1e6 / 8 if 0 < mbits <= FASTEST else 0.0


def _joined(seen: _Seen) -> Joined:
    """NVLinks to other GPUs once a pair, whichever of the two lists them; those to NVSwitches all to one switch."""
    pairs: dict[tuple[int, int], int] = {}
    listed: dict[tuple[int, int], int] = {}
    switch: dict[int, int] = {}
    for gpu, target, count, kind in seen.links:
        peer = seen.gpus.get(target)
        if peer is not None and peer != gpu:
            listed[gpu, peer] = listed.get((gpu, peer), 0) + count
            pair = min(gpu, peer), max(gpu, peer)
            pairs[pair] = max(pairs.get(pair, 0), listed[gpu, peer])
        elif peer is None and kind.startswith(SWITCH) and kind != BRIDGE:
            switch[gpu] = switch.get(gpu, 0) + count
    return Joined(len(seen.gpus), pairs, switch)


def _far(gpu: tuple[str, ...], port: tuple[str, ...]) -> int:
    """As nvidia-smi ranks ways: 0 below one switch, 1 below switches of switches, 2 at one CPU, 4 beyond."""
    shared = sum(a == b for a, b in zip(gpu, port))
    if not shared:
        return 4
    if shared == 1:
        return 2
    return 0 if len(gpu) == len(port) == shared else 1


def _pcie_rate(item: ElementTree.Element) -> float:
    """bytes/s from "16.0 GT/s PCIe" and 16; NCCL takes Gen3 x16 where the machine says nothing."""
    speed = re.match(r"\d+(\.\d+)?", item.get("link_speed", ""))
    width = item.get("link_width", "16")
    factor = GIGATRANSFERS.get(float(speed[0]), 1.0) if speed else 1.0
    return LANE * factor * (int(width) if width.isdecimal() and int(width) else 16)


def _figure(item: ElementTree.Element, key: str, where: str, least: float = 0) -> float:
    text = item.get(key, "")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f'{where}: <{item.tag}> has {key}="{text}"; it must be a number') from None
    if not least <= value < inf:
        bound = f" of {least:g} or more" if least > -inf else ""
        raise ValueError(f'{where}: <{item.tag}> has {key}="{text}"; it must be a finite number{bound}')
    return value
