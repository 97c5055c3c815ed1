"""`parplan trace`: the operator graph of one training step."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parplan.arguments import Json, Model, positive
from parplan.console import emit, number, remark, seconds, show, size, table, working


def trace(
    model: Model,
    batch: Annotated[int | None, typer.Option(help="By default the model's own.", show_default=False)] = None,
    unfolded: Annotated[
        bool, typer.Option("--unfolded", help="Trace every block instead of a few of those that repeat: same, slower.")
    ] = False,
    json: Json = False,
) -> None:
    """Trace one training step of a model and sum it up.

    Example: parplan trace gpt2:layers=4,hidden=256 --batch 8
    """
    import time

    positive("--batch", batch)
    began = time.perf_counter()
    with working() as progress:
        from opgraph.models import check_spec, load_workload

        check_spec(model)
        progress("loading torch", 0.0)
        import torch._dynamo  # noqa: F401  fake tensors load it when first used

        from opgraph.batch import trace_workload
        from opgraph.summary import summary

        progress(f"tracing {model}", 0.1)
        loaded = time.perf_counter()
        graph = trace_workload(load_workload(model), fold=not unfolded)
        graph = graph.at_batch(batch) if batch else graph
        found = summary(graph)
    data = {
        "model": model, "batch": graph.batch, **found, "folded": bool(graph.repeats),
        "seconds": time.perf_counter() - loaded, "loading_seconds": loaded - began,
    }  # fmt: skip
    for note in graph.notes:
        remark(f"note: {note}")
    emit(data) if json else _print(data)


def _print(data: dict[str, Any]) -> None:
    flops = data["flops"]
    rows = [
        ("parameters", number(data["params"])),
        ("operators", f"{data['ops']:,}"),
        *((f"FLOP, {phase}", number(value, "FLOP")) for phase, value in flops.items() if value),
        ("activations kept for backward", size(data["activation_bytes"])),
        ("peak memory of the step", size(data["peak_bytes"])),
        ("work", f"{number(data['work'])} operations"),
        ("depth", f"{number(data['depth'])} steps of the longest chain"),
        ("average parallelism", f"{number(data['parallelism'])} operations at once"),
        ("traced in", f"{seconds(data['seconds'])}, after {seconds(data['loading_seconds'])} of loading torch"),
    ]
    show(table(f"{data['model']}, batch {data['batch']}", ("", ""), rows))
