"""The cluster of a published run, from the names of its device and links."""

from __future__ import annotations

import re
from math import ceil, gcd
from pathlib import Path

from costmodels.cluster import Cluster, Fabric, Link, machine_tables
from costmodels.device import Device, load_device, on_machine
from costmodels.names import device_named
from costmodels.nccl_fabric import family_of
from validation.cases import UNSTATED, Case, CaseError
from validation.cases_device import device_file, this_machine
from validation.link_words import (
    LINKS,
    about_network,
    cube_mesh,
    divided,
    lanes_of,
    network_named,
    nics_of,
    of_a_node,
)  # fmt: skip

GB = 1e9
LATENCY_INSIDE, LATENCY_BETWEEN = 0.0, 0.0  # the collective models have the latencies of NVLink, PCIe and networks
SOCKET_LATENCY = 25e-6  # seconds one way, but those of TCP: ASSUMPTION, half of a round trip of 50 us in a data centre
# Network share of one device in bytes/s where a row does not state it: ASSUMPTION, the reference designs of DGX A100
# (8 x 200 Gb/s), DGX H100 and later (400 Gb/s a device), DGX-1 (4 x 100 Gb/s per node of 8); elsewhere 100 Gb/s a node.
REFERENCE = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9, "b300": 100e9, "gb200": 50e9, "gb300": 100e9,
            "v100": 6.25e9, "p100": 6.25e9, "mi300x": 50e9, "mi355x": 50e9, "mi325x": 50e9, "mi350x": 50e9,
            "h800": 50e9, "h20": 50e9, "gh200": 50e9, "b100": 50e9}  # fmt: skip
SOCKETS = 12.5e9  # bytes/s of a node elsewhere, 100 Gb/s
DOMAIN, TRAY = r"NVL([1-9]\d*)", 4  # devices that NVLink joins beyond a node, and those of such a node
POD_SIDES, CUBE_SIDE = {"TPU v3 (chip)": 32}, 4  # chips along a pod of a 2D torus (else 16), and along a cube
MOST_INSIDE = 4096  # devices that any published node, rack or pod joins
# Runs whose source published op times of the very machine (micro-benchmarks, no step): set of the row -> machine.
MACHINES = {"simumax_b200": "b200-simumax"}
PCIE = {"1": 4e9, "2": 8e9, "3": 15.75e9, "4": 31.5e9, "5": 63e9, "6": 126e9}  # bytes/s of 16 lanes, one way
PCIE_SHARED = 0.5  # share of its PCIe rate that a device reaches while its neighbours use the same switch: ASSUMPTION


def cluster_of(case: Case, devices: dict[str, Device], folder: Path = Path()) -> Cluster:
    """Nodes, device and links of a row; each device has an equal share of its node's network. `devices` are those met
    before, which remember prices; `folder`: where device files lie."""
    name, machine = case.text("gpu"), MACHINES.get(case.text("set"), "")
    key = f"{name} {machine}"
    try:
        if name.lower() == "local":
            return this_machine(case.whole("num_gpus", least=1))
        if key not in devices:
            file = device_file(name, folder)
            found = load_device(file) if file else published_device(name)
            devices[key] = on_machine(found, machine) if machine else found
        device = devices[key]
    except ValueError as error:
        raise CaseError(str(error)) from None
    count = case.whole("num_gpus", least=1)
    near, far = divided(case.text("interconnect"))
    inside, between = case.text("intra_node") or near, case.text("inter_node") or far
    host, per_node = nodes_of(case, device)
    intra = _inside(device, inside, min(count, per_node))
    inter, assumed = _between(device, between, min(host, per_node))
    fabric = _fabric(device, intra, inside)
    notes = []
    if count > 1 and _tells(case.text("intra_node")) and not _is_read(inside):
        notes.append(f"links inside a node are taken as {intra.name}; nothing was read from {inside!r}")
    if assumed and count > per_node and fabric != "torus":  # whose links join all chips
        read = f"; no rate was read from {between!r}" if _tells(between) else ""
        notes.append(f"network between nodes assumed: {inter.bandwidth / GB:.3g} GB/s a device{read}")
    wires = cube_mesh(inside, device.name) if fabric == "cube-mesh" else ()
    dims = _grid(count, 3 if "3D" in device.link else 2) if fabric == "torus" else ()
    if fabric == "torus" and count % per_node:
        per_node = gcd(count, per_node)  # hosts of equal size; a torus does not mind them
    return Cluster(
        f"{case.text('gpu')} x {count}", device, ceil(count / per_node), per_node, intra, inter, "nccl",
        notes=tuple(notes), fabric=fabric, wires=wires, dims=dims, wraps=_closed(dims, device),
        tables=machine_tables(machine),
    )  # fmt: skip


def nodes_of(case: Case, device: Device) -> tuple[int, int]:
    """Devices of a node, and of the domain of NVLink that may join several: what the row says ("NVL72"), or the device,
    where the row leaves its links open and does not state nodes of more devices than one of its trays."""
    told = re.search(DOMAIN, case.text("intra_node"))
    stated = any(_tells(case.text(name)) for name in ("intra_node", "interconnect"))
    own = None if stated else re.search(DOMAIN, device.link)
    host = case.whole("gpus_per_node", 0) or (TRAY if own else 8)
    domain = told or (own if host <= TRAY else None)
    return host, min(int(domain[1]) if domain else host, MOST_INSIDE)


def _tells(text: str) -> bool:
    """Whether a cell holds more than that nothing was published."""
    return text.lower() not in UNSTATED and not re.search(r"(?i)not (stated|published|applicable)|single node", text)


def _is_read(text: str) -> bool:
    """Whether words about the links inside a node are understood: names of links, PCIe, or that there are none."""
    links = "|".join(map(re.escape, LINKS))
    return bool(re.search(rf"(?i){links}|pci|\b(no|without|none)\b|^-$|nvl\d|bridge|cube", text))


def published_device(text: str) -> Device:
    """The device of a published name; what stands in brackets and the vendor's system are left out where the whole
    name is unknown ("DGX H100", "H100 SXM5 80GB (HGX)")."""
    try:
        return device_named(text)
    except ValueError as error:
        bare = re.sub(r"\(.*?\)|\b[DHM]GX\b", "", text).strip()
        try:
            return device_named(bare)
        except ValueError:
            raise error from None


def _fabric(device: Device, intra: Link, text: str) -> Fabric:
    """How the links of a node join its devices: through switches, each pair by its own (AMD, Gaudi, Ascend, Intel), or
    as a torus (TPU)."""
    if intra.name == "PCIe":
        return "pcie"
    if cube_mesh(text, device.name):
        return "cube-mesh"
    if device.kind == "tpu":
        return "torus"
    return "mesh" if re.search(r"xgmi|^if$|infinity|hccs|roce|xe link", device.link.lower()) else "nvswitch"


def _grid(count: int, axes: int) -> tuple[int, ...]:
    """The sides of a torus of so many chips, as equal as they can be."""
    if axes == 3 and count % CUBE_SIDE**3 == 0:  # whole cubes
        return tuple(CUBE_SIDE * n for n in _divided(count // CUBE_SIDE**3, axes))
    return _divided(count, axes)


def _divided(count: int, axes: int) -> tuple[int, ...]:
    if axes == 1:
        return (count,)
    side = next(n for n in range(max(round(count ** (1 / axes)), 1), 0, -1) if count % n == 0)
    return (side, *_divided(count // side, axes - 1))


def _closed(dims: tuple[int, ...], device: Device) -> tuple[bool, ...]:
    """Which axes of a slice of a TPU pod close: of a 2D one those as long as a side of the pod, of a 3D one all where
    it consists of whole cubes of 4 x 4 x 4, whose faces optical switches join, else none (Austin et al., "How to Scale
    Your Model", chapter on TPUs; Jouppi et al. 2023, arXiv:2304.01433, section 2)."""
    if len(dims) == 2:
        return tuple(length == POD_SIDES.get(device.name, 16) for length in dims)
    return (not any(length % CUBE_SIDE for length in dims),) * len(dims)


def _inside(device: Device, text: str, together: int) -> Link:
    """The links of the device at its own rate, or PCIe where the row says so or the device has nothing that joins all
    of a node (bridges join pairs). together: devices of a node that the run has."""
    low = text.lower()
    without = r"\b(no|without) (nvlink|nvswitch|xgmi|infinity)"
    left = re.sub(without, "", low)
    bridged = "bridge" in device.link.lower()
    if bridged and "nvlink" in left and together <= 2:
        return Link("NVLink bridge", device.link_bandwidth, LATENCY_INSIDE, "device file")
    named = any(word in left for word in LINKS) and "bridge" not in low and not bridged
    none = bool(re.search(without, low)) or low.strip() in ("none", "no", "-") or "bridge" in low
    own = bool(device.link) and not re.search(r"bridge|connectx", device.link.lower())
    stated = re.search(r"(\d+(?:\.\d+)?)\s*([GT])B/s", text)
    if stated and not float(stated[1]):
        raise CaseError(f"links of {text.strip()!r} move nothing; leave the rate out where it is unknown")
    if named or (own and "pci" not in low and not none):
        rate = device.link_bandwidth
        if stated:
            ways = 1 if re.search(r"unidirectional|(per|each|one) (direction|way)", low) else 2
            rate = float(stated[1]) * GB * (1000 if stated[2] == "T" else 1) / ways  # both directions are quoted
        if rate:
            return Link(device.link or "NVLink", rate, LATENCY_INSIDE, "device file")
    rate = device.pcie_bandwidth or 12 * GB
    if "pci" in low and stated:
        rate = float(stated[1]) * GB  # of PCIe one direction is quoted
    elif generation := re.search(r"pci(?:e|-e|express)?[ -]*(?:gen(?:eration)?[ .]*)?([1-6])(?:\.0)?\b", low):
        rate = min(rate, PCIE[generation[1]])
    if "pci" in low and not stated:
        rate *= lanes_of(text)
    family = family_of(device.name)
    if family and family.wires == "host":  # no peer-to-peer: their law of collectives holds what neighbours leave
        return Link("PCIe", rate, LATENCY_INSIDE, "device file or the row")
    return Link("PCIe", rate * PCIE_SHARED, LATENCY_INSIDE, "device file or the row, shared switch assumed")


def _between(device: Device, text: str, host: int) -> tuple[Link, bool]:
    """One device's share of the network between nodes of `host` devices, and whether it is an assumption."""
    name = re.sub(r"[^a-z0-9]", "", device.name.lower())
    family = next((f for f in sorted(REFERENCE, key=len, reverse=True) if f in name), "")
    share = REFERENCE.get(family, SOCKETS / host)
    words = about_network(text) or text
    said = nics_of(words)
    if said and said.rate:
        nics, each = of_a_node(said, host, (host, share) if family else None)
        rate = nics * each / host
    else:
        rate = 1.25 * GB / host if "EC2" in text else 0.0  # p2.8xlarge: 10 Gb/s a node, from memory
    kind = network_named(words)
    sockets = kind in ("Ethernet", "TCP")
    latency = SOCKET_LATENCY if sockets else LATENCY_BETWEEN
    if rate:
        return Link(kind or text.strip(" ,;"), rate, latency, "the row"), False
    if sockets:  # the reference designs have RDMA
        share = min(share, SOCKETS / host)
    return Link(f"{kind or 'network'} (assumed)", share, latency, "reference design"), True
