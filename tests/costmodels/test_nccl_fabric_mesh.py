"""In a hybrid cube mesh a group reaches what the wires between its members carry."""

from __future__ import annotations

import pytest

from costmodels.cluster import load_cluster
from costmodels.collectives import collective_price
from costmodels.nccl_fabric import group_of

CUTS = {
    (0, 1): 25e9, (0, 3): 50e9, (0, 1, 2, 3): 100e9, (0, 2, 4, 6): 50e9, (0, 1, 4, 5): 50e9, tuple(range(8)): 150e9,
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "rate"), CUTS.items())
def test_the_narrowest_cut_of_the_members_sets_the_rate(ranks: tuple[int, ...], rate: float) -> None:
    assert group_of(load_cluster("dgx1-v100"), ranks).port == pytest.approx(rate)


def test_neighbours_with_two_wires_talk_faster() -> None:
    cluster = load_cluster("dgx1-v100")
    one, two = (collective_price(cluster, "all_reduce", 2**28, ranks).seconds for ranks in ((0, 1), (0, 3)))
    assert two < 0.7 * one
