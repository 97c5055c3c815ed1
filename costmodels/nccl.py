"""A first model of NCCL: ring, alpha-beta, the better of the LL and Simple protocols.

The structure and the latencies are those of NCCL's own tuner (src/graph/tuning.cc, shared/facts/communication.md A1).
Empirical constants are marked.
"""

from __future__ import annotations

from math import ceil, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from costmodels.cluster import Cluster

# (base, share of the bus bandwidth) by protocol; seconds. tuning.cc baseLat of ring; LL carries 4 B of data in 8 B.
PROTOCOLS = {"LL": (6.6e-6, 0.5), "Simple": (8.4e-6, 1.0)}
INTRA_HOP = {"LL": 0.6e-6, "Simple": 3.4e-6}  # tuning.cc hwLat, NVLink, ring
INTER_HOP = {"LL": 2.7e-6, "Simple": 14.0e-6}  # tuning.cc hwLat, NET, ring (on top of the link's own latency)
LL_CAP = 40e9  # bytes/s, tuning.cc llMaxBws of Ampere on two nodes and Hopper on four, between 20 and 141: EMPIRICAL
INTRA_EFFICIENCY = 0.82  # NVLink 370 of 450 GB/s, sjeaugey in nccl-tests issue 212: EMPIRICAL
INTER_EFFICIENCY = 0.85  # RoCE and IB default, range .73-.95, shared/facts/communication.md A6: EMPIRICAL


def seconds(cluster: Cluster, kind: str, nbytes: float, ranks: tuple[int, ...]) -> float:
    """Seconds of one collective; ranks of one node talk over `intra`, of several over both, whichever is slower."""
    size = len(set(ranks))
    nodes: dict[int, int] = {}
    for rank in set(ranks):
        nodes[cluster.node_of(rank)] = nodes.get(cluster.node_of(rank), 0) + 1
    bus = cluster.intra.bandwidth * INTRA_EFFICIENCY if len(nodes) < size else float("inf")
    if len(nodes) > 1:
        per_node = min(nodes.values())
        ports = min(per_node, cluster.inter.ports) if cluster.inter.ports else per_node
        bus = min(bus, ports * cluster.inter.bandwidth * INTER_EFFICIENCY)
        if kind == "all_to_all":  # every device sends (N - 1) / N of its data through its share of the node's ports
            bus = min(bus, ports / per_node * cluster.inter.bandwidth * INTER_EFFICIENCY)
    factor, steps, crossings = _ring(kind, size, len(nodes))
    return min(_protocol(name, cluster, factor * nbytes, steps, crossings, bus) for name in PROTOCOLS)


def _protocol(name: str, cluster: Cluster, moved: float, steps: int, crossings: int, bus: float) -> float:
    base, share = PROTOCOLS[name]
    hops = (steps - crossings) * (INTRA_HOP[name] + cluster.intra.latency)
    hops += crossings * (INTER_HOP[name] + cluster.inter.latency)
    rate = min(bus * share, LL_CAP) if name == "LL" else bus
    return base + hops + moved / rate


def _ring(kind: str, size: int, nodes: int) -> tuple[float, int, int]:
    """Bytes over the slowest port as a multiple of `bytes`, ring steps, and how many of these cross nodes."""
    if kind == "all_reduce":
        return 2 * (size - 1) / size, 2 * (size - 1), 2 * (nodes - 1)
    if kind in ("all_gather", "reduce_scatter"):
        return (size - 1) / size, size - 1, nodes - 1
    if kind == "all_to_all":
        return (size - 1) / size, 1, min(nodes - 1, 1)
    if kind == "broadcast":  # pipelined ring: 1 x the bytes, latency of the whole ring
        return 1.0, size - 1, nodes - 1
    if kind == "send":
        return 1.0, 1, min(nodes - 1, 1)
    assert kind == "barrier", kind
    return 0.0, 2 * ceil(log2(size)), 2 * ceil(log2(nodes)) if nodes > 1 else 0
