"""`parplan search`: ranked plans for a model on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import (
    ClusterName,
    Compile,
    CudaGraphs,
    GlobalBatch,
    Json,
    Model,
    PrecisionName,
    check_graphs,
    positive,
    precision_of,
)
from parplan.console import emit, percent, remark, seconds, show, size, table, working

MARKER = "plans.json"


def search(
    model: Model,
    cluster: ClusterName,
    global_batch: GlobalBatch,
    devices: Annotated[int | None, typer.Option(help="Devices to use; by default all.", show_default=False)] = None,
    top: Annotated[int, typer.Option(help="How many plans to show and write.")] = 10,
    precision: PrecisionName = "fp32",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the plan files.", show_default=False)] = None,
    compile_: Compile = False,
    cuda_graphs: CudaGraphs = False,
    offload: Annotated[
        str, typer.Option(help="Plans that keep something on the host: auto (where none fits without), never, always.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Search the plan space and rank what fits, with lower bounds and the reasons for what was left out.

    Example: parplan search gpt2 --cluster dgx-h100 --global-batch 32 --top 5 --out plans
    """
    from validation.report_files import check_replaceable

    for name, value in (("--global-batch", global_batch), ("--devices", devices), ("--top", top)):
        positive(name, value)
    if out is not None:
        check_replaceable(out, MARKER)
    with working() as progress:
        options = (compile_, cuda_graphs, offload)
        result, where = _search(model, cluster, global_batch, devices, precision, options, progress)
    plans = result.plans[:top]
    data = {
        "model": model,
        "cluster": where.name,
        "devices": devices or where.size,
        "global_batch": global_batch,
        "assumed": ["torch.compile"] * compile_ + ["CUDA graphs"] * cuda_graphs,
        "offload": offload,
        "offload_reason": result.offload,
        "plans": [ranked_data(r) for r in plans],
        "ranked": len(result.plans),
        "considered": result.considered,
        "infeasible": result.infeasible,
        "undecided": result.undecided,
        "rejected": [{"label": r.label, "reason": r.reason, "count": r.count} for r in result.rejected],
        "seconds": result.seconds,
    }
    if out is not None:
        _write(out, plans, data)
        remark(f"{len(plans)} plan files are in {out}")
    emit(data) if json else _print(data, plans)


def _search(
    model: str, name: str, global_batch: int, devices: int | None, precision: str, options: tuple[bool, bool, str],
    progress: Any,
) -> tuple[Any, Any]:
    from costmodels.cluster import load_cluster
    from costmodels.device import basis_of
    from opgraph.models import check_spec, load_workload
    from planner.space_offload import check_mode

    kind, offload = precision_of(precision), check_mode(options[2])
    cluster = load_cluster(name)
    check_graphs(options[1], cluster)
    check_spec(model)
    progress(f"tracing {model}", 0.0)
    from opgraph.batch import trace_workload
    from planner.search import search as search_plans
    from planner.space import check_devices

    check_devices(cluster, devices)
    workload = load_workload(model)
    graph = trace_workload(workload, precision=kind, accelerator=cluster.device.kind != "cpu")
    result = search_plans(
        workload, graph, cluster, global_batch, devices=devices, precision=kind, compiled=options[0],
        cuda_graphs=options[1], offload=offload, progress=progress,
    )  # fmt: skip
    for note in (*graph.notes, *basis_of(cluster.device)):
        remark(f"note: {note}")
    return result, cluster


def ranked_data(ranked: Any) -> dict[str, Any]:
    """One entry of `plans`. peak_bytes is that of the fullest rank."""
    p = ranked.prediction
    return {
        "label": ranked.plan.label,
        "step_seconds": p.step_seconds,
        "interval": p.interval,
        "peak_bytes": max(p.peak_bytes),
        "peak_bytes_by_rank": p.peak_bytes,
        "memory_bytes": p.memory_bytes,
        "fits": p.fits,
        "mfu": p.mfu,
        "bound_seconds": ranked.bound_seconds,
        "gap": ranked.gap,
        "tied": ranked.tied,
        "shares": p.shares,
        "unpriced": p.unpriced,
        "host_bytes": p.host_bytes,
        "host_pinned_bytes": p.host_pinned_bytes,
        "notes": p.notes,
        "plan": ranked.plan.to_dict(),
    }


def _write(out: Path, plans: Any, data: dict[str, Any]) -> None:
    """A folder with one file per plan, best first, and all of them in plans.json."""
    import json

    from validation.report_files import assembled, plain

    with assembled(out, MARKER) as folder:
        for i, ranked in enumerate(plans, start=1):
            ranked.plan.save(folder / f"{i:02d}-{'-'.join(ranked.plan.label.split())}.json")
        (folder / MARKER).write_text(json.dumps(plain(data), indent=1) + "\n")


def _print(data: dict[str, Any], plans: Any) -> None:
    from planner.space import counted

    rows = []
    for i, (entry, ranked) in enumerate(zip(data["plans"], plans), start=1):
        low, high = entry["interval"]
        rows.append((
            f"{i}{' ~' * (entry['tied'] and i > 1)}", entry["label"],
            seconds(entry["step_seconds"]), f"{seconds(low)} – {seconds(high)}",
            size(entry["peak_bytes"]), "yes" if entry["fits"] else "no", percent(entry["mfu"]),
            seconds(entry["bound_seconds"]), percent(ranked.gap),
        ))  # fmt: skip
    title = f"{data['model']} on {data['devices']} devices of {data['cluster']}, global batch {data['global_batch']}"
    if data["assumed"]:
        title += f", assuming {' and '.join(data['assumed'])}"
    columns = ("", "plan", "step", "interval", "peak", "fits", "MFU", "bound", "gap")
    show(table(title, columns, rows, left=2))
    proof = "none of the others can be faster"
    if data["undecided"]:
        proof = f"{counted(data['undecided'], 'other')} might be faster"
    show(
        f"{data['considered']} plans considered, {data['infeasible']} do not fit, {data['ranked']} simulated in "
        f"{data['seconds']:.1f} s; {proof} than the first by their lower bounds. "
        "Gap: step time over the lower bound of the whole space. ~: tied with the first within the intervals."
    )
    show(f"{data['offload_reason'][:1].upper()}{data['offload_reason'][1:]}.")
    if most := max((sum(entry["host_bytes"].values()) for entry in data["plans"]), default=0):
        show(
            f"Plans with offload need up to {size(most)} of host memory a rank; whether the host has it is not known."
        )
    if data["rejected"]:
        rejected = [(r["label"], r["reason"], str(r["count"])) for r in data["rejected"]]
        show(table("Left out", ("family", "reason", "plans"), rejected, left=2))
