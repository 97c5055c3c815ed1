"""The picture of a report: predicted over measured step time, and predicted over measured peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from validation.compare import Comparison, Summary, family

# Okabe-Ito colours (told apart by colour-blind readers too), and a marker each.
LOOKS = {
    "single": ("#000000", "*"), "ddp": ("#0072B2", "o"), "zero1": ("#56B4E9", "s"), "fsdp": ("#009E73", "^"),
    "tp": ("#D55E00", "D"), "pp gpipe": ("#CC79A7", "v"), "pp 1f1b": ("#E69F00", "P"), "two axes": ("#5B5B5B", "X"),
    "three axes": ("#8C510A", "h"),
}  # fmt: skip
BAND = 0.15


def plot(comparisons: Sequence[Comparison], summary: Summary, title: str, path: Path) -> None:
    """Writes the picture: log-log scatters with the diagonal and a +-15 % band, one look per family of plans.

    Vertical bars are predicted intervals, horizontal ones the 10th to 90th percentile of the measured steps. Where
    there are several models, the first one's markers are filled and the others' are open, in thinner lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
    from matplotlib.figure import Figure

    runs = [c for c in comparisons if c.ok]
    figure = Figure(figsize=(12.5, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _panel(left, runs, lambda c: c.measured_seconds * 1e3, lambda c: c.predicted_seconds * 1e3, _time_bars)
    _label(left, "step time", "ms", f"median |error| {summary.median_error:.1%}, worst {summary.worst_error:.1%}")
    sized = [c for c in runs if c.measured_peaks]
    _panel(right, sized, lambda c: c.measured_peak_bytes / 2**20, lambda c: c.predicted_peak_bytes / 2**20)
    memory = f"median |error| {summary.memory_median_error:.1%}, worst rank {summary.memory_worst_error:.1%}"
    _label(right, "peak memory", "MiB", memory if sized else "not measured")
    handles = _handles(runs)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)
    figure.savefig(path)


def _panel(
    axes: Any,
    runs: Sequence[Comparison],
    x: Callable[[Comparison], float],
    y: Callable[[Comparison], float],
    bars: Callable[[Any, Comparison, str], None] | None = None,
) -> None:
    axes.set(xscale="log", yscale="log", aspect="equal")
    values = [v for c in runs for v in (x(c), y(c))] or [1.0, 10.0]
    low, high = min(values) / 1.35, max(values) * 1.35
    line = np.array([low, high])
    axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#0072B2", alpha=0.10, linewidth=0)
    axes.plot(line, line, color="#333333", linewidth=1)
    models = list(dict.fromkeys(c.model for c in runs))
    for c in runs:
        colour, marker = LOOKS[family(c.plan)]
        if bars:
            bars(axes, c, colour)
        nth = models.index(c.model)
        axes.plot(
            x(c), y(c), marker=marker, color=colour, markersize=8, linestyle="none", zorder=3,
            markerfacecolor=colour if nth == 0 else "white", markeredgecolor="white" if nth == 0 else colour,
            markeredgewidth=0.6 if nth == 0 else max(2.0 - 0.5 * nth, 0.5),
        )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(low, high))
    _ticks(axes, low, high)


def _time_bars(axes: Any, c: Comparison, colour: str) -> None:
    style = {"color": colour, "linewidth": 1.2, "alpha": 0.55, "zorder": 2}
    axes.plot([c.measured_seconds * 1e3] * 2, [bound * 1e3 for bound in c.interval], **style)
    axes.plot([c.measured_p10 * 1e3, c.measured_p90 * 1e3], [c.predicted_seconds * 1e3] * 2, **style)


def _ticks(axes: Any, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5 times powers of ten (more where the range is narrow)."""
    narrow = (1, 1.5, 2, 3, 4, 5, 7) if high / low > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    steps = (1, 2, 5) if high / low > 20 else narrow
    ticks = [s * 10.0**e for e in range(-6, 10) for s in steps if low <= s * 10.0**e <= high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _label(axes: Any, what: str, unit: str, note: str) -> None:
    axes.set_xlabel(f"measured {what} ({unit})")
    axes.set_ylabel(f"predicted {what} ({unit})")
    axes.set_title(f"{what[0].upper()}{what[1:]}: {note}", fontsize=10.5)


def _handles(runs: Sequence[Comparison]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not runs:
        return []
    present = {family(c.plan) for c in runs}
    handles: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=8, label=name)
        for name, (colour, marker) in LOOKS.items()
        if name in present
    ]
    models = list(dict.fromkeys(c.model.partition(":")[0] for c in runs))
    if len(models) > 1:
        for i, model in enumerate(models):
            face = "#777777" if i == 0 else "white"
            handles.append(
                Line2D([], [], color="#777777", marker="o", markerfacecolor=face, linestyle="none", label=model)
            )
    handles.append(Line2D([], [], color="#333333", linewidth=1, label="predicted = measured"))
    handles.append(Patch(color="#0072B2", alpha=0.15, label=f"± {BAND:.0%}"))
    return handles
