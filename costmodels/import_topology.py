"""Clusters from what machines tell of themselves: `nvidia-smi topo -m` text, and NCCL's topology XML.

Both name no GPU model. A first line "# device: h100-sxm" in the text, or a comment <!-- device: h100-sxm --> in the
XML, gives it; otherwise it is guessed from the links, and the notes say so.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from costmodels.cluster import Cluster, Fabric, Link, Wire
from costmodels.device import load_device
from costmodels.names import catalogue_name

# bytes/s of one NVLink in one direction by compute capability. Source: NVIDIA data sheets (20, 25, 25, 25, 50 GB/s).
NVLINK = {60: 20e9, 70: 25e9, 80: 25e9, 86: 14e9, 90: 25e9, 100: 50e9}
# Devices guessed from the NVLinks of a GPU, and from the compute capability.
BY_LINKS = {4: "p100-sxm2", 6: "v100-sxm2-32gb", 12: "a100-sxm-80gb", 18: "h100-sxm"}
BY_CAPABILITY = {60: "p100-sxm2", 70: "v100-sxm2-32gb", 80: "a100-sxm-80gb", 86: "a10g", 89: "l40s", 90: "h100-sxm"}
BY_CAPABILITY |= {100: "b200", 103: "b300"}
PCIE = 2.4e10  # bytes/s of PCIe 4.0 x16 where nothing says more: NCCL's table, 12 GB/s for Gen3, doubling
SOCKETS = 2.2e10  # bytes/s between CPUs: NCCL's table for Intel of Ice Lake's time; AMD 16, Broadwell 6, Skylake 10
GIGATRANSFERS = {2.5: 0.25, 5.0: 0.5, 8.0: 1.0, 16.0: 2.0, 32.0: 4.0, 64.0: 8.0}  # to Gen3's rate
GEN3_LANE = 0.75e9  # bytes/s: NCCL's 12 GB/s for 16 lanes
HOP = 1e-6  # seconds; assumption for every wire inside a node
NETWORK_LATENCY = 2.7e-6  # seconds, InfiniBand: shared/facts/communication.md A1
RANKS = ("PIX", "PXB", "PHB", "NODE", "SYS")  # nvidia-smi's words for ways over PCIe, near to far


def read_topology(path: Path) -> Cluster:
    """One node of a cluster from a .txt of `nvidia-smi topo -m` or an NCCL topology .xml."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ValueError(f"{path}: cannot be read ({reason}); give a text file") from None
    if path.suffix == ".xml":
        return from_xml(text, str(path))
    return from_matrix(text, str(path))


# --- nvidia-smi topo -m ---


def from_matrix(text: str, where: str) -> Cluster:
    """The node of a matrix that `nvidia-smi topo -m` printed: NV# are that many NVLinks, the rest ways over PCIe."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # some versions underline the header
    lines = [line.split() for line in text.splitlines()]
    head = next((words for words in lines if words and words[0] == "GPU0" and "X" not in words), None)
    if head is None:
        raise ValueError(f"{where}: no header line that begins with GPU0; give the whole output of nvidia-smi topo -m")
    columns = [w for w in head if re.fullmatch(r"GPU\d+|NIC\d+|mlx\d_\d+\S*|\w*bnxt\S*|rdma\S*|efa_\d+|cx\d\S*", w)]
    rows = {words[0]: words[1 : len(columns) + 1] for words in lines if words and words[0] in columns and words != head}
    gpus = [c for c in columns if c.startswith("GPU")]
    if missing := [g for g in gpus if len(rows.get(g, [])) < len(gpus)]:
        raise ValueError(f"{where}: no whole row for {', '.join(missing)}; give the whole output of nvidia-smi topo -m")
    cells = {(a, b): word for a, row in rows.items() for b, word in zip(columns, row)}
    names = {c: f"gpu{i}" for i, c in enumerate(gpus)}
    names |= {c: f"nic{i}" for i, c in enumerate(c for c in columns if c not in names)}
    if bad := [w for w in cells.values() if not re.fullmatch(rf"X|NV\d+|{'|'.join(RANKS)}|SOC", w)]:
        raise ValueError(f"{where}: '{bad[0]}' is no word of nvidia-smi topo -m; use X, NV#, {', '.join(RANKS)}")
    counts = {(a, b): int(cells[a, b][2:]) for a in gpus for b in gpus if cells[a, b].startswith("NV")}
    switched = _switched(gpus, counts)
    lanes = max((n if switched else _total(a, counts) for (a, _), n in counts.items()), default=0)
    bridged = len(gpus) == 2 and lanes == 4  # P100 stand in meshes; a pair by four links is a bridge
    device = _named(text) or ("a40" if bridged else BY_LINKS.get(lanes, "a100-pcie-80gb" if lanes else "l40s"))
    lane = _lane(device, lanes)
    wires = _nvlinks(gpus, counts, names, lane, switched)
    wires += _bridges(list(names), cells, names)
    nics = [c for c in columns if c not in gpus]
    near = [n for n in nics if any(cells.get((g, n)) in ("PIX", "PXB") for g in gpus)]  # others serve storage and hosts
    return _node(where, device, len(gpus), wires, lanes * lane, _named(text) == "", 5e10, len(near or nics))


def _total(gpu: str, counts: dict[tuple[str, str], int]) -> int:
    return sum(n for (a, _), n in counts.items() if a == gpu)


def _switched(gpus: Sequence[str], counts: dict[tuple[str, str], int]) -> bool:
    """All pairs by the same number of links, more than they could have if each had its own: a switch."""
    every = all((a, b) in counts for a in gpus for b in gpus if a != b)
    return every and len(gpus) > 2 and len(set(counts.values())) == 1 and min(counts.values()) >= 6


def _nvlinks(
    gpus: Sequence[str], counts: dict[tuple[str, str], int], names: dict[str, str], lane: float, switched: bool
) -> list[Wire]:
    if switched:
        number = next(iter(counts.values()))
        link = Link(f"{number}x NVLink", number * lane, HOP / 2, "nvidia-smi topo -m")
        return [Wire(names[g], "nvswitch", link) for g in gpus]
    pairs = [(a, b) for i, a in enumerate(gpus) for b in gpus[i + 1 :] if (a, b) in counts]
    return [
        Wire(names[a], names[b], Link(f"{counts[a, b]}x NVLink", counts[a, b] * lane, HOP, "nvidia-smi topo -m"))
        for a, b in pairs
    ]


def _bridges(members: Sequence[str], cells: dict[tuple[str, str], str], names: dict[str, str]) -> list[Wire]:
    """PCIe switches and hosts: who is at most PXB apart shares a switch, who is at most NODE apart a CPU."""
    near = _components(members, cells, ("PIX", "PXB"))
    homes = _components(members, cells, ("PIX", "PXB", "PHB", "NODE"))
    wires = []
    link = Link("PCIe", PCIE, HOP / 2, "assumed PCIe 4.0 x16")
    for at, group in enumerate(near):
        home = f"cpu{next(i for i, h in enumerate(homes) if group[0] in h)}"
        top = home if len(group) == 1 else f"plx{at}"
        wires += [Wire(names[m], top, link) for m in group]
        if top != home:
            wires.append(Wire(top, home, link))
    between = Link("link between CPUs", SOCKETS, HOP, "assumed")
    return wires + [Wire("cpu0", f"cpu{i}", between) for i in range(1, len(homes))]


def _components(members: Sequence[str], cells: dict[tuple[str, str], str], words: Sequence[str]) -> list[list[str]]:
    """Groups of members joined by any of these words. GPUs joined by NVLink hide their PCIe way; their NICs tell it."""
    groups = [{m} for m in members]
    for (a, b), word in cells.items():
        if word in words:
            first, second = (next(g for g in groups if x in g) for x in (a, b))
            if first is not second:
                first |= second
                groups.remove(second)
    return [sorted(g, key=list(members).index) for g in groups]


# --- NCCL XML ---


@dataclass(slots=True)
class _Found:
    wires: list[Wire] = field(default_factory=list)
    gpus: dict[str, str] = field(default_factory=dict)  # bus id -> name
    links: list[tuple[str, str, int, str]] = field(default_factory=list)  # gpu, target bus id, count, class
    nics: list[float] = field(default_factory=list)  # bytes/s
    capability: int = 0
    switches: int = 0


def from_xml(text: str, where: str) -> Cluster:
    """The node of an NCCL topology file (NCCL_TOPO_DUMP_FILE): CPUs, PCIe switches, GPUs with NVLinks, NICs."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: no well-formed XML ({error}); give what NCCL_TOPO_DUMP_FILE wrote") from None
    hosts = root.findall("cpu") if root.tag == "system" else []
    if not hosts:
        raise ValueError(f"{where}: no <system> with <cpu> in it; give what NCCL_TOPO_DUMP_FILE wrote")
    found = _Found()
    for i, host in enumerate(hosts):
        for below in host:
            _walk(below, f"cpu{i}", found, where)
        if i:
            rate = 1.6e10 if "AMD" in host.get("vendor", "") else SOCKETS
            found.wires.append(Wire("cpu0", f"cpu{i}", Link("link between CPUs", rate, HOP, "NCCL's table")))
    if not found.gpus:
        raise ValueError(f"{where}: no <gpu> in it; dump the topology on a machine with GPUs")
    named = _named(text)
    device = named or BY_CAPABILITY.get(found.capability, "a100-sxm-80gb")
    per_gpu = max((sum(n for g, _, n, _ in found.links if g == gpu) for gpu in found.gpus.values()), default=0)
    found.wires += _xml_nvlinks(found, _lane(device, per_gpu, found.capability))
    total = per_gpu * _lane(device, per_gpu, found.capability)
    port = max(found.nics, default=5e10)  # slower ones serve storage and hosts
    return _node(where, device, len(found.gpus), found.wires, total, not named, port, found.nics.count(port))


def _walk(item: ElementTree.Element, above: str, found: _Found, where: str) -> None:
    """One PCI device and what hangs below it."""
    if item.tag != "pci":
        if item.tag == "nic":  # virtual machines hang NICs on the CPU itself
            _ports(item, above, PCIE, found, where)
        return
    rate = _pcie_rate(item)
    gpu, nic, below = item.find("gpu"), item.find("nic"), item.findall("pci")
    link = Link("PCIe", rate, HOP / 2, "NCCL topology: link_speed and link_width, at NCCL's 12 GB/s for Gen3 x16")
    if gpu is not None:
        name = f"gpu{len(found.gpus)}"
        found.gpus[item.get("busid", "").lower()] = name
        found.capability = found.capability or int(_figure(gpu, "sm", where))
        found.wires.append(Wire(name, above, link))
        for wire in gpu.findall("nvlink"):
            count = int(_figure(wire, "count", where, least=1))
            row = name, wire.get("target", "").lower(), count, wire.get("tclass", "")
            found.links.append(row)
    if nic is not None:
        _ports(nic, above, rate, found, where)
    if below:
        switch = f"plx{found.switches}"
        found.switches += 1
        found.wires.append(Wire(switch, above, link))
        for other in below:
            _walk(other, switch, found, where)


def _ports(nic: ElementTree.Element, above: str, rate: float, found: _Found, where: str) -> None:
    for net in nic.findall("net"):
        if net.get("keep", "1") == "0":
            continue
        speed = _figure(net, "speed", where, least=1) * 1e6 / 8
        found.wires.append(Wire(f"nic{len(found.nics)}", above, Link("PCIe", rate, HOP / 2, "NCCL topology")))
        found.nics.append(speed)


def _xml_nvlinks(found: _Found, lane: float) -> list[Wire]:
    """NVLinks to other GPUs once a pair; those to NVSwitches (PCI class 0x0680) all to one switch."""
    wires: list[Wire] = []
    to_switch: dict[str, int] = {}
    for gpu, target, count, kind in found.links:
        peer = found.gpus.get(target)
        if peer is None and kind.startswith("0x0680"):
            to_switch[gpu] = to_switch.get(gpu, 0) + count
        elif peer is not None and int(gpu[3:]) < int(peer[3:]):
            wires.append(Wire(gpu, peer, Link(f"{count}x NVLink", count * lane, HOP, "NCCL topology")))
    for gpu, count in to_switch.items():
        wires.append(Wire(gpu, "nvswitch", Link(f"{count}x NVLink", count * lane, HOP / 2, "NCCL topology")))
    return wires


def _pcie_rate(item: ElementTree.Element) -> float:
    """bytes/s from "16.0 GT/s PCIe" and 16; NCCL takes Gen3 x16 where the machine says nothing."""
    speed = re.match(r"[\d.]+", item.get("link_speed", ""))
    width = item.get("link_width", "16")
    factor = GIGATRANSFERS.get(float(speed[0]), 1.0) if speed else 1.0
    return GEN3_LANE * factor * (int(width) if width.isdigit() and int(width) else 16)


def _figure(item: ElementTree.Element, key: str, where: str, least: float = 0) -> float:
    text = item.get(key, "")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f'{where}: <{item.tag}> has {key}="{text}"; it must be a number') from None
    if not least <= value < inf:
        raise ValueError(f'{where}: <{item.tag}> has {key}="{text}"; it must be a number of {least:g} or more')
    return value


# --- both ---


def _named(text: str) -> str:
    """The device that a comment names, as the catalogue calls it."""
    match = re.search(r"^\s*(?:#|<!--)\s*device:\s*(.*?)\s*(?:-->)?\s*$", text, re.MULTILINE)
    return catalogue_name(match[1]) if match else ""


def _lane(device: str, lanes: int, capability: int = 0) -> float:
    """bytes/s of one NVLink: the data sheet's sum over its links, or by compute capability."""
    sheet = load_device(device)
    if sheet.link_bandwidth and lanes and sheet.links:
        return sheet.link_bandwidth / sheet.links
    return NVLINK.get(capability, 25e9)


def _node(
    where: str, device: str, gpus: int, wires: list[Wire], nvlink: float, guessed: bool, port: float, nics: int
) -> Cluster:
    """port, nics: bytes/s of a network port, and how many the GPUs use."""
    fabric: Fabric = "pcie"
    if nvlink:
        fabric = "nvswitch" if any(w.b == "nvswitch" for w in wires) else "cube-mesh"
    slowest = min((w.link.bandwidth for w in wires if w.a.startswith("gpu") or w.b.startswith("gpu")), default=PCIE)
    intra = Link("NVLink" if nvlink else "PCIe", nvlink or slowest, HOP, f"imported from {Path(where).name}")
    inter = Link("network port", port, NETWORK_LATENCY, "imported; latency of InfiniBand assumed", ports=nics or 1)
    note = (f"device {device} was guessed from the links; write '# device: NAME' into the file to say it",)
    return Cluster(
        Path(where).stem,
        load_device(device),
        1,
        gpus,
        intra,
        inter,
        sources=(intra.source,),
        notes=note if guessed else (),
        fabric=fabric,
        wires=tuple(wires),
    )
