"""The anchor benchmark: a fixed mixed workload that tells how fast this machine is right now.

Its time is stored at calibration; the ratio of a later run to it rescales every op time
(`costmodels.device.rescale`). It is no model and no plan: nothing that is scored is in it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from validation.environment import RANK_ENV

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 100


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


def anchor_on_cores(cores: int, repeats: int = REPEATS, cpu_clock: bool = False) -> float:
    """Median seconds of the anchor in `cores` fresh processes, one thread each, all at once.

    Calibration and later runs both call this: inside a process that has done other work (its heap grown, its caches
    full of models) the same anchor takes 5 to 10 % longer.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **RANK_ENV, "PYTHONPATH": path}
    command = [sys.executable, "-m", "validation.anchor", str(repeats), str(int(cpu_clock))]
    processes: list[subprocess.Popen[str]] = []
    try:
        processes += [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                start_new_session=True,
            )
            for _ in range(max(cores, 1))
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the anchor benchmark did not start; its message stands above")
        return statistics.median(float(out.splitlines()[-1]) for out in _released(processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _released(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the waiting processes print once they may all go on."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0] for process in processes]


def main() -> None:
    """`python -m validation.anchor REPEATS CPU_CLOCK`: says ready, waits for a line, prints the median seconds."""
    import torch

    torch.set_num_threads(1)
    once = make_anchor(time.thread_time if int(sys.argv[2]) else time.perf_counter)
    for _ in range(3):
        once()
    print("ready", flush=True)
    input()
    print(statistics.median(once() for _ in range(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
