"""How much GPUs of one model differ in long products: `Device.spread`, and what `costmodels.variability` makes of it.

    python -m validation.fit_spread FOLDER [--json]

FOLDER holds the printed output of gpu-fryer (huggingface/gpu-fryer), one file for each node: it multiplies matrices of
8192 rows and columns on all GPUs of a node for minutes and prints what each reached in the mean. For each model and
precision: the standard deviation of the time of a product, that of the nodes' means beside what independent GPUs would
have (the first over the root of the GPUs of a node), and the slowest of a node and of all beside the law's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.variability import slowest_of

MODEL = re.compile(r'Detected GPU #\d+: "([^"]+)"')
PRECISION = re.compile(r"Using precision\(s\):\s*(\S+)")
RATE = re.compile(r"GPU #(\d+):\s+([\d.]+) Gflops/s \(min:")
COLUMNS = ("spread", "within", "nodes_differ", "independent", "node", "node_law", "all", "all_law")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m validation.fit_spread", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what gpu-fryer printed, a file for each node")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = fit(options.folder)
    except (ValueError, OSError) as error:
        print(f"fit_spread: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'GPU':44} {'':5} {'GPUs':>5} {'TFLOP/s':>8} {'spread':>7} {'inside':>7} {'nodes':>7} {'alone':>7} "
          f"{'of a node':>10} {'law':>6} {'of all':>7} {'law':>6}")  # fmt: skip
    for row in found:
        a, b, c, d, e, f, g, h = (row[k] for k in COLUMNS)
        print(f"{row['gpu']:44} {row['precision']:5} {row['gpus']:5} {row['flops'] / 1e12:8.0f} {a:7.2%} {b:7.2%} "
              f"{c:7.2%} {d:7.2%} {e:+10.2%} {f:+6.2%} {g:+7.2%} {h:+6.2%}")  # fmt: skip
    return 0


def fit(folder: Path) -> list[dict[str, Any]]:
    """For each model and precision of which two nodes or more report as many GPUs each: gpu, precision, nodes, gpus,
    flops (mean FLOP/s), spread (standard deviation of the time over its median), within (the same of the GPUs of one
    node), nodes_differ (of the nodes' means) and independent (what that would be of independent draws), node and all
    (how much longer the slowest of a node, in the mean of nodes, and of all take than the median), each with its law.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file())  # OSError where there is no folder
    by_kind: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for path in files:
        for kind, rates in sections(path.read_text(errors="replace")):
            by_kind[kind].append(rates)
    found = [_row(*kind, rates) for kind, rates in by_kind.items() if len(rates) > 1 and len({*map(len, rates)}) == 1]
    if not found:
        raise ValueError(f"{folder}: no two nodes whose GPUs report a rate; give a folder with gpu-fryer's output")
    return found


def sections(text: str) -> Iterator[tuple[tuple[str, str], list[float]]]:
    """(model, precision) and FLOP/s of each GPU of every run in one node's output that has two GPUs or more, all of one
    model and none without a rate."""
    for part in re.split(r"(?m)^(?=Detected GPU #0:)", text)[1:]:
        models, precision = {*MODEL.findall(part)}, PRECISION.search(part)
        rates = [1e9 * float(rate) for _, rate in RATE.findall(part)]
        if len(models) == 1 and precision and len(rates) > 1 and min(rates) > 0:
            yield (models.pop(), precision[1].lower()), rates


def _row(gpu: str, precision: str, rates: list[list[float]]) -> dict[str, Any]:
    table = np.array(rates)
    times = 1 / table
    times /= np.median(times)
    spread, count = float(times.std(ddof=1)), times.shape[1]
    return {
        "gpu": gpu, "precision": precision, "nodes": len(times), "gpus": times.size, "flops": float(table.mean()),
        "spread": spread, "within": float(np.sqrt(times.var(axis=1, ddof=1).mean())),
        "nodes_differ": float(times.mean(axis=1).std(ddof=1)), "independent": spread / count**0.5,
        "node": float(times.max(axis=1).mean()) - 1, "node_law": slowest_of(count, spread) - 1,
        "all": float(times.max()) - 1, "all_law": slowest_of(times.size, spread) - 1,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
