"""Predicted and measured peak memory of every family of the zoo: `python -m validation.memory_check --out FOLDER`.

Nothing is timed and nothing is fitted: every plan runs three steps on gloo ranks of this machine under the profiler.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.models import load_workload
from opgraph.workload import Workload
from planner.lower import prepared_graph
from planner.memory import peak_bytes
from planner.plan import ParallelPlan
from planner.runtime_stage import prepare
from validation.launch import ROOT, run_plans
from validation.measure import Options

SMALL = "hidden=128,heads=4,seq=128,vocab=2000,batch=8"
# One of every family, small; the sizes are those at which activations, parameters and workspace all matter.
MODELS = (
    "mlp:layers=3,hidden=256,ffn=512,batch=16",
    "lenet5:batch=16",
    "alexnet:image=128,width=32,hidden=512,classes=100,batch=16",
    "vgg16:image=64,width=32,hidden=512,classes=100,batch=8",
    "resnet50:image=64,width=32,classes=100,batch=8",
    "resnet50:image=64,width=32,classes=100,norm=group,batch=8",
    "googlenet:image=64,classes=100,batch=8",
    "lstm-medium:hidden=200,vocab=2000,batch=8",
    f"gpt2:layers=4,ffn=512,positions=128,{SMALL}",
    f"bert-base:layers=4,ffn=512,positions=128,{SMALL}",
    f"llama3-8b:layers=4,kv_heads=2,head_dim=32,ffn=352,{SMALL}",
    "mixtral-8x7b:layers=2,hidden=64,heads=4,kv_heads=2,head_dim=16,ffn=128,seq=64,vocab=500,batch=8",
    "vit-b16:layers=4,hidden=128,heads=4,ffn=512,image=64,patch=8,classes=100,batch=8",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One executed plan. Bytes by rank; error: predicted / measured - 1 of the rank where it is largest in size.
    commit: of the project that predicted and ran it."""

    model: str
    plan: str
    status: str
    predicted: tuple[int, ...]
    measured: tuple[int, ...]
    error: float
    reason: str = ""
    commit: str = ""


def plans_of(workload: Workload) -> tuple[ParallelPlan, ...]:
    """One rank; dp with replicas and with shards, each with and without recomputation; a pipeline of two and of four
    stages where there are blocks enough, and one of sharded stages; ZeRO-2; recomputation of one block, and with fused
    attention or products kept."""
    batch, blocks = workload.batch_size, workload.blocks
    plans = [ParallelPlan(batch)]
    for kind in ("ddp", "fsdp"):
        units = blocks if kind == "fsdp" else ()
        both = ((), blocks)
        plans += [replace(ParallelPlan(batch, dp=2, fsdp_units=units, recompute=r), data_parallel=kind) for r in both]
    for pp in (2, 4):
        if len(blocks) >= pp:
            cuts = tuple(blocks[len(blocks) * s // pp] for s in range(1, pp))
            plans.append(ParallelPlan(batch, pp=pp, micro_batches=4, cuts=cuts))
    plans.append(ParallelPlan(batch, dp=2, data_parallel="zero2", fsdp_units=blocks))
    if len(blocks) >= 2:
        cuts = (blocks[len(blocks) // 2],)
        plans += [
            ParallelPlan(batch, pp=2, dp=2, micro_batches=2, data_parallel="fsdp", fsdp_units=blocks, cuts=cuts),
            ParallelPlan(batch, recompute=blocks, recompute_first=(1,)),
            ParallelPlan(batch, recompute=blocks, recompute_keeps=("attention",)),
            ParallelPlan(batch, recompute=blocks, recompute_keeps=("products",)),
        ]
    return tuple(plans)


def predicted(graph: OpGraph, plan: ParallelPlan) -> tuple[int, ...]:
    step, layout, stages = prepared_graph(graph, plan)
    return peak_bytes(tuple(prepare(step, plan, layout, stages, i) for i in range(plan.pp)), plan)


def check(spec: str) -> list[Row]:
    """Every plan of one model, predicted, then executed. Refused: what torch cannot run (`planner.runtime_stage`)."""
    workload = load_workload(spec)
    graph = trace_workload(workload)
    rows, expected, commit = list[Row](), dict[ParallelPlan, tuple[int, ...]](), present_commit()
    for plan in plans_of(workload):
        try:
            expected[plan] = predicted(graph, plan)
        except ValueError as error:
            rows.append(Row(spec, plan.label, "refused", (0,), (), 0.0, str(error), commit))
    for m in run_plans(spec, tuple(expected), Options(prove=False, measure=False)):
        peaks = expected[m.plan]
        errors = [p / q - 1 for p, q in zip(peaks, m.peak_bytes)]
        worst = max(errors, key=abs, default=0.0)
        rows.append(Row(spec, m.plan.label, m.status, peaks, m.peak_bytes, worst, m.reason, commit))
    return rows


def write(rows: Iterable[Row], out: Path, command: str) -> None:
    """memory.csv, memory.json and report.md in `out`."""
    rows = list(rows)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "memory.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "plan", "status", "predicted_bytes", "measured_bytes", "error", "reason", "commit"])
        for r in rows:
            peaks = max(r.predicted), max(r.measured, default="")
            table.writerow([r.model, r.plan, r.status, *peaks, r.error, r.reason, r.commit])
    about = environment(command)
    (out / "memory.json").write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    pictures = [f"![{p.stem}]({p.name})\n" for p in sorted(out.glob("*.png"))]
    (out / "report.md").write_text("\n".join([markdown(rows, about), *pictures]))


def environment(command: str) -> dict[str, Any]:
    import torch

    return {
        "command": command, "commit": present_commit(), "python": platform.python_version(), "torch": torch.__version__,
        "machine": f"{platform.machine()}, {_cores()} cores, no GPU used, {torch.backends.cpu.get_cpu_capability()}",
    }  # fmt: skip


def present_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def earlier(out: Path) -> list[Row]:
    """The rows that an earlier run left in the folder."""
    if not (out / "memory.json").exists():
        return []
    found = json.loads((out / "memory.json").read_text())["rows"]
    return [Row(**{**r, "predicted": tuple(r["predicted"]), "measured": tuple(r["measured"])}) for r in found]


def _cores() -> int:
    from validation.environment import available_cores

    return available_cores()


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    good = [r for r in rows if r.status == "ok"]
    errors = sorted(abs(r.error) for r in good)
    lines = ["# Peak memory, predicted and measured", ""]
    if errors:
        inside = sum(e <= 0.01 for e in errors)
        lines += [
            f"{len(good)} plans of {len({r.model for r in good})} models ({len(rows) - len(good)} failed or refused): "
            f"median error {statistics.median(errors):.3%}, worst {errors[-1]:.2%}, "
            f"{inside} of {len(errors)} within 1 %.", "",
        ]  # fmt: skip
    lines += [
        "Each row carries its commit in `memory.csv`.",
        "Bytes of tensors alive at the worst moment of a steady step, of the rank where predicted and measured differ",
        "most. Measured: running sum of the profiler's memory events, from before the model is built. gloo's threads",
        "may let go of a message's buffer late: rarely one rank shows exactly one message more, none when repeated.",
        "",
        "| model | plan | predicted MiB | measured MiB | error |", "|---|---|--:|--:|--:|",
    ]  # fmt: skip
    for r in rows:
        if r.status != "ok":
            lines.append(f"| `{r.model}` | {r.plan} | | | {r.status}: {r.reason} |")
            continue
        at = max(range(len(r.measured)), key=lambda i: abs(r.predicted[i] / r.measured[i] - 1))
        sizes = f"{r.predicted[at] / 2**20:.3f} | {r.measured[at] / 2**20:.3f}"
        lines.append(f"| `{r.model}` | {r.plan} | {sizes} | {r.error:+.2%} |")
    lines += ["", *(f"* {key}: `{value}`" for key, value in about.items()), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for memory.csv, memory.json and report.md")
    parser.add_argument(
        "--model", action="append", help="a model spec, also several; other models' rows stay as they are"
    )
    options = parser.parse_args(arguments)
    chosen = options.model or MODELS
    rows = [r for r in earlier(options.out) if r.model not in chosen] if options.model else []
    for spec in chosen:
        for row in check(spec):
            rows.append(row)
            print(f"{spec}: {row.plan}: {row.error:+.3%} {row.reason}", file=sys.stderr, flush=True)
        write(rows, options.out, f"python -m validation.memory_check --out {options.out}")


if __name__ == "__main__":
    main()
