"""The cluster of a published run, from the names of its device and links."""

from __future__ import annotations

import re
from math import ceil, gcd
from pathlib import Path

from costmodels.cluster import Cluster, Fabric, Link, Wire, load_cluster, machine_tables
from costmodels.device import Device, load_device, on_machine
from costmodels.names import device_named
from validation.cases import Case, CaseError
from validation.cases_device import device_file, this_machine

GB = 1e9
LATENCY_INSIDE, LATENCY_BETWEEN = 0.0, 0.0  # the collective models have the latencies of NVLink, PCIe and networks
# Network share of one device in bytes/s where a row does not state it: ASSUMPTION, the reference designs of DGX A100
# (8 x 200 Gb/s), DGX H100 and later (400 Gb/s a device), DGX-1 (4 x 100 Gb/s per node of 8); elsewhere 100 Gb/s a node.
UNSTATED = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9, "b300": 100e9, "gb200": 50e9, "gb300": 100e9,
            "v100": 6.25e9, "p100": 6.25e9, "mi300x": 50e9, "mi355x": 50e9, "mi325x": 50e9, "mi350x": 50e9,
            "h800": 50e9, "h20": 50e9, "gh200": 50e9, "b100": 50e9}  # fmt: skip
# Words that name links between the devices of a node.
LINKS = ("nvlink", "nvswitch", "xgmi", "infinity fabric", "infinityfabric", "ici", "neuronlink", "hccs", "xe link")
MOST_INSIDE = 4096  # devices that any published node, rack or pod joins
# Runs whose source published op times of the very machine (micro-benchmarks, no step): set of the row -> machine.
MACHINES = {"simumax_b200": "b200-simumax"}
# A rate: how many times, how much, of what; "GB/s" and "MBps" are bytes, "Gb/s", "gbps", "25GbE" and "100G" are bits.
RATE = re.compile(
    r"(?:(\d+)\s*x\s*)?(?<![\d.])(\d+(?:\.\d+)?)\s*([TGMtgm])"
    r"(?:(B/s|Bps)|(?:[ie]gabits?|[bB]its?/s|[bB]ps|b/s|ig[eE]|[bB]?[eE])\b|\b)"
)
SCALE = {"t": 1e12, "g": 1e9, "m": 1e6}
# Gb/s of an InfiniBand port of four lanes.
GENERATION = {"QDR": 32, "FDR": 56, "EDR": 100, "HDR": 200, "NDR": 400, "XDR": 800}
NETWORK = re.compile(r"(?i)ethernet|infiniband|\bib\b|roce|efa|\btcp\b|gbe|between|network|[tgm]b(it)?/s|[gm]bps")
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
            found = load_device(file) if file else _device(name)
            devices[key] = on_machine(found, machine) if machine else found
        device = devices[key]
    except ValueError as error:
        raise CaseError(str(error)) from None
    count, per_node = case.whole("num_gpus", least=1), case.whole("gpus_per_node", 8) or 8
    near, far = _parts(case.text("interconnect"))
    inside, between = case.text("intra_node") or near, case.text("inter_node") or far
    if (domain := re.search(r"NVL([1-9]\d*)", inside)) and case.text("intra_node"):
        per_node = int(domain[1])
    per_node = min(per_node, MOST_INSIDE)
    intra = _inside(device, inside)
    inter, assumed = _between(device, between, per_node, case)
    told = re.search(r"\d", between) and "not stated" not in between.lower()
    read = f"; nothing was read from {between!r}" if told else ""
    notes = (f"network between nodes assumed: {inter.bandwidth / GB:.3g} GB/s a device{read}",) if assumed else ()
    fabric = _fabric(device, intra, inside)
    notes = () if fabric == "torus" else notes  # its links join all chips
    dims = _grid(count, 3 if "3D" in device.link else 2) if fabric == "torus" else ()
    if fabric == "torus" and count % per_node:
        per_node = gcd(count, per_node)  # hosts of equal size; a torus does not mind them
    return Cluster(
        f"{case.text('gpu')} x {count}", device, ceil(count / per_node), per_node, intra, inter, "nccl",
        notes=notes, fabric=fabric, wires=_mesh(inside, device), dims=dims, tables=machine_tables(machine),
    )  # fmt: skip


def _device(text: str) -> Device:
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


def _mesh(text: str, device: Device) -> tuple[Wire, ...]:
    """The wires of a hybrid cube mesh: those of the catalogue's DGX-1 of this generation."""
    if "cube" not in text.lower():
        return ()
    return load_cluster("dgx1-p100" if "P100" in device.name else "dgx1-v100").wires


def _fabric(device: Device, intra: Link, text: str) -> Fabric:
    """How the links of a node join its devices: through switches, each pair by its own (AMD, Gaudi, Ascend, Intel), or
    as a torus (TPU)."""
    if intra.name == "PCIe":
        return "pcie"
    if "cube" in text.lower():
        return "cube-mesh"
    if device.kind == "tpu":
        return "torus"
    return "mesh" if re.search(r"xgmi|^if$|infinity|hccs|roce|xe link", device.link.lower()) else "nvswitch"


def _grid(count: int, axes: int) -> tuple[int, ...]:
    """The sides of a torus of so many chips, as equal as they can be."""
    if axes == 1:
        return (count,)
    side = next(n for n in range(max(round(count ** (1 / axes)), 1), 0, -1) if count % n == 0)
    return (side, *_grid(count // side, axes - 1))


def _parts(text: str) -> tuple[str, str]:
    """What a text about both says of the links inside a node, and of the network between nodes.

    >>> _parts("PCIe inside the node, 10 Gb/s between nodes"), _parts("25GbE"), _parts("NVLink1 (DGX-1)")
    (('PCIe ', ', 10 Gb/s between nodes'), ('', '25GbE'), ('NVLink1 (DGX-1)', ''))
    """
    near, told, far = text.partition("inside the node")
    if told:
        return near, far
    parts: tuple[list[str], list[str]] = ([], [])
    for part in re.split(r"[,;]", text):
        about_links = any(word in part.lower() for word in (*LINKS, "pci"))
        parts[bool(NETWORK.search(part)) and not about_links].append(part)
    return ",".join(parts[0]), ",".join(parts[1])


def _inside(device: Device, text: str) -> Link:
    """The links of the device at its own rate, or PCIe where the row says so or the device has nothing that joins all
    of a node (bridges join pairs)."""
    low = text.lower()
    without = r"\b(no|without) (nvlink|nvswitch|xgmi|infinity)"
    left = re.sub(without, "", low)
    named = any(word in left for word in LINKS) and "bridge" not in low
    none = bool(re.search(without, low)) or low.strip() in ("none", "no", "-") or "bridge" in low
    own = bool(device.link) and not re.search(r"bridge|connectx", device.link.lower())
    stated = re.search(r"(\d+(?:\.\d+)?)\s*([GT])B/s", text)
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
    return Link("PCIe", rate * PCIE_SHARED, LATENCY_INSIDE, "device file or the row, shared switch assumed")


def _between(device: Device, text: str, per_node: int, case: Case) -> tuple[Link, bool]:
    """One device's share of the network between nodes, and whether it is an assumption."""
    name = re.sub(r"[^a-z0-9]", "", device.name.lower())
    family = next((f for f in sorted(UNSTATED, key=len, reverse=True) if f in name), "")
    share = UNSTATED.get(family, 12.5e9 / per_node)
    low = text.lower()
    if found := _stated(text):
        count, rate = found
        each = re.search(r"per (gpu|device|accelerator)", low)
        if count:
            rate = count * rate / (1 if each else per_node)
        elif each or "per node" in low:
            rate /= 1 if each else per_node
        else:  # of a NIC; above 100 and up to 400 Gb/s every GPU has its own
            rate = min(rate, share) if family and 12.5e9 < rate <= 50e9 else rate / per_node
    else:
        rate = 1.25 * GB / per_node if "EC2" in text else 0.0  # p2.8xlarge: 10 Gb/s a node, from memory
    if rate:
        return Link(text.strip(" ,;"), rate, LATENCY_BETWEEN, "the row"), False
    return Link("network (assumed)", share, LATENCY_BETWEEN, "reference design"), case.whole("num_gpus") > per_node


def _stated(text: str) -> tuple[int, float] | None:
    """How many ports a text names (0: it does not say), and the bytes/s of one.

    >>> _stated("8x200Gb/s HDR IB per node"), _stated("2.5 Gb/s Ethernet"), _stated("1 GB/s"), _stated("4x HDR")
    ((8, 25000000000.0), (0, 312500000.0), (0, 1000000000.0), (4, 25000000000.0))
    """
    if found := RATE.search(text):
        rate = float(found[2]) * SCALE[found[3].lower()]
        return int(found[1] or 0), rate if found[4] else rate / 8
    if port := re.search(rf"(?:(\d+)\s*x\s*)?\b({'|'.join(GENERATION)})\d*\b", text):
        return int(port[1] or 0), GENERATION[port[2]] / 8 * GB
    return None
