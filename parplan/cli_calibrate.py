"""`parplan calibrate`: measures this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import Json
from parplan.console import emit, percent, seconds, show, table, working


def calibrate(
    out: Annotated[
        Path | None, typer.Option("--out", help="Device file; by default in this user's cache.", show_default=False)
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds to spend.")] = 90.0,
    json: Json = False,
) -> None:
    """Measure this machine's ops, host overheads and collectives into a device file.

    Example: parplan calibrate --budget 90
    """
    if out is not None and out.suffix != ".toml":
        raise ValueError(f"{out} is no TOML file; give a path that ends in .toml")
    if budget <= 0:
        raise ValueError(f"--budget is {budget:g}; give the seconds to spend, 90 is usual")
    with working() as progress:
        progress("starting one process per core", 0.0)
        from validation.calibrate import calibrate as measure

        found = measure(out, budget, progress)
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


def _print(data: dict[str, Any]) -> None:
    rows = [
        (family, percent(e["mean"]), percent(e["by_time"]), str(e["ops"])) for family, e in data["fit_error"].items()
    ]
    title = "Error of the fitted laws on ops that were held out"
    show(table(title, ("family:dtype", "mean", "weighted by time", "ops"), rows))
    show(f"{data['device']}: measured in {seconds(data['seconds'])}, written to {data['path']}")
