"""What a law leaves, learned on the calibration half: a smooth table over log shape, stored in one byte a node.

Values are ln(measured / law) in steps of 1 %. Between nodes they are interpolated linearly in the logs of batches, m, n
and k; beyond the outer nodes the table fades, so that far outside only the law speaks.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.compiled import compiled

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
STEP = 0.01  # ln units of one step of the stored bytes
FADE = float(np.log(4.0))  # the table has faded where the dims are off by this factor in all
LINE = 100  # characters of one line of the stored text


@dataclass(frozen=True, slots=True)
class Correction:
    """axes: nodes in ln of batches, m, n, k. values: ln(measured / law) at the nodes."""

    axes: tuple[Array, ...]
    values: Array


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A correction as the compiled code takes it: the nodes of all axes in one row, where each axis begins and ends,
    and the values."""

    nodes: Array
    ends: Indices
    values: Array


def packed(table: Correction) -> Packed:
    """The table for `factors_of`."""
    ends = np.cumsum([0, *(len(axis) for axis in table.axes)])
    return Packed(np.concatenate(table.axes), ends, np.ascontiguousarray(table.values, float))


def corners(axes: Sequence[Array], logs: Array) -> tuple[Indices, Array]:
    """Flat indices and weights of the nodes around each point: (points, corners) each; weights add up to 1."""
    ends = np.cumsum([0, *(len(axis) for axis in axes)])
    return _corners(np.concatenate(axes), ends, np.ascontiguousarray(logs, float))


def factors(table: Correction, dims: Array) -> Array:
    """measured / law that the table expects for rows of (batches, m, n, k); 1 where one of them is 0."""
    return factors_of(packed(table), dims)


def factors_of(table: Packed, dims: Array) -> Array:
    """The same by a table that is packed already."""
    return _factors(table.nodes, table.ends, table.values, dims)


@compiled
def _factors(nodes: Array, ends: Indices, values: Array, dims: Array) -> Array:
    logs = np.log(np.maximum(dims, 1.0))
    indices, weights = _corners(nodes, ends, logs)
    found = np.empty(len(logs))
    for i in range(len(logs)):
        value = beyond = 0.0
        for j in range(indices.shape[1]):
            value += values[indices[i, j]] * weights[i, j]
        for a in range(len(ends) - 1):
            x = logs[i, a]
            beyond += max(x - nodes[ends[a + 1] - 1], 0.0) + max(nodes[ends[a]] - x, 0.0)
        found[i] = np.exp(value * min(max(1 - beyond / FADE, 0.0), 1.0)) if dims[i].min() > 0 else 1.0
    return found


@compiled
def _corners(nodes: Array, ends: Indices, logs: Array) -> tuple[Indices, Array]:
    """An axis of one node has no width, so no corners of its own."""
    count = 1
    for a in range(len(ends) - 1):
        count *= 2 if ends[a + 1] - ends[a] > 1 else 1
    indices, weights = np.zeros((len(logs), count), np.int64), np.ones((len(logs), count))
    for i in range(len(logs)):
        many = 1  # corners so far
        for a in range(len(ends) - 1):
            axis = nodes[ends[a] : ends[a + 1]]
            x, size = logs[i, a], len(axis)
            if size == 1:
                continue
            low = min(max(np.searchsorted(axis, x, side="right") - 1, 0), size - 2)
            width = axis[low + 1] - axis[low]
            share = min(max((x - axis[low]) / (width if width > 0 else 1.0), 0.0), 1.0)
            for j in range(many - 1, -1, -1):
                index, weight = indices[i, j] * size + low, weights[i, j]
                indices[i, 2 * j], weights[i, 2 * j] = index, weight * (1 - share)
                indices[i, 2 * j + 1], weights[i, 2 * j + 1] = index + 1, weight * share
            many *= 2
    return indices, weights


def section_of(table: Correction) -> dict[str, Any]:
    """The table as entries of a kernels file's section."""
    steps = np.clip(np.rint(table.values / STEP), -127, 127).astype(np.int8)
    text = base64.b85encode(zlib.compress(steps.tobytes(), 9)).decode()
    names = ("nodes_batches", "nodes_m", "nodes_n", "nodes_k")
    nodes = {name: [int(x) for x in np.rint(np.exp(axis))] for name, axis in zip(names, table.axes)}
    return nodes | {"correction": [text[i : i + LINE] for i in range(0, len(text), LINE)]}


def correction_from(section: dict[str, Any]) -> Correction | None:
    """The table of a section, None where it has none."""
    if not section.get("correction"):
        return None
    axes = tuple(np.log(np.array(section[f"nodes_{name}"], float)) for name in ("batches", "m", "n", "k"))
    raw = zlib.decompress(base64.b85decode("".join(section["correction"])))
    return Correction(axes, np.frombuffer(raw, np.int8).astype(float) * STEP)
