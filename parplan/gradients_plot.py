"""The picture of `parplan gradients`: the best step of every compression, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_gradients(advice: Any, title: str, path: Path) -> None:
    """Bars of milliseconds: the step without messages and codes, encoding, decoding, exposed messages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best: dict[str, Any] = {}
    for row in advice.uniform:
        best.setdefault(row.choice.compression.name, row)
    rows = list(best.values())[::-1]
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{r.choice.compression.name}\n{r.choice.scheme.name}" for r in rows]
    codes = [("encode", [r.encode_seconds for r in rows]), ("decode", [r.decode_seconds for r in rows])]
    exposed = [r.exposed_seconds for r in rows]
    base = [max(r.step_seconds - r.encode_seconds - r.decode_seconds - r.exposed_seconds, 0.0) for r in rows]
    left = [0.0] * len(rows)
    colours = ("#9aa7b5", "#e0a458", "#c97b63", "#4a6fa5")
    for (label, parts), colour in zip([("compute", base), *codes, ("exposed messages", exposed)], colours):
        axes.barh(names, [p * 1e3 for p in parts], left=[x * 1e3 for x in left], label=label, color=colour)
        left = [a + b for a, b in zip(left, parts)]
    axes.axvline(advice.policy_step_seconds * 1e3, color="black", linewidth=1, linestyle="--", label="policy")
    axes.set_xlabel("step, ms")
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18 if len(rows) < 6 else -0.12))
    figure.savefig(path, dpi=120, format="png")
