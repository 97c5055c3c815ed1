"""Collectives of the groups of a real cluster, measured under torchrun and stored in its cluster file.

`torchrun --nproc-per-node 8 -m parplan calibrate --cluster dgx-h100 --out mine.toml`: every rank runs this; rank 0
writes. Groups inside the first node (2, 4, ... and all of its ranks) and, where there are several nodes, one rank of
each node and the whole world. Times are those of calls in a loop, as nccl-tests takes them: by CUDA events on GPUs, by
the clock where the backend is gloo.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from costmodels import tomlfile
from costmodels.cluster import Cluster, CollectiveTable, tables_data
from costmodels.device import CATALOGUE

SIZES = tuple(4096 * 8**k for k in range(3)) + tuple(2**k for k in (20, 22, 24, 26, 28))  # 4 KiB to 256 MiB
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
WARM_UP, LEAST, MOST = 3, 10, 100  # calls before a point, and batches of one call that make it
POINT_SECONDS = 0.3


def groups_of(world: int, per_node: int) -> list[tuple[int, ...]]:
    """The groups to measure: 2, 4, ... ranks of the first node, all of it, one rank of each node, the whole world."""
    node = min(per_node, world)
    sizes = sorted({size for k in range(1, 8) if (size := 2**k) <= node} | {node} - {1})
    found = [tuple(range(size)) for size in sizes]
    if world > per_node:
        found += [tuple(range(0, world, per_node)), tuple(range(world))]
    return list(dict.fromkeys(g for g in found if len(g) > 1))


def calibrate_cluster(
    cluster: Cluster,
    backend: str = "nccl",
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = KINDS,
    point_seconds: float = POINT_SECONDS,
) -> tuple[CollectiveTable, ...]:
    """Tables of all groups, the same on every rank. A collective call of all ranks that torchrun started.

    ValueError where torchrun started no ranks, or not as many a node as the cluster has, or NCCL has no GPU.
    """
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError("the collectives of a cluster are measured under torchrun: torchrun --nproc-per-node N -m ...")
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world > cluster.size or (world > local and local != cluster.devices_per_node):
        raise ValueError(
            f"torchrun started {world} ranks, {local} a node; {cluster.name} has {cluster.size} devices, "
            f"{cluster.devices_per_node} a node"
        )
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here, which NCCL needs; use --backend gloo, or run this on the GPUs")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    started = not dist.is_initialized()
    if started:
        dist.init_process_group(backend)
    try:
        return _tables(cluster, backend, sizes, kinds, point_seconds)
    finally:
        if started:
            dist.destroy_process_group()


def _tables(
    cluster: Cluster, backend: str, sizes: Sequence[int], kinds: Sequence[str], point_seconds: float
) -> tuple[CollectiveTable, ...]:
    import torch.distributed as dist

    tables = []
    for ranks in groups_of(dist.get_world_size(), cluster.devices_per_node):
        group = dist.new_group(list(ranks))
        nodes = len({cluster.node_of(r) for r in ranks})
        for kind in kinds if len(ranks) == 2 else [k for k in kinds if k != "send"]:
            points = [_point(kind, size, ranks, group, backend, point_seconds) for size in sizes]
            seconds = tuple(s for s, _ in points)
            demand = 0.0 if backend == "nccl" else 1.0
            error = max(statistics.median(e for _, e in points), 0.01)
            moved = tuple(float(_elements(size, len(ranks)) * 4) for size in sizes)
            tables.append(CollectiveTable(kind, len(ranks), moved, seconds, (demand,) * len(moved), error, nodes))
    return tuple(tables)


def _elements(size: int, ranks: int) -> int:
    return max(size // 4 // ranks, 1) * ranks


def _point(
    kind: str, size: int, ranks: Sequence[int], group: Any, backend: str, point_seconds: float
) -> tuple[float, float]:
    """(median seconds of a call, the most of any rank; half its 10 to 90 % range, relative), the same on every rank."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda") if backend == "nccl" else torch.device("cpu")
    found = torch.zeros(2, dtype=torch.float64, device=device)
    if dist.get_rank() in ranks:
        call = _call(kind, size, ranks, group, device)
        for _ in range(WARM_UP):
            call()
        once = torch.tensor([_timed(call, 1, device)[0]], dtype=torch.float64, device=device)
        dist.all_reduce(once, op=dist.ReduceOp.MAX, group=group)
        count = int(min(max(point_seconds / max(float(once), 1e-6), LEAST), MOST))
        times = sorted(_timed(call, count, device))
        middle = statistics.median(times)
        found[0], found[1] = middle, (times[-1 - count // 10] - times[count // 10]) / 2 / middle
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found[0]), float(found[1])


def _timed(call: Callable[[], Any], count: int, device: Any) -> list[float]:
    """Seconds of each of `count` calls one after the other."""
    import torch

    if device.type == "cuda":
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]
    clock = [time.perf_counter()]
    for _ in range(count):
        call()
        clock.append(time.perf_counter())
    return [b - a for a, b in pairwise(clock)]


def _call(kind: str, size: int, ranks: Sequence[int], group: Any, device: Any) -> Callable[[], Any]:
    import torch
    import torch.distributed as dist

    whole = torch.zeros(_elements(size, len(ranks)), device=device)
    part = torch.zeros(whole.numel() // len(ranks), device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    if kind == "broadcast":
        return lambda: dist.broadcast(whole, ranks[0], group=group)
    assert kind == "send", kind
    first = dist.get_rank() == ranks[0]
    return lambda: dist.send(whole, ranks[1], group=group) if first else dist.recv(whole, ranks[0], group=group)


def store(cluster: str, tables: Sequence[CollectiveTable], out: Path) -> Cluster:
    """Writes the cluster file `out`: that of `cluster` (a name of the catalogue, or a path) with these tables in place
    of those of the same kind and group; returns the cluster that it describes."""
    from costmodels.cluster import cluster_from, load_cluster, tables_from

    load_cluster(cluster)  # says what is wrong with the name
    path = Path(cluster) if cluster.endswith(".toml") else CATALOGUE / "clusters" / f"{cluster.lower()}.toml"
    if not path.is_file():
        raise ValueError(f"'{cluster}' is no single cluster file; describe the whole cluster in one and name that")
    data = tomlfile.read_toml(path)
    new = {(t.kind, t.ranks, t.nodes) for t in tables}
    kept = [t for t in tables_from(data, str(path)) if (t.kind, t.ranks, t.nodes) not in new]
    data["collectives"] = tables_data([*kept, *tables])
    device = str(data["device"])
    if device.endswith(".toml"):  # relative to its file
        data["device"] = os.path.relpath((path.parent / device).resolve(), out.resolve().parent)
    note = f"{len(tables)} collective tables measured on {time.strftime('%Y-%m-%d')} by parplan calibrate --cluster"
    data["notes"] = [*data.get("notes", []), note]
    tomlfile.write_toml(out, data)
    return replace(cluster_from(tomlfile.read_toml(out), out), cache={})


def main(
    cluster: str, out: Path, backend: str, sizes: Sequence[int] = SIZES, point_seconds: float = POINT_SECONDS
) -> tuple[CollectiveTable, ...]:
    """What `parplan calibrate --cluster` does on every rank; rank 0 writes `out`."""
    from costmodels.cluster import load_cluster

    tables = calibrate_cluster(load_cluster(cluster), backend, sizes, KINDS, point_seconds)
    if int(os.environ["RANK"]) == 0:
        store(cluster, tables, out)
    return tables
