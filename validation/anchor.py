"""The anchor benchmark: a fixed mixed workload that tells how fast this machine is right now.

Its time is stored at calibration; the ratio of a later run to it rescales every op time
(`costmodels.device.rescale`). It is no model and no plan: nothing that is scored is in it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from validation.environment import RANK_ENV

ROOT = Path(__file__).resolve().parent.parent


class Beat(NamedTuple):
    """Seconds of the anchor by what it does: matrix products, convolutions, passes over memory (an activation, sums of
    large tensors), calls of ops that compute next to nothing. Who shares the physical core or the memory slows each by
    another factor, so operators go by the part that is like them (`costmodels.families.PARTS`)."""

    products: float
    convolutions: float
    passes: float
    calls: float

    @property
    def whole(self) -> float:
        return sum(self)


NEVER = Beat(0.0, 0.0, 0.0, 0.0)  # where the anchor was not run


def joined(how: Callable[[Sequence[float]], float], beats: Sequence[Beat]) -> Beat:
    """One beat of many: `how` of each of their parts."""
    return Beat(*(how(part) for part in zip(*beats)))


def over(now: Beat, then: Beat) -> Beat:
    """How many times as long ops of each kind take now as then. Convolutions go by the geometric mean of the anchor's
    convolutions and products: its small ones feel a busy neighbour twice as much as larger ones do (2,650 steps of
    calibration's and drawn models on a Xeon, ln of their convolutions' time: 0.08 rms off by both, 0.10 by convolutions
    alone, 0.08 by products alone; least squares gives each of both 0.15 to 0.48)."""
    products, convolutions, passes, calls = (a / b for a, b in zip(now, then))
    return Beat(products, (products * convolutions) ** 0.5, passes, calls)


def make_anchor(clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that runs the workload once (about 10 ms) on the calling thread and returns its seconds.

    Calibration reads the CPU clock of the thread (`time.thread_time`), as for the ops: the time on a free core. A later
    run reads the wall clock, so that a busy machine shows as a ratio above 1.
    """
    beat = make_beat(clock)
    return lambda: beat().whole


def make_beat(clock: Callable[[], float]) -> Callable[[], Beat]:
    """The same by its parts."""
    import torch

    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randn(n, 384, generator=generator) for n in (256, 768))
    large, other = (torch.randn(2**20, generator=generator) for _ in range(2))
    small = torch.randn(16, 64, generator=generator)
    image, weight = torch.randn(2, 32, 28, 28, generator=generator), torch.randn(32, 32, 3, 3, generator=generator)

    def once() -> Beat:
        products = convolutions = passes = 0.0
        last = clock()

        def lap() -> float:
            nonlocal last
            before, last = last, clock()
            return last - before

        with torch.no_grad():
            for _ in range(6):
                hidden = left @ right.t()
                products += lap()
                torch.nn.functional.gelu(hidden)
                passes += lap()
                torch.nn.functional.conv2d(image, weight, padding=1)
                convolutions += lap()
            for _ in range(3):
                torch.add(large, other).mul_(0.5)
            passes += lap()
            for _ in range(150):
                torch.relu(small + small)
        return Beat(products, convolutions, passes, lap())

    return once


class Anchors:
    """Waiting processes, one per core with one thread each, that run the anchor all at once whenever they are asked.

    Processes of their own, started afresh, in calibration and later alike: inside one that has done other work (its
    heap grown, its caches full of models) the same anchor takes 5 to 10 % longer.
    """

    def __init__(self, cores: int, cpu_clock: bool = False) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for _ in range(max(cores, 1)):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "validation.anchor", str(int(cpu_clock))],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                        env={**os.environ, **RANK_ENV, "PYTHONPATH": path},
                    )
                )  # fmt: skip
            for process in self._processes:
                self._line(process)
        except BaseException:
            self.close()
            raise

    def seconds(self, repeats: int) -> float:
        """Median seconds of one anchor over all processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{repeats}\n")
            process.stdin.flush()
        return statistics.median([float(self._line(process)) for process in self._processes])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def __enter__(self) -> Anchors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the anchor benchmark died; its message stands above")
        return line


def main() -> None:
    """`python -m validation.anchor CPU_CLOCK`: says ready; for every line with a count, prints the median seconds."""
    import torch

    torch.set_num_threads(1)
    once = make_anchor(time.thread_time if int(sys.argv[1]) else time.perf_counter)
    for _ in range(3):
        once()
    print("ready", flush=True)
    for line in sys.stdin:  # ends with the parent
        once()
        print(statistics.median(once() for _ in range(int(line))), flush=True)


if __name__ == "__main__":
    main()
