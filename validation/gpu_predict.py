"""Predictions of the GPU suite's steps, written before any step is measured, with several sets of constants.

catalogue: the device as every user has it. calibrated: with this run's constants (`validation.gpu_fit`). lent: with
those of another machine's run. They take the road of any plan: trace, lower, simulate, with the host thread in front of
the device. A row that was measured already is never predicted again with what its machine gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.allocator import CachingAllocator
from costmodels.cluster import Cluster, Link
from costmodels.device import Device
from costmodels.families import FREE, family
from costmodels.ops import price_many
from costmodels.rounding import in_precision
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.models import load_workload
from opgraph.workload import Workload
from planner.host_queue import run_of
from planner.host_thread import eager_costs
from planner.lower import prepared_graph
from planner.memory import memory_events
from planner.memory_timeline import MOST_EVENTS, memory_timeline, with_cublas
from planner.plan import ParallelPlan
from planner.predict import Prediction, predict
from planner.runtime import stage_segments
from planner.runtime_stage import prepare
from planner.script import Work
from planner.software import HostCosts
from validation.gpu_environment import commit
from validation.gpu_files import Budget, Row, Rows, read_json, sentence, utc
from validation.gpu_fit import calibrated_device, catalogue_device, measured_rows
from validation.gpu_models import Run

NEEDED = 30.0  # seconds that must be left for another model: the slowest trace took 6 on two cores
LINK = Link("none", 1e11, 1e-6, "a single device sends nothing")


def predict_runs(
    out: Path, chosen: Sequence[Run], lent: Path | None, budget: Budget, quick: bool, say: Callable[[str], None]
) -> list[str]:
    """Adds what predictions.json lacks; returns the rows that are left."""
    devices = devices_of(out, lent)
    rows, measured = Rows(out / "predictions.json"), Rows(out / "steps.json").rows
    wanted = [r for r in chosen if set(devices) - set(rows.rows.get(r.key, {}).get("predictions", {}))]
    late = [r.key for r in wanted if r.key in measured and "calibrated" not in _sets(rows, r)]
    if late:
        raise ValueError(f"{late[0]} was measured before it was predicted; start again in a new folder")
    graphs: dict[tuple[str, str], OpGraph] = {}
    for i, run in enumerate(wanted):
        if budget.left < (1.0 if quick else NEEDED):
            return [r.key for r in wanted[i:]]
        row = rows.rows.get(run.key) or {**run.head, "predictions": {}}
        try:
            row = predicted_row(row, run, graphs, devices)
        except ValueError as error:
            row["reason"] = sentence(error)
            row["predictions"] = {name: {"at": utc()} for name in devices}
        rows.add(row)
        say(f"predicted {run.key}: {shown(row)}")
    return []


def shown(row: Row) -> str:
    """A row's predictions in a few words."""
    found = {name: p.get("seconds") for name, p in row["predictions"].items()}
    return row.get("reason") or ", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in found.items() if s)


def _sets(rows: Rows, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = rows.rows.get(run.key, {}).get("predictions", {})
    return found


def devices_of(out: Path, lent: Path | None) -> dict[str, Device]:
    """The device by set of constants."""
    about = read_json(out / "environment.json")
    plain, own = catalogue_device(about, measured_rows(out)), calibrated_device(out)
    found = {"catalogue": plain, "calibrated": own}
    if lent is not None:
        theirs = calibrated_device(lent)
        note = f"constants of {theirs.name}"
        found["lent"] = replace(plain, kernels=theirs.kernels, host=theirs.host, notes=(note,), cache={})
    return found


def predicted_row(row: Row, run: Run, graphs: dict[tuple[str, str], OpGraph], devices: dict[str, Device]) -> Row:
    """The row with what every set of constants says, and with the memory, which constants do not change."""
    workload = load_workload(run.spec)
    plan = run.plan(workload)
    graph = traced(run, workload, plan, graphs)
    if "memory" not in row:  # what a compiled step keeps is not predicted
        row["memory"] = {} if run.variant.compiled else memory_of(graph, plan, next(iter(devices.values())).name)
    for name, device in devices.items():
        if name not in row["predictions"]:
            said = step_of(graph, plan, device, run.variant.compiled)
            row["predictions"][name] = {"at": utc(), "commit": commit(), **said}
    return row


def traced(run: Run, workload: Workload, plan: ParallelPlan, graphs: dict[tuple[str, str], OpGraph]) -> OpGraph:
    """The graph of a model and precision: one for all batches, and of one model at a time."""
    key = run.model.spec, "bf16" if plan.precision == "bf16" else "fp32"  # tf32 is a switch of the device
    if key not in graphs:
        if any(spec != run.model.spec for spec, _ in graphs):
            graphs.clear()
        graphs[key] = trace_workload(workload, precision=key[1]).run_by("gpu")
    return replace(graphs[key], precision=plan.precision)


def step_of(graph: OpGraph, plan: ParallelPlan, device: Device, compiled: bool) -> dict[str, Any]:
    """Seconds of the step and their interval, what device and host alone would take (for a compiled step, what
    computing and waiting for the host make of it), and what the prices rest on."""
    work = works(graph, plan)
    cluster = in_precision(Cluster(device.name, device, 1, 1, LINK, LINK), plan.precision)
    device = cluster.device
    prediction = predict(graph, plan, cluster, compiled=compiled)
    if compiled:
        parts = prediction.breakdown
        return _said(prediction, prediction.step_seconds, parts["compute"], parts["host"])
    costs = eager_costs(device)
    seconds = np.array([p.seconds for p in price_many(device, [w.shape for w in work])])
    queue = run_of(host_seconds(work, costs), seconds)
    # On a GPU the prediction has the host thread already; where it has none (a CPU in tests) the queue brings it.
    return _said(prediction, max(prediction.step_seconds, queue.alone), queue.device, queue.host)


def _said(prediction: Prediction, step: float, device: float, host: float) -> dict[str, Any]:
    low, high = (bound / prediction.step_seconds * step for bound in prediction.interval)
    return {
        "seconds": step, "low": low, "high": high, "device_seconds": device, "host_seconds": host,
        "shares": prediction.shares, "unpriced": prediction.unpriced,
    }  # fmt: skip


def works(graph: OpGraph, plan: ParallelPlan) -> list[Work]:
    """Every op of the step in launch order."""
    step, layout, stages = prepared_graph(graph, plan)
    segments = stage_segments(prepare(step, plan, layout, stages, 0))
    return [item for segment in segments for item in segment if isinstance(item, Work)]


def host_seconds(work: Sequence[Work], costs: HostCosts) -> np.ndarray:
    """Host seconds in front of every op: views launch nothing, a module is called where the module changes, backward
    runs without Python."""
    found, module = [], ""
    for item in work:
        free = item.is_view or family(item.shape.name) in FREE
        cost = costs.view if free else costs.backward if item.phase == "backward" else costs.op
        if item.phase in ("forward", "recompute") and item.module != module:
            cost += costs.module
        module = item.module
        found.append(cost)
    return np.array(found)


def memory_of(graph: OpGraph, plan: ParallelPlan, device: str) -> dict[str, int]:
    """peak: tensor bytes; allocated, reserved: as `torch.cuda.max_memory_*` count them, cuBLAS's workspace included."""
    step, layout, stages = prepared_graph(graph, plan)
    events = memory_events((prepare(step, plan, layout, stages, 0),), plan, 0, "nccl")
    live = np.cumsum([e.bytes for e in events])
    found = {"peak": int(live.max(initial=0))}
    if len(events) <= MOST_EVENTS:
        timeline = memory_timeline(with_cublas(events, device), 0, CachingAllocator())
        assert timeline.replayed is not None, "an allocator was given"
        found |= {"allocated": timeline.replayed.peak_allocated, "reserved": timeline.peak_reserved}
    return found
