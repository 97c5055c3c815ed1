"""A node of what a topology file tells: links between GPUs, PCIe, network ports, and notes on what was assumed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from costmodels.cluster import Cluster, Fabric, Link, Wire
from costmodels.device import Device
from costmodels.import_device import Hint, Joined, generation, lane_rate, pcie_rate, port_rate

SOCKETS = 2.2e10  # bytes/s between CPUs: NCCL's table for Intel of Ice Lake's time; AMD 16, Broadwell 6, Skylake 10
HOP = 1e-6  # seconds; assumption for every wire inside a node
STAGED = 5e-6  # seconds of a message over PCIe: clusters of the catalogue
XGMI_HOP = 1.5e-6  # seconds: mi300x-8 of the catalogue
EFA_PORT = 1.25e10  # bytes/s: 100 Gb/s on p4d and p5
# Name of a network and seconds of a message, by how its ports are called: clusters of the catalogue.
NETWORKS = (
    (r"efa|rdmap\d", "EFA", 1.5e-5),
    (r"eth\d|en[ops]\w*\d|bond\d|lo$", "Ethernet (TCP)", 1.5e-5),
    (r"roce|bnxt|irdma|ionic|mlx\d_bond", "RoCE", 3.5e-6),
)
INFINIBAND = 2.7e-6  # seconds, where the names tell nothing: shared/facts/communication.md A1


@dataclass(frozen=True, slots=True)
class Port:
    """A network port. name: as the machine calls it. speed: bytes/s, 0 where unknown. at: what it hangs on. rate:
    bytes/s of its PCIe link, 0: of the device's generation. card: a name that ports of one PCIe link share."""

    name: str
    speed: float
    at: str
    rate: float = 0.0
    card: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file tells of a node. wires: PCIe and CPUs, without network ports. near: for every GPU, how far each port
    is (0 and 1: no CPU between). source: what wrote the file."""

    where: str
    source: str
    joined: Joined
    wires: tuple[Wire, ...]
    ports: tuple[Port, ...]
    near: tuple[tuple[int, ...], ...]
    hint: Hint


def node_of(found: Found, device: Device, notes: Sequence[str]) -> Cluster:
    """The cluster of one node."""
    joined = found.joined
    ports, said = _rated([found.ports[i] for i in _kept(found)], device)
    left = [p.name for p in found.ports if p.name not in {q.name for q in ports}]
    if left:
        said.append(f"left out, as slower or farther from the GPUs than other ports: {', '.join(left)}")
    if len(ports) > joined.gpus and network(ports)[0] != "EFA":
        said.append(
            f"{len(ports)} ports for {joined.gpus} GPUs: virtual functions of one card count as cards of their own"
        )
    fabric = _fabric(joined, device, found.hint)
    lane = lane_rate(device, joined, found.hint)
    name = "xGMI" if found.hint.gfx or "xgmi" in device.link.lower() else "NVLink"
    pcie = [w for w in found.wires if w.a.startswith("gpu")]
    if fabric == "pcie":
        slowest = min((w.link.bandwidth for w in pcie), default=pcie_rate(device))
        intra = Link("PCIe", slowest, STAGED, found.source)
        if joined.total:
            few = "two GPUs" if joined.whole else "only some GPUs"
            said.append(f"{name} joins {few}: the wires list it, the link inside the node is PCIe")
    else:
        links = min(joined.switch.values(), default=joined.total)  # all wait for the GPU with the fewest
        intra = Link(name, links * lane, XGMI_HOP if name == "xGMI" else HOP, found.source)
    kind, latency = network(ports)
    speed = max((p.speed for p in ports), default=port_rate(device))
    return Cluster(
        Path(found.where).stem,
        device,
        1,
        joined.gpus,
        intra,
        Link(kind, speed, latency, f"{found.source}; latency assumed", ports=len(ports) or 1),
        sources=(f"imported from {Path(found.where).name}",),
        notes=(*notes, *said),
        fabric=fabric,
        wires=(*_links(joined, lane, name, found.source), *_pruned(found.wires, ports, device)),
    )


def _kept(found: Found) -> list[int]:
    """Of the fastest ports (NCCL prefers those to near ones) those that serve GPUs; unknown speeds count as fastest."""
    best = max((p.speed for p in found.ports), default=0.0)
    fast = [i for i, p in enumerate(found.ports) if p.speed in (0.0, best)]
    return [fast[i] for i in serving([[row[i] for i in fast] for row in found.near], len(fast))]


def serving(near: Sequence[Sequence[int]], count: int) -> list[int]:
    """Ports that carry traffic of GPUs: those that share a PCIe switch with one, and the nearest of GPUs to which none
    of these is as near. All where no port shares a switch. The others serve storage and the host."""
    close = {p for row in near for p, far in enumerate(row) if far <= 1}
    if not close:
        return list(range(count))
    kept = set(close)
    for row in near:
        if min(row[p] for p in close) > min(row):
            kept |= {p for p, far in enumerate(row) if far == min(row)}
    return sorted(kept)


def network(ports: Sequence[Port]) -> tuple[str, float]:
    """What the ports are called tells the network: its name, and seconds of a message."""
    for pattern, kind, latency in NETWORKS:
        if ports and all(re.match(pattern, p.name, re.IGNORECASE) for p in ports):
            return kind, latency
    return "network port", INFINIBAND


def _rated(ports: list[Port], device: Device) -> tuple[list[Port], list[str]]:
    """The ports, each with one rate, and what was assumed of them."""
    usual = EFA_PORT if network(ports)[0] == "EFA" else port_rate(device)
    if not ports:
        return [], [f"the file lists no network port: one of {usual * 8e-9:g} Gb/s for the node is assumed"]
    said = []
    if unknown := [p.name for p in ports if not p.speed]:
        rate = max(p.speed for p in ports) or usual
        why = "as the others have" if max(p.speed for p in ports) else f"usual beside {device.name}"
        said.append(f"the file gives no speed of {', '.join(unknown)}: {rate * 8e-9:g} Gb/s a port assumed, {why}")
        ports = [replace(p, speed=p.speed or rate) for p in ports]
    shares = {p.card: sum(q.card == p.card for q in ports) for p in ports if p.card}
    parts = [(p.rate or pcie_rate(device)) / shares.get(p.card, 1) for p in ports]
    bound = [i for i, p in enumerate(ports) if shares.get(p.card, 1) > 1 and parts[i] < p.speed]
    if bound:
        said.append(f"ports of one card share its PCIe link: {', '.join(ports[i].name for i in bound)}")
    slowest = min(parts[i] if i in bound else p.speed for i, p in enumerate(ports))
    return [replace(p, speed=slowest) for p in ports], said


def _fabric(joined: Joined, device: Device, hint: Hint) -> Fabric:
    if not joined.whole:
        return "pcie"
    if joined.switch:
        return "nvswitch"
    if hint.gfx and joined.meshed:
        return "mesh"
    if joined.gpus == 2 and not device.links and not hint.gfx:
        return "pcie"  # two cards and a bridge, as pairs among more cards
    return "cube-mesh"


def _links(joined: Joined, lane: float, name: str, source: str) -> list[Wire]:
    """NVLink and xGMI: wires to one switch, or from pair to pair."""
    up = [
        Wire(f"gpu{g}", "nvswitch", Link(f"{n}x {name}", n * lane, HOP / 2, source)) for g, n in joined.switch.items()
    ]
    return up + [
        Wire(f"gpu{a}", f"gpu{b}", Link(f"{n}x {name}", n * lane, HOP, source)) for (a, b), n in joined.pairs.items()
    ]


def _pruned(wires: Sequence[Wire], ports: Sequence[Port], device: Device) -> list[Wire]:
    """PCIe with the ports that are left, without switches that lead to nothing."""
    result = list(wires)
    cards: dict[str, str] = {}
    for i, port in enumerate(ports):
        link = Link("PCIe", port.rate or pcie_rate(device), HOP / 2, f"PCIe {generation(device)}.0 where not stated")
        at = port.at
        if port.card and sum(p.card == port.card for p in ports) > 1:
            if port.card not in cards:
                cards[port.card] = f"card{len(cards)}"
                result.append(Wire(cards[port.card], at, link))
            at = cards[port.card]
        result.append(Wire(f"nic{i}", at, link))
    while True:
        ends = [end for w in result for end in (w.a, w.b)]
        dead = {end for end in ends if end.startswith("plx") and ends.count(end) == 1}
        if not dead:
            return result
        result = [w for w in result if not dead & {w.a, w.b}]
