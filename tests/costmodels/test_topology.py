"""Clusters as graphs: the catalogue, roads, what is shared, and agreement of bounds with flows."""

from __future__ import annotations

import doctest
from dataclasses import replace
from itertools import pairwise
from math import inf

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import costmodels.topology
from costmodels.cluster import Cluster, Link, Tier, Wire, cluster_from, list_clusters, load_cluster
from costmodels.topology import Topology, expand, route
from costmodels.topology_groups import group_bound
from simulator.flow_collectives import all_to_all, ring
from simulator.flows import FlowBuilder, simulate_flows

SMALL = [name for name in list_clusters() if not name.endswith("16k")]


def two_nodes(name: str) -> Cluster:
    cluster = load_cluster(name)
    return cluster if cluster.nodes > 1 or name == "local" else load_cluster(f"2x {name}")


def tree(nodes: int = 8, rails: bool = True, oversubscription: float = 4.0, **link: float) -> Cluster:
    """Eight nodes of four devices: two leaves (of rails) of four nodes each."""
    intra = Link("nv", 100e9, 2e-6)
    inter = Link("ib", 10e9, 4e-6, **link)
    device = load_cluster("dgx-h100").device
    tiers = (Tier("leaf", 4, oversubscription, rails, latency=1e-6),)
    return Cluster("tree", replace(device, pcie_bandwidth=1e12), nodes, 4, intra, inter, tiers=tiers)


@pytest.mark.parametrize("name", SMALL)
def test_every_cluster_is_a_connected_graph_with_roads(name: str) -> None:
    cluster = two_nodes(name)
    topology = expand(cluster)
    graph = topology.graph
    kinds = [kind for _, kind in graph.nodes(data="kind")]
    assert kinds.count("device") == cluster.size and nx.is_connected(graph)
    assert (topology.capacity > 0).all() and len(topology.capacity) == 2 * graph.number_of_edges()
    rng = np.random.default_rng(0)
    for a, b in rng.integers(0, cluster.size, (30, 2)).tolist():
        way = route(topology, a, b)
        assert way[0] == topology.device(a) and way[-1] == topology.device(b) and len(set(way)) == len(way)
        assert all(graph.has_edge(x, y) for x, y in pairwise(way))
        there, back = topology.road(a, b), topology.road(b, a)
        assert there.latency == pytest.approx(back.latency)
        assert not set(there.links) & set(back.links), "full duplex: the two directions share nothing"


@pytest.mark.parametrize("name", ["dgx-h100", "mi300x-8", "tpu-v4-cube", "tpu-v5e-pod", "rtx4090-pcie", "p3-tcp"])
def test_roads_are_the_shortest_ways_of_the_graph(name: str) -> None:
    """Without rails no message takes a detour: as many hops as networkx' shortest path, which knows of no tiers."""
    cluster = two_nodes(name)
    topology = expand(cluster)
    for a, b in np.random.default_rng(1).integers(0, cluster.size, (40, 2)).tolist():
        shortest = nx.shortest_path_length(topology.graph, topology.device(a), topology.device(b))
        way = route(topology, a, b)
        through_devices = [n for n in way[1:-1] if "gpu" in n]
        assert len(way) - 1 == shortest or not through_devices


def test_the_hybrid_cube_mesh_has_six_links_a_gpu() -> None:
    for name, lane, links in (("dgx1-v100", 25e9, 6), ("dgx1-p100", 20e9, 4)):
        graph = expand(load_cluster(name)).graph
        for i in range(8):
            nvlink = [d["bandwidth"] for _, n, d in graph.edges(f"n0/gpu{i}", data=True) if "gpu" in n]
            assert sum(nvlink) == pytest.approx(links * lane)
        assert not graph.has_edge("n0/gpu0", "n0/gpu5")
        road = expand(load_cluster(name)).road(0, 5)
        assert len(road.links) == 2, "over the GPU that both know"


def test_a_full_mesh_gives_a_pair_one_link() -> None:
    topology = expand(load_cluster("mi300x-8"))
    road = topology.road(0, 5)
    assert len(road.links) == 1 and topology.capacity[road.links[0]] == pytest.approx(64e9)


def test_a_torus_goes_the_shorter_way_round() -> None:
    topology = expand(load_cluster("tpu-v4-cube"))
    assert topology.graph.number_of_edges() == 3 * 64
    assert len(topology.road(0, 3).links) == 1  # 0 -> 3 wraps
    assert len(topology.road(0, 42).links) == 6  # two steps in each dim
    assert topology.capacity[0] == pytest.approx(50e9)


def test_oversubscription_and_collisions_take_from_the_uplinks() -> None:
    topology = expand(tree(oversubscription=4.0))
    assert topology.graph.edges["leaf0.rail1", "core"]["bandwidth"] == pytest.approx(4 * 10e9 / 4)
    cluster = replace(tree(rails=False), tiers=(Tier("leaf", 4, 2.0, ecmp=0.7),), cache={})
    assert expand(cluster).graph.edges["leaf1", "core"]["bandwidth"] == pytest.approx(4 * 4 * 10e9 / 2 * 0.7)
    colliding = tree(ecmp=0.5)
    assert expand(colliding).graph.edges["n0/nic0", "leaf0.rail0"]["bandwidth"] == pytest.approx(5e9)
    pair = [[0, 4]]
    whole = group_bound(tree(), "all_to_all", 1e9, pair).layers["ports"]
    assert group_bound(colliding, "all_to_all", 1e9, pair).layers["ports"] == pytest.approx(2 * whole)


def test_a_tree_of_three_tiers_meets_at_the_lowest_common_switch() -> None:
    cluster = replace(tree(nodes=16, rails=False), tiers=(Tier("leaf", 2), Tier("pod", 8, 7.0)), cache={})
    topology = expand(cluster)
    tops = {b: next(n for n in route(topology, 0, b) if topology.graph.nodes[n].get("tier", -1) == level)
            for level, b in ((0, 4), (1, 8), (2, 63))}  # fmt: skip
    assert tops == {4: "leaf0", 8: "pod0", 63: "core"}
    assert topology.graph.edges["pod0", "core"]["bandwidth"] == pytest.approx(8 * 4 * 10e9 / 7)


def test_messages_change_rails_inside_the_node() -> None:
    topology = expand(tree())
    way = route(topology, 0, 5)  # device 0 of node 0 to device 1 of node 1
    assert way == ["n0/gpu0", "n0/nvswitch", "n0/gpu1", "n0/nic1", "leaf0.rail1", "n1/nic1", "n1/gpu1"]
    assert topology.road(0, 4).latency == pytest.approx(4e-6)
    assert topology.road(0, 16).latency == pytest.approx(5e-6), "one switch tier more"


def test_flow_caps_and_windows_limit_a_road() -> None:
    assert expand(tree()).road(0, 4).cap == inf
    assert expand(tree(flow_cap=3e9)).road(0, 4).cap == 3e9
    windowed = expand(tree(window=16e3)).road(0, 4)
    assert windowed.cap == pytest.approx(16e3 / (2 * windowed.latency))
    link = Link("tcp", 1.25e9, 0.01, flow_cap=6.25e8, window=1.25e6)
    assert link.flow_rate() == pytest.approx(6.25e7) and link.flow_rate(1e-4) == 6.25e8


def test_nodes_may_differ() -> None:
    cluster = load_cluster("2x dgx-h100 + 1x g5-12xlarge")
    assert (cluster.nodes, cluster.size, cluster.first_ranks) == (3, 20, (0, 8, 16, 20))
    assert [cluster.node_of(r) for r in (0, 8, 15, 16, 19, 99)] == [0, 0 + 1, 1, 2, 2, 2]
    assert cluster.part_of(2).device.name == cluster.device.name, "the weakest device speaks for all"
    assert cluster.intra.bandwidth == load_cluster("g5-12xlarge").intra.bandwidth
    topology = expand(cluster)
    assert len(topology.road(0, 19).links) == 4 and topology.road(16, 19).latency == pytest.approx(5e-6)
    with pytest.raises(ValueError, match="torus"):
        load_cluster("2x tpu-v4-cube")
    with pytest.raises(ValueError, match="equal nodes"):
        group_bound(cluster, "all_reduce", 1e6, [[0, 8, 16]])


def flows_take(topology: Topology, add, groups: np.ndarray) -> float:
    builder = FlowBuilder()
    for group in groups.tolist():
        add(builder, group, topology.road)
    return simulate_flows(builder.build(), topology.capacity).makespan


@pytest.mark.parametrize("rails", [True, False])
@pytest.mark.parametrize(
    "groups",
    [
        np.arange(32).reshape(8, 4).T,  # one device of each node: four rings, each on its rail
        np.arange(32).reshape(8, 4).T[:1],  # one of them alone
        np.arange(16).reshape(4, 4).T,  # below one leaf
        np.arange(32).reshape(8, 4),  # inside nodes
        np.arange(0, 32, 4).reshape(4, 2),  # pairs of neighbouring nodes
        np.array([[0, 16], [1, 17], [4, 20]]),  # pairs across leaves
    ],
)
def test_bounds_of_groups_are_what_flows_take(groups: np.ndarray, rails: bool) -> None:
    """One device a node, or one node: then a ring is one ring, and loads are even."""
    topology = expand(tree(rails=rails))
    size, nbytes = groups.shape[1], 64e6
    cases = {"all_reduce": lambda b, g, road: ring(b, nbytes, g, road, 2 * (size - 1))}
    cases["all_to_all"] = lambda b, g, road: all_to_all(b, nbytes, g, road)
    for kind, add in cases.items():
        bound = group_bound(topology.cluster, kind, nbytes, groups)
        assert bound.seconds == pytest.approx(flows_take(topology, add, groups), rel=0.01), (kind, bound)


def test_a_ring_over_whole_nodes_uses_all_their_ports() -> None:
    cluster = tree(oversubscription=1.0)
    bound = group_bound(cluster, "all_reduce", 64e6, [range(32)])
    ports = 2 * 31 / 32 * 64e6 / (4 * 10e9)
    assert bound.layers["ports"] == pytest.approx(ports) and bound.layer == "ports"
    one_rail = group_bound(cluster, "all_reduce", 64e6, [range(0, 32, 4)])
    assert one_rail.layers["ports"] == pytest.approx(2 * 7 / 8 * 64e6 / 10e9)


def test_oversubscription_is_felt_by_all_to_all_before_all_reduce() -> None:
    groups = np.arange(32).reshape(8, 4).T
    tight, wide = tree(oversubscription=7.0), tree(oversubscription=1.0)
    rise = {
        kind: group_bound(tight, kind, 64e6, groups).seconds / group_bound(wide, kind, 64e6, groups).seconds
        for kind in ("all_reduce", "all_to_all")
    }
    assert rise["all_to_all"] > 3.5 > rise["all_reduce"]


def test_sixteen_thousand_gpus_are_priced() -> None:
    """Groups of a training run on the Llama 3 network: a data-parallel ring across pods feels 1:7 only if all do."""
    cluster = load_cluster("llama3-roce-16k")
    ranks = np.arange(16384)
    data = ranks.reshape(128, 128).T
    assert cluster.size == 16384
    alone = group_bound(cluster, "all_to_all", 1e8, data[:1])
    together = group_bound(cluster, "all_to_all", 1e8, data)
    assert alone.layer == "ports" and together.layer == "pod" and together.seconds > 4 * alone.seconds
    tensor = group_bound(cluster, "all_reduce", 1e8, ranks.reshape(-1, 8))
    assert tensor.layer == "devices"


shapes = st.sampled_from([(8, 4), (4, 8), (2, 16), (32, 1), (1, 32)])


@given(st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]), shapes, st.floats(1.0, 1e10))
@settings(max_examples=60, deadline=None)
def test_bounds_grow_with_bytes_and_fall_with_bandwidth(kind: str, shape: tuple[int, int], nbytes: float) -> None:
    cluster = tree()
    groups = np.arange(32).reshape(shape)
    base = group_bound(cluster, kind, nbytes, groups)
    assert base.seconds >= 0 and all(layer >= 0 for layer in base.layers.values())
    assert group_bound(cluster, kind, 2 * nbytes, groups).seconds >= base.seconds
    faster = replace(cluster, inter=replace(cluster.inter, bandwidth=20e9), cache={})
    later = replace(cluster, inter=replace(cluster.inter, latency=1e-3), cache={})
    assert group_bound(faster, kind, nbytes, groups).seconds <= base.seconds
    assert group_bound(later, kind, nbytes, groups).seconds >= base.seconds
    assert group_bound(cluster, kind, nbytes, groups[:1]).seconds <= base.seconds * (1 + 1e-12), "others only disturb"


def test_user_mistakes_are_told() -> None:
    topology = expand(tree())
    with pytest.raises(ValueError, match="rank 99"):
        topology.road(0, 99)
    with pytest.raises(ValueError, match="scan"):
        group_bound(tree(), "scan", 1.0, [[0, 1]])
    with pytest.raises(ValueError, match="rank 99"):
        group_bound(tree(), "all_reduce", 1.0, [[0, 99]])
    no_wires = replace(load_cluster("dgx1-v100"), wires=(), cache={})
    with pytest.raises(ValueError, match="cube-mesh"):
        expand(no_wires)
    half = replace(no_wires, wires=(Wire("gpu0", "gpu1", no_wires.intra),), cache={})
    with pytest.raises(ValueError, match="gpu2"):
        expand(half)
    data = {"name": "t", "device": "tpu-v4", "devices_per_node": 4, "fabric": "torus", "dims": [2, 3]}
    data["intra"] = {"name": "ici", "bandwidth": 1e9, "latency": 1e-6}
    with pytest.raises(ValueError, match="product"):
        cluster_from(data, costmodels.cluster.CATALOGUE / "x.toml")
    with pytest.raises(ValueError, match="'wraps' must hold true or false for each of the 2 dims"):
        cluster_from(data | {"dims": [2, 2], "wraps": [True]}, costmodels.cluster.CATALOGUE / "x.toml")
    with pytest.raises(ValueError, match="'ends'"):
        cluster_from(
            data | {"fabric": "pcie", "dims": [], "wires": [data["intra"] | {"ends": ["gpu0"]}]},
            costmodels.cluster.CATALOGUE / "x.toml",
        )
    with pytest.raises(ValueError, match="'fabric'"):
        cluster_from(data | {"fabric": "string"}, costmodels.cluster.CATALOGUE / "x.toml")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(costmodels.topology).failed == 0
