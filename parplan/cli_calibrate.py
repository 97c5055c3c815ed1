"""`parplan calibrate`: measures this machine."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import Json, check_file, refuse
from parplan.console import emit, percent, seconds, show, table, working

BUDGET = 240.0  # seconds; `validation.calibrate.USUAL_BUDGET`, whose module is slow to import


def calibrate(
    out: Annotated[
        Path | None, typer.Option("--out", help="Device file; by default in this user's cache.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(
            help="Seconds to spend; every 75 beyond 90 measure the ops of 60 further models. Not with --cluster.",
            show_default=f"{BUDGET:g}",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Under torchrun: measure its collectives instead, into a cluster file.", show_default=False),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="With --cluster: nccl, or gloo.", show_default="nccl")
    ] = None,
    json: Json = False,
) -> None:
    """Measure this machine's ops, host overheads and collectives into a device file.

    Example: parplan calibrate

    Example, ten minutes for ops priced nearer: parplan calibrate --budget 600

    Example: torchrun --nproc-per-node 8 -m parplan calibrate --cluster dgx-h100 --out mine.toml
    """
    if out is not None and out.suffix != ".toml":
        raise ValueError(f"{out} is no TOML file; give a path that ends in .toml")
    check_file("--out", out)
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"--budget is {budget:g}; give the seconds to spend, {BUDGET:g} is usual")
    if cluster is not None:
        refuse({"--budget": budget}, "what --cluster measures has a length of its own; leave it out")
        _collectives(cluster, out, backend or "nccl", json)
        return
    refuse({"--backend": backend}, "this machine is measured with gloo; it is an option of --cluster, under torchrun")
    with working() as progress:
        progress("starting one process per core", 0.0)
        from validation.calibrate import calibrate as measure

        found = measure(out, BUDGET if budget is None else budget, progress)
    data = {
        "device": found.device.name,
        "path": str(found.path),
        "fit_error": {
            family: {"mean": mean, "by_time": weighted, "ops": ops}
            for family, (mean, weighted, ops) in found.fit_error.items()
        },
        "rounds": found.rounds,
        "seconds": found.seconds,
    }
    emit(data) if json else _print(data)


def _collectives(cluster: str, out: Path | None, backend: str, json: bool) -> None:
    """The groups of a cluster, on every rank that torchrun started; rank 0 writes and prints."""
    if out is None:
        raise ValueError("--cluster needs --out: the cluster file to write")
    if backend not in ("nccl", "gloo"):
        raise ValueError(f"--backend is '{backend}'; use nccl or gloo")
    from validation.calibrate_nccl import main as measure

    tables = measure(cluster, out, backend)
    if os.environ["RANK"] != "0":
        return
    data = [{"kind": t.kind, "ranks": t.ranks, "nodes": t.nodes, "error": t.error} for t in tables]
    if json:
        emit({"path": str(out), "tables": data})
        return
    rows = [(t.kind, str(t.ranks), str(t.nodes), str(len(t.bytes)), percent(t.error)) for t in tables]
    show(table("Measured collectives", ("kind", "ranks", "nodes", "sizes", "spread"), rows))
    show(f"written to {out}")


def _print(data: dict[str, Any]) -> None:
    rows = [
        (family, percent(e["mean"]), percent(e["by_time"]), str(e["ops"])) for family, e in data["fit_error"].items()
    ]
    title = "Error of the fitted laws on ops that were held out"
    show(table(title, ("family:dtype", "mean", "weighted by time", "ops"), rows))
    show(f"{data['device']}: measured in {seconds(data['seconds'])}, written to {data['path']}")
