"""Whole training steps of models that calibration never measured, on one device of this machine, and their ops.

    python -m validation.held_out --out reports/cpu-steps

Needs `parplan calibrate` before. First the step of each model is predicted, written down and executed as a plan of one
rank (`validation.study`); then each op of these steps is timed in place and set beside its price.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from validation.held_out_ops import OpRow, OpScore, op_rows, scores, summary, time_workloads

if TYPE_CHECKING:
    from planner.search import Ranked, SearchResult
    from validation.study import Study

# Spec and global batch. Widths, heads and vocabularies are those of the published models, depth is cut so that a step
# takes one core about a second; the MoE is a Mixtral of an eighth of the width.
WORKLOADS: tuple[tuple[str, int], ...] = (
    ("gpt2:layers=3,seq=128", 1),
    ("gpt2:layers=2,hidden=512,heads=8,vocab=8192,seq=192", 4),
    ("resnet50", 2),
    ("resnet50:image=96,classes=100", 4),
    ("bert-base:layers=3,seq=128", 1),
    ("bert-base:layers=4,hidden=384,heads=6,ffn=1536,vocab=6000,seq=96", 6),
    ("lstm-medium", 8),
    ("lstm-medium:hidden=300,vocab=4000,seq=50", 10),
    ("mixtral-8x7b:layers=2,hidden=512,heads=8,kv_heads=2,head_dim=64,ffn=1792,vocab=8000,seq=256", 1),
    ("mixtral-8x7b:layers=3,hidden=256,heads=4,kv_heads=2,head_dim=64,ffn=512,experts=4,vocab=3000,seq=128", 4),
)
NAMES = ("GPT-2", "ResNet-50", "BERT", "LSTM", "MoE")
MARKER = "results.json"


def title_of(spec: str) -> str:
    """The name of the model family that a spec belongs to."""
    heads = ("gpt2", "resnet50", "bert-base", "lstm-medium", "mixtral-8x7b")
    return dict(zip(heads, NAMES)).get(spec.partition(":")[0], spec.partition(":")[0])


def only_plan(result: SearchResult, ranks: int) -> Sequence[Ranked]:
    """The plan of one rank that splits nothing and recomputes nothing."""
    assert ranks == 1
    return [r for r in result.plans if not r.plan.recompute and r.plan.micro_batches == 1][:1]


def run_steps(workloads: Sequence[tuple[str, int]], keep: Any, progress: Any) -> list[Study]:
    """Predicts and executes each workload's step on one rank."""
    from costmodels.cluster import load_cluster
    from validation.measure import Options
    from validation.study import validate

    cluster = load_cluster("local")
    return [
        validate(spec, cluster, batch, (1,), 1, Options(max_seconds=40.0, memory=False), progress, only_plan, keep)
        for spec, batch in workloads
    ]


def markdown(studies: Sequence[Study], rows: Sequence[OpRow], about: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Training steps on one device, and their ops, predicted and measured",
        "",
        "One rank, one thread. No model of this table is among those that calibration measures, and nothing was fitted",
        "to any of them. *Before* is the prediction as written down before the step ran; *predicted* the same at the",
        "pace that a fixed benchmark between the steps showed. Errors are predicted / measured - 1.",
        "",
        *steps_table(studies),
        "",
        "## Ops, timed in place inside these steps",
        "",
        "Relative errors of distinct ops; *weighted* by the seconds that each op takes in its step.",
        "",
        *score_table("ops", summary(rows)),
        "",
        *score_table("model", scores([r for r in rows if r.held_out], lambda r: r.model)),
        "",
        *score_table("family", scores([r for r in rows if r.held_out], lambda r: r.family)),
        "",
        "## The ops that make most of the error",
        "",
        "| model | op | phase | shapes | times | predicted us | measured us | error | price |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
        *(
            f"| {title_of(r.model)} | {r.op} | {r.phase} | {short(r.shapes)} | {r.count} | {r.predicted * 1e6:.0f} "
            f"| {r.measured * 1e6:.0f} | {r.error:+.1%} | {r.source} |"
            for r in sorted(rows, key=lambda r: -abs(r.error) * r.measured * r.count)[:25]
        ),
        "",
        "## Environment",
        "",
        *(f"* {key}: {value}" for key, value in about.items()),
    ]
    return "\n".join(lines) + "\n"


def short(shapes: str) -> str:
    """Shapes as a cell of a table shows them."""
    return (shapes if len(shapes) <= 60 else shapes[:57] + "...").replace("|", "\\|")


def steps_table(studies: Sequence[Study]) -> list[str]:
    """One row a model, and the means."""
    lines = [
        "| model | batch | before ms | predicted ms | measured ms | error | before | steps | in interval |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    done = [(s, c) for s in studies for c in s.comparisons]
    for s, c in done:
        shown = f"{c.measured_seconds * 1e3:.1f}" if c.ok else f"FAILED: {c.reason}"
        lines.append(
            f"| `{s.model}` | {s.global_batch} | {c.predicted_before * 1e3:.1f} | {c.predicted_seconds * 1e3:.1f} "
            f"| {shown} | {c.error:+.1%} | {c.error_before:+.1%} | {c.steps} | {'yes' if c.covered else 'no'} |"
        )
    ok = [c for _, c in done if c.ok]
    if ok:
        mean = sum(abs(c.error) for c in ok) / len(ok)
        before = sum(abs(c.error_before) for c in ok) / len(ok)
        lines += ["", f"Mean absolute error {mean:.1%} ({before:.1%} as written down before), {len(ok)} steps."]
    return lines


def score_table(name: str, found: Sequence[OpScore]) -> list[str]:
    return [
        f"| {name} | n | mean | median | weighted | bias | share of the steps |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {s.group} | {s.n} | {s.mean:.1%} | {s.median:.1%} | {s.weighted:.1%} | {s.bias:+.1%} | {s.share:.1%} |"
            for s in found
        ),
    ]


def write(folder: Path, studies: Sequence[Study], rows: Sequence[OpRow], about: dict[str, Any]) -> dict[str, Any]:
    """report.md, ops.csv, results.json; returns what results.json holds."""
    from validation.report import run_data
    from validation.report_files import plain

    data: dict[str, Any] = plain(
        {
            "runs": [run_data(c) for s in studies for c in s.comparisons],
            "ops": [asdict(s) for s in summary(rows)],
            "ops_by_family": [asdict(s) for s in scores([r for r in rows if r.held_out], lambda r: r.family)],
            "ops_by_model": [asdict(s) for s in scores([r for r in rows if r.held_out], lambda r: r.model)],
            "environment": about,
        }
    )
    with (folder / "ops.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*(f.name for f in fields(OpRow)), "error"])
        out.writerows([*astuple(r), f"{r.error:.4f}"] for r in sorted(rows, key=lambda r: -r.count * r.measured))
    (folder / "report.md").write_text(markdown(studies, rows, about))
    (folder / MARKER).write_text(json.dumps(data, indent=1) + "\n")
    return data


def read_workloads(texts: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """"spec@batch" each; ValueError says what is wrong."""
    found = []
    for text in texts:
        spec, _, batch = text.rpartition("@")
        if not spec or not batch.isdecimal() or int(batch) < 1:
            raise ValueError(f"'{text}' names no workload; write MODEL@BATCH, such as gpt2:layers=2,seq=128@4")
        found.append((spec, int(batch)))
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.held_out", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/cpu-steps"), help="folder of the report")
    parser.add_argument("--models", nargs="*", default=[], help="MODEL@BATCH ... instead of the five of the report")
    parser.add_argument("--seconds", type=float, default=150.0, help="for timing ops, after the steps")
    parser.add_argument("--json", action="store_true", help="print results.json")
    args = parser.parse_args()
    try:
        data = held_out(args.out, read_workloads(args.models) or WORKLOADS, args.seconds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(data) if args.json else (args.out / "report.md").read_text())


def held_out(out: Path, workloads: Sequence[tuple[str, int]], op_seconds: float) -> dict[str, Any]:
    """Runs and writes the whole report to `out`; ValueError where this machine is not calibrated."""
    from costmodels.cluster import load_cluster
    from validation.report import environment
    from validation.report_files import assembled, plain

    device = load_cluster("local").device
    if not device.laws:
        raise ValueError("this machine is not calibrated, so nothing can be predicted: run parplan calibrate first")
    about = environment(shlex.join(["python", "-m", "validation.held_out", *sys.argv[1:]]))
    with assembled(out, MARKER) as folder:
        predicted: list[dict[str, Any]] = []

        def keep(model: str, predictions: Sequence[Any]) -> None:
            predicted.extend(
                {"model": model, "step_seconds": p.step_seconds, "interval": p.interval} for p in predictions
            )
            (folder / "predictions.json").write_text(json.dumps(plain({"steps": predicted}), indent=1) + "\n")

        studies = run_steps(workloads, keep, note)
        rows = op_rows(device, time_workloads(workloads, op_seconds, note))
        return write(folder, studies, rows, about)


def note(what: str, fraction: float) -> None:
    print(f"[{fraction:4.0%}] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
