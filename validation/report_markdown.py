"""The page of a report that people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from validation.compare import Summary, summarise
from validation.study import Study, drift_warning


def markdown(studies: Sequence[Study], about: dict[str, Any], title: str) -> str:
    """The text of report.md."""
    comparisons = [c for s in studies for c in s.comparisons]
    machine, versions = about["machine"], about["versions"]
    parts = [
        f"# {title}\n",
        "![Predicted over measured step time and peak memory](predicted_vs_measured.png)\n",
        "Errors are predicted / measured - 1. Every prediction was made, and written to `predictions-*.json`, before "
        "its plan ran: the column *before*. *Predicted* is the same prediction at the pace that the machine had while "
        "the plan ran, as a fixed benchmark between its steps showed it. "
        "Peaks are of the rank where predicted and measured memory differ most. "
        "A plan is timed only if its loss and gradients equal those of the unsplit model.\n",
        _summary_table(studies),
    ]
    for study in studies:
        parts += [f"\n## `{study.model}`, global batch {study.global_batch}, on {study.cluster}\n", _runs_table(study)]
        parts += ["", *(f"* {line}" for line in _study_lines(study))]
    failures = [c for c in comparisons if not c.ok]
    parts.append("\n## Failures\n")
    parts += [f"* `{c.model}`, {c.plan.label} on {c.plan.world_size}: {c.reason}" for c in failures] or ["None."]
    parts += [
        "\n## Environment\n",
        f"* command: `{about['command']}`",
        f"* commit: {about['commit']}",
        f"* machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB, "
        f"{machine['system']}",
        f"* versions: {', '.join(f'{k} {v}' for k, v in versions.items())}",
        f"* load averages at the start: {', '.join(f'{x:.2f}' for x in about['load'])}",
    ]
    return "\n".join(parts) + "\n"


def _summary_table(studies: Sequence[Study]) -> str:
    rows = [(f"`{s.model}`", summarise(s.comparisons)) for s in studies]
    if len(studies) > 1:
        rows.append(("all", summarise([c for s in studies for c in s.comparisons])))
    head = (
        "| model | plans | failed | median error | (before) | worst error | bias | Spearman | top-1 regret "
        "| in interval | memory median | memory worst |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(_summary_row(name, s) for name, s in rows)


def _summary_row(name: str, s: Summary) -> str:
    cells = [
        name, str(s.runs), str(s.failed), _percent(s.median_error), _percent(s.median_error_before),
        _percent(s.worst_error), _percent(s.bias, "+"),
        "–" if s.spearman != s.spearman else f"{s.spearman:.3f}", _percent(s.top1_regret), _percent(s.coverage),
        _percent(s.memory_median_error), _percent(s.memory_worst_error),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _runs_table(study: Study) -> str:
    lines = [
        "| plan | ranks | before ms | predicted ms | interval | measured ms | error "
        "| peak predicted MiB | measured MiB | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for c in sorted(study.comparisons, key=lambda c: (c.plan.world_size, c.predicted_seconds)):
        low, high = c.interval
        measured = f"{c.measured_seconds * 1e3:.1f}{'' if c.steady else ' (unsteady)'}" if c.ok else "failed"
        memory = f"{c.measured_peak_bytes / 2**20:.1f}" if c.measured_peak_bytes else "–"
        before = "–" if c.predicted_before != c.predicted_before else f"{c.predicted_before * 1e3:.1f}"
        lines.append(
            f"| {c.plan.label} | {c.plan.world_size} "
            f"| {before} | {c.predicted_seconds * 1e3:.1f} "
            f"| {low * 1e3:.1f} – {high * 1e3:.1f} | {measured} | {_percent(c.error, '+')} "
            f"| {c.predicted_peak_bytes / 2**20:.1f} | {memory} | {_percent(c.memory_error, '+')} |"
        )
    return "\n".join(lines)


def _study_lines(study: Study) -> list[str]:
    lines = []
    for n in study.searches:
        lines.append(
            f"search for {n.ranks} ranks: {n.considered} plans considered, {n.infeasible} do not fit, "
            f"{n.ranked} simulated, {n.seconds:.1f} s"
        )
        lines += [f"not searched: {label} ({count}): {reason}" for label, reason, count in n.rejected]
    if study.anchors:
        low, high = min(study.anchors), max(study.anchors)
        lines.append(
            f"the machine took {low:.3f} to {high:.3f} times its calibrated anchor time "
            f"({len(study.anchors)} samples: three before the predictions, then one between the steps of each plan)"
        )
    if warning := drift_warning(study):
        lines.append(f"**{warning}**")
    lines.append(f"predictions kept at {study.predicted_at}, first run started at {study.executed_at} (UTC)")
    unpriced = sorted({op for c in study.comparisons for op in c.unpriced})
    if unpriced:
        lines.append(f"priced by the roofline alone: {', '.join(unpriced)}")
    return lines + list(dict.fromkeys([*study.notes, *(n for c in study.comparisons for n in c.notes)]))


def _percent(value: float, sign: str = "") -> str:
    return "–" if value != value else f"{value:{sign}.1%}"
