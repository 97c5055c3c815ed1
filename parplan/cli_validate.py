"""`parplan validate`: predict plans, execute them, compare, report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parplan.arguments import GlobalBatch, Json, Model, PrecisionName, positive, precision_of
from parplan.console import emit, percent, remark, seconds, show, size, table, working

if TYPE_CHECKING:
    from validation.study import Study


def validate(
    model: Model,
    global_batch: GlobalBatch,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", help="local, or under torchrun the cluster that runs this.")
    ] = "local",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "2,4",
    plans: Annotated[int, typer.Option(help="Plans to execute for each number of ranks.")] = 8,
    precision: PrecisionName = "fp32",
    steps: Annotated[int, typer.Option(help="Least number of timed steps of a plan.")] = 20,
    timeout: Annotated[float, typer.Option(help="Seconds after which the ranks of a plan are killed.")] = 300.0,
    name: Annotated[str | None, typer.Option(help="Name of the report.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the reports.")] = Path("reports"),
    json: Json = False,
) -> None:
    """Search plans, predict them, execute them, and report predicted beside measured.

    Example: parplan validate gpt2:layers=4,hidden=256,heads=4,seq=128 --cluster local --global-batch 16 --ranks 2
    """
    from opgraph.models import check_spec
    from planner.plan import ParallelPlan, check_executable

    for option, value in (("--global-batch", global_batch), ("--plans", plans), ("--steps", steps)):
        positive(option, value)
    if not timeout > 0:  # nor nan
        raise ValueError(f"--timeout is {timeout:g}; give seconds above 0")
    worlds, kind = read_ranks(ranks), precision_of(precision)
    check_executable(ParallelPlan(1, precision=kind))
    check_spec(model)
    target = out / (name or slug(model))

    def studies(progress: Any, keep: Any) -> list[Study]:
        from costmodels.cluster import load_cluster
        from validation.measure import Options
        from validation.study import validate as study

        options = Options(min_steps=steps, timeout_seconds=timeout)
        where = load_cluster(cluster)
        return [study(model, where, global_batch, worlds, plans, options, progress, keep=keep, precision=kind)]

    title = f"{model}: predicted and measured on {cluster}"
    made, data = reported(target, title, studies)
    finish(made, data, target, json)


def read_ranks(text: str) -> tuple[int, ...]:
    """"2,4" as numbers."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words or not all(w.isdecimal() and int(w) > 0 for w in words):
        raise ValueError(f"--ranks is '{text}'; give whole numbers of 1 or more, separated by commas: 2,4")
    return tuple(dict.fromkeys(int(w) for w in words))


def slug(model: str) -> str:
    """A folder name for a model spec."""
    name = "".join(c if c.isalnum() else "-" for c in model.split("/")[-1])
    return "-".join(filter(None, name.split("-")))[:80] or "report"


def reported(
    target: Path, title: str, make: Callable[[Any, Any], list[Study]]
) -> tuple[Sequence[Study], dict[str, Any]]:
    """Makes the studies and their report at `target`: the whole report or, on any exception, none.

    `make(progress, keep)` returns the studies; `keep(model, predictions)` writes predictions into the report.
    """
    import json

    from validation.report import MARKER, environment, results, write_report
    from validation.report_files import assembled, plain
    from validation.study import predictions_path

    command = shlex.join(["parplan", *sys.argv[1:]])
    if not first_rank():  # under torchrun rank 0 writes the report
        with working() as progress:
            return (made := make(progress, lambda model, predictions: None)), results(made, environment(command))
    with assembled(target, MARKER) as folder:
        about = environment(command)

        def keep(model: str, predictions: Sequence[Any]) -> None:
            from parplan.cli_simulate import prediction_data

            rows = [prediction_data(p) for p in predictions]
            predictions_path(folder, model).write_text(json.dumps(plain(rows), indent=1) + "\n")

        with working() as progress:
            made = make(progress, keep)
        data = write_report(folder, made, about, title)
    return made, data


def first_rank() -> bool:
    """Whether this process speaks for all: it does unless torchrun says that it is another rank."""
    return os.environ.get("RANK", "0") == "0"


def finish(studies: Sequence[Study], data: dict[str, Any], target: Path, json: bool) -> None:
    """Prints the outcome; RuntimeError where a plan failed."""
    from validation.study import drift_warning

    if first_rank():
        remark(f"the report is in {target}")
        if json:
            emit(data)
        else:
            for study in studies:
                _print(study)
        for warning in filter(None, map(drift_warning, studies)):
            remark(f"note: {warning}")
    failures = [c for s in studies for c in s.failures]
    if failures:
        first, count = failures[0], sum(len(s.comparisons) for s in studies)
        raise RuntimeError(
            f"{len(failures)} of {count} plans failed; {first.plan.label} on {first.plan.world_size} ranks of "
            f"{first.model}: {first.reason}"
        )


def _print(study: Study) -> None:
    from validation.compare import summarise

    rows = []
    for c in sorted(study.comparisons, key=lambda c: (c.plan.world_size, c.predicted_seconds)):
        low, high = c.interval
        rows.append((
            c.plan.label, str(c.plan.world_size), seconds(c.predicted_before), seconds(c.predicted_seconds),
            f"{seconds(low)} – {seconds(high)}",
            seconds(c.measured_seconds) if c.ok else "FAILED", percent(c.error, "+"), size(c.predicted_peak_bytes),
            size(c.measured_peak_bytes) if c.measured_peak_bytes else "–", percent(c.memory_error, "+"),
        ))  # fmt: skip
    columns = (
        "plan", "ranks", "before", "predicted", "interval", "measured", "error", "peak predicted", "measured", "error"
    )  # fmt: skip
    show(table(f"{study.model}, global batch {study.global_batch}, on {study.cluster}", columns, rows))
    s = summarise(study.comparisons)
    rank = "–" if s.spearman != s.spearman else f"{s.spearman:.3f}"
    show(
        f"step time: median error {percent(s.median_error)}, worst {percent(s.worst_error)}, bias "
        f"{percent(s.bias, '+')}, Spearman {rank}, top-1 regret {percent(s.top1_regret)}, "
        f"{percent(s.coverage)} in the interval; {percent(s.median_error_before)} before, when the machine's pace "
        "during the runs was not known\n"
        f"memory: median error {percent(s.memory_median_error)}, worst {percent(s.memory_worst_error)}; peaks are of "
        "the rank where predicted and measured differ most"
    )
