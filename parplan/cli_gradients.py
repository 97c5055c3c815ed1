"""`parplan gradients`: how the gradients of a data-parallel step should be exchanged."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import (
    PICTURES,
    ClusterName,
    Json,
    Model,
    PrecisionName,
    check_file,
    positive,
    precision_of,
    refuse,
)
from parplan.console import emit, number, remark, seconds, show, size, table, working

ROWS = 24  # of the table that people read


def gradients(
    model: Model,
    cluster: ClusterName,
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Data-parallel ranks.", show_default=False)],
    global_batch: Annotated[
        int | None,
        typer.Option("--global-batch", "-b", help="By default the model's own on every rank.", show_default=False),
    ] = None,
    schemes: Annotated[
        str,
        typer.Option(
            help="auto, ring, tree, hierarchical, ps, ps-sharded, ps-hierarchical; servers: /gradients, /parameters.",
            show_default=False,
        ),
    ] = "",
    compressions: Annotated[
        str, typer.Option(help="none, fp16, bf16, int8, sign, topk0.01, dgc0.001, powersgd4.", show_default=False)
    ] = "",
    bucket_mb: Annotated[str, typer.Option(help="Bucket sizes to try, MiB.")] = "1,5,25,100",
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Let the policy choose int8, sign, topk, dgc and powersgd, too.")
    ] = False,
    precision: PrecisionName = "fp32",
    plot: Annotated[Path | None, typer.Option(help="Steps of all compressions as a picture (PNG).")] = None,
    json: Json = False,
) -> None:
    """Compare schemes and compressions of the gradient exchange, and choose one for every bucket.

    Convergence is not modelled: seconds of a step, not of a training run.

    Example: parplan gradients resnet50 --cluster p3-tcp --ranks 8 --schemes ring,ps,ps-sharded --lossy
    """
    positive("--global-batch", global_batch)
    if ranks < 2:
        raise ValueError(f"--ranks is {ranks}; gradients are exchanged by 2 ranks or more")
    buckets = _buckets(bucket_mb)
    check_file("--plot", plot, *PICTURES)
    with working() as progress:
        advice = _advice(model, cluster, ranks, global_batch, schemes, compressions, buckets, lossy,
                         precision_of(precision), progress)  # fmt: skip
        if plot is not None:
            from parplan.gradients_plot import plot_gradients
            from validation.report_files import replacing

            with replacing(plot) as partial:
                plot_gradients(advice, f"{model}: gradients of {ranks} ranks on {cluster}", partial)
    for note in advice.notes:
        remark(f"note: {note}")
    emit(advice_data(advice, model, cluster, ranks)) if json else _print(advice, model, cluster, ranks)


def _buckets(text: str) -> list[int]:
    try:
        found = [round(float(word) * 2**20) for word in text.split(",")]
    except (ValueError, OverflowError):  # no number, nan; infinity
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--bucket-mb is '{text}'; give sizes in MiB, as in 1,25")
    return found


def _advice(
    model: str, cluster: str, ranks: int, batch: int | None, schemes: str, compressions: str, buckets: list[int],
    lossy: bool, precision: Any, progress: Any,
) -> Any:  # fmt: skip
    from costmodels.cluster import load_cluster
    from costmodels.compression import DEFAULTS, compression_from
    from costmodels.schemes import SCHEMES, scheme_from
    from opgraph.models import check_spec, load_workload

    machine = load_cluster(cluster)
    check_spec(model)
    chosen = [scheme_from(s.strip()) for s in schemes.split(",")] if schemes else list(SCHEMES)
    kinds = [compression_from(c) for c in (compressions.split(",") if compressions else DEFAULTS)]
    if not any(kind.lossy for kind in kinds):
        refuse({"--lossy": lossy}, "none of --compressions is lossy; leave it out, or add int8, sign or topk0.01")
    from planner.space import check_devices

    check_devices(machine, ranks)
    progress(f"tracing {model}", 0.1)
    from opgraph.batch import trace_workload
    from planner.gradient_policy import advise
    from planner.plan import ParallelPlan

    workload = load_workload(model)
    graph = trace_workload(workload, precision=precision, accelerator=machine.device.kind != "cpu")
    plan = ParallelPlan(global_batch=batch or workload.batch_size * ranks, dp=ranks, precision=precision)
    progress("comparing exchanges", 0.6)
    return advise(graph, plan, machine, chosen, kinds, buckets, lossy)


def advice_data(advice: Any, model: str, cluster: str, ranks: int) -> dict[str, Any]:
    """The JSON of an advice: seconds and bytes of one rank and step. break_even_bandwidth: bytes/s of the slowest link
    below which a compression beats the best uncompressed exchange (null: never; a text: always)."""
    return {
        "model": model, "cluster": cluster, "ranks": ranks,
        "schemes": [
            {"name": u.choice.name, "scheme": u.choice.scheme.name, "compression": u.choice.compression.name,
             "lossy": u.choice.compression.lossy, "bucket_bytes": u.bucket_bytes, "step_seconds": u.step_seconds,
             "exposed_seconds": u.exposed_seconds, "wire_bytes": u.wire_bytes, "encode_seconds": u.encode_seconds,
             "decode_seconds": u.decode_seconds, "memory_bytes": u.memory_bytes, "buffer_bytes": u.buffer_bytes}
            for u in advice.uniform
        ],
        "policy": [
            {"bucket_bytes": d.bucket_bytes, "scheme": d.choice.scheme.name, "compression": d.choice.compression.name,
             "message_seconds": d.message_seconds, "saved_seconds": d.saved_seconds, "reason": d.reason}
            for d in advice.policy
        ],
        "policy_bucket_bytes": advice.policy_bucket_bytes, "policy_step_seconds": advice.policy_step_seconds,
        "no_message_seconds": advice.alone_seconds,
        "break_even_bandwidth": {k: "always" if v == inf else v for k, v in advice.break_even.items()},
        "notes": list(advice.notes),
    }  # fmt: skip


def _print(advice: Any, model: str, cluster: str, ranks: int) -> None:
    columns = ("scheme", "compression", "buckets", "step", "exposed", "encode", "decode", "sent", "memory")
    rows = [
        (u.choice.scheme.name, u.choice.compression.name, size(u.bucket_bytes), seconds(u.step_seconds),
         seconds(u.exposed_seconds), seconds(u.encode_seconds), seconds(u.decode_seconds), size(u.wire_bytes),
         size(u.memory_bytes))
        for u in advice.uniform[:ROWS]
    ]  # fmt: skip
    show(table(f"{model}: gradients of {ranks} ranks on {cluster}, the same for all buckets", columns, rows, left=2))
    if len(advice.uniform) > ROWS:
        show(f"{len(advice.uniform) - ROWS} slower ones are left out; --json has all.")
    show(table("Choice per bucket, in the order in which gradients are complete", ("", ""),
               [(str(i), d.reason) for i, d in enumerate(advice.policy)], left=2))  # fmt: skip
    show(f"step with these choices: {seconds(advice.policy_step_seconds)} in buckets of "
         f"{size(advice.policy_bucket_bytes)}; with free messages: {seconds(advice.alone_seconds)}")  # fmt: skip
    if advice.break_even:
        rates = [(name, _rate(rate)) for name, rate in advice.break_even.items()]
        show(table("Beats the best uncompressed exchange", ("compression", "where links are below"), rates, left=1))


def _rate(rate: float | None) -> str:
    return "never" if rate is None else "always" if rate == inf else number(rate, "B/s")
