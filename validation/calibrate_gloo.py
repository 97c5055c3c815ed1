"""Times of gloo's collectives between ranks of this machine, and the host cores that they keep busy.

In place, as the ops: every rank computes for some milliseconds before each call, so that caches are cold, threads have
to wake up and ranks arrive a little apart. Calls in a tight loop are up to ten times faster (32 KiB on 2 ranks: 0.3
against 3 ms) and nothing like a training step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
MOST, LEAST, PASSES = 12, 2, 2


def measure_collectives(
    kinds: tuple[str, ...], sizes: tuple[int, ...], seconds_per_point: float
) -> list[dict[str, Any]]:
    """Rows of `costmodels.cluster.CollectiveTable` on the default group, the same on every rank (means over ranks).

    `sizes` are bytes as nccl-tests counts them; each point repeats for about `seconds_per_point`, spread over `PASSES`
    passes, of which the better one counts: whatever else runs here only slows messages down.
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
    """Median of seconds, host cores per rank, relative spread (median deviation): means over the ranks."""
    call, work = _call(kind, size), _work()
    call()
    dist.barrier()
    start = time.perf_counter()
    call()
    once = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    repeats = int(min(max(seconds / max(float(once), 1e-6), LEAST), MOST))
    walls, busy = [], 0.0
    for _ in range(repeats):
        work()
        start, used = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - start)
        busy += time.process_time() - used
    middle = statistics.median(walls)
    spread = statistics.median(abs(w - middle) for w in walls) / middle
    mean = torch.tensor([middle, min(busy / sum(walls), 2.0), spread], dtype=torch.float64)
    dist.all_reduce(mean)
    middle, demand, spread = (mean / dist.get_world_size()).tolist()
    return middle, demand, spread


def pair_seconds(size: int = 256 << 10, repeats: int = 30) -> float:
    """Median seconds of an all-reduce within pairs of ranks, all pairs at once, each after some work."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([first, first + 1]) for first in range(0, ranks - 1, 2)]
    mine = groups[rank // 2] if rank // 2 < len(groups) else None
    buffer, work, walls = torch.zeros(size // 4), _work(), []
    dist.barrier()
    for _ in range(repeats):
        work()
        start = time.perf_counter()
        if mine is not None:
            dist.all_reduce(buffer, group=mine)
        walls.append(time.perf_counter() - start)
    total = torch.tensor(statistics.median(walls), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / ranks


def _work() -> Callable[[], None]:
    """About 4 ms of what lies between two messages of a step: products, and a sweep through 4 MiB."""
    square, swept = torch.ones(384, 384), torch.ones(2**20)

    def run() -> None:
        for _ in range(4):
            square @ square
        swept.mul_(1.0)

    return run


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
