"""Parameter servers and all-reduces: closed forms, flows, placement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.cluster import Cluster, Link, load_cluster
from costmodels.collectives import collective_price
from costmodels.compression import NONE, compression_from
from costmodels.device import Device
from costmodels.gloo import SOCKET_SHARE
from costmodels.schemes import (
    NETWORK_LATENCY,
    SCHEMES,
    SERVER_MEMORY,
    UPDATE_PASSES,
    Scheme,
    central,
    fits,
    scheme_from,
    scheme_price,
    sharded,
    tree,
)
from simulator.flow_collectives import Road, all_to_all, tree_all_reduce
from simulator.flows import FlowBuilder, simulate_flows

MIB = 2**20
GRADIENT = ((1024, 1024),)
SIZE = 4 * MIB


def ethernet(nodes: int, per_node: int = 1, rate: float = 1.25e9) -> Cluster:
    device = Device("card", "gpu", {"float32": 1e13}, 2**34, 1e12)
    inside, net = Link("NVLink", 1e11, 1e-6), Link("TCP", rate, 1e-4, ports=1)
    return Cluster("tcp", device, nodes, per_node, inside, net, "nccl")


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
def test_an_incast_is_what_flows_make_of_it(ranks):
    builder = FlowBuilder()
    for worker in range(ranks):  # links 2 i and 2 i + 1 leave and enter machine i; the server is the last
        builder.flow(SIZE, (2 * worker, 2 * ranks + 1), latency=1e-4)
    times = simulate_flows(builder.build(), [1.25e9] * (2 * ranks + 2), "reference")
    assert times.makespan == pytest.approx(central(SIZE, ranks, 1e-4, 1 / 1.25e9))
    assert times.makespan - 1e-4 == pytest.approx(ranks * SIZE / 1.25e9)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_sharded_servers_and_trees_are_what_flows_make_of_them(ranks):
    def road(a: int, b: int) -> Road:
        return Road((2 * a, 2 * b + 1), 1e-4)

    for build, form in ((all_to_all, sharded), (tree_all_reduce, tree)):
        builder = FlowBuilder()
        build(builder, SIZE, range(ranks), road)
        times = simulate_flows(builder.build(), [1e9] * 2 * ranks, "reference")
        assert times.makespan == pytest.approx(form(SIZE, ranks, 1e-4, 1e-9))


@pytest.mark.parametrize("ranks", [2, 8, 24])
def test_a_central_server_costs_n_s_over_b_and_shards_what_a_ring_costs(ranks):
    cluster = ethernet(ranks)
    rate = SOCKET_SHARE * 1.25e9
    both = scheme_price(cluster, Scheme("ps"), NONE, GRADIENT, range(ranks))
    assert both.push == both.pull == pytest.approx(ranks * SIZE / rate + 1e-4 + NETWORK_LATENCY)
    shards = scheme_price(cluster, Scheme("ps-sharded"), NONE, GRADIENT, range(ranks))
    moved = 2 * (ranks - 1) / ranks * SIZE / rate
    assert moved < shards.seconds < moved + 4e-4
    ring = scheme_price(replace(cluster, inter=replace(cluster.inter, latency=0.0)), Scheme("ring"), NONE, GRADIENT,
                        range(ranks))  # fmt: skip
    assert ring.seconds == pytest.approx(moved)


def test_capped_flows_fill_a_servers_port_together():
    cluster = ethernet(8)
    capped = replace(cluster, inter=replace(cluster.inter, flow_cap=1.25e9 / 4), cache={})
    free, eight = (scheme_price(c, Scheme("ps"), NONE, GRADIENT, range(8)).push for c in (cluster, capped))
    assert eight == free
    two = scheme_price(capped, Scheme("ps"), NONE, GRADIENT, range(2)).push - 1e-4 - NETWORK_LATENCY
    assert two == pytest.approx(SIZE / (SOCKET_SHARE * 1.25e9 / 4))  # each flow at its cap


def test_levels_send_one_sum_a_node():
    cluster, ranks = ethernet(4, 8), range(32)
    flat, levels = (scheme_price(cluster, Scheme(a), NONE, GRADIENT, ranks) for a in ("ps", "ps-hierarchical"))
    inside = collective_price(cluster, "reduce_scatter", SIZE, range(8)).seconds
    rate = SOCKET_SHARE * 1.25e9
    assert levels.push == pytest.approx(inside + 4 * SIZE / rate + 1e-4 + NETWORK_LATENCY)
    assert flat.push == pytest.approx(32 * SIZE / rate + 1e-4 + NETWORK_LATENCY)


def test_a_fast_network_waits_for_the_server_to_add():
    cluster = ethernet(8, rate=1e12)
    assert scheme_price(cluster, Scheme("ps"), NONE, GRADIENT, range(8)).push == pytest.approx(8 * SIZE / SERVER_MEMORY)


def test_parameters_come_back_whole_after_the_servers_update():
    cluster, ranks = ethernet(8), range(8)
    half = compression_from("fp16")
    sums, whole = (scheme_price(cluster, Scheme("ps", e), half, GRADIENT, ranks) for e in ("gradients", "parameters"))
    assert sums.push == whole.push and sums.update == 0
    assert whole.update == pytest.approx(UPDATE_PASSES * SIZE / SERVER_MEMORY) and whole.pull > 1.9 * sums.pull


@given(st.sampled_from(SCHEMES), st.integers(1, 200), st.sampled_from(["none", "fp16", "sign", "topk0.01"]))
def test_more_bytes_never_take_less_nor_faster_links_more(scheme, rows, name):
    c, cluster = compression_from(name), load_cluster("4x dgx-h100")
    if not fits(scheme, c, cluster, range(32)):
        return
    price = scheme_price(cluster, scheme, c, ((rows, 4096),), range(32))
    assert price.seconds <= scheme_price(cluster, scheme, c, ((rows + 50, 4096),), range(32)).seconds * (1 + 1e-12)
    faster = replace(cluster, inter=replace(cluster.inter, bandwidth=2 * cluster.inter.bandwidth), cache={})
    assert scheme_price(faster, scheme, c, ((rows, 4096),), range(32)).seconds <= price.seconds * (1 + 1e-12)


def test_what_does_not_go_together_is_left_out():
    one, many = load_cluster("dgx-h100"), load_cluster("2x dgx-h100")
    assert not fits(Scheme("ps"), compression_from("powersgd2"), many, range(16))
    assert not fits(Scheme("tree"), compression_from("sign"), many, range(16))
    assert not fits(Scheme("hierarchical"), NONE, one, range(8)) and fits(Scheme("hierarchical"), NONE, many, range(16))
    assert not fits(Scheme("tree"), NONE, ethernet(4), range(4)) and not fits(
        Scheme("auto"), NONE, ethernet(4), range(4)
    )


def test_the_backends_choice_is_no_slower_than_its_ring_or_tree():
    cluster = load_cluster("4x dgx-h100")
    auto, *others = (
        scheme_price(cluster, Scheme(a), NONE, GRADIENT, range(32)).seconds for a in ("auto", "ring", "tree")
    )
    assert auto <= min(others) * (1 + 1e-9)


def test_a_measured_machine_prices_servers_by_its_measured_messages(tmp_path):
    from costmodels.cluster import CollectiveTable, local_cluster

    local = local_cluster(tmp_path / "none.toml")
    table = CollectiveTable("send", 2, (1e3, 1e8), (1e-5, 1.0), (1.0, 1.0))
    cluster = replace(local, tables=(table,), cache={})
    send = collective_price(cluster, "send", SIZE, (0, 1)).seconds
    part = collective_price(cluster, "send", SIZE / 2, (0, 1)).seconds
    assert scheme_price(cluster, Scheme("ps"), NONE, GRADIENT, range(2)).push == pytest.approx(2 * send)
    assert scheme_price(cluster, Scheme("ps-sharded"), NONE, GRADIENT, range(2)).seconds == pytest.approx(2 * part)
    assert scheme_price(cluster, Scheme("tree"), NONE, GRADIENT, range(2)).seconds == pytest.approx(2 * send)


def test_one_rank_exchanges_nothing_and_bad_names_get_one_sentence():
    assert scheme_price(ethernet(2), Scheme("ring"), NONE, GRADIENT, range(1)).seconds == 0
    assert [scheme_from(s.name) for s in SCHEMES] == list(SCHEMES) and scheme_from("ps").exchange == "gradients"
    with pytest.raises(ValueError, match="no known scheme"):
        scheme_from("mesh")
