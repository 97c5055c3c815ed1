"""What `parplan simulate` says about memory: by category, as the CUDA allocator reserves it, event by event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parplan.console import percent, size

SUFFIXES = (".csv", ".png", ".pickle")


def memory_data(graph: Any, prediction: Any, cluster: Any, path: Path | None, title: str) -> dict[str, Any]:
    """The JSON of the fullest rank's memory, in bytes; writes the timeline, plot or snapshot to `path`.

    reserved_bytes: what torch's CUDA caching allocator takes from the device, and the same with expandable segments;
    null on CPUs, and where a step has too many allocations to replay them unasked.
    """
    from costmodels.allocator import CachingAllocator
    from planner.memory_timeline import MOST_EVENTS, memory_timeline, with_cublas

    graph = graph.run_by(cluster.device.kind)
    peaks = prediction.peak_bytes
    rank = peaks.index(max(peaks))
    data: dict[str, Any] = {
        "rank": rank, "peak_bytes": max(peaks), "resting_bytes": prediction.resting_bytes,
        "at_peak": prediction.at_peak, "reserved_bytes": None, "reserved_expandable_bytes": None,
        "host_bytes": prediction.host_bytes, "host_pinned_bytes": prediction.host_pinned_bytes,
        "capacity_bytes": prediction.memory_bytes, "offload_peak_bytes": _with_offload(graph, prediction, cluster),
    }  # fmt: skip
    cuda = cluster.backend == "nccl"
    if not cuda and path is None:
        return data
    events = _events(graph, prediction.plan, cluster, rank)
    if not cuda:
        _write(memory_timeline(events, rank), path, title, prediction.memory_bytes)
        return data
    if len(events) > MOST_EVENTS and path is None:
        return data
    events = with_cublas(events, cluster.device.name)
    timeline = memory_timeline(events, rank, CachingAllocator())
    data["reserved_bytes"] = timeline.peak_reserved
    data["reserved_expandable_bytes"] = memory_timeline(events, rank, CachingAllocator(expandable=True)).peak_reserved
    _write(timeline, path, title, prediction.memory_bytes)
    return data


def _events(graph: Any, plan: Any, cluster: Any, rank: int) -> Any:
    from planner.memory import memory_events

    return memory_events(_prepared(graph, plan), plan, rank, cluster.backend)


def _prepared(graph: Any, plan: Any) -> Any:
    from planner.lower import prepared_graph
    from planner.runtime_stage import prepare

    step, layout, stages = prepared_graph(graph, plan)
    return tuple(prepare(step, plan, layout, stages, i) for i in range(plan.pp))


def _with_offload(graph: Any, prediction: Any, cluster: Any) -> int | None:
    """Bytes of the fullest rank of a plan that does not fit, were its shards and optimizer in the host's memory; None
    where it fits, or has no shards to move."""
    from dataclasses import replace

    from planner.memory import peak_bytes
    from planner.offload import is_apart

    plan = prediction.plan
    if prediction.fits or not plan.fully_sharded or "parameters" in plan.offload or not is_apart(cluster):
        return None
    away = replace(plan, offload=(*plan.offload, "parameters"))
    return max(peak_bytes(_prepared(graph, away), away, cluster.backend))


def _write(timeline: Any, path: Path | None, title: str, capacity: int) -> None:
    from planner.memory_timeline import write_csv, write_snapshot
    from validation.report_files import replacing

    if path is None:
        return
    with replacing(path) as partial:
        if path.suffix == ".csv":
            write_csv(timeline, partial)
        elif path.suffix == ".pickle":
            write_snapshot(timeline, partial)
        else:
            from parplan.memory_plot import plot_memory

            plot_memory(timeline, title, partial, capacity)


def memory_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table that people read: the categories at the peak, and what is reserved."""
    peak = max(data["peak_bytes"], 1)
    rows = [
        (f"  {name.replace('_', ' ')}", f"{size(held)} ({percent(held / peak)})")
        for name, held in sorted(data["at_peak"].items(), key=lambda item: -item[1]) if held
    ]  # fmt: skip
    if (away := data["offload_peak_bytes"]) is not None:
        verdict = "would fit" if away <= data["capacity_bytes"] else "would not fit either"
        rows.append(("  with offload", f"{size(away)} of {size(data['capacity_bytes'])}, {verdict}"))
    if data["host_bytes"]:
        parts = ", ".join(f"{name.replace('_', ' ')} {size(held)}" for name, held in data["host_bytes"].items())
        rows.append(("host memory", f"{size(sum(data['host_bytes'].values()))} a rank ({parts}), "
                                    f"{size(data['host_pinned_bytes'])} pinned"))
    if data["reserved_bytes"] is not None:
        expandable = size(data["reserved_expandable_bytes"])
        rows.append(("reserved", f"{size(data['reserved_bytes'])} ({expandable} with expandable segments)"))
    return rows
