"""Chrome trace JSON of a timeline, for ui.perfetto.dev: a process per rank, a thread per server of a resource."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np

from simulator.order import Ints
from simulator.timeline import Timeline


def write_perfetto(timeline: Timeline, path: str | Path) -> None:
    """Writes the trace; the file appears whole or not at all."""
    target = Path(path)
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(trace_events(timeline)):
                file.write((",\n" if number else "") + json.dumps(event))
            file.write("\n]}\n")
        os.chmod(partial, 0o644)  # mkstemp lets only the owner read
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Metadata events (names of processes and threads), then one complete event ("X") per task, by start."""
    program = timeline.program
    names = [*(item.name for item in program.resources), "unbound"]
    homes = np.array([*(item.rank for item in program.resources), -1])
    # A task without a resource is shown with its own rank, the others where their resource is.
    ranks = np.where(program.resource < 0, program.rank, homes[program.resource])
    lanes = server_of(timeline)
    keys = sorted({*zip(ranks.tolist(), program.resource.tolist(), lanes.tolist())})
    threads = {key: number for number, key in enumerate(keys, start=1)}  # unique over all processes; 0 is reserved
    for rank in sorted({rank for rank, _, _ in keys}):
        yield _metadata("process_name", rank, 0, {"name": f"rank {rank}" if rank >= 0 else "shared"})
        yield _metadata("process_sort_index", rank, 0, {"sort_index": rank if rank >= 0 else 2**20})
    for (rank, r, lane), thread in threads.items():
        yield _metadata("thread_name", rank, thread, {"name": names[r] + (f" #{lane + 1}" if lane else "")})
        yield _metadata("thread_sort_index", rank, thread, {"sort_index": thread})
    # Whole nanoseconds: neighbours that touch must not overlap after rounding, or Perfetto nests them.
    start = np.rint(timeline.start * 1e9).astype(np.int64)
    length = np.rint(timeline.finish * 1e9).astype(np.int64) - start
    for i in np.argsort(start, kind="stable").tolist():
        rank, r = int(ranks[i]), int(program.resource[i])
        yield {
            "name": program.labels[i],
            "cat": program.categories[program.category[i]],
            "ph": "X",
            "ts": int(start[i]) / 1000,
            "dur": int(length[i]) / 1000,
            "pid": _process(rank),
            "tid": threads[rank, r, int(lanes[i])],
            "args": {"task": i, "rank": int(program.rank[i])},
        }


def _process(rank: int) -> int:
    """Process 0 is special to trace viewers: "shared" (rank -1) is 1, rank 0 is 2."""
    return rank + 2


def _metadata(name: str, rank: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _process(rank), "tid": thread, "args": args}


def server_of(timeline: Timeline) -> Ints:
    """Server of its resource that runs each task: i4[n], counting from 0, the lowest that is free.

    Slices of one thread may not overlap, so a resource of capacity 3 needs three threads.
    """
    program = timeline.program
    lanes = np.zeros(len(program), np.int32)
    wide = np.array([*(item.capacity > 1 for item in program.resources), True])[program.resource]
    tasks = np.flatnonzero(wide)
    order = tasks[np.lexsort((tasks, timeline.finish[tasks], timeline.start[tasks]))]
    busy: dict[tuple[int, int], list[tuple[float, int]]] = {}
    free: dict[tuple[int, int], list[int]] = {}
    for i in order.tolist():
        r = int(program.resource[i])
        key = (r, int(program.rank[i]) if r < 0 else 0)
        running, idle = busy.setdefault(key, []), free.setdefault(key, [])
        while running and running[0][0] <= timeline.start[i]:
            heappush(idle, heappop(running)[1])
        lanes[i] = heappop(idle) if idle else len(running)
        heappush(running, (float(timeline.finish[i]), int(lanes[i])))
    return lanes
