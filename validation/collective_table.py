"""Prices of one collective over sizes, beside what the catalogue has measured on such a group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.nccl_fabric import family_of
from validation.collective_cases import Sweep, catalogue_sweeps, setup_of

SIZES = tuple(2.0**k for k in range(3, 34, 2))  # 8 bytes to 8 GiB


def bus_factor(kind: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth as nccl-tests defines them."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}.get(kind, 1.0)


def table(
    cluster: Cluster, kind: str, ranks: Sequence[int], sizes: Sequence[float] = SIZES, algorithm: str = ""
) -> list[dict[str, Any]]:
    """A row for each size: bytes, algorithm, protocol, seconds, algbw and busbw (bytes/s), interval (seconds). A
    barrier carries nothing and has one row."""
    if kind == "send" and len(set(ranks)) > 2:
        raise ValueError(f"a send has two ends, not {len(set(ranks))}; give --ranks 2, or two ranks such as 0,8")
    sizes = (0.0,) if kind == "barrier" else sizes
    factor = bus_factor(kind, len(ranks))
    rows = []
    for size in sizes:
        price = collective_price(cluster, kind, size, ranks, algorithm)
        if price.seconds <= 0:
            raise ValueError("a group of one rank sends nothing; give --ranks 2 or more")
        rate = 0.0 if kind == "barrier" else size / price.seconds
        rows.append(
            {
                "bytes": size,
                "algorithm": price.algorithm,
                "protocol": price.protocol,
                "seconds": price.seconds,
                "algbw": rate,
                "busbw": rate * factor,
                "interval": [price.seconds / (1 + price.error), price.seconds * (1 + price.error)],
                "source": price.source,
            }
        )
    return rows


def group_on(cluster: Cluster, wanted: int | str | None) -> tuple[int, ...]:
    """The ranks of a group: the first so many ("8"), those that are named ("0,8,16" or "0-7" or "0-63:8", or several of
    them), or all of them by default."""
    text = str(cluster.size if wanted is None else wanted).strip()
    if text.isdigit():
        size = int(text)
        if not 2 <= size <= cluster.size:
            raise ValueError(f"a group of {size} on {cluster.size} device(s); {_sizes_of(cluster)}")
        return tuple(range(size))
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+))?)?\s*", part)
        if match is None or match[3] == "0":
            raise ValueError(
                f"--ranks '{wanted}': '{part.strip()}' names no ranks; write 8 (the first eight), 0,8,16 or 0-63:8"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    ranks = tuple(dict.fromkeys(found))
    if len(ranks) < 2 or max(ranks) >= cluster.size:
        raise ValueError(
            f"--ranks {wanted} names {len(ranks)} rank(s); a group has two or more of 0 to {cluster.size - 1}"
        )
    return ranks


def _sizes_of(cluster: Cluster) -> str:
    """Which groups a cluster has."""
    if cluster.size < 2:
        return "a collective needs two devices, so take a cluster of more"
    return f"give --ranks between 2 and {cluster.size}"


def measured_on(cluster: Cluster, kind: str, ranks: Sequence[int]) -> list[Sweep]:
    """Sweeps of the catalogue with as many devices of the same family on as many nodes."""
    nodes = len({cluster.node_of(r) for r in ranks})
    family = family_of(cluster.device.name)
    found = []
    for sweep in catalogue_sweeps():
        same = (sweep.num_gpus, sweep.num_nodes) == (len(ranks), nodes)
        if family and same and family_of(sweep.gpu) == family and setup_of(sweep).kind == kind:
            found.append(sweep)
    return found
