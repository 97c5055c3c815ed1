"""`parplan predict`: published training runs, predicted and compared."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import Json, positive
from parplan.console import emit, remark, show, table, working

NOTES_SHOWN = 6  # on the console


def predict(
    cases: Annotated[
        Path,
        typer.Option("--cases", help="CSV file of training runs; docs/cases.md has the columns.", show_default=False),
    ],
    set_name: Annotated[str | None, typer.Option("--set", help="Only rows of this set.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for table, summary and scatter plot.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Predict published training runs and compare with what was measured.

    A row is a run: model, devices, plan, and measured seconds where there are any. docs/cases.md has the columns.
    Its gpu is a name of parplan devices, local, or a device file (.toml) beside the CSV file.

    Example: parplan predict --cases examples/runs.csv
    Example: parplan predict --cases examples/runs_vision.csv --set invented --out reports/mine
    """
    import time

    from validation.cases import read_cases
    from validation.report_files import check_writable

    positive("--limit", limit)
    if out is not None and out.is_file():
        raise ValueError(f"--out {out} is a file; give the name of a folder")
    if out is not None:
        check_writable(out / "cases.csv")
    rows = read_cases(cases)
    if set_name is not None:
        known = list(dict.fromkeys(c.set for c in rows))
        rows = [c for c in rows if c.set == set_name]
        if not rows:
            raise ValueError(f"{cases} has no set {set_name!r}; it has {', '.join(known)}")
    rows = rows[:limit]
    began = time.perf_counter()
    with working() as progress:
        from validation.cases_run import run_cases

        outcomes = run_cases(rows, progress, cases.parent)
        if out is not None:
            from validation.cases_report import write_report

            write_report(outcomes, out, f"parplan {' '.join(sys.argv[1:])}")
    _print(outcomes, time.perf_counter() - began, json)
    if all(outcome.predicted_seconds is None for outcome in outcomes):
        raise typer.Exit(2)


def _print(outcomes: list[Any], seconds: float, json: bool) -> None:
    from dataclasses import asdict

    from validation.cases_report import COLUMNS, table_rows
    from validation.cases_score import case_data, summary

    scores = summary(outcomes)
    for reason, count in _reasons(outcomes).items():
        remark(f"{count} rows cannot be predicted: {reason}")
    for value, count in _unscored(outcomes).items():
        remark(f"{count} rows are not scored: column step_time_s is {value!r}; seconds above 0 are needed")
    _remark_notes(outcomes)
    if json:
        emit({"cases": [case_data(o) for o in outcomes], "summary": {k: asdict(v) for k, v in scores.items()},
              "seconds": seconds})  # fmt: skip
    else:
        show(table(f"{len(outcomes)} published runs in {seconds:.1f} s", COLUMNS, table_rows(scores)))


def _remark_notes(outcomes: list[Any]) -> None:
    """What was assumed of most rows, and where the rest is said."""
    notes = Counter(note for o in outcomes for note in o.notes)
    for note, count in notes.most_common(NOTES_SHOWN):
        remark(f"{count} row(s): {note}")
    if len(notes) > NOTES_SHOWN:
        remark(f"{len(notes) - NOTES_SHOWN} other notes stand in --json, and in cases.csv of --out")


def _unscored(outcomes: list[Any]) -> dict[str, int]:
    """Measured times that are none, and in how many rows each stands."""
    cells = [o.case.text("step_time_s") for o in outcomes if not o.reason and o.measured_seconds is None]
    return {cell: cells.count(cell) for cell in dict.fromkeys(cells) if cell}


def _reasons(outcomes: list[Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.reason:
            found[outcome.reason] = found.get(outcome.reason, 0) + 1
    return found
