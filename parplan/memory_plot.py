"""A rank's memory as a picture: who holds how much after every allocation and free."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parplan.console import size

if TYPE_CHECKING:
    from planner.memory_timeline import MemoryTimeline

COLOURS = {
    "parameters": "#0072B2", "optimizer_state": "#56B4E9", "gradients": "#009E73", "activations": "#D55E00",
    "workspace": "#CC79A7", "communication": "#E69F00", "inputs": "#5B5B5B",
}  # fmt: skip
MOST_POINTS = 4000  # a longer timeline is drawn by the highest of neighbouring events


def plot_memory(timeline: MemoryTimeline, title: str, path: Path, capacity: int = 0) -> None:
    """Writes the picture: bytes by category, stacked, and what the allocator has reserved.

    capacity: bytes of the device, drawn where they are within three times the peak (0: not drawn).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from planner.memory_ledger import CATEGORIES

    chosen = _highest(timeline.total)
    unit, scale = (("GiB", 2**30) if timeline.total.max() >= 2**30 else ("MiB", 2**20))
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    columns = [CATEGORIES.index(c) for c in COLOURS]
    names = [c.replace("_", " ") for c in COLOURS]
    layers = timeline.live[chosen][:, columns].T / scale
    axes.stackplot(chosen, layers, colors=COLOURS.values(), labels=names, step="post")
    if timeline.replayed is not None:
        reserved = timeline.replayed.reserved[chosen[chosen < len(timeline.replayed.reserved)]] / scale
        axes.step(chosen[: len(reserved)], reserved, color="black", where="post", linewidth=1.2, label="reserved")
    highest = max(int(timeline.total.max()), timeline.peak_reserved)
    if capacity and capacity < 3 * highest:
        axes.axhline(capacity / scale, color="#b00020", linestyle="--", linewidth=1, label="capacity")
    for step in range(1, int(timeline.steps.max()) + 1):
        begins = int(np.searchsorted(timeline.steps, step))
        axes.axvline(begins, color="#888888", linewidth=0.8)
        axes.annotate(f"step {step}", (begins, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -12),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xlabel="allocations and frees, in order", ylabel=unit, xlim=(0, len(timeline.events)), ylim=(0, None))
    peak = size(int(timeline.total.max()))
    axes.set_title(f"{title}, rank {timeline.rank}: peak {peak}", fontsize=11, fontweight="bold", loc="left")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _highest(total: Any) -> Any:
    """Indices to draw: all events, or of each of `MOST_POINTS` runs of events the highest."""
    if len(total) <= MOST_POINTS:
        return np.arange(len(total))
    edges = np.linspace(0, len(total), MOST_POINTS + 1).astype(int)
    return np.array([a + int(np.argmax(total[a:b])) for a, b in pairwise(edges) if b > a])
