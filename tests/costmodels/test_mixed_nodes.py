"""A group on a cluster of different nodes is priced by the nodes that it lies on."""

from __future__ import annotations

import pytest

from costmodels.cluster import load_cluster
from costmodels.collectives import algorithms_of, collective_price
from costmodels.mixed_nodes import over, seen_by

GIB = 2**30


@pytest.mark.parametrize(
    ("mixed", "ranks", "alone", "same"),
    [
        ("dgx-h100 + dgx-a100", range(8), "dgx-h100", range(8)),
        ("dgx-h100 + dgx-a100", range(8, 16), "dgx-a100", range(8)),
        ("2x dgx-h100 + g5-12xlarge", range(16), "2x dgx-h100", range(16)),
        ("g5-12xlarge + 2x dgx-h100", range(4, 20), "2x dgx-h100", range(16)),
        ("dgx-h100 + mi300x-8", range(8, 16), "mi300x-8", range(8)),
        ("dgx1-v100 + dgx1-v100", (0, 1), "2x dgx1-v100", (0, 1)),
        ("dgx1-v100 + dgx1-v100", (8, 11), "2x dgx1-v100", (8, 11)),
    ],
)
def test_a_group_feels_its_own_nodes(mixed: str, ranks: range, alone: str, same: range) -> None:
    one, other = load_cluster(mixed), load_cluster(alone)
    for kind in ("all_reduce", "all_to_all"):
        price = collective_price(one, kind, GIB, ranks)
        assert price.seconds == pytest.approx(collective_price(other, kind, GIB, same).seconds), kind
        assert price.algorithm == collective_price(other, kind, GIB, same).algorithm
    assert algorithms_of(one, "all_reduce", ranks) == algorithms_of(other, "all_reduce", same)


def test_a_group_over_both_feels_the_weaker() -> None:
    both, weaker = load_cluster("dgx-h100 + dgx-a100"), load_cluster("2x dgx-a100")
    ranks = range(16)
    whole = collective_price(both, "all_reduce", GIB, ranks).seconds
    assert whole >= collective_price(load_cluster("2x dgx-h100"), "all_reduce", GIB, ranks).seconds
    assert whole == pytest.approx(collective_price(weaker, "all_reduce", GIB, ranks).seconds, rel=0.3)


def test_likes_share_the_ports_of_mixed_nodes() -> None:
    mixed, ranks = load_cluster("2x a100-pcie + 2x l40s-pcie"), (0, 8, 16, 24)
    alone = collective_price(mixed, "all_reduce", GIB, ranks).seconds
    together = collective_price(mixed, "all_reduce", GIB, ranks, firsts=range(8)).seconds
    assert together == pytest.approx(8 * alone, rel=0.05), "one port a node"


def test_equal_nodes_stay_as_they_are() -> None:
    cluster = load_cluster("2x dgx-h100")
    assert seen_by(cluster, (0, 8), (0, 1)) == (cluster, (0, 8), (0, 1))


def test_another_backend_moves_messages_its_own_way() -> None:
    cluster = load_cluster("dgx-h100")
    gloo = over(cluster, "gloo")
    assert over(cluster, None) is over(cluster, "nccl") is cluster
    price = collective_price(gloo, "all_reduce", GIB, range(8))
    assert price.protocol == "tcp"
    assert GIB / price.seconds < 2e9, "gloo goes through the host, not over NVLink"
    with pytest.raises(ValueError, match="use one of gloo, nccl"):
        over(cluster, "mpi")


def test_a_large_node_of_another_kind_leaves_by_its_own_nics() -> None:
    """All of an exchange between DGX H100 and a rack: bound by the NICs of the DGX, of which the rack has nine times as
    many."""
    mixed, size = load_cluster("2x dgx-h100 + 1x gb200-nvl72"), 2.0**30
    seconds = collective_price(mixed, "all_to_all", size, range(88)).seconds
    least = 8 * 80 / 88 * size / (8 * 50e9)
    assert least < seconds < 3 * least
