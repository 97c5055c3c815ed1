"""What a law leaves, learned on the calibration half: a smooth table over log shape, stored in one byte a node.

Values are ln(measured / law) in steps of 1 %. Between nodes they are interpolated linearly in the logs of batches, m, n
and k; beyond the outer nodes the table fades, so that far outside only the law speaks.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STEP = 0.01  # ln units of one step of the stored bytes
FADE = float(np.log(4.0))  # the table has faded where the dims are off by this factor in all
LINE = 100  # characters of one line of the stored text


@dataclass(frozen=True, slots=True)
class Correction:
    """axes: nodes in ln of batches, m, n, k. values: ln(measured / law) at the nodes."""

    axes: tuple[Array, ...]
    values: Array


def corners(axes: Sequence[Array], logs: Array) -> tuple[NDArray[np.int64], Array]:
    """Flat indices and weights of the nodes around each point: (points, corners) each; weights add up to 1."""
    lower, share = [], []
    for axis, x in zip(axes, logs.T):
        i = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, max(len(axis) - 2, 0))
        width = axis[np.minimum(i + 1, len(axis) - 1)] - axis[i]
        lower.append(i)
        share.append(np.clip((x - axis[i]) / np.where(width > 0, width, 1.0), 0.0, 1.0))
    indices, weights = [], []
    for corner in product(*((0, 1) if len(axis) > 1 else (0,) for axis in axes)):
        index, weight = np.zeros(len(logs), np.int64), np.ones(len(logs))
        for bit, axis, i, f in zip(corner, axes, lower, share):
            index = index * len(axis) + i + bit
            weight = weight * (f if bit else 1 - f if len(axis) > 1 else 1.0)
        indices.append(index)
        weights.append(weight)
    return np.stack(indices, axis=1), np.stack(weights, axis=1)


def factors(table: Correction, dims: Array) -> Array:
    """measured / law that the table expects for rows of (batches, m, n, k)."""
    logs = np.log(dims)
    indices, weights = corners(table.axes, logs)
    value = (table.values[indices] * weights).sum(axis=1)
    beyond = np.zeros(len(dims))
    for axis, x in zip(table.axes, logs.T):
        beyond += np.maximum(x - axis[-1], 0.0) + np.maximum(axis[0] - x, 0.0)
    result: Array = np.exp(value * np.clip(1 - beyond / FADE, 0.0, 1.0))
    return result


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
