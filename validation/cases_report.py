"""Files about predicted published runs: a table per row (CSV, JSON), a summary (Markdown), a scatter plot (PNG)."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from validation.cases_run import Outcome
from validation.cases_score import Score, case_data, summary
from validation.report import environment
from validation.report_files import plain, replacing


def write_report(outcomes: Sequence[Outcome], folder: Path, command: str) -> None:
    """Writes cases.csv, cases.json, report.md and scatter.png into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = summary(outcomes)
    rows = [case_data(o) for o in outcomes]
    with replacing(folder / "cases.json") as path:
        data = {"command": command, "cases": rows, "summary": {k: asdict(v) for k, v in scores.items()}}
        Path(path).write_text(json.dumps(plain(data), indent=1) + "\n")
    _write_csv(rows, folder / "cases.csv")
    with replacing(folder / "report.md") as path:
        Path(path).write_text(_markdown(outcomes, scores, command))
    with replacing(folder / "scatter.png") as path:
        plot(outcomes, Path(path))


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = ["case_id", "set", "predicted_seconds", "measured_seconds", "error", "low", "high", "scored", "plan",
             "software", "predicted_allocated_bytes", "allocated_error", "predicted_reserved_bytes", "reserved_error",
             "reason", "notes"]  # fmt: skip
    with replacing(path) as partial, Path(partial).open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            low, high = row["interval"] or (None, None)
            more = {"low": low, "high": high, "notes": "; ".join(row["notes"])}
            writer.writerow({k: _short(v) for k, v in (row | more).items()})


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def table_rows(scores: dict[str, Score]) -> list[tuple[str, ...]]:
    """The summary as text, a row per set."""
    return [
        (name, str(s.n), *(_percent(v) for v in (s.mape, s.median)), _percent(s.worst, "+"), _percent(s.bias, "+"),
         "–" if s.spearman is None else f"{s.spearman:.3f}", _percent(s.coverage),
         f"{_percent(s.allocated)} ({s.allocated_n})" if s.allocated_n else "–",
         f"{_percent(s.reserved)} ({s.reserved_n})" if s.reserved_n else "–", str(s.unpredicted))
        for name, s in scores.items()
    ]  # fmt: skip


COLUMNS = ("set", "n", "mape", "median", "worst", "bias", "Spearman", "in interval", "allocated", "reserved",
           "not predicted")  # fmt: skip


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.1%}"


def _markdown(outcomes: Sequence[Outcome], scores: dict[str, Score], command: str) -> str:
    about = environment(command)
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    machine = f"{about['machine']['processor']}, {about['machine']['cores']} cores, no GPU"
    lines = ["# Published training runs, predicted", "", f"Command: `{command}`", "", f"Commit {about['commit']}; "
             f"{machine}; {versions}."]  # fmt: skip
    lines += ["", "Nothing was fitted to these rows. Errors are predicted / measured - 1; memory: mean absolute error "
              "(rows that publish it).", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]  # fmt: skip
    lines += [f"| {' | '.join(row)} |" for row in table_rows(scores)]
    lines += ["", "![predicted against measured](scatter.png)", "", "## Farthest rows of each set", ""]
    for name in scores:
        members = [o for o in outcomes if o.case.set == name and o.error is not None]
        for o in sorted(members, key=lambda o: -abs(o.error or 0))[:3]:
            top = ", ".join(f"{k} {v:.3g} s" for k, v in list(o.parts.items())[:4])
            lines.append(f"* {name}: {o.case.id} ({o.plan}) {_percent(o.error, '+')}: {top}")
    reasons: dict[str, int] = {}
    for o in outcomes:
        if o.reason:
            reasons[f"{o.case.set}: {o.reason}"] = reasons.get(f"{o.case.set}: {o.reason}", 0) + 1
    if reasons:
        lines += ["", "## Not predicted", "", *(f"* {n} rows, {reason}" for reason, n in reasons.items())]
    return "\n".join([*lines, ""])


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Predicted against measured seconds, one colour per set, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 7), dpi=130)
    points = [o for o in outcomes if o.predicted_seconds and o.measured_seconds]
    colours = pyplot.get_cmap("tab20")
    for i, name in enumerate(dict.fromkeys(o.case.set for o in points)):
        own = [o for o in points if o.case.set == name]
        x, y = [o.measured_seconds or 0.0 for o in own], [o.predicted_seconds or 0.0 for o in own]
        axes.scatter(x, y, s=14, color=colours(i % 20), label=f"{name} ({len(own)})", alpha=0.8)
    if points:
        ends = [min(o.measured_seconds or 1 for o in points) / 2, max(o.measured_seconds or 1 for o in points) * 2]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        for factor in (0.9, 1.1):
            axes.plot(ends, [e * factor for e in ends], color="grey", linewidth=0.6, linestyle="--")
        axes.legend(fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="measured seconds a step", ylabel="predicted (dashed: 10 %)")
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)
