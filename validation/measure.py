"""Times an applied plan and measures its peak memory, inside one rank; what came out as a `Measurement`."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from planner.plan import ParallelPlan
from validation.allocations import recorded_allocations
from validation.anchor import NEVER, Beat, joined
from validation.environment import available_cores, let_gloo_wait, room_to_grow, without_denormals
from validation.pace import usual

BLOCK = 5  # steps between two looks at the machine's pace
DISTURBED = 1.2
STEADY, AFTER = "parplan.steady_step", "parplan.after_it"  # marks among the allocations of a step


@dataclass(frozen=True, slots=True)
class Options:
    """How plans are executed.

    backend: "gloo" (CPU) or "nccl" (one GPU per rank). max_seconds caps the timed steps of a plan once `min_steps`
    are done; timeout_seconds is the time after which a plan's ranks are killed. `prove`, `memory` and `measure`
    switch the three parts; `trace` also returns every collective of one steady step.
    """

    backend: Literal["gloo", "nccl"] = "gloo"
    seed: int = 0
    warmup: int = 3
    min_steps: int = 20
    max_seconds: float = 60.0
    timeout_seconds: float = 900.0
    prove: bool = True
    memory: bool = True
    measure: bool = True
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """What executing one plan gave. Times in seconds, sizes in bytes, errors relative.

    status: "ok" or "failed" (`reason` says why; a plan that computes something else is failed and never timed).
    Step times are the maximum over the ranks. `block_medians`: of the first and the second half of the steps.
    peak_bytes: tensor bytes alive at the worst moment of a steady step, by rank. gradient_error: worst parameter,
    ||g - reference|| / max(||reference||, 0.001 ||all references||). load: load averages before and after.
    disturbed: steps that were not counted because the machine was busy with something else (see `undisturbed`).
    pace: the anchor between the counted steps (`pace_of_steps`; `NEVER` where it was not run);
    pace_alone: of rank 0 while the others waited.
    """

    plan: ParallelPlan
    status: Literal["ok", "failed"]
    reason: str = ""
    median_seconds: float = float("nan")
    p10_seconds: float = float("nan")
    p90_seconds: float = float("nan")
    cv: float = float("nan")
    steps: int = 0
    block_medians: tuple[float, ...] = ()
    load: tuple[float, float] = (float("nan"), float("nan"))
    disturbed: int = 0
    pace: Beat = NEVER
    pace_alone: Beat = NEVER
    peak_bytes: tuple[int, ...] = ()
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    notes: tuple[str, ...] = ()
    traces: tuple[Any, ...] = ()

    @property
    def steady(self) -> bool:
        """Whether the two halves of the steps agree within 5 %."""
        return blocks_agree(self.block_medians)


def failed(plan: ParallelPlan, reason: str) -> Measurement:
    return Measurement(plan, "failed", " ".join(reason.split()))


def measurement(plan: ParallelPlan, replies: list[dict[str, Any]]) -> Measurement:
    """Puts the replies of all ranks together."""
    first = replies[0]
    notes = tuple(first.get("notes", ()))
    errors = {
        "loss_error": first.get("loss_error", float("nan")),
        "gradient_error": max((r.get("gradient_error", float("nan")) for r in replies), default=float("nan")),
    }
    wrong = next((r["wrong"] for r in replies if r.get("wrong")), "")
    if wrong:
        return Measurement(plan, "failed", wrong, notes=notes, **errors)
    peaks = tuple(int(r["peak_bytes"]) for r in replies if "peak_bytes" in r)
    traces = tuple(r["trace"] for r in replies if "trace" in r)
    if "seconds" not in first:
        return Measurement(plan, "ok", peak_bytes=peaks, notes=notes, traces=traces, **errors)
    times = first["seconds"]
    return Measurement(
        plan, "ok",
        median_seconds=statistics.median(times),
        p10_seconds=float(np.percentile(times, 10)),
        p90_seconds=float(np.percentile(times, 90)),
        cv=statistics.pstdev(times) / statistics.fmean(times),
        steps=len(times),
        block_medians=block_medians(times),
        load=(first["load"][0], first["load"][1]), disturbed=first.get("disturbed", 0),
        pace=pace_of_steps(plan, first["paces"], first["slowest"]) if "paces" in first else NEVER,
        pace_alone=Beat(*first.get("alone", NEVER)),
        peak_bytes=peaks, notes=notes, traces=traces, **errors,
    )  # fmt: skip


def block_medians(times: list[float]) -> tuple[float, ...]:
    half = len(times) // 2
    return (statistics.median(times[:half]), statistics.median(times[half:])) if half else tuple(times)


def blocks_agree(medians: tuple[float, ...], tolerance: float = 0.05) -> bool:
    return len(medians) == 2 and abs(medians[0] - medians[1]) <= tolerance * min(medians)


def time_steps(run: Callable[[], Any], options: Options, cuda: bool) -> dict[str, Any]:
    """Seconds of every timed step (the maximum over ranks) and load averages. A collective call."""
    import torch
    import torch.distributed as dist

    def once() -> float:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    load_before = os.getloadavg()[0]
    once()
    if not cuda:
        without_denormals()
        let_gloo_wait()
        room_to_grow(dist.get_world_size())
    for _ in range(options.warmup):
        once()
    pace: Callable[[], tuple[Beat, Beat]] = (lambda: (NEVER, NEVER)) if cuda else _pace()
    blocks: list[list[float]] = []
    paces = [pace()]
    begin, limit = time.perf_counter(), 0.0
    while True:
        for _ in range(-(-options.min_steps // BLOCK) if not blocks else 2):
            blocks.append([once() for _ in range(BLOCK)])
            paces.append(pace())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (blocks, paces, time.perf_counter() - begin))
        slowest = [[max(steps) for steps in zip(*same)] for same in zip(*(b for b, _, _ in everyone))]
        ranks = [[both for both, _ in p] for _, p, _ in everyone]
        slower = [max(same, key=lambda beat: beat.whole) for same in zip(*ranks)]
        kept = undisturbed([beat.whole for beat in slower])
        times = [t for block, good in zip(slowest, kept) if good for t in block]
        spent = max(s for *_, s in everyone)
        limit = limit or max(options.max_seconds, 1.5 * spent)  # as long as that for enough undisturbed steps
        enough = len(times) >= options.min_steps
        if (enough and (blocks_agree(block_medians(times)) or spent > options.max_seconds)) or spent > limit:
            times = times if enough else [t for block in slowest for t in block]
            counted = kept if enough else None
            return {
                "seconds": times, "disturbed": BLOCK * len(blocks) - len(times),
                "paces": [beside(p, counted) for p in ranks], "slowest": beside(slower, counted),
                "alone": beside([alone for _, alone in everyone[0][1]], counted),
                "load": (load_before, os.getloadavg()[0]),
            }  # fmt: skip


def _pace() -> Callable[[], tuple[Beat, Beat]]:
    """A function that returns the anchor on this rank, while as many ranks as there are cores run it, and on rank 0
    alone (`NEVER` where this rank does not run it). Collective.

    Virtual cores may share a physical one for seconds: then two at once took 21 ms where one alone took 13 ms.
    """
    import torch.distributed as dist

    from validation.anchor import make_beat

    anchor = make_beat(time.perf_counter)
    mine = dist.get_rank() < available_cores()
    anchor()

    def quick() -> Beat:
        return joined(min, [anchor() for _ in range(3)])

    def run() -> tuple[Beat, Beat]:
        dist.barrier()
        both = quick() if mine else NEVER
        dist.barrier()
        return both, quick() if dist.get_rank() == 0 else NEVER

    return run


def beside(paces: list[Beat], kept: list[bool] | None) -> Beat:
    """Median of one rank's anchors beside the blocks that count (all blocks if None)."""
    near = [joined(statistics.fmean, pair) for pair in pairwise(paces)]
    return joined(statistics.median, [p for p, good in zip(near, kept or [True] * len(near)) if good])


def pace_of_steps(plan: ParallelPlan, paces: Sequence[Sequence[float]], slowest: Sequence[float]) -> Beat:
    """The anchor of ranks that compute at once, from the parts of each rank's (`NEVER`: the rank did not run it) and of
    the slowest's at every moment.

    Ranks of one stage wait for the slowest; stages work in turn. Where more ranks than cores run, any rank may get the
    slow core.
    """
    beats = [Beat(*p) for p in paces]
    if plan.pp > 1 and NEVER not in beats:
        stages = [[b for r, b in enumerate(beats) if plan.coordinates(r)["pp"] == s] for s in range(plan.pp)]
        return joined(statistics.fmean, [max(stage, key=lambda b: b.whole) for stage in stages])
    return Beat(*slowest)


def undisturbed(paces: list[float]) -> list[bool]:
    """Which blocks of steps count, from the anchor's seconds before the first block and after each.

    A block does not where the anchor beside it took more than `DISTURBED` times its lower quartile: another tenant of
    the machine was busy then. The steps' own times decide nothing.
    """
    limit = DISTURBED * usual(paces)
    return [max(pair) <= limit for pair in pairwise(paces)]


def peak_of_steady_step(build: Callable[[], Callable[[], Any]], cuda: bool) -> tuple[Callable[[], Any], int]:
    """Builds a step with `build`, runs it three times and returns it with the peak bytes inside the third run.

    On the CPU: the running sum of what torch's allocator gives and takes, from before the model is built.
    """
    import torch

    if cuda:
        run = build()
        run()
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return run, torch.cuda.max_memory_allocated()
    gc.collect()  # what an earlier plan left behind must not be freed inside the profile
    with _patient_waits(), recorded_allocations() as allocations:
        run = build()
        run()
        run()  # DDP changes its buckets in the second step
        gc.collect()
        with torch.autograd.profiler.record_function(STEADY):
            run()
        with torch.autograd.profiler.record_function(AFTER):
            pass
    return run, _peak(allocations)


@contextmanager
def _patient_waits() -> Iterator[None]:
    """Lets gloo's threads drop their references first after every wait.

    The profiler does not see what a foreign thread frees, and whoever drops the last reference frees.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class AfterWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(t.__name__ in ("DTensor", "AsyncCollectiveTensor") for t in types):
                return NotImplemented  # they come back as their local ops and waits
            result = func(*args, **(kwargs or {}))
            if func.name() == "_c10d_functional::wait_tensor":
                time.sleep(0.002)
            return result

    mode: Any = AfterWaits
    work = torch.distributed.Work
    original = work.wait

    def wait(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        time.sleep(0.002)
        return result

    work.wait = wait  # type: ignore[method-assign]
    try:
        with mode():
            yield
    finally:
        work.wait = original  # type: ignore[method-assign]


def _peak(allocations: list[tuple[float, str, int]]) -> int:
    """The largest running sum of allocations inside the marked step, bytes."""
    running = peak = 0
    inside = False
    for _, name, size in allocations:
        inside = inside or name == STEADY
        if name == AFTER:
            break
        running += size
        if inside:
            peak = max(peak, running)
    return peak
