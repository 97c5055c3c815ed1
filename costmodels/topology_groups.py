"""What many groups that communicate at once ask of every layer of a cluster, without its graph: vectorised, so that
16,384 devices cost well under a millisecond.

A ring over several nodes is cut into as many rings as it has devices on a node, each leaving the node by another port
(NCCL's channels); an all-to-all sends between nodes by the port on the receiver's rail. Loads are balanced over the
ports of a rail and over the parallel links of a switch; what hashes lose is `Tier.ecmp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from costmodels.cluster import Cluster
from costmodels.topology_nodes import nics_per_node

# Bytes that a device sends to its neighbours in a ring, per byte of the collective and rank: rounds of 1/P each.
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
KINDS = (*ROUNDS, "all_to_all")


@dataclass(frozen=True, slots=True)
class GroupBound:
    """seconds: the layer that takes longest, and the latency of one message after another. layer: which one it is.
    layers: seconds of each layer alone, by name. latency: seconds of the messages, without bytes."""

    seconds: float
    layer: str
    layers: dict[str, float]
    latency: float


def group_bound(cluster: Cluster, kind: str, nbytes: float, groups: Sequence[Sequence[int]] | np.ndarray) -> GroupBound:
    """A lower bound of the time in which all `groups` (rows of ranks, equally long) do the same collective at once.

    Exact where every layer is loaded evenly: flows of `simulator.flow_collectives` on the cluster's graph take as long.
    """
    if kind not in KINDS:
        raise ValueError(f"'{kind}' has no group bound; use one of {', '.join(KINDS)}")
    ranks = np.atleast_2d(np.asarray(groups, np.int64))
    if cluster.size < 2**24:  # products of nodes and rails stay below 2^31: half of the time of long integers
        ranks = ranks.astype(np.int32)
    if cluster.groups or cluster.fabric == "torus":
        raise ValueError(f"{cluster.name}: group bounds need equal nodes under switches; simulate flows on its graph")
    if ranks.size and not 0 <= int(ranks.min()) <= int(ranks.max()) < cluster.size:
        raise ValueError(f"a group names rank {int(ranks.max())}; {cluster.name} has {cluster.size} devices")
    size = ranks.shape[1]
    if size < 2 or not ranks.size:
        return GroupBound(0.0, "none", {}, 0.0)
    node = ranks // cluster.devices_per_node
    together = int((node[0] == node[0, 0]).sum())  # ranks of a group that share a node
    if kind == "all_to_all":
        return _all_to_all(cluster, nbytes, ranks, node, together)
    return _ring(cluster, ROUNDS[kind], nbytes, ranks, node, together)


def _ring(
    cluster: Cluster, rounds: int, nbytes: float, ranks: np.ndarray, node: np.ndarray, together: int
) -> GroupBound:
    size = ranks.shape[1]
    sent = rounds * (size - 1) / size * nbytes
    layers = {"devices": sent / cluster.intra.bandwidth} if together > 1 else {}
    hops = np.full(node.shape, cluster.intra.latency) if together > 1 else np.zeros(node.shape)
    if together < size:
        after = np.roll(node, -together, axis=1)  # the same place on the next node
        load = np.full(node.shape, sent / together)
        layers |= _network(cluster, ranks, [(node, after, load)])
        crossing = node != np.roll(node, -1, axis=1)
        hops = np.where(crossing, _latency(cluster, node, np.roll(node, -1, axis=1)), hops)
    # A piece travels around the ring: it meets every edge once a round.
    latency = rounds * (size - 1) * float(hops.mean(axis=1).max())
    return _slowest(layers, latency)


def _all_to_all(cluster: Cluster, nbytes: float, ranks: np.ndarray, node: np.ndarray, together: int) -> GroupBound:
    size = ranks.shape[1]
    layers = {"devices": (together - 1) / size * nbytes / cluster.intra.bandwidth}
    latency = cluster.intra.latency
    if together < size:
        ports = [("ports", node, 1.0)] + [(t.name, node // t.nodes, 0.0) for t in cluster.tiers]
        capacity = capacities(cluster)
        rail = rail_of(cluster, ranks)
        rails = nics_per_node(cluster)
        for (name, block, _), (top, by_rail) in zip(ports, capacity):
            inside = _members(block)
            load = (size - inside) / size * nbytes
            key = block * rails + rail if by_rail else block
            layers[name] = float(np.bincount(key.ravel(), load.ravel()).max()) / top
        latency = float(_latency(cluster, node[:1], node[:1, ::-1]).max())
    return _slowest(layers, latency)


def _members(block: np.ndarray) -> np.ndarray:
    """For every rank of every group, how many of the group are in its block."""
    width = int(block.max()) + 1
    key = np.arange(block.shape[0])[:, None] * width + block
    return np.bincount(key.ravel(), minlength=block.shape[0] * width)[key]


def _network(
    cluster: Cluster, ranks: np.ndarray, flows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """Seconds of the ports and of every tier's uplinks, from (node, next node, bytes) of every rank."""
    result: dict[str, float] = {}
    rail, rails = rail_of(cluster, ranks), nics_per_node(cluster)
    widths = [("ports", 1), *((t.name, t.nodes) for t in cluster.tiers)]
    for (name, width), (top, by_rail) in zip(widths, capacities(cluster)):
        worst = 0.0
        for node, after, load in flows:
            out, into = (node, after) if width == 1 else (node // width, after // width)
            crossing = np.where(out != into, load, 0.0).ravel()
            for block in (out, into):
                key = block * rails + rail if by_rail else block
                worst = max(worst, float(np.bincount(key.ravel(), crossing).max()))
        result[name] = worst / top
    return result


def rail_of(cluster: Cluster, ranks: np.ndarray) -> np.ndarray:
    """The port of every rank on its node."""
    return ranks % cluster.devices_per_node * nics_per_node(cluster) // cluster.devices_per_node


def capacities(cluster: Cluster) -> list[tuple[float, bool]]:
    """bytes/s of a port, and of one switch's uplinks in every tier, each with whether it belongs to one rail."""
    ports = nics_per_node(cluster)
    each = cluster.inter.bandwidth * cluster.inter.ecmp
    result = [(each, True)]
    share, railed = 1.0, True
    for tier in cluster.tiers:
        share *= tier.ecmp / tier.oversubscription
        railed = railed and tier.rails
        result.append((each * share * min(tier.nodes, cluster.nodes) * (1 if railed else ports), railed))
    return result


def _latency(cluster: Cluster, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Seconds of an empty message between nodes: the ports' latency, and that of every tier passed."""
    result = np.full(a.shape, cluster.inter.latency)
    for tier in cluster.tiers:
        result += np.where(a // tier.nodes != b // tier.nodes, tier.latency, 0.0)
    return result


def _slowest(layers: dict[str, float], latency: float) -> GroupBound:
    layer = max(layers, key=lambda name: layers[name])
    return GroupBound(layers[layer] + latency, layer, layers, latency)
