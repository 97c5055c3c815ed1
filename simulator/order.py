"""Edges: compressed rows, and a cycle where there is one. Edge lists are two arrays [edges], source and target."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Shorts = npt.NDArray[np.int16]


def compressed_rows(source: Ints, target: Ints, n: int) -> tuple[Ints, Ints]:
    """(pointer [n + 1], targets [edges]): the targets of source a are targets[pointer[a]:pointer[a + 1]], ascending."""
    pointer = np.zeros(n + 1, np.int32)
    np.cumsum(np.bincount(source, minlength=n), out=pointer[1:])
    # One sort of one combined key is several times faster than a lexsort of two.
    key = source.astype(np.int64) * max(n, 1) + target
    key.sort()
    return pointer, (key % max(n, 1)).astype(np.int32)


def edge_sources(pointer: Ints) -> Ints:
    """Source of every edge of compressed rows: [edges]."""
    return np.repeat(np.arange(pointer.size - 1, dtype=np.int32), np.diff(pointer))


def predecessors(pointer: Ints, succ: Ints) -> tuple[Ints, Ints]:
    """The same edges in compressed rows by target: (pointer [n + 1], sources [edges])."""
    return compressed_rows(succ, edge_sources(pointer), pointer.size - 1)


def find_cycle(pointer: Ints, succ: Ints) -> list[int]:
    """Nodes of one cycle in edge order, or [] where there is none. Immediate where every edge ascends."""
    if bool((succ > edge_sources(pointer)).all()):
        return []
    left = _unfinished(pointer, succ)
    return _walk_back(pointer, succ, left) if left else []


def _unfinished(pointer: Ints, succ: Ints) -> set[int]:
    """Nodes that never become ready: those on a cycle or behind one."""
    rows, targets = pointer.tolist(), succ.tolist()
    n = pointer.size - 1
    waiting = np.bincount(succ, minlength=n).tolist()
    ready = [i for i in range(n) if waiting[i] == 0]
    left = set(range(n))
    while ready:
        node = ready.pop()
        left.discard(node)
        for target in targets[rows[node] : rows[node + 1]]:
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    return left


def _walk_back(pointer: Ints, succ: Ints, left: set[int]) -> list[int]:
    """From any node of `left`, each of which has a predecessor in `left`, back until a node repeats."""
    before = {int(b): int(a) for a, b in zip(edge_sources(pointer), succ) if int(a) in left and int(b) in left}
    path, node = [], min(left)
    while node not in path:
        path.append(node)
        node = before[node]
    return path[path.index(node) :][::-1]
