"""Groups that share ports and uplinks: the closed form and the simulator's pools against exact flows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from costmodels.cluster import Cluster, load_cluster
from costmodels.collectives import collective_price
from costmodels.nccl_fabric import group_of
from costmodels.sharing import alike, fullest, layers_of, shared_group, slowed_by_likes
from costmodels.topology import expand
from simulator import ProgramBuilder, simulate
from simulator.flow_collectives import all_to_all, ring
from simulator.flows import FlowBuilder, simulate_flows
from tests.costmodels.test_topology import tree

SIZE = 4e9  # bytes that drown every latency


def cluster_of(ports: int = 0, oversubscription: float = 1.0, rails: bool = False) -> Cluster:
    cluster = tree(oversubscription=oversubscription, rails=rails)
    return replace(cluster, inter=replace(cluster.inter, ports=ports), cache={})


def flows_take(cluster: Cluster, kind: str, groups: np.ndarray, nbytes: float) -> float:
    topology, builder = expand(cluster), FlowBuilder()
    for group in groups.tolist():
        if kind == "all_to_all":
            all_to_all(builder, nbytes, group, topology.road)
        elif kind == "send":
            way = topology.road(*group)
            builder.flow(nbytes, way.links, latency=way.latency)
        else:
            ring(builder, nbytes, group, topology.road, (2 if kind == "all_reduce" else 1) * (len(group) - 1))
    return simulate_flows(builder.build(), topology.capacity).makespan


CASES = {
    "a port a device": (cluster_of(), range(0, 32, 4), range(4)),
    "two devices a port": (cluster_of(ports=2), range(0, 32, 4), range(4)),
    "one port a node": (cluster_of(ports=1), range(0, 32, 4), range(4)),
    "spine of 1:7": (cluster_of(oversubscription=7.0), range(0, 32, 4), range(4)),
    "spine of 1:7, rails": (cluster_of(oversubscription=7.0, rails=True), range(0, 32, 4), range(4)),
    "pairs of far nodes, spine of 1:7": (cluster_of(oversubscription=7.0), (0, 16), range(16)),
    "one port a node, pairs": (cluster_of(ports=1), (0, 16), range(4)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "send"])
def test_likes_slow_a_group_as_flows_say(name: str, kind: str) -> None:
    """How many times longer all groups together take than one alone, in the price and in exact flows."""
    cluster, ranks, firsts = CASES[name]
    if kind == "send":
        ranks = (ranks[0], ranks[-1])
    alone = flows_take(cluster, kind, alike(ranks, (ranks[0],)), SIZE)
    together = flows_take(cluster, kind, alike(ranks, firsts), SIZE)
    prices = [collective_price(cluster, kind, SIZE, ranks, firsts=f).seconds for f in ((), firsts)]
    assert prices[1] / prices[0] == pytest.approx(together / alone, rel=0.05)


def test_shared_bandwidth_in_numbers() -> None:
    h100 = load_cluster("2x dgx-h100")
    ranks = (0, 8)
    price = collective_price(h100, "all_reduce", 1e9, ranks).seconds
    assert collective_price(h100, "all_reduce", 1e9, ranks, firsts=range(8)).seconds == price, "a port each"
    one = replace(h100, inter=replace(h100.inter, ports=1), cache={})
    beside = collective_price(one, "all_reduce", 1e9, ranks, firsts=range(8)).seconds
    assert beside == pytest.approx(8 * price, rel=0.02)
    assert slowed_by_likes(one, "all_reduce", ranks, range(8)) == pytest.approx(8)
    assert slowed_by_likes(one, "all_reduce", range(8), range(0, 16, 8)) == 1.0, "inside nodes nothing is shared"


def test_gloo_and_sockets_share_the_port_too() -> None:
    for backend in ("gloo", "nccl"):
        cluster = replace(load_cluster("2x dgx-h100"), backend=backend, cache={})
        link = replace(cluster.inter, name="10 Gbit/s ethernet (TCP)", bandwidth=1.25e9, latency=2e-5, ports=1)
        cluster = replace(cluster, inter=link, cache={})
        alone, beside = (collective_price(cluster, "all_reduce", 1e9, (0, 8), firsts=f).seconds for f in ((), range(8)))
        assert beside == pytest.approx(8 * alone, rel=0.05), backend


def test_what_is_not_counted_is_left_alone() -> None:
    for name in ("tpu-v4-cube", "2x dgx-h100 + 2x dgx-a100", "dgx-h100"):
        cluster = load_cluster(name)
        assert layers_of(cluster) == [] and slowed_by_likes(cluster, "all_reduce", (0, 4), range(4)) == 1.0
    cluster = load_cluster("2x dgx-h100")
    assert slowed_by_likes(cluster, "all_reduce", (0, 8), range(16)) == 1.0, "ranks beyond the last device"
    group = group_of(cluster, range(8))
    assert shared_group(cluster, group, "all_reduce", range(8), range(0, 16, 8)) is group


def test_the_layer_that_traffic_meets_on() -> None:
    dp, pp = [(range(0, 16, 4), range(4))], [((0, 16), range(16))]
    assert fullest(cluster_of(ports=1), [dp, pp]).name == "ports"
    assert fullest(cluster_of(oversubscription=7.0), [dp, pp]).name == "leaf"
    assert fullest(cluster_of(), [dp, [(range(4), range(0, 16, 4))]]) is None, "tensor groups stay inside nodes"
    assert fullest(load_cluster("dgx-h100"), [dp]) is None


@pytest.mark.parametrize(("ports", "oversubscription"), [(1, 1.0), (2, 1.0), (0, 7.0)])
@pytest.mark.parametrize("late", [0.0, 0.3, 0.9])
def test_pools_share_wires_like_flows(ports: int, oversubscription: float, late: float) -> None:
    """Rings of four nodes below one leaf and across, and sends to the other leaf that begin `late` (a share of the
    rings' time): the last arrival by pools of the layer and by exact flows."""
    cluster = cluster_of(ports=ports, oversubscription=oversubscription)
    topology, ranks, stride = expand(cluster), tuple(range(0, 32, 4)), 16
    rings, pairs = alike(ranks, range(4)), alike((0, stride), range(16))
    traffic = [[(ranks, range(4))], [((0, stride), range(16))]]
    layer = fullest(cluster, traffic)
    sent, moved = 1e9, 2e8
    alone = flows_take(cluster, "all_gather", rings, sent)
    builder = FlowBuilder()
    for group in rings.tolist():
        ring(builder, sent, group, topology.road, len(group) - 1)
    for a, b in pairs.tolist():
        way = topology.road(a, b)
        builder.flow(moved, way.links, latency=way.latency, start=late * alone)
    exact = simulate_flows(builder.build(), topology.capacity).makespan
    tasks, pools = ProgramBuilder(), {}
    single = flows_take(cluster, "send", pairs, moved)
    begin = tasks.task("begin", "wait", late * alone)
    for groups, kind, size, seconds, after in (
        (rings, "all_gather", sent, alone, ()), (pairs, "send", moved, single, (begin,))
    ):  # fmt: skip
        for group in groups.tolist():
            for rank in group:
                place = layer.pool_of(cluster, rank)
                if place not in pools:
                    pools[place] = tasks.pool(str(place), 1.0)
                stream = tasks.resource(f"{rank} {kind}", pool=pools[place], rank=rank)
                share = min(layer.busy(cluster, kind, size, group, rank) / seconds, 1.0)
                tasks.task(kind, kind, seconds, stream, after, share)
    assert simulate(tasks.build()).makespan == pytest.approx(exact, rel=0.05)


def test_pairs_across_sockets_share_the_link_between_them() -> None:
    """Four pairs, one device on each socket, of a server whose sockets have 16 GB/s between them."""
    box = load_cluster("a100-pcie")
    alone, two, four = (
        collective_price(box, "all_reduce", 2.0**28, (0, 4), firsts=firsts).seconds
        for firsts in ((0,), (0, 1), (0, 1, 2, 3))
    )
    exact = flows_take(box, "all_reduce", alike((0, 4), range(4)), 2.0**28)
    assert alone <= two < four
    assert four == pytest.approx(exact / 0.8, rel=0.05), "rings move 0.8 of what wires could"
    bridged = [collective_price(box, "all_reduce", 2.0**28, (0, 1), firsts=f).seconds for f in ((0,), (0, 2, 4, 6))]
    assert bridged[0] == bridged[1], "every pair has a bridge of its own"


def test_a_bridged_pair_goes_over_its_bridge_and_two_pairs_over_pcie() -> None:
    box = load_cluster("a100-pcie")
    pair, apart, two = (group_of(box, ranks) for ranks in ((0, 1), (0, 2), (0, 1, 2, 3)))
    assert (pair.wires, pair.port) == ("nvlink", 3e11)
    assert apart.wires == two.wires != "nvlink"
