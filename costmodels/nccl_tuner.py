"""The algorithms and protocols that NCCL can use for a collective, each as latency terms and seconds per byte.

The structure and the constants are those of NCCL's own tuner (src/graph/tuning.cc, master 5067397, about v2.30, read in
shared/facts/communication.md A1) except where marked EMPIRICAL. What the tuner leaves out (NVLS bandwidth by the bytes
that a port really carries, two-node trees, send and receive, all_to_all) is derived in the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, log2

import numpy as np

from costmodels.nccl_fabric import Group

US = 1e-6
PROTOCOLS = ("LL", "LL128", "Simple")
BASE = {"tree": (6.8, 14.0, 8.4), "ring": (6.6, 14.0, 8.4)}  # microseconds, tuning.cc baseLat
# microseconds a hop, tuning.cc hwLat. RCCL on xGMI takes NVLink's, staging through the host PCIe's.
_NVLINK = {"tree": (0.6, 1.25, 4.0), "ring": (0.6, 1.9, 3.4)}
_PCI = {"tree": (1.0, 1.9, 4.0), "ring": (1.0, 2.5, 5.7)}
HOP = {"nvlink": _NVLINK, "mesh": _NVLINK, "pci": _PCI, "host": _PCI}
CROSSING = {"tree": (5.0, 8.5, 14.0), "ring": (2.7, 4.0, 14.0)}
NVLS_HOP, NVLS_CROSSING, PAT_BASE = 25.0, 20.9, 8.0
# Power of the ranks beyond 8 of one NVLink domain by which NVLS loses rate. EMPIRICAL, one point: 72 GB200 reach
# 835 GB/s on the bus at 8 GiB (shared/facts/communication.md A6); by the law of 4 to 8 ranks alone it would be 1024.
NVLS_USUAL, NVLS_WIDE = 8, 0.093
# bytes/s, tuning.cc llMaxBws by generation; one, two, more hosts
LL_CAP = ((39e9, 39e9, 20.4e9), (87.7e9, 22.5e9, 19e9), (141e9, 45e9, 35e9), (282e9, 90e9, 70e9))
LL_SHARE, LL128_SHARE = 0.5, 0.92  # 4 of 8 bytes are data; 120 of 128, measured by NCCL's authors as 0.92
TREE_SHARE, TREE_LL_SHARE = 0.92, 1 / 3.8
# Ring rate over the data-sheet rate: 20.6 of 25 GB/s a link (Hopper), 40.1 of 50 (Blackwell), 20 of 25 (before).
RING_SHARE = 0.8
HOST_SHARE = 0.4  # of a PCIe port where devices stage through host memory: every byte passes it twice. ASSUMPTION
MESH_PEERS = 7  # a device of a full xGMI mesh has one link to each of its seven peers
# send and receive: NCCL's enqueue.cc gives a message channels until each carries 16 MiB or less, starting with the
# share of 32 channels that one peer of the node gets. A channel moves 20 GB/s (one NVLink of SM70/80 in tuning.cc).
P2P_CHANNELS, P2P_CHANNEL_RATE, P2P_CHANNEL_BYTES = 32, 20e9, 16 * 2**20
P2P_LL_BYTES = 2**14  # for each of the channels: up to that, messages go by LL (enqueue.cc, NCCL_P2P_LL_THRESHOLD)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a collective. base, hops, net: seconds of launch, of hops inside and between hosts by NCCL's
    constants; crossings: how many hops between hosts. inside, across: seconds per byte of the busiest port inside a
    domain and of its NICs. slow, cap: send only, seconds per byte on few channels, up to `cap` seconds."""

    algorithm: str
    protocol: str
    base: float
    hops: float
    net: float
    crossings: int
    inside: float
    across: float
    slow: float = 0.0
    cap: float = 0.0


def candidates(group: Group, kind: str) -> list[Candidate]:
    """All ways to run `kind` on the group (a barrier is an all_reduce, as torch issues it)."""
    if kind == "send":
        return _sends(group)
    if kind == "all_to_all":
        return [_all_to_all(group)]
    if kind in ("all_reduce", "barrier"):
        return [*_rings(group, "all_reduce"), *_trees(group), *_nvls(group)]
    return [*_rings(group, kind), *_pat(group, kind)]


def chosen(kind: str, ways: Sequence[Candidate], sizes: np.ndarray) -> np.ndarray:
    """Which ways NCCL may take: True at (way, size). The protocol of a send inside an NVLink host hangs on its size
    alone; elsewhere all may be taken, and the best is."""
    if kind != "send" or len(ways) < 2:
        return np.ones((len(ways), len(sizes)), bool)
    by_ll = sizes <= P2P_CHANNELS * P2P_LL_BYTES
    return np.array([by_ll if way.protocol == "LL" else ~by_ll for way in ways])


def ring_rate(group: Group) -> float:
    """bytes/s that a ring moves through each device inside a domain; a mesh has one link to each peer in use."""
    if group.per_domain < 2:
        return inf
    if group.wires == "mesh":
        return group.port * RING_SHARE * min(group.per_domain - 1, MESH_PEERS) / MESH_PEERS
    return group.port * (HOST_SHARE if group.wires == "host" else RING_SHARE)


def _rate(rate: float) -> float:
    return 1 / rate if rate else 0.0


def _possible(group: Group, protocol: str) -> bool:
    """LL128 needs 128-byte stores that arrive whole: NVLink. LL and LL128 need a network that keeps bytes in order: the
    EFA of instances before P5 does not, and its plugin sets NCCL_PROTO=simple (github aws/aws-ofi-nccl: issues 76 and
    715, pull request 280)."""
    if protocol == "Simple":
        return True
    return (group.wires == "nvlink" or protocol == "LL") and not (group.network == "efa-v1" and group.hosts > 1)


def _net(group: Group) -> float:
    return _rate(group.across) if group.domains > 1 else 0.0


def _uplink(group: Group, crossing: float, everyone: bool = False) -> float:
    """Seconds per byte on the links above the lowest switches. crossing: bytes through a boundary per byte of the
    collective; everyone: each rank below sends to all ranks beyond."""
    worst = 0.0
    for below, rate in group.uplinks:
        share = below * max(group.ranks - below, 0) / group.ranks if everyone else crossing
        worst = max(worst, share / rate)
    return worst


def _rings(group: Group, kind: str) -> list[Candidate]:
    n, hosts = group.ranks, group.hosts
    factor, steps, crossings = {
        "all_reduce": (2 * (n - 1) / n, 2 * (n - 1), 2 * (hosts - 1)),
        "all_gather": ((n - 1) / n, n - 1, hosts - 1),
        "reduce_scatter": ((n - 1) / n, n - 1, hosts - 1),
        "broadcast": (1.0, n - 1, hosts - 1),
        "reduce": (1.0, n - 1, hosts - 1),
    }[kind]
    found = []
    for i, protocol in enumerate(PROTOCOLS):
        if not _possible(group, protocol):
            continue
        share = (LL_SHARE, LL128_SHARE, 1.0)[i]
        rate = ring_rate(group) * share
        if protocol == "LL":
            rate = min(rate, LL_CAP[group.generation][min(hosts, 3) - 1])
        across = max(_net(group), _uplink(group, 1.0)) * factor / share
        hops = (steps - crossings) * (HOP[group.wires]["ring"][i] * US + group.hop)
        net = crossings * CROSSING["ring"][i] * US
        base = BASE["ring"][i] * US
        found.append(Candidate("ring", protocol, base, hops, net, crossings, factor * _rate(rate), across))
    return found


def _trees(group: Group) -> list[Candidate]:
    """Double binary tree over hosts, a chain inside each. Between two hosts each direction carries the buffer once;
    in larger trees a host is inner in one tree and leaf in the other and carries it twice."""
    depth = ceil(log2(group.hosts)) if group.hosts > 1 else 0
    volume = 1.0 if group.domains == 2 else 2.0
    found = []
    for i, protocol in enumerate(PROTOCOLS):
        if not _possible(group, protocol):
            continue
        share = (TREE_LL_SHARE, 7 / 9 if group.hosts == 1 else 120 / 128, 1.0)[i]
        inside = 2 * _rate(ring_rate(group) * TREE_SHARE * share)
        across = max(_net(group), _uplink(group, 1.0)) * volume / share
        hops = 2 * (group.per_host - 1) * (HOP[group.wires]["tree"][i] * US + group.hop)
        net = 2 * depth * CROSSING["tree"][i] * US
        found.append(Candidate("tree", protocol, BASE["tree"][i] * US, hops, net, 2 * depth, inside, across))
    return found


def _nvls(group: Group) -> list[Candidate]:
    """NVLink SHARP: the switch reduces, so a port sends its buffer once plus 1 / n of it for the broadcast half:
    (n + 1) / n bytes per byte, which fits 5, 7 and 8 H200 and 6 and 8 B200 with one efficiency each. Over several hosts
    (NVLSTree) a tree joins the hosts; not over several NVL72 domains (EMPIRICAL: 128 GB200 run at a ring's rate)."""
    within = group.per_domain
    if not group.nvls_from or within < group.nvls_from or (group.domains > 1 and group.domains != group.hosts):
        return []
    depth = ceil(log2(group.domains)) if group.domains > 1 else 0
    across = max(_net(group), _uplink(group, 1.0)) * (1.0 if group.domains == 2 else 2.0)
    name = "nvls_tree" if group.domains > 1 else "nvls"
    hops = NVLS_HOP * US + group.hop
    net = 2 * depth * NVLS_CROSSING * US
    inside = (within + 1) / within / group.port * max(within / NVLS_USUAL, 1.0) ** NVLS_WIDE
    return [Candidate(name, "Simple", 0.0, hops, net, 2 * depth, inside, across)]


def _pat(group: Group, kind: str) -> list[Candidate]:
    """Parallel aggregated trees: all_gather and reduce_scatter of one device a host."""
    if kind not in ("all_gather", "reduce_scatter") or group.per_host > 1 or group.hosts < 2:
        return []
    depth = ceil(log2(group.hosts))
    net = (depth * CROSSING["ring"][2] / 3.5 + 2.8 * group.ranks) * US
    factor = (group.ranks - 1) / group.ranks
    across = max(_net(group), _uplink(group, 1.0)) * factor / 0.75
    return [Candidate("pat", "Simple", PAT_BASE * US, 0.0, net, depth, 0.0, across)]


def _all_to_all(group: Group) -> Candidate:
    """Pairwise, all pairs posted at once: what a device sends inside its domain, what a domain sends out of it. Its
    latency grows with log2 of the ranks (EMPIRICAL, tables of nccl_tables.toml: 512 bytes take 6.4, 6.7 and 7.7 us on
    2, 4 and 8 H100, 9.2, 10.3 and 10.9 on B200, 10.5, 12.4 and 15.8 on A100). Between domains the
    NICs set the rate (NCCL's authors: github NVIDIA/nccl-tests, issue 130)."""
    n, within = group.ranks, group.per_domain
    inside = (within - 1) / n * _rate(ring_rate(group)) if within > 1 else 0.0
    across = (group.leaving or within * (n - within) / n) * _net(group)
    outside = 1 if group.hosts > 1 else 0
    base, hops = BASE["ring"][0] * US, log2(n) * (HOP[group.wires]["ring"][0] * US + group.hop)
    net = outside * CROSSING["ring"][2] * US
    return Candidate("pairwise", "Simple", base, hops, net, outside, inside, max(across, _uplink(group, 0.0, True)))


def _sends(group: Group) -> list[Candidate]:
    """One message between two ranks; inside a node on few channels at first (P2P_CHANNELS), small ones by LL."""
    base = BASE["ring"][0] * US
    if group.hosts > 1:
        net = CROSSING["ring"][0] * US
        own = _net(group) * group.per_domain  # one message at a time leaves through the NIC of its device
        return [Candidate("p2p", "Simple", base, 0.0, net, 1, 0.0, max(own, _uplink(group, 1.0)))]
    hop, inside = HOP[group.wires]["ring"][0] * US + group.hop, _rate(ring_rate(group))
    if group.wires != "nvlink":
        return [Candidate("p2p", "Simple", base, hop, 0.0, 0, inside, 0.0)]
    first = max(P2P_CHANNELS // max(group.per_host, 8), 1)
    slow, cap = 1 / (first * P2P_CHANNEL_RATE), P2P_CHANNEL_BYTES / P2P_CHANNEL_RATE
    by_ll = max(slow / TREE_LL_SHARE, inside / LL_SHARE)  # LL on few channels moves what it moves on those of a tree
    return [
        Candidate("p2p", "LL", base, hop, 0.0, 0, by_ll, 0.0),
        Candidate("p2p", "Simple", base, hop, 0.0, 0, inside, 0.0, slow, cap),
    ]
