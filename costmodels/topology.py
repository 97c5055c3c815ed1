"""A cluster as a graph: devices, network ports, hosts and switches, and the way from any device to any other.

Nodes of the graph are named "n3/gpu0", "n3/nic0", "n3/cpu0", "n3/nvswitch", and the switches of the network by tier
("leaf0.rail2", "pod1", "core"). Parallel links between the same switches are one edge of their joint bandwidth; what
oversubscription and colliding hashes take away is taken off it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import networkx as nx
import numpy as np

from costmodels.cluster import Cluster, Link
from costmodels.topology_nodes import nics_per_node, node_wires

if TYPE_CHECKING:
    Graph = nx.Graph[str]


class Road(NamedTuple):
    """links: ids of the directed links passed. latency: seconds, one way. cap: most bytes/s of one flow."""

    links: tuple[int, ...]
    latency: float
    cap: float


@dataclass(frozen=True, eq=False)
class Topology:
    """graph: attributes of nodes are kind (device, nic, switch, host) and node; of edges link (`cluster.Link`),
    bandwidth (bytes/s in each direction, after oversubscription and collisions) and index: the edge is link 2 * index
    in the direction in which it was added (attribute `tail` is where it starts) and 2 * index + 1 in the other.
    chains: of every port, the switches above it, from the lowest."""

    cluster: Cluster
    graph: Graph
    chains: dict[str, tuple[str, ...]]
    cache: dict[tuple[int, int], Road] = field(default_factory=dict, repr=False)

    @cached_property
    def capacity(self) -> np.ndarray:
        """bytes/s of every directed link."""
        result = np.empty(2 * self.graph.number_of_edges())
        for _, _, edge in self.graph.edges(data=True):
            result[2 * edge["index"] : 2 * edge["index"] + 2] = edge["bandwidth"]
        return result

    def device(self, rank: int) -> str:
        """The graph's name of a rank's device."""
        if not 0 <= rank < self.cluster.size:
            raise ValueError(f"rank {rank} is none of the {self.cluster.size} devices of {self.cluster.name}")
        node = self.cluster.node_of(rank)
        return f"n{node}/gpu{rank - self.cluster.first_ranks[node]}"

    def rank(self, name: str) -> int:
        """The rank of a device of the graph."""
        node, _, device = name.partition("/gpu")
        return self.cluster.first_ranks[int(node[1:])] + int(device)

    def road(self, a: int, b: int) -> Road:
        """The way from rank a to rank b: the quickest inside a node, up to the first common switch between nodes."""
        known = self.cache.get((a, b))
        if known is None:
            known = self.cache[a, b] = self._road(a, b)
        return known

    def _road(self, a: int, b: int) -> Road:
        return self.along(route(self, a, b))

    def along(self, names: list[str]) -> Road:
        """The road over these nodes of the graph. A flow's cap: the least `flow_cap`, and window / round trip."""
        edges = [self.graph.edges[pair] | {"from": pair[0]} for pair in pairwise(names)]
        latency = sum(e["link"].latency for e in edges)
        caps = [e["link"].flow_cap for e in edges if e["link"].flow_cap]
        caps += [e["link"].window / (2 * latency) for e in edges if e["link"].window and latency]
        links = tuple(2 * e["index"] + (e["tail"] != e["from"]) for e in edges)
        return Road(links, latency, min(caps, default=inf))


def expand(cluster: Cluster) -> Topology:
    """The graph of a cluster.

    >>> from costmodels.cluster import load_cluster
    >>> topology = expand(load_cluster("2x dgx-h100"))
    >>> [kind for _, kind in topology.graph.nodes(data="kind")].count("device")
    16
    """
    graph: Graph = nx.Graph()
    if cluster.fabric == "torus":
        _torus(graph, cluster)
        return Topology(cluster, graph, {})
    networked = cluster.nodes > 1
    for node in range(cluster.nodes):
        part = cluster.part_of(node)
        for i in range(part.devices_per_node):
            _name(graph, f"n{node}/gpu{i}", node)
        for wire in node_wires(part, networked):
            for end in (wire.a, wire.b):
                _name(graph, f"n{node}/{end}", node)
            _join(graph, f"n{node}/{wire.a}", f"n{node}/{wire.b}", wire.link)
    return Topology(cluster, graph, _network(graph, cluster) if networked else {})


def _name(graph: Graph, name: str, node: int) -> None:
    last = name.rpartition("/")[2]
    kinds = {"gpu": "device", "nic": "nic", "cpu": "host"}
    graph.add_node(name, kind=kinds.get(last.rstrip("0123456789"), "switch"), node=node)


def _join(graph: Graph, a: str, b: str, link: Link, share: float = 1.0) -> None:
    bandwidth = link.bandwidth * share
    if graph.has_edge(a, b):
        graph.edges[a, b]["bandwidth"] += bandwidth
    else:
        index = graph.graph["edges"] = graph.graph.get("edges", -1) + 1  # counting them each time is quadratic
        graph.add_edge(a, b, link=link, bandwidth=bandwidth, index=index, tail=a)


def _torus(graph: Graph, cluster: Cluster) -> None:
    """A device's links are spread evenly over both directions of every dim; rank order is row-major."""
    dims = cluster.dims
    each = Link(cluster.intra.name, cluster.intra.bandwidth / (2 * max(len(dims), 1)), cluster.intra.latency)
    for rank in range(cluster.size):
        _name(graph, f"n{rank // cluster.devices_per_node}/gpu{rank % cluster.devices_per_node}", cluster.node_of(rank))
    names = np.array(list(graph.nodes)).reshape(dims)
    for axis in (axis for axis, length in enumerate(dims) if length > 1):
        closed = not cluster.wraps or cluster.wraps[axis]
        own = names if closed else np.delete(names, -1, axis)
        following = np.roll(names, -1, axis) if closed else np.delete(names, 0, axis)
        for a, b in zip(own.ravel(), following.ravel()):
            _join(graph, str(a), str(b), each)  # a ring of two: both links join the same pair


def _network(graph: Graph, cluster: Cluster) -> dict[str, tuple[str, ...]]:
    """Adds switches above the ports, tier by tier. Returns the switches above every port."""
    chains: dict[str, tuple[str, ...]] = {}
    below: dict[str, tuple[int, int, float]] = {}  # name -> first node, rail, bandwidth upwards
    for node in range(cluster.nodes):
        part = cluster.part_of(node)
        for port in range(nics_per_node(part)):
            below[f"n{node}/nic{port}"] = (node, port, part.inter.bandwidth * part.inter.ecmp)
            chains[f"n{node}/nic{port}"] = ()
    top = {name: name for name in chains}
    for level, tier in enumerate([*cluster.tiers, None]):
        if tier is None and level and len(below) == 1:
            break
        above: dict[str, tuple[int, int, float]] = {}
        for name, (node, rail, upwards) in below.items():
            block = node // tier.nodes if tier else 0
            switch = "core" if tier is None else f"{tier.name}{block}" + (f".rail{rail}" if tier.rails else "")
            graph.add_node(switch, kind="switch", node=-1, tier=level)
            graph.nodes[name].setdefault("up", switch)
            link = _uplink(cluster, level, node)
            _join(graph, name, switch, link, upwards / link.bandwidth)
            first, _, total = above.get(switch, (node, rail, 0.0))
            # What the switch can send up: all that comes from below, less its own oversubscription and collisions.
            gain = upwards * tier.ecmp / tier.oversubscription if tier else upwards
            above[switch] = (first, rail if tier and tier.rails else 0, total + gain)
        for nic in chains:
            top[nic] = graph.nodes[top[nic]]["up"]
            chains[nic] += (top[nic],)
        below = above
    return chains


def _uplink(cluster: Cluster, level: int, node: int) -> Link:
    """The link up from the ports (level 0), or from the switches of the tier below."""
    inter = cluster.part_of(node).inter
    if level == 0:
        return Link(
            inter.name, inter.bandwidth, inter.latency / 2, inter.source, 0, inter.flow_cap, inter.window, inter.ecmp
        )
    return Link(f"{cluster.tiers[level - 1].name} uplinks", inter.bandwidth, cluster.tiers[level - 1].latency / 2)


def route(topology: Topology, a: int, b: int) -> list[str]:
    """Names of the nodes of the graph from rank a to rank b."""
    cluster = topology.cluster
    if cluster.fabric == "torus":
        return list(_grid_route(topology, a, b))
    start, end = topology.device(a), topology.device(b)
    if start == end:
        return [start]
    if cluster.node_of(a) == cluster.node_of(b):
        return _inside(topology, start, end)
    out, into = _port(topology, start), _port(topology, end)
    rails = bool(cluster.tiers) and cluster.tiers[0].rails
    same_rail = f"{out.rpartition('/nic')[0]}/nic{into.rpartition('/nic')[2]}"
    if rails and out != same_rail and same_rail in topology.graph:
        out = same_rail  # over a neighbour in the node whose port is on the receiver's rail, as NCCL's PXN does
    up, down = topology.chains[out], topology.chains[into]
    meet = next(i for i, (x, y) in enumerate(zip(up, down)) if x == y)
    network = [out, *up[: meet + 1], *reversed(down[:meet]), into]
    return [*_inside(topology, start, out)[:-1], *network, *_inside(topology, into, end)[1:]]


def _inside(topology: Topology, a: str, b: str) -> list[str]:
    """The way of least latency within a node, then of least hops."""
    node = a.partition("/")[0] + "/"
    members = _members(topology, node)

    def weight(x: str, y: str, edge: dict[str, Any]) -> float | None:
        if any(members.nodes[z]["kind"] == "nic" and z not in (a, b) for z in (x, y)):
            return None  # a port passes nothing on between devices
        return float(edge["link"].latency) + 1e-9

    return list(nx.dijkstra_path(members, a, b, weight=weight))


def _members(topology: Topology, node: str) -> Graph:
    """The part of the graph that is one node: what its devices reach without the network."""
    cache: dict[Any, Any] = topology.cluster.cache
    key = ("members", id(topology), node)
    if key not in cache:
        part = topology.cluster.part_of(int(node[1:-1]))
        ends = {end for w in node_wires(part, bool(topology.chains)) for end in (w.a, w.b)}
        names = [node + end for end in ends] or [f"{node}gpu0"]
        cache[key] = topology.graph.subgraph(names)
    return cache[key]


def _port(topology: Topology, device: str) -> str:
    """The nearest port of a device."""
    node = device.partition("/")[0] + "/"
    members = _members(topology, node)
    lengths = nx.single_source_dijkstra_path_length(members, device, weight=lambda x, y, e: e["link"].latency + 1e-9)
    ports = [(length, name) for name, length in lengths.items() if members.nodes[name]["kind"] == "nic"]
    if not ports:
        raise ValueError(f"{topology.cluster.name}: no wire leads from {device} to a port; add one to [[wires]]")
    return min(ports)[1]


def _grid_route(topology: Topology, a: int, b: int) -> Iterator[str]:
    """Dimension by dimension, the shorter way round each ring, and along what does not close."""
    dims, wraps = topology.cluster.dims, topology.cluster.wraps
    here, there = list(np.unravel_index(a, dims)), np.unravel_index(b, dims)
    yield topology.device(a)
    for axis, length in enumerate(dims):
        ahead = (int(there[axis]) - int(here[axis])) % length
        step = 1 if 2 * ahead <= length else -1
        if wraps and not wraps[axis]:
            step = 1 if there[axis] > here[axis] else -1
        while here[axis] != there[axis]:
            here[axis] = (here[axis] + step) % length
            yield topology.device(int(np.ravel_multi_index(here, dims)))
