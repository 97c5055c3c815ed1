"""The environment that every measured or executed rank runs in. Calibration and execution must use the same one."""

from __future__ import annotations

import contextlib
import os
import time

# One thread per rank (a rank is a device). The malloc settings keep large tensors in the heap: otherwise every step
# page-faults its large outputs anew, _log_softmax of 32 MiB takes twice as long (shared/facts/torch.md section 7). One
# arena, because those of other threads end at 64 MiB: an all_gather of 64 MiB, whose result a thread of gloo allocates,
# took five times as long as one of 32 MiB. oneDNN keeps 1,024 compiled kernels, least recently used ones go first:
# calibration's models need 886, and with ten models more (1,061) all were compiled anew in every round, so that small
# convolutions took three times as long.
RANK_ENV = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
}

NAMED = 1.0  # seconds for which a thread of gloo that takes its name is waited for: an ASSUMPTION

_room = 0  # bytes of heap that room_to_grow has touched in this process


def room_to_grow(ranks: int) -> None:
    """Touches as much fresh heap as this process holds, and gives it back to malloc, which keeps it (`RANK_ENV`).

    A heap grows by fragmentation for tens of steps, 12 us a page: such steps took up to 1.4 times as long, and the
    first plan of a process came out 20 to 30 % slower than the same plan later.
    """
    import psutil
    import torch

    global _room
    free = psutil.virtual_memory().available // (2 * ranks)
    held = psutil.Process().memory_info().rss - _room
    if held > _room:
        _room = min(held, free)
        torch.ones(_room, dtype=torch.uint8)


def without_denormals() -> None:
    """Lets this thread, and those it starts, take numbers below float32's normal range (1.2e-38) for zero. Call it in
    calibration and before measured steps alike.

    Both repeat one batch. After some twenty steps softmax gives wrong tokens probabilities of 1e-40, and a Xeon then
    took 2 s instead of 40 ms for a product with their gradients. Training on data that changes does not get there.
    """
    import torch

    torch.set_flush_denormal(True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def let_gloo_wait() -> None:
    """Lets gloo's polling threads of this process run only while its other threads do not want to. Call it after the
    process groups are made, in calibration and in measured steps alike.

    gloo's TCP loop asks the kernel again and again (level-triggered EPOLLIN) while data lies there for which no receive
    was posted, and on a core without a neighbour it keeps the thread that would post it waiting until the scheduler's
    next tick, 4 ms. So every fourth message took ten times as long as the others: 4 KiB among 2 ranks 1.5 to 1.9 ms in
    the mean and 0.4 in the median, of which the loop computed 0.5 ms; with this 0.41 and 0.33 ms. Ranks are sessions
    of their own, so Linux' autogroups keep other processes from starving the loop. Elsewhere nothing happens.
    A thread bears its name only some time after it has begun, so the threads are counted until they stay the same.
    """
    if not hasattr(os, "SCHED_IDLE"):
        return
    before, until = set[str](), time.monotonic() + NAMED
    while (found := _polling_threads()) != before or (not found and time.monotonic() < until):
        before = found
        time.sleep(NAMED / 20)  # a thread that has just begun does not bear its name yet
    for thread in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or a sandbox does not let us
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def _polling_threads() -> set[str]:
    """The threads of this process in which gloo polls."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        ended = contextlib.suppress(FileNotFoundError, ProcessLookupError)
        with ended, open(f"/proc/self/task/{thread}/comm") as name:
            if name.read().startswith("gloo_tcp_loop"):
                found.add(thread)
    return found
