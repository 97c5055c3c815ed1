"""The anchor benchmark: a fixed mixed workload that tells how fast this machine is right now.

Its time is stored at calibration; the ratio of a later run to it rescales every op time
(`costmodels.device.rescale`). It is no model and no plan: nothing that is scored is in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

REPEATS = 40


def make_anchor(clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that runs the workload once (about 10 ms) on the calling thread and returns its seconds.

    Calibration reads the CPU clock of the thread (`time.thread_time`), as for the ops: the time on a free core. A later
    run reads the wall clock, so that a busy machine shows as a ratio above 1.
    """
    import torch

    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randn(n, 384, generator=generator) for n in (256, 768))
    large, other = (torch.randn(2**20, generator=generator) for _ in range(2))
    small = torch.randn(16, 64, generator=generator)
    image, weight = torch.randn(2, 32, 28, 28, generator=generator), torch.randn(32, 32, 3, 3, generator=generator)

    def once() -> float:
        start = clock()
        with torch.no_grad():
            for _ in range(6):
                hidden = left @ right.t()
                torch.nn.functional.gelu(hidden)
                torch.nn.functional.conv2d(image, weight, padding=1)
            for _ in range(3):
                torch.add(large, other).mul_(0.5)
            for _ in range(150):
                torch.relu(small + small)
        return clock() - start

    return once


def anchor_seconds(repeats: int = REPEATS) -> float:
    """Median wall seconds of the anchor workload, half a second in all. Run it with one torch thread, on as many
    processes at a time as there are cores: calibration does."""
    once = make_anchor()
    once()
    return statistics.median(once() for _ in range(repeats))
