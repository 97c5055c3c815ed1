"""What gloo's collectives between ranks of this machine add to a step, and the host cores that they keep busy.

In place, as the ops: every rank computes for some milliseconds before each call, so that caches are cold, threads have
to wake up and ranks arrive a little apart. Calls in a tight loop are up to ten times faster (32 KiB on 2 ranks: 0.3
against 3 ms) and nothing like a training step.

A message's seconds begin when the last of its ranks calls: what the others wait for it is no matter of the message.
That wait is a share of the work before it (2 ranks of a Xeon, 7 to 106 ms of work: 6.5 to 8.6 % of it), and is
calibrated as one ("skew", `costmodels.variability`). With it in the message, the same 4 KiB took 1.1 to 3.4 ms in
two runs, without it 0.8 to 1.4 ms. All ranks are on this machine, so their clocks are one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from validation.environment import let_gloo_wait

SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20, 64 << 20)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
MOST, LEAST, PASSES = 40, 3, 2  # rounds of a point in a pass, and passes where there is time
FLAT = 0.03  # relative error that a mean has at least: the pace wanders between two points
LEAST_SECONDS = 2e-5  # no message adds less: two system calls and a wake-up


def measure_collectives(
    kinds: tuple[str, ...],
    sizes: tuple[int, ...],
    seconds_per_point: float,
    reference: float = 0.0,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """Rows of `costmodels.cluster.CollectiveTable` on the default group, the same on every rank (means over ranks).

    `sizes` are bytes as nccl-tests counts them; each point repeats for about `seconds_per_point`, spread over `PASSES`
    passes over all points, of which one that would end after `until` (of `time.time`) is left out. Seconds of all sizes
    of a collective are smoothed together (`smoothed`); "error" is the median of the standard error of a point's mean,
    relative, "skew" the mean of `Round.skew`. Times are brought to the pace at which the anchor takes `reference`
    seconds of CPU time (0: left as they are).
    """
    from validation.anchor import make_anchor
    from validation.calibrate_worker import together

    anchor = make_anchor(time.thread_time)
    anchor()

    def point(kind: str, size: int) -> list[Round]:
        before = min(anchor() for _ in range(2))
        rounds = _point(kind, size, seconds_per_point / PASSES)
        factor = 2 * reference / (before + min(anchor() for _ in range(2))) if reference else 1.0
        return [replace(r, seconds=r.seconds * factor, busy=r.busy * factor) for r in rounds]

    passes: list[list[list[Round]]] = []
    began = time.time()
    while together(not passes or (len(passes) < PASSES and time.time() + (time.time() - began) / len(passes) < until)):
        passes.append([point(k, s) for k in kinds for s in sizes])
    points = [[p for runs in each for p in runs] for each in zip(*passes)]
    rows = []
    for i, kind in enumerate(kinds):
        of_kind = points[i * len(sizes) : (i + 1) * len(sizes)]
        means, spreads = zip(*(_mean(runs) for runs in of_kind))
        slowest, busy = _slowest(means), _over_ranks([statistics.fmean(r.busy for r in runs) for runs in of_kind])
        # Over the slowest rank's mean: a broadcast's root is through before the last rank calls, its own is nothing.
        errors = [spread / mean for spread, mean in zip(_over_ranks(spreads), slowest)]
        seconds = smoothed(sizes, slowest, errors)
        rows.append({
            "kind": kind, "ranks": dist.get_world_size(), "bytes": [float(s) for s in sizes],
            "seconds": seconds,
            "demand": [min(b / s, 2.0) for b, s in zip(busy, slowest)],
            "error": statistics.median(errors),
            "skew": statistics.fmean(_middle([r.skew for runs in of_kind for r in runs])),
        })  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one round on one rank: of the call, since the last rank made it; CPU time that the call used; and the
    longest work before it over the mean of all ranks, less 1."""

    seconds: float
    busy: float
    skew: float


def rounds_of(call: Callable[[], Any], repeats: int, members: Sequence[int] = ()) -> list[Round]:
    """Rounds of some work and a call among the ranks `members` (none: all). A collective call."""
    work = _work()
    marks, busy = torch.zeros(repeats, 3, dtype=torch.float64), []
    for i in range(repeats):
        start = time.perf_counter()
        work()
        used, called = time.process_time(), time.perf_counter()
        call()
        marks[i] = torch.tensor([start, called, time.perf_counter()], dtype=torch.float64)
        busy.append(time.process_time() - used)
    everyone = [torch.zeros_like(marks) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, marks)
    of_all = np.stack([everyone[rank].numpy() for rank in members or range(len(everyone))], axis=2)
    worked = of_all[:, 1] - of_all[:, 0]  # [rounds, ranks]
    seconds = marks[:, 2].numpy() - of_all[:, 1].max(axis=1)
    skews = worked.max(axis=1) / worked.mean(axis=1) - 1
    return [Round(float(s), b, float(k)) for s, b, k in zip(seconds, busy, skews)]


def _point(kind: str, size: int, seconds: float) -> list[Round]:
    """About `seconds` of rounds with one collective, as many on every rank."""
    call = call_of(kind, size)
    call()
    dist.barrier()
    start = time.perf_counter()
    rounds_of(call, 1)
    once = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    return rounds_of(call, int(min(max(seconds / max(float(once), 1e-6), LEAST), MOST)))


def _mean(rounds: list[Round]) -> tuple[float, float]:
    """Mean of the middle four fifths of the calls, and its standard error, in seconds.

    The mean, because a step adds its messages up and their times have two humps (threads awake or asleep); without the
    ends, because whatever else runs here belongs to no message.
    """
    middle = _middle([r.seconds for r in rounds])
    mean = max(statistics.fmean(middle), LEAST_SECONDS)
    return mean, statistics.pstdev(middle) / len(middle) ** 0.5


def _middle(values: Sequence[float]) -> list[float]:
    """The middle four fifths."""
    cut = len(values) // 10
    return sorted(values)[cut : len(values) - cut]


def smoothed(sizes: Sequence[float], seconds: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Seconds of one collective at `sizes` bytes, smoothed: a latency, a term with the root of the bytes, and rates
    that may fall from one size to the next (caches, pages) but not rise, all of them 0 or more, by least squares of
    relative deviations over the points' relative `errors` (at least `FLAT`). So a point that little was measured of
    takes from its neighbours, and time never falls with bytes.
    """
    from scipy.optimize import nnls

    n, y = np.array(sizes, float), np.array(seconds)
    features = np.stack([np.ones_like(n), np.sqrt(n), n, *(np.maximum(n - k, 0.0) for k in n[1:-1])], axis=1)
    features /= features.max(axis=0)
    weights = 1 / (y * np.maximum(errors, FLAT))
    coefficients, _ = nnls(features * weights[:, None], y * weights)
    return [max(float(s), LEAST_SECONDS) for s in features @ coefficients]


def _over_ranks(values: Sequence[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def _slowest(values: Sequence[float]) -> list[float]:
    """The most on any rank: the others run ahead of it at first (the root of a broadcast), but not for long."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def pair_seconds(size: int = 256 << 10, repeats: int = 30) -> float:
    """Seconds of an all-reduce within pairs of ranks, all pairs at once, each after some work."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([first, first + 1]) for first in range(0, ranks - 1, 2)]
    let_gloo_wait()
    mine = groups[rank // 2] if rank // 2 < len(groups) else None
    members = [rank - rank % 2, rank - rank % 2 + 1] if mine is not None else [rank]
    buffer = torch.zeros(size // 4)
    dist.barrier()
    rounds = rounds_of(lambda: dist.all_reduce(buffer, group=mine) if mine is not None else None, repeats, members)
    return _over_ranks([_mean(rounds)[0]])[0]


def _work() -> Callable[[], None]:
    """About 4 ms of what lies between two messages of a step: products, and a sweep through 4 MiB."""
    square, swept = torch.ones(384, 384), torch.ones(2**20)

    def run() -> None:
        for _ in range(4):
            square @ square
        swept.mul_(1.0)

    return run


def call_of(kind: str, size: int) -> Callable[[], Any]:
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
