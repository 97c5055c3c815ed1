"""Compressed gradients, executed with gloo on this machine: bytes, memory and seconds beside what is predicted.

    python -m validation.compression_runs --out reports/compression

Bytes of every collective and memory of every hook must be what `costmodels.compression` says, to the byte. Seconds are
medians of 20 steps or more; predictions use the calibration of this machine (`parplan calibrate`) at the pace that the
anchor had beside those steps, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from costmodels.cluster import Cluster, load_cluster
from costmodels.compression import Compression, Message, compression_from, messages, state_bytes
from costmodels.schemes import Scheme
from opgraph.graph import OpGraph
from planner.gradient_policy import Choice, Exchange
from planner.gradient_times import Load, step_seconds
from planner.plan import ParallelPlan
from validation.environment import RANK_ENV
from validation.measure import pace_of_steps
from validation.pace import Pace, since_calibration

COMPRESSIONS = ("none", "fp16", "bf16", "int8", "sign", "topk0.01", "powersgd2", "powersgd4")
MODELS = (
    "gpt2:layers=4,hidden=256,heads=4,seq=64,vocab=2048,batch=4",
    "alexnet:width=32,hidden=512,classes=100,batch=8",
)
ROOT = Path(__file__).resolve().parent.parent
MARKER = "compression.json"
LIMIT = 150.0  # seconds after which the ranks of a model are killed


@dataclass(frozen=True, slots=True)
class Run:
    """One compression of one model. Predicted and measured seconds of a step and of encoding and decoding; `before` is
    the prediction at the calibration's pace. exact: whether every collective and all kept bytes were predicted."""

    model: str
    compression: str
    exact: bool
    messages: int
    wire_bytes: int
    kept_bytes: int
    measured: float = nan
    predicted: float = nan
    before: float = nan
    codec_measured: float = nan
    codec_predicted: float = nan
    steps: int = 0
    pace: float = nan


def execute(spec: str, plan: ParallelPlan, names: Sequence[str], timed: bool) -> list[list[dict[str, Any]]]:
    """The replies of every rank for every compression. RuntimeError where a rank fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **RANK_ENV, "PYTHONPATH": path}
    task = json.dumps({"spec": spec, "plan": plan.to_dict(), "compressions": list(names), "timed": timed}) + "\n"
    with tempfile.TemporaryDirectory(prefix="parplan-") as scratch:
        command = [sys.executable, "-m", "validation.compression_rank"]
        ranks = [
            subprocess.Popen([*command, str(r), str(plan.dp), f"{scratch}/store"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
            for r in range(plan.dp)
        ]  # fmt: skip
        watchdog = threading.Timer(LIMIT, _stop, (ranks,))
        watchdog.start()
        try:
            for process in ranks:
                assert process.stdin is not None
                process.stdin.write(task)
                process.stdin.flush()
            replies = [[json.loads(line) for line in process.stdout or ()] for process in ranks]
        finally:
            watchdog.cancel()
            for process in ranks:
                if sys.exc_info()[0]:
                    process.kill()
                process.wait()
    if any(len(r) < len(names) for r in replies):
        raise RuntimeError(f"a rank of {spec} failed after {min(map(len, replies))} of {len(names)} compressions")
    return replies


def _stop(ranks: list[subprocess.Popen[str]]) -> None:
    for process in ranks:
        process.kill()


def compared(
    spec: str, graph: OpGraph, plan: ParallelPlan, cluster: Cluster, replies: Sequence[Sequence[dict[str, Any]]]
) -> list[Run]:
    """What came out beside what was predicted."""
    pace, runs = Pace(cluster, None), []
    for i, reply in enumerate(replies[0]):
        compression = compression_from(reply["compression"])
        exchange = Exchange(graph, plan, cluster)
        buckets = exchange.work(plan.bucket_bytes).buckets
        expected = [m for b in buckets for m in messages(compression, b, plan.dp)]
        found = [Message(**m) for m in reply["messages"]]
        keeps = sum(state_bytes(compression, b) for b in buckets)
        exact = all(sorted(map(_key, [Message(**m) for m in r[i]["messages"]])) == sorted(map(_key, expected))
                    and r[i]["kept_bytes"] == keeps for r in replies)  # fmt: skip
        run = Run(spec, compression.name, exact, len(found), sum(m.bytes for m in found), reply["kept_bytes"])
        if "seconds" in reply:
            ratio, parts = since_calibration(cluster.device, pace_of_steps(plan, reply["paces"], reply["slowest"]))
            run = _timed(run, reply, exchange, compression, replace_pace(pace, ratio or 1.0, parts))
        runs.append(run)
    return runs


def replace_pace(pace: Pace, ratio: float, parts: Mapping[str, float]) -> tuple[Cluster, float]:
    """The cluster at this pace, also where no anchors wait."""
    return replace(pace, anchors=_KNOWN).at(ratio, parts, slowest=True), ratio


_KNOWN: Any = object()  # stands for anchors whose ratio is known already


def _waited(load: Load) -> Load:
    """The same work where the thread that computes waits for every message."""
    return Load(encode=load.encode + load.between + load.decode + load.first + load.second)


def _key(message: Message) -> tuple[str, int]:
    return message.kind, message.bytes


def _timed(run: Run, reply: dict[str, Any], exchange: Exchange, compression: Compression,
           at: tuple[Cluster, float]) -> Run:  # fmt: skip
    choice, size = Choice(Scheme("ring"), compression), exchange.plan.bucket_bytes
    paced = Exchange(exchange.graph, exchange.plan, at[0])
    steps = []
    for one in (exchange, paced):
        work = one.work(size)
        loads = [one.load(choice, b) for b in work.buckets]
        if compression.kind == "powersgd":
            loads = [_waited(load) for load in loads]
        steps.append(step_seconds(work, loads))
    loads = [paced.load(choice, b) for b in paced.work(size).buckets]
    return replace(
        run, measured=statistics.median(reply["seconds"]), predicted=steps[1], before=steps[0],
        codec_measured=reply["codec"], codec_predicted=sum(x.encode + x.between + x.decode for x in loads),
        steps=len(reply["seconds"]), pace=at[1],
    )  # fmt: skip


def report(runs: Sequence[Run], command: str) -> str:
    """Markdown: bytes, seconds, who is quicker."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    lines = [
        "# Compressed gradients on this machine", "",
        f"Command: `{command}`; commit {commit.strip() or 'unknown'}; {platform.system()}, 2 ranks, gloo.", "",
        "Bytes and memory are compared with the collectives that were issued and the tensors that the hooks keep, on "
        "every rank. Steps: median seconds; predicted at the pace of the anchor beside these steps (in brackets: "
        "at the calibration's pace). Codes: seconds of the hooks a step when nothing is sent.", "",
        "| model | compression | exact | messages | bytes | kept | step measured | predicted | error "
        "| codes measured | predicted | pace | steps |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_row(r) for r in runs]
    timed = [r for r in runs if r.measured == r.measured]
    if timed:
        errors = [abs(r.predicted / r.measured - 1) for r in timed]
        before = [abs(r.before / r.measured - 1) for r in timed]
        codes = [abs(r.codec_predicted / r.codec_measured - 1) for r in timed if r.compression != "none"]
        means = [f"{statistics.fmean(e):.1%}" for e in (errors, before, codes)]
        lines += ["", f"Mean error of steps {means[0]} at their pace, {means[1]} at the calibration's; of encoding and "
                  f"decoding {means[2]}. PowerSGD's messages are waited for one by one (gloo runs callbacks in threads "
                  "of its own, where they block each other), and are predicted so."]  # fmt: skip
        lines += ["", *_sides(timed)]
    return "\n".join(lines) + "\n"


def _row(r: Run) -> str:
    return (
        f"| {r.model.partition(':')[0]} | {r.compression} | {'yes' if r.exact else 'NO'} | {r.messages} "
        f"| {r.wire_bytes:,} | {r.kept_bytes:,} | {r.measured * 1e3:.1f} ms | {r.predicted * 1e3:.1f} "
        f"({r.before * 1e3:.1f}) ms | {r.predicted / r.measured - 1:+.1%} | {r.codec_measured * 1e3:.2f} ms "
        f"| {r.codec_predicted * 1e3:.2f} ms | {r.pace:.2f} | {r.steps} |"
    )


def _sides(runs: Sequence[Run]) -> list[str]:
    """Whether a compression is predicted on the right side of no compression."""
    said = []
    for model in dict.fromkeys(r.model for r in runs):
        plain = next(r for r in runs if r.model == model and r.compression == "none")
        others = [r for r in runs if r.model == model and r is not plain]
        right = [r for r in others if (r.measured < plain.measured) == (r.predicted < plain.predicted)]
        wrong = ", ".join(r.compression for r in others if r not in right) or "none"
        said.append(f"{model.partition(':')[0]}: {len(right)} of {len(others)} compressions are on the side of the "
                    f"uncompressed step where they were predicted (on the wrong one: {wrong}).")  # fmt: skip
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.compression_runs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="model specs")
    options = parser.parse_args(arguments)
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from validation.report_files import assembled

    cluster, runs = load_cluster("local"), list[Run]()
    for spec in options.models:
        workload = load_workload(spec)
        graph = trace_workload(workload)
        plan = ParallelPlan(global_batch=2 * workload.batch_size, dp=2, bucket_bytes=4 * 2**20)
        runs += compared(spec, graph, plan, cluster, execute(spec, plan, COMPRESSIONS, timed=True))
    text = report(runs, "python -m validation.compression_runs --out reports/compression")
    with assembled(options.out, MARKER) as folder:
        from dataclasses import asdict

        (folder / MARKER).write_text(json.dumps([asdict(r) for r in runs], indent=1) + "\n")
        (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
