"""Tasks per second of the event engine, of replay and of the plain-Python reference, on one core.

The program: every task but the first depends on two tasks drawn from the `window` tasks before it, runs for an
exponentially distributed time and sits on one of 64 FIFO resources drawn at random. "local" draws from the last 4096
tasks, as programs of training steps do; "scattered" draws from all earlier tasks, which costs cache misses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator import Pool, Program, Resource, program_from_arrays, replay, simulate

TASKS, RESOURCES, LOCAL = 1_000_000, 64, 4096


def synthetic(tasks: int, window: int, pools: int = 0, seed: int = 0) -> Program:
    """The program described above; with pools, resource r is in pool r % pools, each of 4 cores."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(1, tasks), 2)
    back = rng.random(target.size) * np.minimum(target, window)
    return program_from_arrays(
        rng.exponential(1e-3, tasks),
        target - 1 - back.astype(np.int64),
        target,
        resource=rng.integers(0, RESOURCES, tasks),
        resources=[Resource(f"r{r}", pool=r % pools if pools else -1) for r in range(RESOURCES)],
        pools=[Pool(f"p{i}", 4.0) for i in range(pools)],
    )


def rate(call: Callable[[], object], tasks: int, runs: int) -> dict[str, float]:
    """Tasks per second of `runs` calls after one to warm up: median, lowest, highest."""
    call()
    rates = []
    for _ in range(runs):
        begun = time.perf_counter()
        call()
        rates.append(tasks / (time.perf_counter() - begun))
    return {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def measure(runs: int) -> dict[str, object]:
    local, scattered, small = synthetic(TASKS, LOCAL), synthetic(TASKS, TASKS), synthetic(TASKS // 20, LOCAL)
    pooled = synthetic(TASKS, LOCAL, pools=8)
    rates = {
        "simulate local": rate(lambda: simulate(local), TASKS, runs),
        "simulate scattered": rate(lambda: simulate(scattered), TASKS, runs),
        "simulate 8 pools": rate(lambda: simulate(pooled), TASKS, runs),
        "replay local": rate(lambda: replay(local), TASKS, runs),
        "replay scattered": rate(lambda: replay(scattered), TASKS, runs),
        "reference local": rate(lambda: simulate(small, engine="reference"), len(small), 3),
    }
    return {
        "tasks_per_second": rates["simulate local"]["median"],
        "replay_tasks_per_second": rates["replay local"]["median"],
        "rates": rates,
        "tasks": TASKS,
        "edges": local.succ.size,
        "resources": RESOURCES,
        "runs": runs,
        "reference_tasks": len(small),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    result = measure(options.runs)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['cpu']}, numba {result['numba']}")
    print(f"{TASKS:,} tasks, {result['edges']:,} edges, {RESOURCES} resources")
    for name, row in result["rates"].items():  # type: ignore[attr-defined]
        spread = f"{row['lowest'] / 1e6:.2f} to {row['highest'] / 1e6:.2f}"
        print(f"{name:20} {row['median'] / 1e6:8.2f} million tasks/s ({spread})")


if __name__ == "__main__":
    main()
