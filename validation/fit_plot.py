"""The picture of the kernel fits: predicted over measured held-out times, and mean errors beside their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from validation.fit_common import Fitted


def plot(fits: Sequence[Fitted], targets: Mapping[str, float], path: Path) -> None:
    """Predicted over measured held-out times by law (left three), and mean error by device (right)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    laws = [law for law in targets if any(f.law == law for f in fits)]
    figure = Figure(figsize=(5.2 * (len(laws) + 1), 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(laws) + 1)
    for axes, law in zip(panels, laws):
        _scatter(axes, law, targets[law], [f for f in fits if f.law == law])
    _bars(panels[-1], targets, fits)
    figure.savefig(path)


def _scatter(axes: Any, law: str, target: float, fits: Sequence[Fitted]) -> None:
    for i, fit in enumerate(fits):
        some = np.random.default_rng(0).permutation(len(fit.measured))[:400]
        label = f"{fit.device} ({fit.dtype})" if law == "rowwise" else fit.device
        axes.plot(fit.measured[some] * 1e3, fit.predicted[some] * 1e3, ".", ms=3, alpha=0.6, color=f"C{i % 10}",
                  label=label)  # fmt: skip
    ends = np.array(axes.get_xlim())
    ends = np.array([max(ends[0], 1e-3), ends[1]])
    axes.set(xscale="log", yscale="log", title=law, xlabel="measured, ms", ylabel="predicted, ms (held-out shapes)")
    axes.plot(ends, ends, color="#333333", linewidth=1)
    axes.fill_between(ends, ends * (1 - target), ends * (1 + target), color="#0072B2", alpha=0.12, linewidth=0)
    axes.legend(fontsize=7, markerscale=3, frameon=False)


def _bars(axes: Any, targets: Mapping[str, float], fits: Sequence[Fitted]) -> None:
    labels = [f"{f.law} {f.device} {'' if f.law == 'attention' else f.dtype}" for f in fits]
    means = [float(np.abs(f.errors).mean()) for f in fits]
    colours = ["#D55E00" if m > targets[f.law] else "#009E73" for f, m in zip(fits, means)]
    axes.barh(labels, means, color=colours)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(title="mean absolute error (orange: over its target)")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
