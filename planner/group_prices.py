"""Prices of a plan's groups where nodes differ or name their wires, so that groups of one form take different times."""

from __future__ import annotations

from costmodels.cluster import Cluster
from costmodels.collectives import CollectivePrice, collective_price
from planner.plan import ParallelPlan


def quickest(cluster: Cluster, plan: ParallelPlan, axis: str, kind: str, nbytes: float) -> CollectivePrice:
    """The price of the group along `axis` ("dp" or "tp") that is through first beside its likes: a bound counts no
    slower one, and where all groups are alike it is any."""
    likes = ((ranks, plan.likes(ranks[0], axis)) for ranks in groups_along(cluster, plan, axis))
    prices = (collective_price(cluster, kind, nbytes, ranks, firsts=firsts) for ranks, firsts in likes)
    return min(prices, key=lambda price: price.seconds)


def groups_along(cluster: Cluster, plan: ParallelPlan, axis: str) -> list[tuple[int, ...]]:
    """The plan's groups along `axis`; only the first where all are alike."""
    ranks = range(plan.world_size) if _differ(cluster) else range(1)
    return list(dict.fromkeys(plan.group(rank, axis) for rank in ranks))


def quickest_send(cluster: Cluster, plan: ParallelPlan, stage: int, nbytes: float) -> float:
    """Seconds of the message of `nbytes` bytes into `stage`, of the lane that is through first."""
    width = plan.dp * plan.tp
    base = (stage - 1) * width
    likes = range(base, base + width)
    lanes = likes if _differ(cluster) else likes[:1]
    return min(collective_price(cluster, "send", nbytes, (r, r + width), firsts=likes).seconds for r in lanes)


def _differ(cluster: Cluster) -> bool:
    return bool(cluster.wires or cluster.groups)
