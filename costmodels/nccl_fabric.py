"""What NCCL sees of a cluster: how many ranks of a group lie where, and how fast the wires between them are.

Families of devices are data (`catalogue/collectives/families.toml`); a new device of a known kind is a new line there,
an unknown one is priced by the links of its cluster and the constants that all families share.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from costmodels import tomlfile as toml
from costmodels.cluster import Cluster, Link
from costmodels.device import CATALOGUE

# Latencies that the fitted constants contain; what a link's file says beyond them is added to every hop (seconds).
REFERENCE_HOP = {"nvlink": 1e-6, "mesh": 1e-6, "pci": 5e-6, "host": 5e-6}
REFERENCE_CROSSING = {"ib": 2.7e-6, "roce": 2.7e-6, "efa-v1": 15e-6, "efa": 15e-6, "ethernet": 2.7e-6}
_NVLINKS = "nvlink|xgmi"  # names of wires that join devices directly
EFA_V1_RATE = 12.5e9  # bytes/s of such a port
EFA_V1_PORTS = 4  # of a node: of the first generation p4d has 4, of later ones p5 32, p5en 16, p6 8


@dataclass(frozen=True, slots=True)
class Family:
    """One entry of families.toml (described there). like: whose fitted constants it takes."""

    name: str
    match: tuple[str, ...]
    wires: str
    generation: int
    port: float
    nvls_from: int
    tray: int = 0
    domain: int = 0
    like: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A group of ranks and the wires between them.

    ranks; hosts it lies on; per_host: ranks of one host; domains: NVLink domains (hosts where these are the same).
    family: whose constants apply; wires, generation, nvls_from: as in `Family`. port: bytes/s of one device inside the
    domain, one direction. across: bytes/s of all NICs of one domain that the group can use, one direction.
    network: kind of wire between hosts. hop, crossing: seconds to add to every hop inside and between hosts.
    uplinks: (ranks below one switch, bytes/s of its links upwards) of every tier of switches that the group crosses.
    leaving: bytes of an all-to-all, per byte of it, that leave the domain which takes longest for them at its own NICs,
    as a multiple of what passes at `across` meanwhile; 0 where domains are alike.
    """

    ranks: int
    hosts: int
    per_host: int
    domains: int
    family: str
    wires: str
    generation: int
    nvls_from: int
    port: float
    across: float
    network: str
    hop: float = 0.0
    crossing: float = 0.0
    uplinks: tuple[tuple[int, float], ...] = ()
    leaving: float = 0.0

    @property
    def per_domain(self) -> int:
        return -(-self.ranks // self.domains)


@cache
def families() -> tuple[Family, ...]:
    """All families of the catalogue, in the order in which names are tried."""
    where = CATALOGUE / "collectives" / "families.toml"
    rows = toml.tables(toml.read_toml(where), "family", str(where))
    return tuple(_family(row, str(where)) for row in rows)


def _family(row: dict[str, Any], where: str) -> Family:
    return Family(
        name=toml.text(row, "name", where),
        match=toml.strings(row, "match", where),
        wires=toml.text(row, "wires", where),
        generation=toml.whole(row, "generation", where),
        port=toml.number(row, "port", where),
        nvls_from=toml.whole(row, "nvls_from", where),
        tray=toml.whole(row, "tray", where, 0),
        domain=toml.whole(row, "domain", where, 0),
        like=toml.text(row, "like", where, ""),
    )


def family_of(name: str) -> Family | None:
    """The family of a device by its name; None where there is none, or for the PCIe card of an NVLink family."""
    for family in families():
        if any(re.search(rf"(?<![A-Z0-9]){re.escape(m)}", name, re.IGNORECASE) for m in family.match):
            return None if family.wires == "nvlink" and re.search(r"(?i:pcie)|NVL\b", name) else family
    return None


def group_of(cluster: Cluster, ranks: Sequence[int]) -> Group:
    """How the group lies on the cluster (two ranks or more, of any order, repeated ones counted once)."""
    members = _members(ranks)
    size = len(members)
    if cluster.groups:
        nodes = np.array([cluster.node_of(int(r)) for r in members])
    else:
        nodes = np.minimum(members // cluster.devices_per_node, cluster.nodes - 1)
    counts = np.bincount(nodes)
    used = np.flatnonzero(counts)
    counts = counts[used]
    family = family_of(cluster.device.name)
    bridged = bridged_rate(cluster, members)
    wires = "nvlink" if bridged else _wires(cluster, family)
    hosts, per_host, domains = len(used), int(counts.max()), len(used)
    if family and family.tray:
        hosts, per_host, domains = _trays(family, cluster, size, used, int(counts.max()))
    across, leaving = 0.0, 0.0
    if domains > 1:
        apart = used if domains == len(used) or not family else used * cluster.devices_per_node // family.domain
        kinds = _kinds(counts, apart)
        across = min(across_of(cluster, few, nodes) for _, nodes, few in kinds)
        if len({held for held, _, _ in kinds}) > 1:
            leaving = _leaving(cluster, counts, used, kinds) * across / size
    network = network_of(cluster.inter)
    crossing = max(cluster.inter.latency - REFERENCE_CROSSING.get(network, 0.0), 0.0) if hosts > 1 else 0.0
    return Group(
        ranks=size,
        hosts=hosts,
        per_host=per_host,
        domains=domains,
        family=(family.like or family.name) if family and family.wires == wires else wires,
        wires=wires,
        generation=family.generation if family else 1,
        nvls_from=family.nvls_from if family and wires == "nvlink" else 0,
        port=_port(cluster, members, bridged),
        across=across,
        network=network,
        hop=max(_latency_inside(cluster, bridged) - REFERENCE_HOP[wires], 0.0) if per_host > 1 else 0.0,
        crossing=crossing + _tier_latency(cluster, used),
        uplinks=_uplinks(cluster, used, int(counts.max())),
        leaving=leaving,
    )


def _latency_inside(cluster: Cluster, bridged: float) -> float:
    """Seconds of a hop inside a node: over the bridges of a PCIe box where the group is joined by them."""
    if not bridged or cluster.fabric != "pcie":
        return cluster.intra.latency
    return max(w.link.latency for w in cluster.wires if re.search(_NVLINKS, w.link.name, re.I))


def _leaving(
    cluster: Cluster, counts: np.ndarray, used: np.ndarray, kinds: Sequence[tuple[int, int, int]]
) -> float:
    """Pairs of ranks that an all-to-all joins across the border of a domain, over the bytes/s of its NICs: the worst.
    counts: ranks of each node of `used`; kinds: of domains. Nodes of several kinds each have their own NICs."""
    total = int(counts.sum())
    if cluster.groups:
        nodes = zip(counts.tolist(), used.tolist())
        return max(own * (total - own) / across_of(cluster.part_of(node), own, 1) for own, node in nodes)
    return max(own * (total - own) / across_of(cluster, few, spread) for own, spread, few in kinds)


def _kinds(counts: np.ndarray, domain_of: np.ndarray) -> list[tuple[int, int, int]]:
    """What domains there are, each kind once: ranks, nodes, and the ranks of the node that has fewest."""
    _, place = np.unique(domain_of, return_inverse=True)
    held, nodes = np.bincount(place, counts), np.bincount(place)
    least = np.full(len(held), int(counts.max()))
    np.minimum.at(least, place, counts)
    return [tuple(kind) for kind in np.unique(np.stack([held.astype(int), nodes, least]), axis=1).T.tolist()]


def _port(cluster: Cluster, members: np.ndarray, bridged: float) -> float:
    """bytes/s of one device of the group inside its node: over NVLink, by the wires between members where the cluster
    names them (`bridged`); members of a cube mesh that share none talk over the host."""
    if bridged or cluster.fabric != "cube-mesh" or not cluster.wires or len(members) < 2:
        return bridged or cluster.intra.bandwidth
    if len(np.unique(members % cluster.devices_per_node)) < 2:
        return cluster.intra.bandwidth
    return min(w.link.bandwidth for w in cluster.wires)


def bridged_rate(cluster: Cluster, members: np.ndarray) -> float:
    """bytes/s that rings of all members pass over the NVLink wires between them, 0 where these do not join them: every
    ring crosses each cut of the group once each way, so the narrowest cut holds all rings together."""
    if cluster.fabric not in ("cube-mesh", "pcie") or not cluster.wires or cluster.groups:
        return 0.0
    places = {f"gpu{int(r) % cluster.devices_per_node}" for r in members}
    wires = [w for w in cluster.wires if re.search(_NVLINKS, w.link.name, re.I) and {w.a, w.b} <= places]
    if len(places) < 2 or {end for w in wires for end in (w.a, w.b)} != places:
        return 0.0
    import networkx as nx

    graph: nx.Graph[str] = nx.Graph()
    for wire in wires:
        before = graph.get_edge_data(wire.a, wire.b, {"weight": 0.0})["weight"]
        graph.add_edge(wire.a, wire.b, weight=before + wire.link.bandwidth)
    if not nx.is_connected(graph):
        return 0.0
    cut, _ = nx.stoer_wagner(graph)
    return float(min(cut, cluster.intra.bandwidth) if cluster.fabric == "cube-mesh" else cut)


def _members(ranks: Sequence[int]) -> np.ndarray:
    """The ranks in order, each once."""
    if isinstance(ranks, range) and ranks.step > 0:
        return np.arange(ranks.start, ranks.stop, ranks.step)
    members = np.frombuffer(array("q", ranks), dtype=np.int64)
    in_order = bool((members[1:] > members[:-1]).all())
    return members if in_order else np.unique(members)


def _wires(cluster: Cluster, family: Family | None) -> str:
    """What joins the devices of a node: what the cluster says, and the family where that leaves a choice."""
    text = f"{cluster.intra.name} {cluster.intra.source}".lower()
    if cluster.fabric == "mesh":
        return "mesh"
    if cluster.fabric == "pcie" or "pcie" in text:
        staged = "host" in text or "no p2p" in text or (family is not None and family.wires == "host")
        return "host" if staged else "pci"
    pair = "nvlink" in text and family is not None and family.wires in ("pci", "host")  # by a bridge
    if family and not pair and (family.wires != "nvlink" or "nvlink" in text or not text.strip()):
        return family.wires
    return "nvlink"


def _trays(family: Family, cluster: Cluster, size: int, used: np.ndarray, most: int) -> tuple[int, int, int]:
    """Hosts, ranks of a host and domains of devices whose NVLink domain holds several hosts (NVL72). NCCL joins the
    topologies of a domain's hosts, so trays of one rack are one host. Over several domains trays count: the only sweep
    there is (128 GB200 on two racks) takes 186 us for 32 bytes, what 32 hosts take, not two."""
    per_node = cluster.devices_per_node
    whole = per_node > family.tray  # nodes of the cluster are whole domains
    domains = len(used) if whole else len(np.unique(used * per_node // family.domain))
    if domains == 1:
        return 1, size, 1
    per_host = min(family.tray, most)
    return -(-size // per_host), per_host, domains


def across_of(cluster: Cluster, least: int, nodes_per_domain: int) -> float:
    """bytes/s of the NICs that a domain's ranks of the group can use: those of `least` devices a node, one at least."""
    link, devices = cluster.inter, cluster.devices_per_node
    ports = link.ports or devices
    usable = min(ports, least * max(ports / devices, 1.0))
    return usable * link.bandwidth * link.ecmp * max(nodes_per_domain, 1)


def network_of(link: Link) -> str:
    """ib, roce, efa-v1, efa, or ethernet (TCP sockets), by the link's name; what is not named counts as ib."""
    name = link.name.lower()
    if "efa" in name:
        return "efa-v1" if 0 < link.ports <= EFA_V1_PORTS and link.bandwidth <= EFA_V1_RATE else "efa"
    if "roce" in name:
        return "roce"
    return "ethernet" if re.search(r"ethernet|tcp|eth\b|gbe|veth", name) else "ib"


def _tier_latency(cluster: Cluster, used: np.ndarray) -> float:
    """Seconds of the switches above the lowest one that a message of the group passes."""
    below, total = 1, 0.0
    for tier in cluster.tiers:
        if used[0] // below == used[-1] // below:  # in order: all below one switch
            break
        total += tier.latency
        below = tier.nodes
    return total


def _uplinks(cluster: Cluster, used: np.ndarray, most: int) -> tuple[tuple[int, float], ...]:
    """For every tier whose switches the group crosses: its ranks below the fullest switch, bytes/s upwards."""
    found = []
    for tier in cluster.tiers:
        if used[0] // tier.nodes == used[-1] // tier.nodes:
            break
        counts = np.bincount(used // tier.nodes)
        node = cluster.inter.bandwidth * (cluster.inter.ports or cluster.devices_per_node)
        found.append((int(counts.max()) * most, tier.nodes * node / tier.oversubscription * tier.ecmp))
    return tuple(found)
