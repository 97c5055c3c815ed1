"""What groups that communicate at once leave each other of the ports and switches between nodes.

Two forms. Groups of one kind that start together (all data-parallel rings of a stage): `shared_group` narrows what one
of them gets by the loads of all (`topology_groups.group_bound`), and NCCL's law prices it with that. Traffic of
different kinds that meets at any moment (pipeline sends beside gradients): `Layer` says which share of a port or
uplink one message keeps busy, for the processor-sharing pools of the simulator. Both are held to exact flows by
`tests/costmodels/test_sharing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from costmodels.cluster import Cluster
from costmodels.nccl_fabric import Group
from costmodels.nccl_tuner import RING_SHARE, ring_rate
from costmodels.topology_groups import ROUNDS, capacities, group_bound, rail_of

if TYPE_CHECKING:
    from costmodels.topology import Topology

Firsts = range | tuple[int, ...]


def alike(ranks: Sequence[int], firsts: Firsts) -> np.ndarray:
    """Rows of ranks: the group moved so that it begins at each of `firsts`."""
    own = _numbers(ranks)
    return own[None, :] - own[0] + _numbers(firsts)[:, None]


def _numbers(ranks: Sequence[int]) -> np.ndarray:
    """The ranks as an array; ranges of thousands are not walked through."""
    return np.arange(ranks.start, ranks.stop, ranks.step) if isinstance(ranks, range) else np.asarray(ranks, np.int64)


def _last(ranks: Sequence[int]) -> int:
    return max(ranks[0], ranks[-1]) if isinstance(ranks, range) else max(ranks)


def known(cluster: Cluster) -> bool:
    """Whether loads of this cluster's network can be counted: equal nodes, several of them, under switches."""
    return cluster.nodes > 1 and not cluster.groups and cluster.fabric != "torus"


def shared_group(cluster: Cluster, group: Group, kind: str, ranks: Sequence[int], firsts: Firsts) -> Group:
    """`group` (of `ranks`) with what it gets of NICs and uplinks while its likes, which begin at `firsts`, do the same.

    On one node, what it gets of the node's wires. The same object where nothing is shared: one group, switches that
    give every device its own way, or a cluster whose loads are not counted (`known`).
    Where switches are rails' own, a group alone too has only the uplinks of the rails that it lies on.
    """
    alone = len(firsts) < 2
    if kind == "all_to_all" and cluster.wires and not cluster.groups:
        here = cluster.node_of(ranks[0])
        group = _narrowed(group, exchanged_inside(cluster, [r for r in ranks if cluster.node_of(r) == here]))
    if group.domains == 1:
        return _narrowed(group, inf if alone else left_inside(cluster, kind, ranks, firsts))
    if alone and any(t.rails for t in cluster.tiers) and group.per_host < cluster.devices_per_node:
        firsts = (ranks[0],)  # it lies on some of the rails, perhaps
    elif alone:
        return group
    if group.domains != group.hosts or not _counted(cluster, ranks, firsts):
        return group
    everywhere = kind == "all_to_all"
    layers = _layers(cluster, everywhere, ranks, firsts)
    n, within = group.ranks, group.per_domain
    left = within * (n - within) / n if everywhere else (n - 1) / n
    across = left / layers["ports"] if layers.get("ports") and not alone else group.across
    uplinks = []
    for (below, rate), tier in zip(group.uplinks, cluster.tiers):
        passed = below * max(n - below, 0) / n if everywhere else (n - 1) / n
        load = layers.get(tier.name, 0.0)
        uplinks.append((below, min(rate, passed / load) if load else rate))
    return replace(group, across=min(group.across, across), uplinks=tuple(uplinks))


def _narrowed(group: Group, left: float) -> Group:
    """`group` where each device has no more than `left` bytes/s of the wires inside its node. A ring moves RING_SHARE
    of a wire's rate, or less where devices stage through the host."""
    if left == inf:
        return group
    return replace(group, port=min(group.port, left * RING_SHARE * group.port / ring_rate(group)))


def slowed_by_likes(cluster: Cluster, kind: str, ranks: Sequence[int], firsts: Firsts) -> float:
    """How many times less bandwidth between nodes a group gets beside its likes than alone; 1 where it shares none."""
    if len(firsts) < 2 or not _counted(cluster, ranks, firsts) or len({cluster.node_of(r) for r in ranks}) < 2:
        return 1.0
    everywhere = kind == "all_to_all"
    alone = _layers(cluster, everywhere, ranks, (ranks[0],))
    together = _layers(cluster, everywhere, ranks, firsts)
    outside = [name for name in together if name != "devices"]
    own = max(alone[name] for name in outside)
    return max(max(together[name] for name in outside) / own, 1.0) if own > 0 else 1.0


def left_inside(cluster: Cluster, kind: str, ranks: Sequence[int], firsts: Firsts) -> float:
    """bytes/s that each rank of a group of one node can send while its likes there do the same, by the loads of the
    node's named wires (links between sockets and switches of PCIe); inf without likes or wires."""
    if not cluster.wires or cluster.groups or max(ranks) >= cluster.size:
        return inf
    first = cluster.first_ranks[cluster.node_of(ranks[0])]
    own = [r - first for r in ranks]
    rows = (alike(ranks, firsts) - first).tolist()
    likes = [row for row in rows if row != own and min(row) >= 0 and max(row) < cluster.devices_per_node]
    if not likes or max(own) >= cluster.devices_per_node:
        return inf
    topology = _node(cluster)
    everywhere = kind == "all_to_all"
    loads = np.zeros((1 + len(likes), len(topology.capacity)))
    for load, row in zip(loads, (own, *likes)):
        for a, b in permutations(row, 2) if everywhere else zip(row, [*row[1:], row[0]]):
            load[list(topology.road(a, b).links)] += 1 / (len(row) - 1) if everywhere else 1
    # Wires of a group's own say nothing: NCCL lays several rings over them, of which these roads are one.
    shared = (loads[0] > 0) & (loads[1:].sum(axis=0) > 0)
    rates = topology.capacity[shared] / loads.sum(axis=0)[shared]
    return float(rates.min()) if shared.any() else inf


def exchanged_inside(cluster: Cluster, ranks: Sequence[int]) -> float:
    """bytes/s that each rank of a group of one node sends in an all-to-all, whose pairs meet on the node's named wires
    (a ring crosses each only once); inf for one rank."""
    if max(ranks) >= cluster.size:
        return inf
    own = sorted({r - cluster.first_ranks[cluster.node_of(ranks[0])] for r in ranks})
    if len(own) < 2 or max(own) >= cluster.devices_per_node:
        return inf
    topology = _node(cluster)
    loads = np.zeros(len(topology.capacity))
    for a, b in permutations(own, 2):
        loads[list(topology.road(a, b).links)] += 1
    busy = loads > 0
    return float((len(own) - 1) / (loads[busy] / topology.capacity[busy]).max()) if busy.any() else inf


def _node(cluster: Cluster) -> Topology:
    """The graph of one node."""
    from costmodels.topology import expand

    if "node" not in cluster.cache:
        cluster.cache["node"] = expand(replace(cluster, nodes=1, cache={}))
    found: Topology = cluster.cache["node"]
    return found


def _counted(cluster: Cluster, ranks: Sequence[int], firsts: Firsts) -> bool:
    """Whether the loads of these groups can be counted: all lie on devices of their own (ranks beyond the last device
    share its node)."""
    return known(cluster) and _last(firsts) + _last(ranks) - ranks[0] < cluster.size


def _layers(cluster: Cluster, everywhere: bool, ranks: Sequence[int], firsts: Firsts) -> dict[str, float]:
    """Seconds per byte of every layer while all groups of this form communicate."""
    return group_bound(cluster, "all_to_all" if everywhere else "all_gather", 1.0, alike(ranks, firsts)).layers


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of ports or uplinks as pools. width: nodes below one switch (1: ports of nodes). rate: bytes/s of one
    pool. by_rail: whether each rail of a node or switch has its own."""

    name: str
    width: int
    rate: float
    by_rail: bool

    def pool_of(self, cluster: Cluster, rank: int) -> tuple[int, int]:
        """The pool that the messages of a rank leave through."""
        rail = int(rail_of(cluster, np.array([rank]))[0]) if self.by_rail else 0
        return cluster.node_of(rank) // self.width, rail

    def busy(self, cluster: Cluster, kind: str, nbytes: float, ranks: Sequence[int], rank: int) -> float:
        """Seconds for which a whole pool is busy with what `rank` sends through it in one collective of `ranks`.

        Rings leave a node by as many ports as they have ranks there; a send leaves from its first rank; what ROUNDS
        does not count (broadcast, reduce) passes a ring once.
        """
        blocks = [cluster.node_of(r) // self.width for r in ranks]
        own = cluster.node_of(rank) // self.width
        if len(set(blocks)) < 2 or (kind == "send" and rank != ranks[0]):
            return 0.0
        size, together = len(ranks), blocks.count(own)
        if kind == "send":
            return nbytes / self.rate
        if kind == "all_to_all":
            return (size - together) / size * nbytes / self.rate
        nodes = [cluster.node_of(r) for r in ranks]
        here = nodes.count(cluster.node_of(rank))
        turn = nodes[(ranks.index(rank) + here) % size]  # the same place on the group's next node
        if turn // self.width == own:
            return 0.0
        sent = ROUNDS.get(kind, 1) * (size - 1) / size * nbytes
        return sent / here / self.rate


def layers_of(cluster: Cluster) -> list[Layer]:
    """Ports and the uplinks of every tier; empty where loads of the network are not counted."""
    if not known(cluster):
        return []
    widths = [("ports", 1), *((t.name, t.nodes) for t in cluster.tiers)]
    return [Layer(name, width, rate, rail) for (name, width), (rate, rail) in zip(widths, capacities(cluster))]


def fullest(cluster: Cluster, traffic: Sequence[Sequence[tuple[Sequence[int], Firsts]]]) -> Layer | None:
    """The layer that all kinds of traffic together load most; None where fewer than two kinds leave their nodes, so
    that nothing can meet. traffic: of each kind its forms (a group and where its likes begin), of which the heaviest
    counts."""
    found = layers_of(cluster)
    if not found:
        return None
    kinds = [[_layers(cluster, False, ranks, firsts) for ranks, firsts in forms if len(ranks) > 1] for forms in traffic]
    heaviest = [max(loads, key=lambda x: x.get("ports", 0.0)) for loads in kinds if loads]
    crossing = [x for x in heaviest if x.get("ports", 0.0) > 0]
    if len(crossing) < 2:
        return None
    return max(found, key=lambda layer: sum(x.get(layer.name, 0.0) for x in crossing))
