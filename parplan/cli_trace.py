"""`parplan trace`: the operator graph of one training step."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parplan.arguments import Json, Model, positive
from parplan.console import emit, number, remark, seconds, show, size, table, working

HEAD = ("processors p", "steps, at least", "at most", "speed-up, at least")


def trace(
    model: Model,
    batch: Annotated[int | None, typer.Option(help="By default the model's own.", show_default=False)] = None,
    unfolded: Annotated[
        bool, typer.Option("--unfolded", help="Trace every block instead of a few of those that repeat: same, slower.")
    ] = False,
    processors: Annotated[
        int | None, typer.Option(help="Brent's bounds for this many; by default for 1, 8, 64, ...", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Trace one training step of a model and sum it up.

    Example: parplan trace gpt2:layers=4,hidden=256 --batch 8
    """
    import time

    positive("--batch", batch)
    positive("--processors", processors)
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
        "model": model, "batch": graph.batch, **found, "brent": brent(found["work"], found["depth"], processors),
        "folded": bool(graph.repeats),
        "seconds": time.perf_counter() - loaded, "loading_seconds": loaded - began,
    }  # fmt: skip
    for note in graph.notes:
        remark(f"note: {note}")
    emit(data) if json else _print(data)


def brent(work: float, depth: float, processors: int | None) -> list[dict[str, float]]:
    """Brent's bounds of the steps (T_p, between `least` and `most`) on p processors: on those asked for, else on 1, 8,
    64, ... until the longest chain is what bounds them."""
    from opgraph.work import brent_bounds

    counts = [processors] if processors else [1]
    while not processors and counts[-1] * depth < work:
        counts.append(8 * counts[-1])
    bounds = ((p, *brent_bounds(work, depth, p)) for p in counts)
    return [{"processors": p, "least": least, "most": most} for p, least, most in bounds]


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
    work = data["work"]
    bounds = [
        (f"{b['processors']:,}", number(b["least"]), number(b["most"]), number(work / b["most"])) for b in data["brent"]
    ]
    show(table("Brent's bounds: max(T1/p, Tinf) <= Tp <= T1/p + Tinf (p-1)/p", HEAD, bounds))
