"""`parplan simulate`: one plan, its timeline, its breakdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import (
    PICTURES,
    ClusterName,
    Compile,
    CudaGraphs,
    Json,
    Model,
    check_different,
    check_file,
    check_graphs,
    positive,
)
from parplan.cli_memory import SUFFIXES, memory_data, memory_rows
from parplan.console import emit, percent, remark, seconds, show, size, table, working

MOST_CHAINS = 6


def simulate(
    model: Model,
    plan: Annotated[
        str,
        typer.Option(
            "--plan", "-p", help="A plan file, or degrees: dp2,tp2,mb4 or 'dp8 fsdp offload'.", show_default=False
        ),
    ],
    cluster: ClusterName,
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", "-b", help="By default that of the plan file.", show_default=False)
    ] = None,
    trace_file: Annotated[
        Path | None, typer.Option(help="Timeline for ui.perfetto.dev (JSON).", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Timeline as a picture (PNG).", show_default=False)] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            help="Memory of the fullest rank, event by event: .csv, .png, or .pickle for torch's memory viewer.",
            show_default=False,
        ),
    ] = None,
    compile_: Compile = False,
    cuda_graphs: CudaGraphs = False,
    json: Json = False,
) -> None:
    """Simulate one training step under one plan.

    Example: parplan simulate gpt2 --plan "dp4 fsdp" --cluster dgx-h100 -b 32 --trace-file step.json
    """
    import time

    positive("--global-batch", global_batch)
    check_file("--trace-file", trace_file)
    check_file("--plot", plot, *PICTURES)
    check_file("--memory", memory, *SUFFIXES)
    check_different({"--trace-file": trace_file, "--plot": plot, "--memory": memory})
    began = time.perf_counter()
    with working() as progress:
        prediction, timeline, graph, machine = _simulate(
            model, plan, cluster, global_batch, (cuda_graphs, compile_), progress
        )
        if trace_file is not None:
            from simulator import write_perfetto

            write_perfetto(timeline, trace_file)
        if plot is not None:
            from parplan.timeline_plot import plot_timeline
            from validation.report_files import replacing

            with replacing(plot) as partial:
                plot_timeline(timeline, f"{model}: {prediction.plan.label} on {cluster}", partial)
        held = memory_data(graph, prediction, machine, memory, f"{model}: {prediction.plan.label} on {cluster}")
    for note in prediction.notes:
        remark(f"note: {note}")
    data = {**prediction_data(prediction), "model": model, "cluster": cluster, "memory": held}
    data["seconds"] = time.perf_counter() - began
    emit(data) if json else _print(data)


def _simulate(
    model: str, plan: str, name: str, global_batch: int | None, options: tuple[bool, bool], progress: Any
) -> tuple[Any, Any, Any, Any]:
    from costmodels.cluster import load_cluster
    from parplan.inline_plan import read_plan

    cluster = load_cluster(name)
    check_graphs(options[0], cluster)
    world, precision, finish = read_plan(plan, global_batch)  # what is wrong with it shows before the model is built
    progress(f"tracing {model}", 0.1)
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from planner.host_thread import Running
    from planner.predict import simulate_plan
    from planner.space import check_devices

    try:
        check_devices(cluster, world)
    except ValueError as error:
        raise ValueError(f"plan {plan}: {error}") from None
    workload = load_workload(model)
    graph = trace_workload(workload, precision=precision, accelerator=cluster.device.kind != "cpu")
    progress("simulating", 0.7)
    running = Running(options[0], compiled=options[1])
    prediction, timeline = simulate_plan(graph, finish(workload, graph, cluster), cluster, running)
    return prediction, timeline, graph, cluster


def prediction_data(p: Any) -> dict[str, Any]:
    """The JSON of a prediction. peak_bytes is that of the fullest rank."""
    return {
        "label": p.plan.label,
        "step_seconds": p.step_seconds,
        "interval": p.interval,
        "breakdown": p.breakdown,
        "peak_bytes": max(p.peak_bytes),
        "peak_bytes_by_rank": p.peak_bytes,
        "memory_bytes": p.memory_bytes,
        "fits": p.fits,
        "mfu": p.mfu,
        "shares": p.shares,
        "unpriced": p.unpriced,
        "notes": p.notes,
        "tasks": p.tasks,
        "assumed": p.assumed,
        "fused": p.fused,
        "plan": p.plan.to_dict(),
    }


def _print(data: dict[str, Any]) -> None:
    low, high = data["interval"]
    step = data["step_seconds"]
    rows = [
        ("step", f"{seconds(step)} ({seconds(low)} – {seconds(high)})"),
        *((f"  {name.replace('_', ' ')}", f"{seconds(part)} ({percent(part / step)})")
          for name, part in data["breakdown"].items()),
        ("MFU", percent(data["mfu"])),
        ("peak memory", f"{size(data['peak_bytes'])} of {size(data['memory_bytes'])}, "
                        f"{'fits' if data['fits'] else 'DOES NOT FIT'}"),
        *memory_rows(data["memory"]),
        ("prices", ", ".join(f"{percent(share)} {source}" for source, share in data["shares"].items() if share)),
        ("tasks", f"{data['tasks']:,}, {seconds(data['seconds'])} in all"),
    ]  # fmt: skip
    if data["assumed"]:
        rows.append(("assumed", ", ".join(data["assumed"])))
    for chain, count in list(data["fused"].items())[:MOST_CHAINS]:
        rows.append(("  fused", f"{count} x {chain}"))
    if len(data["fused"]) > MOST_CHAINS:
        rows.append(("", f"and {len(data['fused']) - MOST_CHAINS} other chains"))
    if data["unpriced"]:
        names = [name.removeprefix("aten.").removesuffix(".default") for name in data["unpriced"]]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        rows.append(("roofline only", ", ".join(names[:8]) + more))
    show(table(f"{data['model']}: {data['label']} on {data['cluster']}", ("", ""), rows, left=2))
