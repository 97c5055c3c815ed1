"""The cluster of a published run, from the names of its device and links."""

from __future__ import annotations

import re
from math import ceil

from costmodels.cluster import Cluster, Fabric, Link, Wire, load_cluster, machine_tables
from costmodels.device import Device, on_machine
from costmodels.names import device_named
from validation.cases import Case, CaseError

GB = 1e9
LATENCY_INSIDE, LATENCY_BETWEEN = 0.0, 0.0  # the collective models have the latencies of NVLink, PCIe and networks
# Network share of one device in bytes/s where a row does not state it: ASSUMPTION, the reference designs of DGX A100
# (8 x 200 Gb/s), DGX H100 and later (400 Gb/s a device), DGX-1 (4 x 100 Gb/s per node of 8); elsewhere 100 Gb/s a node.
UNSTATED = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9, "b300": 100e9, "gb200": 50e9, "gb300": 100e9,
            "v100": 6.25e9, "p100": 6.25e9, "mi300x": 50e9, "mi355x": 50e9}  # fmt: skip
# Runs whose source published op times of the very machine (micro-benchmarks, no step): set of the row -> machine.
MACHINES = {"simumax_b200": "b200-simumax"}
PCIE_SHARED = 0.5  # share of its PCIe rate that a device reaches while its neighbours use the same switch: ASSUMPTION


def cluster_of(case: Case, devices: dict[str, Device]) -> Cluster:
    """Nodes, device and links of a row; each device has an equal share of its node's network. `devices` are those met
    before, which remember prices."""
    name, machine = case.text("gpu"), MACHINES.get(case.text("set"), "")
    key = f"{name} {machine}"
    try:
        if key not in devices:
            found = device_named(name)
            devices[key] = on_machine(found, machine) if machine else found
        device = devices[key]
    except ValueError as error:
        raise CaseError(str(error)) from None
    count, per_node = case.whole("num_gpus"), case.whole("gpus_per_node", 8) or 1
    inside = case.text("intra_node") or case.text("interconnect")
    between = case.text("inter_node") or case.text("interconnect").partition("inside the node")[2]
    if domain := re.search(r"NVL(\d+)", inside):
        per_node = int(domain[1])
    intra = _inside(device, inside)
    inter, assumed = _between(device, between, per_node, case)
    notes = (f"network between nodes assumed: {inter.bandwidth / GB:.3g} GB/s a device",) if assumed else ()
    cluster = Cluster(
        f"{case.text('gpu')} x {count}", device, ceil(count / per_node), per_node, intra, inter, "nccl",
        notes=notes, fabric=_fabric(inside), wires=_mesh(inside, device), tables=machine_tables(machine),
    )  # fmt: skip
    return cluster


def _mesh(text: str, device: Device) -> tuple[Wire, ...]:
    """The wires of a hybrid cube mesh: those of the catalogue's DGX-1 of this generation."""
    if "cube" not in text.lower():
        return ()
    return load_cluster("dgx1-p100" if "P100" in device.name else "dgx1-v100").wires


def _fabric(text: str) -> Fabric:
    low = text.lower()
    return "cube-mesh" if "cube" in low else "nvswitch" if "nvlink" in low or "nvswitch" in low else "pcie"


def _inside(device: Device, text: str) -> Link:
    """NVLink at the device's own rate, or PCIe."""
    if "nvlink" in text.lower() or ("xgmi" in text.lower() or "infinity" in text.lower()):
        rate = device.link_bandwidth
        if stated := re.search(r"(\d+)\s*GB/s", text):
            rate = float(stated[1]) * GB / 2  # both directions are quoted
        if rate:
            return Link(device.link or "NVLink", rate, LATENCY_INSIDE, "device file")
    rate = device.pcie_bandwidth or 12 * GB
    return Link("PCIe", rate * PCIE_SHARED, LATENCY_INSIDE, "device file, shared switch assumed")


def _between(device: Device, text: str, per_node: int, case: Case) -> tuple[Link, bool]:
    """One device's share of the network between nodes."""
    rate = None
    if found := re.search(r"(\d+)\s*x\s*(\d+)\s*Gb/s.*per node", text):
        rate = int(found[1]) * int(found[2]) / 8 * GB / per_node
    elif found := re.search(r"(\d+)\s*Gb/s.*per (node|GPU)", text):
        rate = int(found[1]) / 8 * GB / (per_node if found[2] == "node" else 1)
    elif "EC2" in text:
        rate = 1.25 * GB / per_node  # p2.8xlarge: 10 Gb/s a node, from memory
    if rate is not None:
        return Link(text, rate, LATENCY_BETWEEN, "the row"), False
    name = re.sub(r"[^a-z0-9]", "", device.name.lower())
    family = next((f for f in sorted(UNSTATED, key=len, reverse=True) if f in name), "")
    share = UNSTATED.get(family, 12.5e9 / per_node)
    return Link("network (assumed)", share, LATENCY_BETWEEN, "reference design"), case.whole("num_gpus") > per_node
