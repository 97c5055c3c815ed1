"""What torch's CPU allocator gives and takes while a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState  # type: ignore[attr-defined]


@contextmanager
def recorded_allocations() -> Iterator[list[tuple[float, str, int]]]:
    """Records what this thread, and those that work for it, allocate and free on the CPU.

    Yields a list that is filled on leaving: (microseconds, name, bytes) in the order of time. A memory event has no
    name, and a name (of an op or of a `torch.autograd.profiler.record_function`) stands where it begins, with 0 bytes.
    What was allocated before is not seen when it is freed.

    By torch's older profiler: the newer one (kineto, torch 2.13) ended one of every 20 to 50 plans on two gloo ranks
    with a SIGSEGV while it put its events together (`TransferEvents::toResult`).
    """
    found: list[tuple[float, str, int]] = []
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        yield found
    finally:
        threads = _disable_profiler_legacy()
        first = next(event for events in threads for event in events)
        for event in (event for events in threads for event in events):
            is_memory = str(event.kind()) == "memory_alloc"
            if is_memory or str(event.kind()) == "push":
                size = event.cpu_memory_usage() if is_memory else 0
                found.append((first.cpu_elapsed_us(event), "" if is_memory else event.name(), size))
        found.sort(key=lambda entry: entry[0])
