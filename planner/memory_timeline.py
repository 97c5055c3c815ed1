"""The memory of one rank over its first training steps: who holds what, what torch's allocator reserves for it, and the
same as a snapshot that torch's own viewer opens."""

from __future__ import annotations

import csv
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.allocator import (
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACE_HOPPER,
    LARGE_SEGMENT,
    SMALL_SEGMENT,
    AllocatorReplay,
    CachingAllocator,
    replay,
)
from planner.memory_ledger import CATEGORIES, Event

STEPS = 2  # the optimizer's state appears in the first one, from the second on every step is the same
MOST_EVENTS = 500_000  # beyond that a reserved size is not computed unasked


@dataclass(frozen=True, slots=True)
class MemoryTimeline:
    """Allocations and frees of one rank, in order, over `STEPS` steps.

    events: what happened. steps: of which step (0: before the first). live: bytes after each event, a column per
    category of `CATEGORIES`. allocator: what the caching allocator makes of it; None on devices without one (CPUs).
    """

    rank: int
    events: tuple[Event, ...]
    steps: NDArray[np.int64]
    live: NDArray[np.int64]
    allocator: CachingAllocator | None = None
    replayed: AllocatorReplay | None = None

    @property
    def total(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.live.sum(axis=1)
        return found

    @property
    def peak_reserved(self) -> int:
        """Bytes that the allocator holds from the device at most; 0 on devices without one."""
        return self.replayed.peak_reserved if self.replayed is not None else 0


def memory_timeline(
    events: tuple[Event, ...], rank: int = 0, allocator: CachingAllocator | None = None, steps: int = STEPS
) -> MemoryTimeline:
    """The timeline of the events of one steady step (`planner.memory.memory_events`), from the first step on.

    With an allocator they run through it, one after another on one stream.
    """
    found, of_step = _from_the_start(events, steps)
    change = np.zeros((len(found), len(CATEGORIES)), np.int64)
    column = {c: i for i, c in enumerate(CATEGORIES)}
    for i, e in enumerate(found):
        change[i, column[e.category]] = e.bytes
    replayed = replay([e.block for e in found], [e.bytes for e in found], allocator) if allocator else None
    return MemoryTimeline(
        rank, tuple(found), np.array(of_step, np.int64), np.cumsum(change, axis=0), allocator, replayed
    )


def reserved_bytes(events: tuple[Event, ...], device: str, capacity: int = 0, expandable: bool = False) -> int:
    """Bytes that torch reserves on a CUDA device for these events, the workspace of cuBLAS included.

    capacity: bytes of the device (0: no end); where they do not suffice, what was reserved when they ran out.
    """
    allocator = CachingAllocator(capacity, expandable)
    return memory_timeline(with_cublas(events, device), 0, allocator).peak_reserved


def with_cublas(events: tuple[Event, ...], device: str) -> tuple[Event, ...]:
    """The events with cuBLAS's workspace, which is made once, with the first product, and kept."""
    hopper = any(mark in device.lower() for mark in ("h100", "h200", "h800", "h20", "gh200", "b200", "b300", "gb"))
    size = CUBLAS_WORKSPACE_HOPPER if hopper else CUBLAS_WORKSPACE
    rest = sum(e.phase == "rest" for e in events)
    number = max((e.block for e in events), default=-1) + 1
    workspace = Event(number, size, "workspace", "rest", 0, "cublas", "")
    return (*events[:rest], workspace, *events[rest:])


def _from_the_start(events: tuple[Event, ...], steps: int) -> tuple[list[Event], list[int]]:
    """Parameters first, then step after step; the optimizer's state is made by the first update, and what a step still
    holds at its end (gradients) is freed."""
    rest = [e for e in events if e.phase == "rest"]
    step = [e for e in events if e.phase != "rest"]
    states = [replace(e, phase="optimizer") for e in rest if e.category == "optimizer_state"]
    found = [e for e in rest if e.category != "optimizer_state"]
    of_step = [0] * len(found)
    update = next((i for i, e in enumerate(step) if e.phase == "optimizer"), len(step))
    next_block = max((e.block for e in events), default=-1) + 1
    for number in range(1, steps + 1):
        numbered = [replace(e, block=e.block + number * next_block) for e in step]
        made = states if number == 1 else []
        before = len(found)
        found += [*numbered[:update], *made, *numbered[update:], *_leftovers(numbered)]
        of_step += [number] * (len(found) - before)
    return found, of_step


def _leftovers(step: list[Event]) -> list[Event]:
    held: dict[int, Event] = {}
    for e in step:
        if e.bytes > 0:
            held[e.block] = e
        else:
            held.pop(e.block, None)
    return [replace(e, bytes=-e.bytes, phase="zero_grad", op="", module="") for e in held.values()]


# -- files --------------------------------------------------------------------------------------------------


def write_csv(timeline: MemoryTimeline, path: Path) -> None:
    """A row per event: what happened, and the bytes of every category after it."""
    reserved = timeline.replayed.reserved if timeline.replayed is not None else None
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([
            "step", "phase", "micro_batch", "op", "module", "category", "bytes", "total",
            *CATEGORIES, *(["reserved"] if reserved is not None else []),
        ])  # fmt: skip
        for i, (e, total) in enumerate(zip(timeline.events, timeline.total)):
            if reserved is not None and i == len(reserved):
                break  # out of memory
            where = (int(timeline.steps[i]), e.phase, e.micro, e.op, e.module, e.category, e.bytes, int(total))
            rows.writerow([*where, *timeline.live[i].tolist(), *([int(reserved[i])] if reserved is not None else [])])


def snapshot(timeline: MemoryTimeline) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would return on this device after these steps: its segments, and the trace
    of every allocation, for `torch.cuda._memory_viz` and pytorch.org/memory_viz. Frames name op and module.

    ValueError on devices without a caching allocator.
    """
    if timeline.allocator is None or timeline.replayed is None:
        raise ValueError("only CUDA devices have the allocator that a snapshot shows; write .csv or .png for CPUs")
    held: dict[int, tuple[Event, int]] = {}
    trace: list[dict[str, Any]] = []
    reserved = 0
    for i, (address, now) in enumerate(zip(timeline.replayed.addresses, timeline.replayed.reserved)):
        e = timeline.events[i]
        if now > reserved:
            small = e.bytes <= SMALL_SEGMENT // 2
            page = SMALL_SEGMENT if small else LARGE_SEGMENT
            start = int(address) // page * page if timeline.allocator.expandable else int(address)
            kind = "segment_map" if timeline.allocator.expandable else "segment_alloc"
            trace.append(_entry(i, kind, start, int(now) - reserved, e))
        reserved = int(now)
        if address < 0:
            continue
        if e.bytes > 0:
            held[int(address)] = (e, e.bytes)
            trace.append(_entry(i, "alloc", int(address), e.bytes, e))
        else:
            made, size = held.pop(int(address))
            trace += [_entry(i, kind, int(address), size, made) for kind in ("free_requested", "free_completed")]
    segments = [_segment(timeline.allocator, address, held) for address in timeline.allocator.segments]
    return {
        "segments": segments,
        "device_traces": [trace],
        "external_annotations": [],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True" if timeline.allocator.expandable else "",
            "expandable_segments": timeline.allocator.expandable,
        },
    }


def write_snapshot(timeline: MemoryTimeline, path: Path) -> None:
    """The snapshot as the pickle that `python -m torch.cuda._memory_viz trace_plot FILE` reads."""
    with path.open("wb") as file:
        pickle.dump(snapshot(timeline), file)


def _frames(e: Event) -> list[dict[str, Any]]:
    where = f"{e.phase} micro-batch {e.micro}" if e.phase in ("forward", "backward", "recompute") else e.phase
    return [
        {"name": e.op or e.category, "filename": e.module or "<step>", "line": 0},
        {"name": e.category, "filename": where, "line": 0},
    ]


def _entry(at: int, action: str, address: int, size: int, e: Event) -> dict[str, Any]:
    return {
        "action": action, "addr": address, "size": size, "stream": 0, "time_us": at, "frames": _frames(e),
        "category": e.category,
    }  # fmt: skip


def _segment(allocator: CachingAllocator, address: int, held: dict[int, tuple[Event, int]]) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    block = allocator.segments[address][0] if address in allocator.segments else None
    small = block.small if block is not None else True
    while block is not None:
        if block.mapped:
            used = held.get(block.address) if block.requested else None
            blocks.append({
                "address": block.address, "size": block.size, "requested_size": block.requested,
                "state": "active_allocated" if block.requested else "inactive",
                "frames": _frames(used[0]) if used else [],
            })  # fmt: skip
        block = block.after
    active = sum(b["size"] for b in blocks if b["state"] == "active_allocated")
    return {
        "device": 0, "address": address, "total_size": sum(b["size"] for b in blocks), "allocated_size": active,
        "active_size": active, "requested_size": sum(b["requested_size"] for b in blocks), "stream": 0,
        "segment_type": "small" if small else "large", "segment_pool_id": (0, 0),
        "is_expandable": allocator.expandable, "frames": [], "blocks": blocks,
    }  # fmt: skip
