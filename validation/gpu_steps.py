"""Training steps of the GPU suite on one device: seconds, memory, loss, and the allocator's own snapshot.

A step is timed between two synchronisations, so that host and device begin idle, as a prediction has it; `stream` is
the time of a step in a run of steps that nothing interrupts. Peaks are those of steady steps of a process whose cache
was emptied before the model was built. Every row says when it was measured; none is measured without a prediction.
"""

from __future__ import annotations

import gc
import pickle
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from opgraph.models import load_workload
from planner.apply import Step, apply
from planner.apply_model import rounding
from validation.environment import RANK_ENV
from validation.gpu_calibrate import device_lost
from validation.gpu_environment import clocks
from validation.gpu_files import Budget, Row, Rows, sentence, utc
from validation.gpu_models import Run
from validation.gpu_ops import out_of_memory
from validation.report_files import replacing

WARMUP, LEAST_STEPS, MOST_STEPS, STEP_SECONDS = 3, 5, 30, 3.0
ROW_SECONDS = 240.0  # a row that takes longer has failed: a compiler may take minutes
RESERVE = 10.0  # seconds kept for writing and for the end of the process
MOST_TRACED = 300_000  # allocations in a snapshot


class TimeUp(BaseException):
    """The time of a row is over. No Exception, so that no library catches it on the way."""


def run_steps(
    out: Path, chosen: Sequence[Run], device: str, budget: Budget, quick: bool, say: Callable[[str], None]
) -> list[str]:
    """Measures what steps.json lacks; returns the rows that are left. A row that was begun by a process that died is
    failed and not begun again."""
    predictions, rows = Rows(out / "predictions.json").rows, Rows(out / "steps.json")
    unpredicted = [r.key for r in chosen if not predictions.get(r.key, {}).get("predictions")]
    if unpredicted:
        raise ValueError(f"{unpredicted[0]} has no prediction yet; run the piece predict first")
    for row in rows.rows.values():
        if row["status"] == "running":
            rows.add({**row, "status": "failed", "reason": "the process ended while this step was run"})
    waiting = [r for r in chosen if r.key not in rows.rows]
    for i, run in enumerate(waiting):
        if budget.left < (0.5 if quick else run.seconds + RESERVE):
            return [r.key for r in waiting[i:]]
        if not _one(run, rows, device, budget, quick, out):
            return [r.key for r in waiting[i:]]
        row = rows.rows[run.key]
        say(f"{run.key}: {row['reason'] if row['status'] == 'failed' else f'''{row['seconds'] * 1e3:.2f} ms'''}")
    return []


def _one(run: Run, rows: Rows, device: str, budget: Budget, quick: bool, out: Path) -> bool:
    """Measures one row; False where the call's time ended in it, which leaves it for the next call."""
    head: Row = {**run.head, "at": utc()}
    rows.add({**head, "status": "running"})
    limit = min(ROW_SECONDS, budget.left - (0.0 if quick else RESERVE / 2))
    try:
        with time_limit(limit):
            found = measured(run, device, quick, out)
        rows.add({**head, "status": "ok", **found})
    except TimeUp:
        if limit < ROW_SECONDS:
            rows.rows.pop(run.key)
            rows.save()
            return False
        rows.add({**head, "status": "failed", "reason": f"took longer than {ROW_SECONDS:g} s"})
    except Exception as error:
        reason = "out of memory" if out_of_memory(error) else sentence(error)
        rows.add({**head, "status": "failed", "reason": reason})
        if device_lost(error):
            raise ValueError(f"{run.key}: {reason}; the device is lost to this process, call the piece again") from None
    except BaseException:  # Ctrl-C: the row was not run
        rows.rows.pop(run.key)
        rows.save()
        raise
    finally:
        _clean(device, run.variant.compiled)
    return True


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the main thread after so many seconds; without effect in other threads. What runs inside one
    call of a library is only interrupted when it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def up(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(run: Run, device: str, quick: bool, out: Path) -> Row:
    """Builds the step with the runtime that executes plans and measures it."""
    import torch

    workload = load_workload(run.spec)
    torch.manual_seed(0)
    batch = workload.batch(run.batch)
    inputs, targets = (tuple(t.to(device) for t in part) for part in batch)
    if device == "cpu":
        torch.set_num_threads(int(RANK_ENV["OMP_NUM_THREADS"]))
    plan = run.plan(workload)
    with rounding(plan, torch.device(device)):  # around compiling, too
        step = apply(plan, workload, 0, device)
        if run.variant.compiled:
            # aot_eager captures and differentiates the graph but needs no C compiler: enough to run this code
            compiled: Any = torch.compile(step.wrapped, dynamic=False, backend="aot_eager" if quick else "inductor")
            step = replace(step, wrapped=compiled)
        begun = time.perf_counter()
        first = _loss(step.run(inputs, targets))
        first_seconds = time.perf_counter() - begun
        times = timed(step, inputs, targets, device, quick)
        last = _loss(step.run(inputs, targets))
        if device == "cuda" and _keeps_snapshot(run):
            save_snapshot(step, inputs, targets, out / "snapshots" / f"{_stem(run)}.pickle")
    return {**times, "first_step_seconds": first_seconds, "first_loss": first, "last_loss": last, "clocks": clocks()}


def timed(step: Step, inputs: Any, targets: Any, device: str, quick: bool) -> Row:
    """Seconds of steady steps, alone and in a stream, and peaks of memory (none on a CPU)."""
    import torch

    cuda = device == "cuda"
    clock = time.perf_counter if cuda else time.thread_time
    for _ in range(WARMUP - quick):
        step.run(inputs, targets)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < LEAST_STEPS or (not quick and len(times) < MOST_STEPS and sum(times) < STEP_SECONDS):
        begun = clock()
        step.run(inputs, targets)
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - begun)
    peaks = {}
    if cuda:
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    begun = clock()
    for _ in range(LEAST_STEPS):
        step.run(inputs, targets)
    if cuda:
        torch.cuda.synchronize()
    ordered = sorted(times)
    return {
        "seconds": statistics.median(times), "low": ordered[len(times) // 10], "high": ordered[-1 - len(times) // 10],
        "steps": len(times), "stream_seconds": (clock() - begun) / LEAST_STEPS, **peaks,
    }  # fmt: skip


def _loss(value: Any) -> float:
    return float(value)  # waits for the device


def _keeps_snapshot(run: Run) -> bool:
    """One a model: its large eager bf16 step."""
    return run.variant.label == "bf16 large"


def _stem(run: Run) -> str:
    return "".join(c if c.isalnum() else "-" for c in run.model.spec)


def save_snapshot(step: Step, inputs: Any, targets: Any, path: Path) -> None:
    """What torch's allocator did in one step, as pytorch.org/memory_viz reads it; without stacks, which would make it
    hundreds of times larger."""
    import torch

    memory: Any = torch.cuda.memory
    memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=MOST_TRACED)
    try:
        step.run(inputs, targets)
        torch.cuda.synchronize()
        found = memory._snapshot()
    finally:
        memory._record_memory_history(enabled=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        pickle.dump(found, file)


def _clean(device: str, compiled: bool) -> None:
    """Gives the memory of a row back, so that the next begins with an empty cache."""
    import torch

    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        with suppress(RuntimeError):  # the device may be lost; then the row says why
            torch.cuda.empty_cache()
