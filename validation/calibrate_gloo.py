"""Times of gloo's collectives between ranks of this machine, and the host cores that they keep busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
MOST, LEAST, PASSES = 25, 2, 3


def measure_collectives(
    kinds: tuple[str, ...], sizes: tuple[int, ...], seconds_per_point: float
) -> list[dict[str, Any]]:
    """Rows of `costmodels.cluster.CollectiveTable` on the default group, the same on every rank (means over ranks).

    `sizes` are bytes as nccl-tests counts them; each point repeats for about `seconds_per_point`, spread over `PASSES`
    passes. Of the passes' lower quartiles the least counts: whatever else runs here only slows messages down.
    """
    passes = [[_point(k, s, seconds_per_point / PASSES) for k in kinds for s in sizes] for _ in range(PASSES)]
    best = [min(points) for points in zip(*passes)]
    rows = []
    for i, kind in enumerate(kinds):
        points = best[i * len(sizes) : (i + 1) * len(sizes)]
        rows.append({
            "kind": kind, "ranks": dist.get_world_size(), "bytes": [float(s) for s in sizes],
            "seconds": [p[0] for p in points], "demand": [p[1] for p in points],
            "error": statistics.median(p[2] for p in points),
        })  # fmt: skip
    return rows


def _point(kind: str, size: int, seconds: float) -> tuple[float, float, float]:
    """Lower quartile of seconds, host cores per rank, relative spread (median deviation): means over the ranks."""
    call = _call(kind, size)
    call()
    dist.barrier()
    start = time.perf_counter()
    call()
    once = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    repeats = int(min(max(seconds / max(float(once), 1e-6), LEAST), MOST))
    walls, busy = [], time.process_time()
    began = time.perf_counter()
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        walls.append(time.perf_counter() - start)
    demand = (time.process_time() - busy) / (time.perf_counter() - began)
    middle = sorted(walls)[len(walls) // 4]
    spread = statistics.median(abs(w - middle) for w in walls) / middle
    mean = torch.tensor([middle, demand, spread], dtype=torch.float64)
    dist.all_reduce(mean)
    middle, demand, spread = (mean / dist.get_world_size()).tolist()
    return middle, demand, spread


def _call(kind: str, size: int) -> Callable[[], Any]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    count = max(size // 4 // ranks, 1) * ranks
    whole = torch.empty(count).fill_(0.0)
    part = torch.empty(count // ranks).fill_(0.0)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    if kind == "broadcast":
        return lambda: dist.broadcast(whole, 0)
    assert kind == "send", kind
    peer = rank ^ 1
    operation = dist.isend if rank % 2 == 0 else dist.irecv

    def send() -> None:
        if peer < ranks:
            for request in dist.batch_isend_irecv([dist.P2POp(operation, whole, peer)]):
                request.wait()

    return send
