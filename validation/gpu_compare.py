"""Predicted before beside measured: every step of a run of the GPU suite, by variant and set of constants."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from validation.gpu_files import Row, Rows, read_json, write_text
from validation.report_files import replacing

SETS = ("catalogue", "calibrated", "lent")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Joined:
    """One step and one set of constants. Seconds and bytes; 0 where there is none. error: predicted / measured - 1.
    inside: whether the measured step lies in the predicted interval. before: predicted before it was measured.
    allocated, reserved: (predicted, measured)."""

    model: str
    variant: str
    batch: int
    constants: str
    predicted: float
    measured: float
    inside: bool
    before: bool
    allocated: tuple[int, int] = (0, 0)
    reserved: tuple[int, int] = (0, 0)

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def allocated_error(self) -> float:
        return self.allocated[0] / self.allocated[1] - 1 if all(self.allocated) else float("nan")

    @property
    def reserved_error(self) -> float:
        return self.reserved[0] / self.reserved[1] - 1 if all(self.reserved) else float("nan")


def joined(predictions: Sequence[Row], steps: Sequence[Row]) -> list[Joined]:
    """Every measured step with every prediction of it, in the order of the steps."""
    by_key = {row["key"]: row for row in predictions}
    found = []
    for step in steps:
        row = by_key.get(step["key"])
        if step["status"] != "ok" or row is None:
            continue
        memory = row.get("memory", {})
        for name in SETS:
            said = row["predictions"].get(name, {})
            if not said.get("seconds"):
                continue
            seconds = step["seconds"]
            found.append(Joined(
                step["model"], step["variant"], step["batch"], name, said["seconds"], seconds,
                said["low"] <= seconds <= said["high"], said["at"] < step["at"],
                (memory.get("allocated", 0), step.get("allocated") or 0),
                (memory.get("reserved", 0), step.get("reserved") or 0),
            ))  # fmt: skip
    return found


def summary(rows: Sequence[Joined]) -> dict[str, float]:
    """n; median, mean and worst of the absolute errors; bias (mean signed); share inside the interval; Spearman's rank
    correlation of predicted and measured; median absolute error of allocated and reserved bytes (nan where none)."""
    errors = [r.error for r in rows]
    return {
        "n": len(rows), "median": statistics.median(map(abs, errors)), "mean": statistics.fmean(map(abs, errors)),
        "worst": max(map(abs, errors)), "bias": statistics.fmean(errors),
        "inside": statistics.fmean(r.inside for r in rows),
        "spearman": spearman([r.predicted for r in rows], [r.measured for r in rows]),
        "allocated": _median_abs([r.allocated_error for r in rows]),
        "reserved": _median_abs([r.reserved_error for r in rows]),
    }  # fmt: skip


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; nan for fewer than three values or where one side does not vary."""
    import pandas as pd

    if len(a) < 3:
        return float("nan")
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def _median_abs(values: Sequence[float]) -> float:
    known = [abs(v) for v in values if v == v]
    return statistics.median(known) if known else float("nan")


def compare_run(out: Path) -> list[Joined]:
    """Writes compare.csv, compare.png and report.md from what the folder holds."""
    predictions, steps = (list(Rows(out / name).rows.values()) for name in ("predictions.json", "steps.json"))
    if not steps:
        raise ValueError(f"{out / 'steps.json'} holds no step; run the pieces steps-1, steps-2, ... first")
    rows = joined(predictions, steps)
    write_csv(rows, out / "compare.csv")
    if rows:
        plot(rows, out / "compare.png")
    write_text(out / "report.md", report(out, rows, predictions, steps))
    return rows


def write_csv(rows: Sequence[Joined], path: Path) -> None:
    """A line per step and set of constants."""
    head = [
        "model", "variant", "batch", "constants", "predicted_seconds", "measured_seconds", "error", "inside", "before",
        "predicted_allocated", "measured_allocated", "predicted_reserved", "measured_reserved",
    ]  # fmt: skip
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(head)
        for r in rows:
            numbers = (r.predicted, r.measured, r.error, r.inside, r.before, *r.allocated, *r.reserved)
            table.writerow([r.model, r.variant, r.batch, r.constants, *numbers])


def report(out: Path, rows: Sequence[Joined], predictions: Sequence[Row], steps: Sequence[Row]) -> str:
    """The page that people read."""
    about = read_json(out / "environment.json")
    before = sum(r.before for r in rows)
    lines = [
        f"# Training steps on {about['name']}: predicted before, and measured", "",
        "Errors are predicted / measured - 1. *catalogue*: constants that every user has; *calibrated*: constants from "
        "this machine's own op sweeps, no step among them; *lent*: constants from another machine's sweeps. "
        f"{before} of {len(rows)} predictions were written before their step was measured.", "",
        *(["![Predicted over measured](compare.png)", ""] if rows else []),
        *_summaries(rows), *_table(rows, predictions, steps), *_ops(out),
        "", "## Environment", "", *(f"* {k}: {v}" for k, v in about.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _summaries(rows: Sequence[Joined]) -> list[str]:
    lines = [
        "## Errors by set of constants and variant", "",
        "| constants | variant | steps | median | mean | worst | bias | inside | Spearman | allocated | reserved |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name in SETS:
        mine = [r for r in rows if r.constants == name]
        for variant in ("all", *dict.fromkeys(r.variant for r in mine)) if mine else ():
            s = summary([r for r in mine if variant in ("all", r.variant)])
            cells = [f"{s[k]:.1%}" for k in ("median", "mean", "worst")] + [f"{s['bias']:+.1%}", f"{s['inside']:.0%}"]
            cells += [_number(s["spearman"], ".3f"), _number(s["allocated"], ".1%"), _number(s["reserved"], ".1%")]
            lines.append(f"| {name} | {variant} | {s['n']} | {' | '.join(cells)} |")
    return lines


def _table(rows: Sequence[Joined], predictions: Sequence[Row], steps: Sequence[Row]) -> list[str]:
    sets = [name for name in SETS if any(r.constants == name for r in rows)]
    by = {(r.model, r.variant, r.constants): r for r in rows}
    reasons = {row["key"]: row.get("reason", "") for row in predictions}
    lines = [
        "", "## Steps", "",
        f"| model | variant | batch | measured ms | {' | '.join(f'{n} ms | error' for n in sets)} "
        "| in a stream ms | allocated MiB (predicted) | reserved MiB (predicted) |",
        f"|---|---|--:|--:|{'--:|--:|' * len(sets)}--:|--:|--:|",
    ]  # fmt: skip
    for step in steps:
        head = f"| `{step['model']}` | {step['variant']} | {step['batch']} |"
        if step["status"] != "ok":
            lines.append(f"{head} {step.get('reason', step['status'])} |")
            continue
        found = [by.get((step["model"], step["variant"], name)) for name in sets]
        none = f"{reasons.get(step['key'], '')} | –"
        cells = [f"{r.predicted * 1e3:.2f} | {r.error:+.1%}" if r else none for r in found]
        first = next((r for r in found if r), None)
        memory = [_mebibytes(first.allocated), _mebibytes(first.reserved)] if first else ["–", "–"]
        cells += [f"{step['stream_seconds'] * 1e3:.2f}", *memory]
        lines.append(f"{head} {step['seconds'] * 1e3:.2f} | {' | '.join(cells)} |")
    return lines


def _ops(out: Path) -> list[str]:
    """Errors of op prices on the shapes that no fit saw."""
    if not (out / "fit.json").is_file():
        return []
    scores = read_json(out / "fit.json")["scores"]
    kinds: dict[str, dict[str, Row]] = {s["kind"]: {} for s in scores}
    for s in scores:
        kinds[s["kind"]][s["constants"]] = s
    lines = ["", "## Ops: mean absolute error (bias) on held-back shapes", "",
             "| op | shapes | catalogue | calibrated |", "|---|--:|--:|--:|"]  # fmt: skip
    for kind, by in kinds.items():
        cells = [f"{by[n]['mean']:.1%} ({by[n]['bias']:+.1%})" if n in by else "–" for n in SETS[:2]]
        lines.append(f"| {kind} | {next(iter(by.values()))['n']} | {' | '.join(cells)} |")
    return lines


def _mebibytes(pair: tuple[int, int]) -> str:
    return f"{pair[1] / MIB:.0f} ({pair[0] / MIB:.0f})" if pair[1] else "–"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if value == value else "–"


def plot(rows: Sequence[Joined], path: Path) -> None:
    """Predicted over measured seconds and, where it was measured, reserved memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(n for n in SETS if any(r.constants == n for r in rows)):
        mine = [r for r in rows if r.constants == name]
        label = f"{name}: median {summary(mine)['median']:.1%}"
        left.plot([r.measured * 1e3 for r in mine], [r.predicted * 1e3 for r in mine], "o", ms=4, alpha=0.7,
                  color=f"C{i}", label=label)  # fmt: skip
    seen = [r for r in rows if all(r.reserved)]
    pairs = {(r.model, r.variant): r for r in seen}.values()
    for i, field in enumerate(("allocated", "reserved")):
        sizes = np.array([getattr(r, field) for r in pairs], float).reshape(-1, 2) / 2**30
        right.plot(sizes[:, 1], sizes[:, 0], "o", ms=4, alpha=0.7, color=f"C{3 + i}", label=field)
    for axes, what in ((left, "ms a step"), (right, "GiB at the peak")):
        axes.set(xscale="log", yscale="log", xlabel=f"measured, {what}", ylabel=f"predicted, {what}")
        axes.axline((1, 1), (10, 10), color="#333333", linewidth=1)
        axes.legend(fontsize=8, frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial)
