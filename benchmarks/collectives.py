"""Microseconds of pricing one collective on 16,384 devices, uncached and cached: `python benchmarks/collectives.py`.

The cluster: 2,048 nodes of 8 in pods of 384 nodes, 1:7 oversubscribed above the pods, as published for Llama 3.
Groups: all devices; one rank of every node; a tensor-parallel group of one node; an expert group over 8 nodes.
"uncached" forgets group, curve and price; "new size" knows the group's curve; "cached" has seen the very same call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from costmodels import nccl
from costmodels.cluster import Cluster, Tier, load_cluster
from costmodels.collectives import collective_price

GROUPS = {
    "all 16,384 (tuple)": tuple(range(16384)),
    "all 16,384 (range)": range(16384),
    "one of each node": tuple(range(0, 16384, 8)),
    "one node": tuple(range(8)),
    "8 nodes": tuple(range(64)),
}


def llama3() -> Cluster:
    pods = (Tier("leaf", 2, rails=True), Tier("pod", 384, 7.0), Tier("spine", 2048))
    return replace(load_cluster("2048x dgx-h100"), tiers=pods, cache={})


def best(call: Callable[[], object], before: Callable[[], object], runs: int) -> float:
    """Median seconds of a call; `before` runs untimed ahead of each."""
    times = []
    for _ in range(runs):
        before()
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(runs: int) -> list[dict[str, object]]:
    cluster = llama3()
    sizes = iter(range(1, 10**9))

    def forget() -> None:
        cluster.cache.clear()
        nccl._shipped_curve.cache_clear()

    rows = []
    for name, ranks in GROUPS.items():
        for kind in ("all_reduce", "all_to_all"):
            price = collective_price(cluster, kind, 2**26, ranks)
            rows.append(
                {
                    "group": name,
                    "kind": kind,
                    "seconds": price.seconds,
                    "algorithm": price.algorithm,
                    "uncached_us": best(lambda: collective_price(cluster, kind, 2**26, ranks), forget, runs) * 1e6,  # noqa: B023
                    "new_size_us": best(
                        lambda: collective_price(cluster, kind, 2**26 + next(sizes), ranks),  # noqa: B023
                        lambda: None,
                        runs,
                    ) * 1e6,
                    "cached_us": best(lambda: collective_price(cluster, kind, 2**26, ranks), lambda: None, runs) * 1e6,  # noqa: B023
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.runs)
    if options.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    for row in rows:
        times = ", ".join(f"{key[:-3].replace('_', ' ')} {row[key]:.1f} us" for key in row if key.endswith("_us"))
        print(f"{row['kind']:11} {row['group']:20} {row['algorithm']:9} {times}")


if __name__ == "__main__":
    main()
