"""`parplan infer`: time to the first token and per token, the KV cache, and how many sequences fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import (
    ClusterName,
    Compile,
    CudaGraphs,
    Json,
    PrecisionName,
    check_graphs,
    positive,
    precision_of,
)
from parplan.console import emit, number, percent, remark, seconds, show, size, table, working


def infer(
    model: Annotated[
        str,
        typer.Argument(help="A language model of the zoo (gpt2, llama3-8b) or a config.json.", show_default=False),
    ],
    cluster: ClusterName,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences at once, over all replicas.")] = 1,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of every prompt.")] = 512,
    generate: Annotated[int, typer.Option("--generate", help="Tokens generated for every prompt.")] = 128,
    plan: Annotated[str, typer.Option("--plan", "-p", help="Degrees: tp8, 'dp2 tp4', 'pp2 tp4 mb2'.")] = "tp1",
    precision: PrecisionName = "bf16",
    compile_: Compile = False,
    cuda_graphs: CudaGraphs = False,
    json: Json = False,
) -> None:
    """Predict inference: prefill and decode with a KV cache, forward passes only.

    Stages of a pipeline (ppN) work at once where the sequences go through it in micro-batches (mbN).

    Example: parplan infer llama3-70b --cluster dgx-h100 --plan tp8 --batch 1 --prompt 2048 --generate 256
    """
    import time

    for name, value in (("--batch", batch), ("--prompt", prompt)):
        positive(name, value)
    if generate < 0:
        raise ValueError(f"--generate is {generate}; give a whole number of 0 or more")
    began = time.perf_counter()
    with working() as progress:
        found = _infer(model, cluster, plan, precision, (batch, prompt, generate), (compile_, cuda_graphs), progress)
    for note in found.notes:
        remark(f"note: {note}")
    if found.no_decode:
        remark(f"no decode: {found.no_decode}")
    data = {"model": model, "cluster": cluster, "precision": precision, **inference_data(found)}
    data |= {"assumed": found.assumed, "seconds": time.perf_counter() - began}
    emit(data) if json else _print(data, found)


def _infer(
    model: str, name: str, plan: str, precision: str, lengths: tuple[int, int, int], options: tuple[bool, bool],
    progress: Any,
) -> Any:  # fmt: skip
    from costmodels.cluster import load_cluster
    from opgraph.models import at_length, check_spec, with_length

    kind = precision_of(precision)
    wanted = degrees(plan)
    cluster = load_cluster(name)
    check_graphs(options[1], cluster)
    check_spec(at_length(model, lengths[1]))
    progress(f"tracing {model}", 0.1)
    from planner.inference import infer as predict
    from planner.inference_graph import trace_inference

    batch, prompt, generate = lengths
    whole, token = trace_inference(
        lambda length: with_length(model, length), prompt, generate, kind, cluster.device.kind != "cpu"
    )
    progress("simulating", 0.6)
    return predict(
        whole, token, cluster, batch=batch, prompt=prompt, generate=generate, **wanted,
        compiled=options[0], cuda_graphs=options[1],
    )  # fmt: skip


def degrees(plan: str) -> dict[str, int]:
    """The degrees of a typed plan. ValueError for what inference does not know."""
    from parplan.inline_plan import parse

    if Path(plan).is_file():
        raise ValueError(f"--plan {plan} is a file; inference takes degrees alone: tpN, dpN, ppN, mbN, as in 'dp2 tp4'")
    wanted = parse("single" if plan in ("", "tp1") else plan)
    plain, known = parse("single"), ("tp", "dp", "pp", "micro_batches")
    if any(wanted[name] != plain[name] for name in wanted if name not in (*known, "schedule")):
        aside = " (--precision says the precision)" if wanted["precision"] != plain["precision"] else ""
        raise ValueError(f"--plan '{plan}' says more than inference knows{aside}; write tpN, dpN, ppN, mbN: 'dp2 tp4'")
    return {name: wanted[name] for name in known}


def inference_data(found: Any) -> dict[str, Any]:
    """The JSON of an inference. Decode is null where the model does not decode."""
    decode, last = found.decode, found.last
    return {
        "label": found.plan.label,
        "batch": found.batch,
        "prompt": found.prompt,
        "generate": found.generate,
        "prefill_seconds": found.prefill.seconds,
        "interval": found.prefill.interval,
        "prefill_flops": found.prefill.flops,
        "prefill_breakdown": found.prefill.breakdown,
        "decode_seconds_per_token": decode.seconds if decode else None,
        "decode_interval": decode.interval if decode else None,
        "decode_seconds_last_token": last.seconds if last else None,
        "decode_flops_per_token": decode.flops if decode else None,
        "decode_breakdown": decode.breakdown if decode else None,
        "tokens_per_second": found.tokens_per_second if decode else None,
        "request_seconds": found.request_seconds,
        "host_bound": (decode or found.prefill).host_bound,
        "host_share": (decode or found.prefill).host_share,
        "kv_cache_bytes": found.kv_cache_bytes,
        "kv_cache_bytes_per_rank": found.cache_per_rank,
        "parameter_bytes_per_rank": found.parameter_bytes,
        "peak_bytes": found.peak_bytes,
        "memory_bytes": found.memory_bytes,
        "fits": found.fits,
        "largest_batch": found.largest_batch,
        "largest_decode_batch": found.largest_decode_batch if decode else None,
        "shares": (decode or found.prefill).shares,
        "prefill_shares": found.prefill.shares,
        "unpriced": sorted({*found.prefill.unpriced, *(decode.unpriced if decode else ())}),
        "no_decode": found.no_decode or None,
        "notes": found.notes,
    }


def host_sentence(one: Any) -> str:
    """Whether the host bounds a pass, and by how much."""
    if not one.host_bound:
        return f"not host-bound: a free host would save {percent(one.host_share)} of a token"
    return f"HOST-BOUND: a free host would save {percent(one.host_share)} of a token (--cuda-graphs, --compile)"


def _print(data: dict[str, Any], found: Any) -> None:
    def spread(one: Any) -> str:
        low, high = one.interval
        return f"{seconds(one.seconds)} ({seconds(low)} – {seconds(high)})"

    def where(one: Any) -> str:
        return ", ".join(f"{percent(v / one.seconds)} {k.replace('_', ' ')}" for k, v in one.breakdown.items() if v)

    def prices(one: Any) -> str:
        return ", ".join(f"{percent(share)} {source}" for source, share in one.shares.items() if share)

    rows = [("first token (prefill)", spread(found.prefill)), ("", where(found.prefill)),
            ("  prices", prices(found.prefill))]  # fmt: skip
    if found.decode:
        middle = found.prompt + (found.generate + 1) // 2
        rows += [
            (f"a token at {middle:,} of context", spread(found.decode)), ("", where(found.decode)),
            ("  prices", prices(found.decode)),
            (f"a token at {found.prompt + found.generate:,}", spread(found.last)),
            ("decoding", f"{number(found.tokens_per_second, 'tokens/s')}, {host_sentence(found.decode)}"),
            ("whole request", seconds(found.request_seconds)),
        ]  # fmt: skip
    rows += [
        ("KV cache", f"{size(found.kv_cache_bytes)}, {size(found.cache_per_rank)} a rank"),
        ("peak memory", f"{size(found.peak_bytes)} of {size(found.memory_bytes)} a rank, "
                        f"{'fits' if found.fits else 'DOES NOT FIT'}"),
        ("largest batch", f"{found.largest_batch:,} prompts in one pass" if found.largest_batch else "none fits"),
        *([("", f"{found.largest_decode_batch:,} sequences while decoding")] if found.decode else []),
    ]  # fmt: skip
    if found.assumed:
        rows.append(("assumed", ", ".join(found.assumed)))
    if data["unpriced"]:
        rows.append(("roofline only", ", ".join(data["unpriced"][:8])))
    title = f"{data['model']} {data['precision']}: {data['batch']} sequences, {found.plan.label} on {data['cluster']}"
    show(table(title, ("", ""), rows, left=2))
