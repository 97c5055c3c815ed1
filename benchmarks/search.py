"""Speed of the plan search and the gap that its bounds leave: a row per problem.

Examples: `python benchmarks/search.py --json`, `python benchmarks/search.py gpt2 --json`
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# name, model, cluster, global batch, devices
PROBLEMS = (
    ("alexnet", "alexnet", "dgx-a100", 256, 8),
    ("resnet50", "resnet50", "dgx-a100", 256, 8),
    ("gpt2", "gpt2", "dgx-a100", 64, 8),
    ("gpt2-xl", "gpt2-xl", "dgx-a100", 64, 8),
    ("llama3-8b", "llama3-8b:seq=2048", "dgx-h100", 64, 8),
    ("llama3-8b on 64", "llama3-8b:seq=2048", "8x dgx-h100", 256, 64),
)


def measure(
    name: str, model: str, cluster_name: str, global_batch: int, devices: int, limit: int | None
) -> dict[str, Any]:
    """The row of one problem: traced once, searched once. Times in seconds, gap a fraction."""
    from costmodels.cluster import load_cluster
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from planner.estimate import estimate
    from planner.search import search
    from planner.space import enumerate_plans

    workload, cluster = load_workload(model), load_cluster(cluster_name)
    began = time.perf_counter()
    graph = trace_workload(workload)
    traced = time.perf_counter() - began
    space = enumerate_plans(workload, graph, cluster, global_batch, devices)
    estimate(space.costs, space.plans)
    began = time.perf_counter()
    estimate(space.costs, space.plans)
    each = (time.perf_counter() - began) / len(space.plans)
    row: dict[str, Any] = {
        "problem": name, "model": model, "cluster": cluster_name, "global_batch": global_batch, "devices": devices,
        "plans": len(space.plans), "trace_seconds": traced, "estimate_seconds_per_plan": each,
    }  # fmt: skip
    try:
        result = search(workload, graph, cluster, global_batch, devices=devices, limit=limit)
    except ValueError as error:
        return row | {"error": str(error)}
    best = result.plans[0]
    return row | {
        "seconds": result.seconds, "simulated": len(result.plans), "infeasible": result.infeasible, "gap": best.gap,
        "undecided": result.undecided, "best": best.plan.label, "step_seconds": best.prediction.step_seconds,
        "bound_seconds": best.bound_seconds, "tied": sum(r.tied for r in result.plans) - 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help=f"of {', '.join(p[0] for p in PROBLEMS)} (default: all)")
    parser.add_argument("--limit", type=int, default=None, help="plans to simulate (default: the search's own)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args()
    unknown = set(args.problems) - {p[0] for p in PROBLEMS}
    if unknown:
        parser.error(f"unknown problem {', '.join(sorted(unknown))}; known are {', '.join(p[0] for p in PROBLEMS)}")
    rows = [measure(*p, limit=args.limit) for p in PROBLEMS if not args.problems or p[0] in args.problems]
    if args.json:
        print(json.dumps({"problems": rows}, indent=1))
        return
    for row in rows:
        if "error" in row:
            print(f"{row['problem']:16} {row['plans']:5} plans  {row['error']}")
            continue
        print(
            f"{row['problem']:16} {row['plans']:5} plans {row['seconds']:7.2f} s  {row['simulated']} simulated  "
            f"best {row['best']} {row['step_seconds'] * 1e3:.2f} ms, gap {row['gap']:.2%}, {row['undecided']} undecided"
        )


if __name__ == "__main__":
    main()
