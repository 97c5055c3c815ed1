"""Clusters whose nodes differ: put together, moved by another backend, and as one group of ranks sees them: by the
nodes that it lies on, not by the weakest of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from costmodels.cluster import Backend, Cluster, NodeGroup

Firsts = range | tuple[int, ...]


def over(cluster: Cluster, backend: str | None) -> Cluster:
    """The cluster with its messages moved by this backend; itself where none is named. Tables that were measured with
    another backend say nothing of it."""
    if backend in (None, cluster.backend):
        return cluster
    if backend not in get_args(Backend):
        raise ValueError(f"'{backend}' is no known backend; use one of {', '.join(get_args(Backend))}")
    if cluster.fabric == "torus":
        raise ValueError(f"{cluster.name} is a torus, whose messages its compiler moves; leave the backend out")
    if backend == "nccl" and cluster.device.kind == "cpu":
        raise ValueError(f"nccl moves messages of GPUs, and {cluster.name} has {cluster.device.name}; use gloo")
    groups = tuple(replace(g, part=over(g.part, backend)) for g in cluster.groups)
    return replace(cluster, backend=cast(Backend, backend), tables=(), groups=groups, cache={})


def mixed(parts: Sequence[Cluster]) -> Cluster:
    """One cluster of the nodes of several, in this order; its plain fields are those of the weakest part."""
    if len({p.backend for p in parts}) > 1 or any(p.dims for p in parts):
        raise ValueError(
            "a mixed cluster needs parts of one backend, none of them a torus; put them in files of their own"
        )
    groups = tuple(g for p in parts for g in (p.groups or (NodeGroup(p.nodes, p),)))
    return replace(
        weakest(parts),
        name=" + ".join(p.name for p in parts),
        nodes=sum(g.nodes for g in groups),
        devices_per_node=min(g.part.devices_per_node for g in groups),
        sources=tuple(dict.fromkeys(s for p in parts for s in p.sources)),
        notes=tuple(dict.fromkeys(n for p in parts for n in p.notes)),
        groups=groups,
        cache={},
    )


def weakest(parts: Sequence[Cluster]) -> Cluster:
    """The part whose devices have the slowest links (its wires with them), with the slowest device and the NICs of the
    node that has the least of them."""

    def leaving(part: Cluster) -> float:
        return part.inter.bandwidth * part.inter.ecmp * (part.inter.ports or part.devices_per_node)

    slowest = min(parts, key=lambda p: p.intra.bandwidth)
    device = min((p.device for p in parts), key=lambda d: max(d.peak_flops.values(), default=0.0))
    return replace(slowest, device=device, inter=min(parts, key=leaving).inter)


def seen_by(cluster: Cluster, ranks: Sequence[int], firsts: Firsts = ()) -> tuple[Cluster, tuple[int, ...], Firsts]:
    """The cluster of equal nodes that a group of `ranks` feels, each as the weakest of the group's own; its ranks
    there, and where its likes begin (`collectives.collective_price`), those left out that lie on nodes of another
    size. Nodes keep their places below the switches.

    As it is where all nodes are equal. Where the group's nodes have different numbers of devices, these stay, and only
    the links and the device are those of the group's weakest node.
    """
    if not cluster.groups:
        return cluster, tuple(ranks), firsts
    used = sorted({cluster.node_of(r) for r in ranks})
    parts = tuple(dict.fromkeys(cluster.part_of(node) for node in used))
    key = ("seen by", tuple(map(id, parts)))
    same = len({p.devices_per_node for p in parts}) == 1
    if key not in cluster.cache:
        felt = weakest(parts)
        cluster.cache[key] = replace(
            felt, name=cluster.name, nodes=cluster.nodes, tiers=cluster.tiers, groups=() if same else cluster.groups,
            tables=felt.tables if len(parts) == 1 else (), cache={},
        )  # fmt: skip
    found: Cluster = cluster.cache[key]
    if not same:
        return found, tuple(ranks), firsts
    return found, tuple(_moved(cluster, found, r) for r in ranks), _likes(cluster, found, ranks, firsts)


def _moved(cluster: Cluster, found: Cluster, rank: int) -> int:
    """The rank of the same device among equal nodes."""
    node = cluster.node_of(rank)
    return node * found.devices_per_node + rank - cluster.first_ranks[node]


def _likes(cluster: Cluster, found: Cluster, ranks: Sequence[int], firsts: Firsts) -> tuple[int, ...]:
    """Where the likes begin that keep their form, moved: all their ranks on nodes of as many devices as ours."""
    kept = []
    for first in firsts:
        own = [r - ranks[0] + first for r in ranks]
        inside = min(own) >= 0 and max(own) < cluster.size
        if inside and all(cluster.part_of(cluster.node_of(r)).devices_per_node == found.devices_per_node for r in own):
            kept.append(_moved(cluster, found, first))
    return tuple(kept)
