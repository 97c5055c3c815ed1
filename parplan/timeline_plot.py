"""A timeline as a picture: one row per rank and kind of resource."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from simulator import Timeline

MOST_RANKS = 16
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#8C510A", "#F0E442", "#000000")


def plot_timeline(timeline: Timeline, title: str, path: Path) -> None:
    """Writes a picture of the timeline, one colour per category of tasks; of the first ranks where there are many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    program = timeline.program
    rows = _rows(timeline)
    figure = Figure(figsize=(13, 1.6 + 0.42 * max(len(rows), 2)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    used = sorted({int(c) for tasks in rows.values() for c in np.unique(program.category[tasks])})
    colour = {c: COLOURS[i % len(COLOURS)] for i, c in enumerate(used)}
    for y, tasks in enumerate(rows.values()):
        for c in used:
            chosen = tasks[program.category[tasks] == c]
            spans = np.stack([timeline.start[chosen], timeline.finish[chosen] - timeline.start[chosen]], axis=1) * 1e3
            axes.broken_barh(spans[spans[:, 1] > 0], (y - 0.4, 0.8), color=colour[c], linewidth=0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlim=(0, max(timeline.makespan * 1e3, 1e-9)), xlabel="time (ms)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    handles = [Patch(color=colour[c], label=program.categories[c]) for c in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles) or 1, 8), frameon=False)
    figure.savefig(path)


def _rows(timeline: Timeline) -> dict[str, Any]:
    """Tasks by "rank 0 compute" and the like, in order of rank."""
    program = timeline.program
    kinds = np.array([*(item.kind for item in program.resources), "delay"])[program.resource]
    rows = {}
    ranks = sorted({int(r) for r in np.unique(program.rank)})
    for rank in [r for r in ranks if r >= 0][:MOST_RANKS] + [r for r in ranks if r < 0]:
        own = program.rank == rank
        for kind in ("compute", "host", "communication", "link"):
            tasks = np.flatnonzero(own & (kinds == kind))
            if tasks.size:
                rows[f"{'rank ' + str(rank) if rank >= 0 else 'shared'} {kind}"] = tasks
    return rows
