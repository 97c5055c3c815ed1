"""Peak memory of a traced step: the storages' lifetimes replayed, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opgraph.graph import OpGraph, Role


@dataclass(frozen=True, slots=True)
class MemoryReplay:
    """Live bytes over a step. `live[i]` is what is allocated while op i - 1 has run and op i has not (op -1 is the
    state before the step), at its highest: op i's outputs exist and what it frees is still there."""

    live: NDArray[np.int64]
    peak_bytes: int
    peak_op: int
    by_role: dict[Role, int]  # bytes at the peak


def replay_memory(graph: OpGraph) -> MemoryReplay:
    """Replays births and deaths of all storages. Bytes are the tensors' own, before any allocator's rounding."""
    count = len(graph.ops)
    size = np.array([s.bytes for s in graph.storages], np.int64)
    birth = np.array([s.birth for s in graph.storages], np.int64)
    death = np.array([s.death for s in graph.storages], np.int64)
    change = np.zeros(count + 3, np.int64)
    np.add.at(change, birth + 1, size)
    np.add.at(change, np.maximum(death, birth) + 2, -size)  # a storage still lives while the op that frees it runs
    live = np.cumsum(change)[: count + 1]
    peak = int(np.argmax(live))
    at_peak = (birth + 1 <= peak) & (np.maximum(death, birth) + 2 > peak)
    by_role: dict[Role, int] = {}
    for storage in np.flatnonzero(at_peak):
        role = graph.storages[storage].role
        by_role[role] = by_role.get(role, 0) + int(size[storage])
    return MemoryReplay(live, int(live[peak]), peak - 1, by_role)
