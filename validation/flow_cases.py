"""Published gloo collectives over shaped TCP, predicted by flows that share links, without any fitted constant.

    python -m validation.flow_cases --cases sweeps.csv --out reports/topology

Broadcast: simultaneous sends of a binomial tree share the sender's port. All-reduce: gloo's ring, segment by
segment, where the delay of each message counts in full. The unshaped instance network is 10 Gbit/s a port, 5 a flow,
as AWS says.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import fmean

import numpy as np

from simulator.flow_collectives import Road, broadcast
from simulator.flows import FlowBuilder, simulate_flows
from validation.flow_gloo import gloo_all_reduce

KINDS = ("broadcast", "all_reduce")
GIGABIT = 1.25e8  # bytes/s
PORT, FLOW = 10 * GIGABIT, 5 * GIGABIT  # of the instance where nothing was shaped
COLUMNS = ("config_id", "backend", "num_nodes", "delay_ms", "bandwidth_gbps", "collective", "bytes", "time_us")


@dataclass(frozen=True, slots=True)
class Case:
    """delay: one way, seconds. rate: bytes/s of a port, 0 where it was not shaped. Times in seconds."""

    config: str
    kind: str
    nodes: int
    delay: float
    rate: float
    bytes: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def read_cases(path: Path) -> list[Case]:
    """The gloo broadcasts and all-reduces of a CSV with the TCP columns of docs/cases.md, predicted."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        if missing := [c for c in COLUMNS if c not in (table.fieldnames or ())]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; docs/cases.md has the columns of TCP")
        rows = [row for row in table if row["backend"] == "gloo" and row["collective"] in KINDS]
    cases = []
    for row in rows:
        delay, rate = float(row["delay_ms"]) * 1e-3, float(row["bandwidth_gbps"]) * GIGABIT
        told = row["config_id"], row["collective"], int(row["num_nodes"]), delay, rate, float(row["bytes"])
        cases.append(Case(*told, float(row["time_us"]) * 1e-6, predict(*told[1:])))
    return cases


def predict(kind: str, nodes: int, delay: float, rate: float, nbytes: float) -> float:
    """Seconds of a collective of `nodes` ranks, each on a full-duplex port of its own."""
    builder = FlowBuilder()
    cap = inf if rate else FLOW

    def road(a: int, b: int) -> Road:
        return Road((2 * a, 2 * b + 1), delay, cap)

    if kind == "broadcast":
        broadcast(builder, nbytes, range(nodes), road, at_once=True)
    else:
        entered = [builder.flow(0.0, ()) for _ in range(nodes)]
        gloo_all_reduce(builder, nbytes, range(nodes), road, entered, rate or PORT)
    return simulate_flows(builder.build(), np.full(2 * nodes, rate or PORT)).makespan


def report(cases: Sequence[Case], command: str) -> str:
    """Tables in markdown."""
    lines = ["# Collectives as flows that share links", "", *(__doc__ or "").split("\n\n")[-1].strip().splitlines(), ""]
    for kind in KINDS:
        of_kind = [c for c in cases if c.kind == kind]
        if of_kind:
            shaped = [abs(c.error) for c in of_kind if not (kind == "all_reduce" and c.delay)]
            lines += [f"{kind}: n {len(of_kind)}, mean absolute error {fmean(abs(c.error) for c in of_kind):.1%}"]
            lines[-1] += "." if kind == "broadcast" else f"; without delay n {len(shaped)}, {fmean(shaped):.1%}."
            lines.append("")
    late = [c.error for c in cases if c.kind == "all_reduce" and c.delay]
    if late:
        lines += [
            f"The all-reduce with delays comes out {min(late):+.0%} to {max(late):+.0%}: a word of readiness waits for",
            "the whole delay and for what a connection of its port holds there, which is taken from a network without",
            "delay, where windows are small. The formula of `costmodels.gloo` has an empirical share of the delay:",
            "the better model of it.",
            "",
        ]
    lines += [
        "| configuration | delay ms | Gbit/s | MiB | measured ms | predicted ms | error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for c in cases:
        shape = f"{1e3 * c.delay:g} | {c.rate / GIGABIT:g} | {c.bytes / 2**20:g}"
        lines.append(f"| {c.config} | {shape} | {1e3 * c.measured:.0f} | {1e3 * c.predicted:.0f} | {c.error:+.1%} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.system()}, {os.cpu_count()} cores, no GPU; Python {platform.python_version()}"
    return "\n".join([*lines, "", f"Command: `{command}`; commit {commit or 'unknown'}; {machine}."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.flow_cases")
    parser.add_argument("--cases", type=Path, required=True, help="a CSV with the TCP columns of docs/cases.md")
    parser.add_argument("--out", type=Path, required=True, help="folder for flows.md and flows.json")
    options = parser.parse_args(arguments)
    try:
        cases = read_cases(options.cases)
    except (ValueError, OSError) as error:
        print(f"flow_cases: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m validation.flow_cases --cases {options.cases.name} --out {options.out}"
    (options.out / "flows.md").write_text(report(cases, command))
    rows = [asdict(c) | {"error": c.error} for c in cases]
    (options.out / "flows.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
