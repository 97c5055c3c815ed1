"""Flows per second: max-min sharing of 1,000 concurrent flows, whole runs, and groups on 16,384 GPUs.

Prints a table, `--json` a JSON object with `share_ms` (1,000 flows shared once), `reference_ratio` (how many times
longer the plain-Python reference takes for the same rates), `run_ms` (until the last of them is through),
`events`, and `groups` with the microseconds of one group's price on the 16,384-GPU trees.
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

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from costmodels.cluster import load_cluster
from costmodels.collectives import collective_price
from costmodels.topology_groups import group_bound
from simulator.flow_collectives import Road, all_to_all
from simulator.flows import FlowBuilder, Flows, share, simulate_flows

FLOWS, LINKS, HOPS = 1000, 200, 4


def random_flows(seed: int = 0) -> tuple[Flows, np.ndarray]:
    """1,000 flows of 1 to 100 MB over 4 of 200 links of 1 GB/s."""
    rng = np.random.default_rng(seed)
    builder = FlowBuilder()
    for _ in range(FLOWS):
        builder.flow(float(rng.integers(1, 100)) * 1e6, rng.choice(LINKS, HOPS, replace=False).tolist())
    return builder.build(), np.full(LINKS, 1e9)


def all_to_all_flows(ranks: int = 32) -> tuple[Flows, np.ndarray]:
    """992 flows of an all-to-all, all over ports of their own ranks."""
    builder = FlowBuilder()
    all_to_all(builder, 1e9, range(ranks), lambda a, b: Road((2 * a, 2 * b + 1)))
    return builder.build(), np.full(2 * ranks, 1e9)


def median_seconds(call: Callable[[], object], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(runs: int) -> dict[str, object]:
    flows, links = random_flows()
    alike, ports = all_to_all_flows()
    once = median_seconds(lambda: share(flows, links), runs)
    plain = median_seconds(lambda: share(flows, links, "reference"), 3)
    np.testing.assert_allclose(share(flows, links), share(flows, links, "reference"), rtol=1e-9)
    times = simulate_flows(flows, links)
    return {
        "share_ms": 1e3 * once,
        "reference_ratio": plain / once,
        "run_ms": 1e3 * median_seconds(lambda: simulate_flows(flows, links), max(runs // 10, 3)),
        "events": len(np.unique(times.finish)),
        "all_to_all_run_ms": 1e3 * median_seconds(lambda: simulate_flows(alike, ports), runs),
        "groups": groups(runs),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }


def groups(runs: int) -> list[dict[str, object]]:
    """Microseconds of one price of each kind of group of a training run with tp 8, dp 128, pp 16."""
    rows: list[dict[str, object]] = []
    for name in ("llama3-roce-16k", "h100-rail-tree-16k"):
        cluster = load_cluster(name)
        ranks = np.arange(cluster.size)
        cases = {
            "tp 8, in a node": ranks.reshape(-1, 8),
            "dp 128, across pods": ranks.reshape(128, 128).T,
            "ep 64, neighbouring nodes": ranks.reshape(-1, 64),
        }
        for label, placed in cases.items():
            for kind in ("all_reduce", "all_to_all"):
                bound = group_bound(cluster, kind, 1e9, placed)
                one = tuple(placed[0].tolist())

                def uncached(kind: str = kind, one: tuple[int, ...] = one, cluster: object = cluster) -> None:
                    cluster.cache.clear()  # type: ignore[attr-defined]
                    collective_price(cluster, kind, 1e9, one)  # type: ignore[arg-type]

                rows.append(
                    {
                        "cluster": name,
                        "groups": label,
                        "kind": kind,
                        "slowest_layer": bound.layer,
                        "all_groups_ms": 1e3 * bound.seconds,
                        "alone_ms": 1e3 * group_bound(cluster, kind, 1e9, placed[:1]).seconds,
                        "price_alone_us": 1e6 * median_seconds(uncached, runs),
                        "bound_alone_us": 1e6
                        * median_seconds(lambda c=cluster, k=kind, p=placed: group_bound(c, k, 1e9, p[:1]), runs),
                        "bound_all_us": 1e6
                        * median_seconds(lambda c=cluster, k=kind, p=placed: group_bound(c, k, 1e9, p), runs),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    found = measure(options.runs)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"1,000 flows shared once: {found['share_ms']:.2f} ms, {found['reference_ratio']:.0f} times the reference")
    print(f"until all are through: {found['run_ms']:.0f} ms ({found['events']} instants)")
    print(f"an all-to-all of 32 ranks (992 flows): {found['all_to_all_run_ms']:.2f} ms")
    rows = found["groups"]
    assert isinstance(rows, list)
    for row in rows:
        print(
            f"{row['cluster']}, {row['groups']}, {row['kind']}: alone {row['alone_ms']:.2f} ms, all at once "
            f"{row['all_groups_ms']:.2f} ms ({row['slowest_layer']}); priced in {row['bound_alone_us']:.0f} us alone, "
            f"{row['bound_all_us']:.0f} us all; collective_price {row['price_alone_us']:.0f} us"
        )
    print(found["machine"])


if __name__ == "__main__":
    main()
