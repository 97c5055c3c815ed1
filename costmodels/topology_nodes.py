"""The wires inside one node, from its description: every fabric becomes pairs of names and links."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from costmodels.cluster import Cluster, Link, Wire


def node_wires(part: Cluster, networked: bool = True) -> list[Wire]:
    """All wires of a node: between devices (gpu0, ...) and, if `networked`, from them to network ports (nic0, ...)."""
    wires = list(part.wires) or _fabric(part)
    names = {end for wire in wires for end in (wire.a, wire.b)}
    missing = [f"gpu{i}" for i in range(part.devices_per_node) if f"gpu{i}" not in names]
    if missing and part.devices_per_node > 1:
        raise ValueError(f"cluster '{part.name}': no wire leads to {', '.join(missing)}; add it to [[wires]]")
    if networked and not any(name.startswith("nic") for name in names):
        wires += _ports(part)
    return wires


def nics_per_node(part: Cluster) -> int:
    """Network ports of a node: those its wires name, `inter.ports`, or one a device."""
    named = {end for wire in part.wires for end in (wire.a, wire.b) if end.startswith("nic")}
    return len(named) or part.inter.ports or part.devices_per_node


def _fabric(part: Cluster) -> list[Wire]:
    devices = [f"gpu{i}" for i in range(part.devices_per_node)]
    match part.fabric:
        case "nvswitch":
            return [Wire(d, "nvswitch", _half(part.intra)) for d in devices]
        case "pcie":
            return [Wire(d, "cpu0", _half(part.intra)) for d in devices]
        case "loopback":
            return [Wire(d, "cpu0", _half(part.intra)) for d in devices]
        case "mesh":  # a device's links are spread evenly over its peers
            peers = max(len(devices) - 1, 1)
            link = replace(part.intra, bandwidth=part.intra.bandwidth / peers)
            return [Wire(a, b, link) for a, b in combinations(devices, 2)]
    raise ValueError(f"cluster '{part.name}': fabric {part.fabric} needs [[wires]] that say which devices are joined")


def _half(link: Link) -> Link:
    """One of the two hops over a switch: half of the latency of a message between devices."""
    return replace(link, latency=link.latency / 2)


def _ports(part: Cluster) -> list[Wire]:
    """Devices share the ports in turn. The latency between nodes is all on the network's side of the port."""
    nics = nics_per_node(part)
    bandwidth = part.device.pcie_bandwidth or part.inter.bandwidth
    link = Link("PCIe to the port", bandwidth, 0.0, "device file: pcie_bandwidth, or the port's own rate")
    count = part.devices_per_node
    return [Wire(f"gpu{i}", f"nic{i * nics // count}", link) for i in range(count)]
