"""Speed of what a plan's prediction is made of: prices of ops, a folded Llama-405B step, allocator events, estimates of
plans, and the start of the command line. Medians over `--runs`, with the range; nothing here is a test.

    python benchmarks/pricing.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def timed(
    run: Callable[[], Any], runs: int, per: int = 1, before: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Seconds of `run` over `per` things that it does, each time after `before`."""
    seconds = []
    for _ in range(runs):
        before()
        began = time.perf_counter()
        run()
        seconds.append((time.perf_counter() - began) / per)
    return {"median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds), "runs": runs}


def priced(device: Any, shapes: list[Any], runs: int, what: str) -> dict[str, dict[str, float]]:
    """Seconds an op of different ones, nothing cached but what the device keeps of its constants: all in one call, and
    in a call each."""
    from costmodels.ops import price, price_many

    price_many(device, shapes)  # compiles, and finds whose constants serve

    def forget() -> None:
        for shape in shapes:
            device.cache.pop(shape, None)

    def together() -> None:
        price_many(device, shapes)

    def alone() -> None:
        for shape in shapes:
            price(device, shape)

    return {
        f"{what}, many at once": timed(together, runs, len(shapes), forget),
        f"{what}, one by one": timed(alone, runs, len(shapes), forget),
    }


def prices(runs: int) -> dict[str, dict[str, float]]:
    """Seconds an op of kinds of ops on an H100, 1,000 different ones of each, and of a step of Llama-405B."""
    from costmodels.device import load_device
    from costmodels.ops import OpShape, price_many, shape_of
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload

    device = load_device("h100-sxm")
    times = range(1, 1001)
    kinds = {
        "product": [("mm", ((16 + i, 4096), (4096, 1000 + 8 * i)), (16 + i, 1000 + 8 * i)) for i in times],
        "convolution": [("convolution", ((2, 64, 28, 28), (i, 64, 3, 3)), (2, i, 28, 28)) for i in times],
        "attention": [("_scaled_dot_product_flash_attention", ((2, 16, 64 * i, 128),) * 3, (2, 16, 64 * i, 128))
                      for i in times],
        "layer norm": [("native_layer_norm", ((i, 4096), (4096,), (4096,)), (i, 4096)) for i in times],
        "addition": [("add", ((i, 4096),) * 2, (i, 4096)) for i in times],
    }  # fmt: skip
    rows: dict[str, dict[str, float]] = {}
    for what, ops in kinds.items():
        dtype = "float32" if what == "convolution" else "bfloat16"
        shapes = [OpShape(name, "forward", ins, (out,), dtype, 10**9, 10**6, 10**6) for name, ins, out in ops]
        rows |= priced(device, shapes, runs, what)
    graph = trace_workload(load_workload("llama3-405b"))
    shapes = [shape_of(graph, op) for op in graph.ops]
    return rows | {
        "llama3-405b step": timed(lambda: price_many(replace(device, cache={}), shapes), runs),
        "llama3-405b step, shapes included": timed(
            lambda: price_many(replace(device, cache={}), [shape_of(graph, op) for op in graph.ops]), runs
        ),
    }


def cpu_prices(runs: int) -> dict[str, dict[str, float]]:
    """The same of all ops of two models at six batch sizes on this CPU, where it is calibrated."""
    from costmodels.context import in_context
    from costmodels.device import load_device, local_path
    from costmodels.ops import shape_of
    from opgraph.batch import rescaled, trace_workload
    from opgraph.models import load_workload

    if not local_path().is_file():
        return {}
    device, shapes = load_device(local_path()), []
    for spec in ("resnet50", "gpt2:layers=3,seq=128"):
        graph = trace_workload(load_workload(spec))
        for batch in (1, 2, 3, 5, 9, 16):
            sized = rescaled(graph, batch)
            shapes += in_context([shape_of(sized, op) for op in sized.ops])
    return priced(device, list(dict.fromkeys(shapes)), runs, "op of this CPU")


def allocator(runs: int) -> dict[str, float]:
    """Seconds of 100,000 allocations and frees."""
    from costmodels.allocator import replay

    draw, alive, blocks, sizes = random.Random(0), list[int](), list[int](), list[int]()
    size = dict[int, int]()
    while len(blocks) < 100_000:
        if alive and (len(alive) > 400 or draw.random() < 0.5):
            block = alive.pop(draw.randrange(len(alive)))
            blocks.append(block)
            sizes.append(-size[block])
        else:
            block = len(size)
            size[block] = int(10 ** draw.uniform(3, 8))
            alive.append(block)
            blocks.append(block)
            sizes.append(size[block])
    return timed(lambda: replay(blocks, sizes), runs)


def estimates(runs: int) -> dict[str, float]:
    """Seconds a plan of the estimator."""
    from costmodels.cluster import load_cluster
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from planner.estimate import estimate
    from planner.space import enumerate_plans

    workload = load_workload("gpt2:layers=4,hidden=128,heads=4,seq=64,vocab=512")
    space = enumerate_plans(workload, trace_workload(workload), load_cluster("dgx-a100"), 64)
    plans = list(space.plans) * 10
    return timed(lambda: estimate(space.costs, plans), runs, len(plans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    start = [sys.executable, "-c", "from parplan.cli import main; main(['--help'])"]
    rows = {
        **prices(args.runs), **cpu_prices(args.runs),
        "100,000 allocator events": allocator(args.runs),
        "estimate of a plan": estimates(args.runs),
        "parplan --help": timed(lambda: subprocess.run(start, cwd=ROOT, check=True, capture_output=True), args.runs),
    }
    if args.json:
        print(json.dumps({"seconds": rows, "load_average": os.getloadavg()[0], "cores": os.cpu_count()}, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:36s} {row['median']:.3g} s ({row['lowest']:.3g} to {row['highest']:.3g}, {row['runs']} runs)")
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
