"""Collectives on a torus stay on the links between its chips, whatever hosts the chips belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from costmodels import torus
from costmodels.cluster import Cluster, load_cluster
from costmodels.collectives import KINDS, collective_price
from costmodels.topology import expand
from costmodels.torus import REACHED, Axis, axes_of

CUBE = load_cluster("tpu-v4-cube")  # 4 x 4 x 4
POD = load_cluster("tpu-v5e-pod")  # 16 x 16


def bandwidth(cluster: Cluster, kind: str, ranks: Sequence[int], nbytes: float = 2**34) -> float:
    return nbytes / collective_price(cluster, kind, nbytes, ranks).seconds


@pytest.mark.parametrize("cluster", [CUBE, POD], ids=lambda c: c.name)
def test_all_chips_gather_at_the_rate_of_all_links_of_one(cluster: Cluster) -> None:
    n, reached = cluster.size, REACHED * cluster.intra.bandwidth
    assert bandwidth(cluster, "all_gather", range(n)) == pytest.approx(reached * n / (n - 1), rel=1e-3)
    assert bandwidth(cluster, "all_reduce", range(n)) == pytest.approx(reached * n / (n - 1) / 2, rel=1e-3)


def test_a_row_has_the_links_of_one_axis() -> None:
    """16 chips in a row of a 16 x 16 grid close to a ring: half of a chip's links; 8 of them are a line: a quarter."""
    whole = REACHED * POD.intra.bandwidth
    assert bandwidth(POD, "all_gather", range(16)) == pytest.approx(whole / 2 * 16 / 15, rel=1e-3)
    assert bandwidth(POD, "all_gather", range(8)) == pytest.approx(whole / 4 * 8 / 7, rel=1e-3)


def test_all_to_all_is_bound_by_the_cut_and_by_the_links() -> None:
    """On a k-ring every chip's bytes pass k/4 links in the mean, over two directions: k/8 of them on each."""
    link = REACHED * POD.intra.bandwidth / 4
    assert bandwidth(POD, "all_to_all", range(256)) == pytest.approx(link / (16 / 8), rel=1e-3)
    link = REACHED * CUBE.intra.bandwidth / 6
    assert bandwidth(CUBE, "all_to_all", range(64)) == pytest.approx(link / (4 / 8), rel=1e-3)


def test_axes_of_strided_groups() -> None:
    assert axes_of((16, 16), range(0, 256, 4)) == (Axis(16, 1, True), Axis(4, 4, True))
    assert axes_of((16, 16), (0, 1)) == (Axis(2, 1, False),)
    assert axes_of((16, 16), range(0, 256, 16)) == (Axis(16, 1, True),)
    assert axes_of((2, 4), (0, 4)) == (Axis(2, 1, True),)


def test_groups_that_interleave_share_their_links() -> None:
    one = torus.seconds(POD, "all_gather", 2**34, range(0, 16, 4))
    assert torus.seconds(POD, "all_gather", 2**34, range(0, 16, 4), shared=True) == pytest.approx(4 * one, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_times_grow_with_bytes_and_are_positive(kind: str) -> None:
    for ranks in ((0, 1), (0, 5, 77), range(7), range(0, 256, 3), range(256)):
        times = [collective_price(POD, kind, 2.0**e, ranks).seconds for e in range(0, 34)]
        assert times[0] > 0 and all(a <= b for a, b in pairwise(times))


def test_it_says_what_it_is() -> None:
    price = collective_price(POD, "all_reduce", 2**20, range(64))
    assert (price.algorithm, price.source, price.error) == ("torus", "roofline", torus.ERROR)


def test_axes_that_do_not_close_are_lines() -> None:
    """A 4 x 4 x 4 cube whose axes end: half the lanes of each axis, and half the links in a cut."""
    line = replace(CUBE, wraps=(False, False, False), cache={})
    assert axes_of((4, 4), (0, 1, 2, 3), (True, False)) == (Axis(4, 1, False),)
    for kind in ("all_gather", "all_to_all"):
        whole = bandwidth(CUBE, kind, range(64))
        assert bandwidth(line, kind, range(64)) == pytest.approx(whole / 2, rel=1e-3)
    assert len(expand(line).road(0, 3).links) == 3 and expand(line).graph.number_of_edges() == 3 * 48
    half = replace(CUBE, wraps=(True, True, False), cache={})
    assert len(expand(half).road(0, 3).links) == 3 and len(expand(half).road(0, 48).links) == 1


def test_an_axis_of_one_chip_leaves_its_links_unused() -> None:
    slab = replace(CUBE, dims=(8, 8, 1), cache={})
    assert bandwidth(slab, "all_gather", range(64)) == pytest.approx(
        bandwidth(CUBE, "all_gather", range(64)) * 4 / 6, rel=1e-3
    )
