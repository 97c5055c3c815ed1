"""Writes a report: results.json, results.csv, predicted_vs_measured.png and report.md, with what produced them."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from validation.compare import Comparison, family, summarise
from validation.launch import ROOT
from validation.report_files import plain
from validation.report_markdown import markdown
from validation.report_plot import plot
from validation.study import Study

MARKER = "results.json"  # a folder that holds it is a report, and may be replaced by a newer one
PACKAGES = ("parplan", "torch", "numpy", "scipy", "numba")
COLUMNS = (
    "model", "label", "family", "ranks", "status", "reason", "predicted_before", "predicted_seconds", "interval_low",
    "interval_high", "measured_seconds", "measured_p10", "measured_p90", "error_before", "error",
    "peak_rank", "predicted_peak_bytes", "measured_peak_bytes", "memory_error", "steps", "steady", "disturbed",
    "loss_error", "gradient_error", "load_before", "load_after",
)  # fmt: skip


def environment(command: str) -> dict[str, Any]:
    """What produced a report: command, commit, machine, versions and the load at this moment."""
    import psutil

    return {
        "command": command,
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "load": list(os.getloadavg()),
    }


def results(studies: Sequence[Study], about: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json. Times in seconds, sizes in bytes, errors as fractions; null where not measured."""
    comparisons = [c for s in studies for c in s.comparisons]
    data: dict[str, Any] = plain(
        {
            "runs": [run_data(c) for c in comparisons],
            "summary": {
                **asdict(summarise(comparisons)),
                "by_model": {s.model: asdict(summarise(s.comparisons)) for s in studies},
            },
            "studies": [_study_data(s) for s in studies],
            "environment": about,
        }
    )
    return data


def run_data(c: Comparison) -> dict[str, Any]:
    """One entry of `runs`."""
    return {
        "model": c.model, "label": c.plan.label, "family": family(c.plan), "ranks": c.plan.world_size,
        "status": c.status, "reason": c.reason,
        "predicted_before": c.predicted_before, "error_before": c.error_before,
        "predicted_seconds": c.predicted_seconds, "interval": c.interval, "measured_seconds": c.measured_seconds,
        "measured_p10": c.measured_p10, "measured_p90": c.measured_p90, "error": c.error, "covered": c.ok and c.covered,
        "peak_rank": c.peak_rank,
        "predicted_peak_bytes": c.predicted_peak_bytes, "measured_peak_bytes": c.measured_peak_bytes or None,
        "predicted_peak_bytes_by_rank": c.predicted_peaks, "measured_peak_bytes_by_rank": c.measured_peaks,
        "memory_error": c.memory_error, "steps": c.steps, "steady": c.steady, "disturbed": c.disturbed,
        "loss_error": c.loss_error, "gradient_error": c.gradient_error, "load": c.load, "shares": dict(c.shares),
        "breakdown": dict(c.breakdown), "unpriced": c.unpriced, "notes": c.notes, "plan": c.plan.to_dict(),
    }  # fmt: skip


def _study_data(s: Study) -> dict[str, Any]:
    return {
        "model": s.model, "cluster": s.cluster, "device": s.device, "global_batch": s.global_batch,
        "predicted_at": s.predicted_at, "executed_at": s.executed_at, "seconds": s.seconds,
        "anchors": s.anchors, "drift": s.drift,
        "searches": [{**asdict(n), "rejected": [dict(zip(("label", "reason", "count"), r)) for r in n.rejected]}
                     for n in s.searches],
        "notes": s.notes,
    }  # fmt: skip


def write_report(folder: Path, studies: Sequence[Study], about: dict[str, Any], title: str) -> dict[str, Any]:
    """Writes all files of a report into `folder` (see `report_files.assembled`); returns what results.json holds."""
    data = results(studies, about)
    comparisons = [c for s in studies for c in s.comparisons]
    (folder / "results.csv").write_text(_csv(data["runs"]))
    plot(comparisons, summarise(comparisons), title, folder / "predicted_vs_measured.png")
    (folder / "report.md").write_text(markdown(studies, about, title))
    (folder / MARKER).write_text(json.dumps(data, indent=1) + "\n")
    return data


def _csv(runs: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        (low, high), (before, after) = run["interval"], run["load"]
        writer.writerow({**run, "interval_low": low, "interval_high": high, "load_before": before, "load_after": after})
    return text.getvalue()


# -- the environment ----------------------------------------------------------------------------------------------


def _commit() -> str:
    """The commit of this source tree, and whether its tracked files, but for reports, were changed; "unknown" outside
    of git."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", ":!reports"], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head} with uncommitted changes" if changed else head


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
