"""Pictures of collectives: predicted over measured time of published sweeps, and bus bandwidth over sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from validation.collective_cases import Sweep, setup_of
from validation.collective_score import Scored
from validation.collective_table import bus_factor

# Okabe-Ito colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#8C510A")
MARKERS = "osD^vPX*"


def scatter(scored: Sequence[Scored], title: str, path: Path) -> None:
    """Left: predicted over measured time, log-log. Right: signed error over bytes. One look for each configuration."""
    figure, axes = _figure(1, 2, (15, 7))
    left, right = axes
    for i, one in enumerate(scored):
        look = {"color": COLOURS[i % 8], "marker": MARKERS[i // 8 % 8], "ms": 4, "lw": 0, "alpha": 0.8}
        left.plot(np.array(one.measured) * 1e6, np.array(one.predicted) * 1e6, label=one.config_id, **look)
        right.plot(one.bytes, one.errors * 100, **(look | {"lw": 0.7}))
    times = np.concatenate([[*s.measured, *s.predicted] for s in scored]) * 1e6
    ends = np.array([times.min(), times.max()])
    left.plot(ends, ends, color="black", lw=0.8)
    left.fill_between(ends, ends * 0.9, ends * 1.1, color="#dddddd", zorder=0)
    left.set(xscale="log", yscale="log", xlabel="measured (us)", ylabel="predicted (us)")
    left.set_title("grey: within 10 %", fontsize=9, loc="left")
    right.axhline(0, color="black", lw=0.8)
    right.set_xscale("log", base=2)
    right.set(ylim=(-100, 150), xlabel="bytes", ylabel="predicted / measured - 1 (%)")
    right.set_title("error over size, cut at 150 %", fontsize=9, loc="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    _save(figure, title, path)


def bandwidths(
    rows: Sequence[dict[str, Any]], kind: str, ranks: int, sweeps: Sequence[Sweep], title: str, path: Path
) -> None:
    """Left: predicted bus bandwidth with its interval; right: time. Markers: published measurements."""
    figure, axes = _figure(1, 2, (13, 5.5))
    sizes = np.array([row["bytes"] for row in rows])
    factor = bus_factor(kind, ranks)
    seconds = np.array([row["seconds"] for row in rows])
    low, high = np.array([row["interval"] for row in rows]).T
    views: tuple[Callable[[Any, Any], Any], ...] = (lambda t, n: factor * n / t / 1e9, lambda t, n: t * 1e6)
    for axis, of in zip(axes, views, strict=True):
        axis.fill_between(sizes, of(low, sizes), of(high, sizes), color="#0072B2", alpha=0.15, lw=0)
        axis.plot(sizes, of(seconds, sizes), color="#0072B2", label="predicted")
        for i, sweep in enumerate(sweeps):
            host = setup_of(sweep).host
            x, t = np.array(sweep.bytes), np.maximum(np.array(sweep.seconds) - host, 1e-9)
            axis.plot(x, of(t, x), MARKERS[i % 8], color=COLOURS[1 + i % 7], ms=4, label=sweep.config_id)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("bytes")
    axes[0].set_ylabel("bus bandwidth (GB/s)")
    axes[1].set(ylabel="time (us)", yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    _save(figure, title, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns)
    for axis in axes:
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
