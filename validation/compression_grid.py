"""Does compression pay? Our answer over a grid like that of Agarwal et al. (MLSys 2022), who measured on V100s that it
beats tuned all-reduces in only 6 of more than 200 settings.

    python -m validation.compression_grid --out reports/compression-grid

Nothing is fitted here, neither to that count nor to the other published figure: PowerSGD of rank 2 brings ResNet-18
from 312 to 239 ms a batch on 16 workers (Vogels et al. 2019; the figures are from memory and not checked). The grid:
ResNet-50, ResNet-101 and BERT-base, batches 16, 32 and 64 a GPU, 8 to 96 V100 in nodes of four behind one port of 10
or 25 Gb/s (TCP; ASSUMPTION for the machines, which the abstract does not name), buckets of 25 MiB, float32.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from costmodels.cluster import Cluster, Link
from costmodels.compression import compression_from
from costmodels.device import load_device
from costmodels.schemes import Scheme
from opgraph.graph import OpGraph
from planner.gradient_policy import MIB, Choice, Exchange, uniform
from planner.plan import ParallelPlan

MODELS = ("resnet50", "resnet101", "bert-base")
BATCHES, RANKS, GIGABITS = (16, 32, 64), (8, 16, 32, 64, 96), (10, 25)
COMPRESSIONS = ("sign", "topk0.01", "powersgd4")
MARKER = "grid.json"
PER_NODE = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """Seconds of a step without and with the compression; after: with it, but all of it after backward, as trainers
    that compress outside of DDP's buckets do."""

    model: str
    batch: int
    ranks: int
    gigabits: int
    compression: str
    plain: float
    compressed: float
    codec: float
    after: float

    @property
    def wins(self) -> bool:
        return self.compressed < self.plain


def cluster_of(ranks: int, gigabits: float, per_node: int = PER_NODE) -> Cluster:
    """Nodes of V100 on NVLink, one TCP port each."""
    net = Link(f"TCP, {gigabits:g} Gb/s", gigabits * 1.25e8, 5e-5, ports=1)
    inside = Link("NVLink2", 1.5e11, 1e-6)
    device = load_device("v100-sxm2-16gb")
    return Cluster(f"{ranks} V100", device, -(-ranks // per_node), per_node, inside, net, "nccl")


def settings(models: Sequence[str], compressions: Sequence[str]) -> list[Setting]:
    """Every point of the grid."""
    found = []
    for model in models:
        graph = traced(model)
        for gigabits in GIGABITS:
            for ranks in RANKS:
                cluster = cluster_of(ranks, gigabits)
                for batch in BATCHES:
                    found += _points(model, graph, cluster, batch, ranks, gigabits, compressions)
    return found


def traced(model: str) -> OpGraph:
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload

    return trace_workload(load_workload(model))


def _points(
    model: str, graph: OpGraph, cluster: Cluster, batch: int, ranks: int, gigabits: int, compressions: Sequence[str]
) -> list[Setting]:
    exchange = Exchange(graph, ParallelPlan(global_batch=batch * ranks, dp=ranks), cluster)
    rows = {
        name: uniform(exchange, Choice(Scheme("ring"), compression_from(name)), 25 * MIB)
        for name in ("none", *compressions)
    }
    whole = sum(t.bytes for t in graph.parameters.values())  # one bucket: nothing is sent before backward ends
    after = {
        name: uniform(exchange, Choice(Scheme("ring"), compression_from(name)), whole).step_seconds
        for name in compressions
    }
    plain = rows.pop("none").step_seconds
    return [
        Setting(
            model,
            batch,
            ranks,
            gigabits,
            name,
            plain,
            row.step_seconds,
            row.encode_seconds + row.decode_seconds,
            after[name],
        )
        for name, row in rows.items()
    ]


def resnet18() -> tuple[float, float]:
    """Seconds of a step of 16 workers at 10 Gb/s without and with PowerSGD of rank 2; 128 images of 32 x 32 each, two
    workers a node (ASSUMPTIONS on what the paper ran)."""
    from opgraph.batch import trace_workload
    from validation.resnet18 import workload

    exchange = Exchange(trace_workload(workload()), ParallelPlan(global_batch=16 * 128, dp=16), cluster_of(16, 10, 2))
    plain, compressed = (
        uniform(exchange, Choice(Scheme("ring"), compression_from(name)), 25 * MIB).step_seconds
        for name in ("none", "powersgd2")
    )
    return plain, compressed


def report(found: Sequence[Setting], published: tuple[float, float], command: str) -> str:
    wins = [s for s in found if s.wins]
    lines = [
        "# Where gradient compression pays", "", f"Command: `{command}`. Predictions only; nothing is fitted.", "",
        f"Compression wins in {len(wins)} of {len(found)} settings where every bucket is compressed while backward "
        f"goes on, in {sum(s.after < s.plain for s in found)} where all is compressed after backward. Agarwal et al. "
        "measured 6 of more than 200.", "",
        "| compression | model | 10 Gb/s | 25 Gb/s | codes, ms |", "|---|---|---|---|---|",
    ]  # fmt: skip
    total, won = (Counter((s.compression, s.model, s.gigabits) for s in group) for group in (found, wins))
    for compression, model in dict.fromkeys((s.compression, s.model) for s in found):
        cells = [f"{won[compression, model, g]} of {total[compression, model, g]}" for g in GIGABITS]
        codes = [s.codec * 1e3 for s in found if (s.compression, s.model) == (compression, model)]
        lines.append(f"| {compression} | {model} | {' | '.join(cells)} | {min(codes):.1f} to {max(codes):.1f} |")
    plain, compressed = published
    lines += ["", f"ResNet-18 on 16 workers at 10 Gb/s: {plain * 1e3:.0f} ms without, {compressed * 1e3:.0f} ms with "
              "PowerSGD of rank 2; published (from memory): 312 and 239 ms."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.compression_grid", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the report; by default it is only printed")
    options = parser.parse_args(arguments)
    found = settings(MODELS, COMPRESSIONS)
    text = report(found, resnet18(), "python -m validation.compression_grid --out reports/compression-grid")
    if options.out:
        from validation.report_files import assembled

        with assembled(options.out, MARKER) as folder:
            (folder / MARKER).write_text(json.dumps([asdict(s) for s in found], indent=1) + "\n")
            (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
