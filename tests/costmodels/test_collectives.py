"""Prices of collectives: the published gloo points, monotone in bytes, tables before formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import gloo
from costmodels.cluster import Cluster, CollectiveTable, Link, load_cluster
from costmodels.collectives import KINDS, algorithms_of, collective_price

SIZES = st.integers(0, 2**31)
NODES = load_cluster("4x dgx-h100")
LOOPBACK = Link("lo", 1e9, 5e-5)
TABLES = (
    CollectiveTable("all_reduce", 2, (4096, 1e6, 64e6), (1e-4, 2e-3, 6e-2), (0.3, 0.5, 0.6), 0.05),
    CollectiveTable("all_reduce", 4, (4096, 1e6, 64e6), (3e-4, 1.5e-3, 1.2e-1), (0.2, 0.4, 0.5), 0.05),
    CollectiveTable("send", 2, (4096, 1e6), (5e-3, 1e-3), (0.3, 0.5)),
)
CORES = Cluster("local", NODES.device, 1, 2, LOOPBACK, LOOPBACK, "gloo", 2, 2**34, TABLES)
PLAIN = replace(CORES, tables=(), cache={})
MIB = 2**20

# github BinhangYuan/tc_cluster_setting, AWS p3.2xlarge, tc-shaped TCP: nodes, one-way delay s, bits/s, bytes, seconds.
ALL_REDUCE = [
    (4, 1e-3, 5e9, 128, 0.485), (4, 1e-3, 5e9, 256, 0.959), (4, 5e-3, 2e9, 128, 1.517), (4, 5e-3, 2e9, 256, 2.989),
    (4, 10e-3, 1e9, 128, 2.993), (4, 10e-3, 1e9, 256, 5.909), (16, 1e-3, 5e9, 128, 0.612),
    (16, 1e-3, 5e9, 256, 1.239), (16, 5e-3, 2e9, 128, 1.950), (16, 5e-3, 2e9, 256, 3.861),
    (16, 10e-3, 1e9, 128, 3.873), (16, 10e-3, 1e9, 256, 7.636),
]  # fmt: skip
BROADCAST = [
    (4, 1e-3, 5e9, 128, 0.674), (4, 5e-3, 2e9, 256, 3.322), (4, 10e-3, 1e9, 128, 3.395), (8, 1e-3, 5e9, 128, 1.321),
    (8, 5e-3, 2e9, 128, 3.319), (8, 10e-3, 1e9, 256, 13.133),
]  # fmt: skip


def mean_error(points: list[tuple[int, float, float, int, float]], kind: str) -> float:
    errors = [
        abs(gloo.seconds(kind, size * MIB, nodes, Link("tcp", bits / 8, delay)) / seconds - 1)
        for nodes, delay, bits, size, seconds in points
    ]
    return sum(errors) / len(errors)


def test_gloo_formulas_meet_the_published_points() -> None:
    assert mean_error(ALL_REDUCE, "all_reduce") < 0.03  # 1.7 % over all 24 points (communication.md A2)
    assert mean_error(BROADCAST, "broadcast") < 0.035  # 2.5 % over all 18 points


def test_gloo_reduce_scatter_is_a_whole_all_reduce() -> None:
    assert gloo.seconds("reduce_scatter", 1e8, 4, LOOPBACK) >= gloo.seconds("all_reduce", 1e8, 4, LOOPBACK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [CORES, PLAIN, NODES], ids=["tables", "formulas", "nccl"])
@given(size=SIZES, more=st.integers(1, 2**28), ranks=st.integers(2, 20))
def test_prices_are_positive_and_grow_with_bytes(cluster: Cluster, kind: str, size: int, more: int, ranks: int) -> None:
    group = tuple(range(2 if kind == "send" else ranks))
    less, larger = (collective_price(cluster, kind, n, group) for n in (size, size + more))
    assert 0 < less.seconds <= larger.seconds * (1 + 1e-12)
    assert less.demand >= 0 and 0 <= less.error < 2


def test_tables_are_interpolated_and_their_edges_named() -> None:
    price = collective_price(CORES, "all_reduce", 1e6, (0, 1))
    assert (
        price.seconds == pytest.approx(2e-3) and price.source == "interpolated" and price.demand == pytest.approx(0.5)
    )
    middle = collective_price(CORES, "all_reduce", 1e6 * 8, (0, 1))
    assert middle.seconds == pytest.approx((2e-3 * 6e-2) ** 0.5)
    beyond = collective_price(CORES, "all_reduce", 256e6, (0, 1))
    assert beyond.seconds == pytest.approx(4 * 6e-2) and beyond.source == "extrapolated"
    assert collective_price(CORES, "all_reduce", 1, (0, 1)).seconds == pytest.approx(1e-4)
    other_size = collective_price(CORES, "all_reduce", 1e6, (0, 1, 2))
    assert (
        other_size.source == "extrapolated"
        and other_size.seconds < collective_price(CORES, "all_reduce", 1e6, (0, 1, 2, 3)).seconds
    )
    assert collective_price(CORES, "broadcast", 1e6, (0, 1)).source == "roofline"


def test_a_disturbed_small_message_does_not_hide_a_larger_one() -> None:
    assert collective_price(CORES, "send", 4096, (0, 1)).seconds == pytest.approx(1e-3)


def test_a_group_of_one_is_free_and_nonsense_is_refused() -> None:
    assert collective_price(CORES, "all_reduce", 1e6, (1,)).seconds == 0.0
    with pytest.raises(ValueError, match="all_reduce, all_gather"):
        collective_price(CORES, "all_hands", 1e6, (0, 1))
    with pytest.raises(ValueError, match="0 or more"):
        collective_price(CORES, "all_reduce", -1, (0, 1))


def test_nccl_feels_node_borders_and_group_size() -> None:
    inside = collective_price(NODES, "all_reduce", 1e9, tuple(range(8)))
    across = collective_price(NODES, "all_reduce", 1e9, tuple(range(0, 32, 4)))
    assert inside.seconds < across.seconds and inside.demand == 0.0
    assert inside.algorithm == "nvls" and 1e9 * 2 * 7 / 8 / inside.seconds == pytest.approx(450e9, rel=0.05)
    send = collective_price(NODES, "send", 1e9, (0, 8))
    assert 1e9 / send.seconds == pytest.approx(0.9 * 50e9, rel=0.05)


# -- algorithms that are asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "algorithm", "has"),
    [
        ("dgx-a100", "all_reduce", "nvls", "ring, tree, rec"),  # switches that reduce came with Hopper
        ("tpu-v5e-pod", "all_reduce", "ring", "torus, or"),
        ("tpu-v5e-pod", "all_reduce", "rabenseifner", "torus, or"),
        ("dgx-h100", "all_gather", "nvls", "ring, rec"),
        ("dgx-h100", "all_to_all", "tree", "pairwise, or"),
        ("dgx-h100", "all_reduce", "rong", "ring, tree, nvls, rec"),
        ("dgx-h100", "send", "binomial", "p2p, or"),
        ("p3-tcp", "all_gather", "tree", "ring, rec"),
    ],
)
def test_an_algorithm_that_a_cluster_has_not_is_refused(name: str, kind: str, algorithm: str, has: str) -> None:
    cluster = load_cluster(name)
    ranks = (0, cluster.size - 1) if kind == "send" else range(cluster.size)
    with pytest.raises(ValueError, match=rf"{algorithm} is no algorithm of {kind} .*; use (one of )?{has}"):
        collective_price(cluster, kind, 1e6, ranks, algorithm)
    assert collective_price(cluster, kind, 1e6, ranks).seconds > 0


@pytest.mark.parametrize("algorithm", ["nvls", "tree", "binomial"])
def test_gloo_has_none_of_nccls_algorithms(algorithm: str) -> None:
    for cluster in (CORES, PLAIN):
        with pytest.raises(ValueError, match=r"\(gloo\); use one of ring, recursive_doubling"):
            collective_price(cluster, "all_reduce", 1e6, (0, 1), algorithm)


@pytest.mark.parametrize("name", ["dgx-a100", "2x dgx-h100", "tpu-v4-cube", "p3-tcp", "mi300x-8", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_that_is_offered_is_the_one_priced(name: str, kind: str) -> None:
    cluster = CORES if name == "local" else load_cluster(name)
    ranks = (0, cluster.size - 1) if kind == "send" else range(cluster.size)
    for algorithm in algorithms_of(cluster, kind, ranks):
        price = collective_price(cluster, kind, 1e6, ranks, algorithm)
        assert price.seconds > 0 and price.algorithm in (algorithm, "measured")
        assert cluster.backend == "nccl" or price.protocol in ("tcp", "")


def test_what_was_measured_of_gloos_only_way_counts_when_it_is_asked_for() -> None:
    asked, chosen = (collective_price(CORES, "all_reduce", 1e6, (0, 1), a) for a in ("ring", ""))
    assert asked == chosen and asked.source == "interpolated"


def test_textbook_algorithms_on_gloo_pass_its_links() -> None:
    by_hand = 2 * (5e-5 + 1 / 2 * 1e6 / 1e9)
    price = collective_price(PLAIN, "all_reduce", 1e6, (0, 1), "rabenseifner")
    assert price.seconds == pytest.approx(by_hand) and (price.algorithm, price.protocol) == ("rabenseifner", "tcp")
