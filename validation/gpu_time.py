"""Seconds that a device takes for an op: CUDA events behind a sleeping kernel, or thread time on a CPU.

On a GPU a batch of calls is issued while a sleeping kernel (`torch.cuda._sleep`) holds the stream, so that the kernels
then run one behind the other without waiting for the host; events before and after them give device seconds, a clock
around the issuing gives host seconds of an eager call. Where the host took longer than the sleep, the batch is repeated
with a longer one; a batch that cannot be hidden (the op waits for the device) is marked.

Inputs rotate through copies of more than twice the last cache (at most `MOST_COPIES`), so that large operands come from
memory, as in a training step; what is smaller than the cache divided by half of that number stays in the cache. Results
go to whatever block the caching allocator hands out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

MOST_COPIES = 32
MOST_CALLS = 64  # of one batch: a stream takes about 1,000 launches before the host must wait
TRIES = 4
FIRST_SLEEP = 2_000_000  # clock cycles, about 1 ms

Call = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """Median device seconds of a call, the spread of the batches ((worst - best) / median), host seconds of a call,
    calls in all, and whether the host was hidden behind the sleep."""

    seconds: float
    spread: float
    host: float
    calls: int
    hidden: bool


class Engine(Protocol):
    """Times batches of calls: device seconds and host seconds of one call, and whether the host was hidden."""

    def batch(self, call: Call, calls: int, first: int) -> tuple[float, float, bool]: ...


@dataclass(slots=True)
class CudaEngine:
    """cuda: `torch.cuda`, or what behaves like it. cycles: length of the sleep, which grows where it was too short."""

    cuda: Any
    cycles: int = FIRST_SLEEP

    def batch(self, call: Call, calls: int, first: int) -> tuple[float, float, bool]:
        asleep, awake, end = (self.cuda.Event(enable_timing=True) for _ in range(3))
        seconds = host = 0.0
        for _ in range(TRIES):
            self.cuda.synchronize()
            asleep.record()
            self.cuda._sleep(self.cycles)
            awake.record()
            begun = time.perf_counter()
            for i in range(calls):
                call(first + i)
            end.record()
            host = time.perf_counter() - begun
            self.cuda.synchronize()
            slept, seconds = asleep.elapsed_time(awake) * 1e-3, awake.elapsed_time(end) * 1e-3
            if host <= slept:
                return seconds / calls, host / calls, True
            self.cycles = int(self.cycles * min(max(1.5 * host / max(slept, 1e-6), 2.0), 20.0))
        self.cycles = FIRST_SLEEP  # an op that waits for the device would lengthen the sleep for ever
        return seconds / calls, host / calls, False


@dataclass(frozen=True, slots=True)
class CpuEngine:
    """Thread time: what the call costs without what else the machine does. There is no host beside the device."""

    clock: Callable[[], float] = field(default=time.thread_time)

    def batch(self, call: Call, calls: int, first: int) -> tuple[float, float, bool]:
        begun = self.clock()
        for i in range(calls):
            call(first + i)
        return (self.clock() - begun) / calls, 0.0, True


def sample(engine: Engine, call: Call, batch_seconds: float = 0.004, batches: int = 5) -> Sample:
    """Warms up, then times `batches` batches of about `batch_seconds` each."""
    engine.batch(call, 2, 0)
    rough = engine.batch(call, 2, 2)[0]
    calls = calls_of(rough, batch_seconds)
    found = [engine.batch(call, calls, 4 + i * calls) for i in range(batches)]
    times = [seconds for seconds, _, _ in found]
    middle = statistics.median(times)
    return Sample(
        middle, (max(times) - min(times)) / middle if middle else 0.0, statistics.median(h for _, h, _ in found),
        calls * batches, all(hidden for *_, hidden in found),
    )  # fmt: skip


def calls_of(seconds: float, batch_seconds: float) -> int:
    """Calls of one batch, from the rough seconds of one.

    >>> calls_of(1e-3, 0.004), calls_of(1e-7, 0.004), calls_of(1.0, 0.004)
    (4, 64, 2)
    """
    return min(max(ceil(batch_seconds / max(seconds, 1e-9)), 2), MOST_CALLS)


def copies_of(moved: int, cache: int, memory: int = 4 * 2**30) -> int:
    """How many copies of an op's inputs rotate: more than twice the last cache in all, within `memory` bytes.

    >>> copies_of(2**20, 50 * 2**20), copies_of(50 * 2**20, 50 * 2**20), copies_of(100, 50 * 2**20)
    (32, 3, 32)
    """
    wanted = min(2 * cache // max(moved, 1) + 1, MOST_COPIES)
    return max(min(wanted, memory // max(moved, 1)), 1)
