"""Bounds count the quickest of groups that take different times."""

from __future__ import annotations

from costmodels.cluster import load_cluster
from costmodels.collectives import collective_price
from planner.group_prices import groups_along, quickest, quickest_send
from planner.plan import ParallelPlan
from tests.planner.models import SHARDINGS


def test_the_quickest_pair_of_a_cube_mesh_counts() -> None:
    mesh, plan = load_cluster("dgx1-v100"), ParallelPlan(8, pp=2, dp=2, tp=2, shardings=SHARDINGS, cuts=("blocks.2",))
    assert groups_along(mesh, plan, "tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    prices = [collective_price(mesh, "all_reduce", 2**24, pair).seconds for pair in groups_along(mesh, plan, "tp")]
    found = quickest(mesh, plan, "tp", "all_reduce", 2**24).seconds
    assert found == min(prices) < 0.7 * prices[0]
    lanes = [collective_price(mesh, "send", 2**24, (r, r + 4)).seconds for r in range(4)]
    assert quickest_send(mesh, plan, 1, 2**24) == min(lanes)


def test_alike_groups_are_priced_once() -> None:
    plan = ParallelPlan(8, dp=4, tp=2, shardings=SHARDINGS)
    assert groups_along(load_cluster("dgx-h100"), plan, "tp") == [(0, 1)]
    assert groups_along(load_cluster("dgx-h100"), plan, "dp") == [(0, 2, 4, 6)]
