"""gloo and NCCL over TCP: published points of shaped networks, and what every formula must obey."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import gloo
from costmodels.cluster import Link, load_cluster
from costmodels.collectives import collective_price
from costmodels.mixed_nodes import over
from simulator.flow_collectives import Road, broadcast
from simulator.flows import FlowBuilder, simulate_flows

MIB = 2**20
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send", "all_to_all", "barrier")
# github BinhangYuan/tc_cluster_setting, AWS p3.2xlarge, TCP shaped by tc: nodes, delay s, bit/s, MiB, seconds
REDUCE = [(8, 1e-3, 5e9, 128, 0.427), (8, 5e-3, 2e9, 256, 2.307), (16, 1e-3, 5e9, 256, 0.873),
          (16, 10e-3, 1e9, 256, 4.525)]  # fmt: skip
SEND = [(2, 0.0, 5e9, 64, 0.110), (2, 1e-3, 5e9, 128, 0.224), (2, 5e-3, 2e9, 64, 0.311), (2, 10e-3, 1e9, 128, 1.160)]
NCCL_RING = [(8, 1e-3, 5e9, 128, 0.383), (8, 5e-3, 2e9, 256, 1.921), (8, 10e-3, 1e9, 128, 1.940)]
NCCL_BROADCAST = [(16, 1e-3, 5e9, 256, 0.502), (16, 5e-3, 2e9, 128, 0.831), (16, 10e-3, 1e9, 128, 1.651)]


@pytest.mark.parametrize(
    ("kind", "points", "limit", "nccl"),
    [
        ("reduce", REDUCE, 0.05, False),
        ("send", SEND, 0.03, False),
        ("all_reduce", NCCL_RING, 0.02, True),
        ("broadcast", NCCL_BROADCAST, 0.04, True),
    ],
    ids=["gloo reduce", "gloo send", "nccl all_reduce", "nccl broadcast"],
)
def test_formulas_meet_published_points(
    kind: str, points: list[tuple[int, float, float, int, float]], limit: float, nccl: bool
) -> None:
    errors = []
    for nodes, delay, bits, size, seconds in points:
        link = Link("tcp", bits / 8, delay)
        found = (
            gloo.nccl_sockets(kind, size * MIB, nodes, nodes, link)[0]
            if nccl
            else gloo.seconds(kind, size * MIB, nodes, link)
        )
        errors.append(abs(found / seconds - 1))
    assert sum(errors) / len(errors) < limit


def test_a_broadcast_shares_its_port_and_obeys_the_cap_of_a_flow() -> None:
    """8 nodes, 10 Gbit/s ports, 5 Gbit/s a flow: stages of 1, 2 and 3 sends take S/5, S/5 and S/3.33."""
    link = Link("tcp", 1.25e9, 0.0, flow_cap=6.25e8)
    size = 128 * MIB
    assert gloo.seconds("broadcast", size, 8, link) == pytest.approx(size * (1 + 1 + 1.5) / 6.25e8)
    assert gloo.seconds("broadcast", size, 8, replace(link, flow_cap=0)) == pytest.approx(6 * size / 1.25e9)


def test_slow_start_ends_when_the_window_covers_the_path() -> None:
    assert gloo.slow_start(1e9, 1e9, 0.0) == 0.0
    assert gloo.slow_start(1e9, 1.46e6, 1e-2) == pytest.approx(1e-2)  # ten segments fill the path at once
    assert gloo.slow_start(1e9, 4 * 1.46e6, 1e-2) == pytest.approx(3e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nccl", [False, True], ids=["gloo", "nccl"])
@given(
    size=st.floats(0, 1e10), factor=st.floats(1, 50), ranks=st.integers(2, 32), rate=st.floats(1e7, 1e10),
    latency=st.floats(1e-6, 5e-2),
)  # fmt: skip
def test_times_rise_with_bytes_and_latency_and_fall_with_bandwidth(
    kind: str, nccl: bool, size: float, factor: float, ranks: int, rate: float, latency: float
) -> None:
    def seconds(nbytes: float, link: Link) -> float:
        n = 2 if kind == "send" else ranks
        return gloo.nccl_sockets(kind, nbytes, n, n, link)[0] if nccl else gloo.seconds(kind, nbytes, n, link)

    link = Link("tcp", rate, latency)
    here, slack = seconds(size, link), 1 + 1e-9
    assert here > 0
    assert seconds(size * factor, link) * slack >= here
    assert seconds(size, replace(link, bandwidth=rate * factor)) <= here * slack
    assert seconds(size, replace(link, latency=latency * factor)) * slack >= here
    if kind not in ("barrier", "send", "all_gather", "all_to_all", "reduce_scatter"):
        assert here * slack >= size / rate


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 9, 13, 16])
def test_a_broadcast_takes_as_long_as_its_flows(ranks: int) -> None:
    """The tree of any number of ranks, each port shared by the children of its rank."""
    builder = FlowBuilder()
    port = 1e9

    def road(a: int, b: int) -> Road:
        return Road((2 * a, 2 * b + 1))

    broadcast(builder, 1e9, range(ranks), road, at_once=True)
    flows = simulate_flows(builder.build(), np.full(2 * ranks, port)).makespan
    assert gloo.seconds("broadcast", 1e9, ranks, Link("tcp", port, 0.0)) == pytest.approx(flows, rel=1e-3)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (2, 8), (4, 4), (3, 2)])
def test_ranks_of_a_node_share_its_port(nodes: int, per_node: int) -> None:
    """No collective is faster than the bytes that must leave a node through its one port."""
    link, loop, size, ranks = Link("tcp", 1.25e9, 1e-4), Link("lo", 5e9, 2e-5), 2.0**28, nodes * per_node
    least = {
        "all_to_all": per_node * (ranks - per_node) / ranks * size, "broadcast": size,
        "all_gather": size * (nodes - 1) / nodes,
        "reduce": size * (nodes - 1) / nodes, "all_reduce": 2 * size * (nodes - 1) / nodes,
    }  # fmt: skip
    for kind, leaves in least.items():
        assert gloo.seconds(kind, size, ranks, link, per_node, loop) >= leaves / 1.25e9, kind


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "barrier"])
@pytest.mark.parametrize("size", [8.0, 2.0**20, 2.0**33])
def test_more_nodes_are_never_faster_than_the_ranks_of_one(kind: str, size: float) -> None:
    """Hosts whose memory is slower than the network between them."""
    clusters = [over(load_cluster(f"{n}x dgx-h100"), "gloo") for n in (1, 2, 4)]
    one, two, four = (collective_price(c, kind, size, range(c.size)).seconds for c in clusters)
    assert one <= two * (1 + 1e-9) and two <= four * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_caps_of_flows_and_colliding_hashes_slow_nccl(kind: str) -> None:
    link = Link("tcp", 1.25e9, 1e-4, flow_cap=6.25e8, window=1.25e6)

    def seconds(link: Link) -> float:
        return gloo.nccl_sockets(kind, 2.0**30, 8 if kind != "send" else 2, 8 if kind != "send" else 2, link)[0]

    usual = seconds(link)
    slower = [seconds(replace(link, **change)) for change in ({"flow_cap": 1e8}, {"window": 1e4}, {"ecmp": 0.5})]
    assert all(t == usual if kind == "barrier" else t > 1.5 * usual for t in slower)


def test_small_all_reduces_over_sockets_take_trees() -> None:
    link = Link("tcp", 1.25e9, 5e-5)
    assert gloo.nccl_sockets("all_reduce", 8, 8, 8, link) == (pytest.approx(6 * 5e-5, rel=1e-3), "tree")
    assert gloo.nccl_sockets("all_reduce", 2.0**30, 8, 8, link)[1] == "ring"
    assert gloo.nccl_sockets("all_reduce", 8, 8, 8, link, "ring")[0] == pytest.approx(14 * 5e-5, rel=1e-3)
