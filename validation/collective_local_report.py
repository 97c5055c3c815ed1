"""The report of `validation.collective_local`: table, summary by kind and group size, picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEAR = 0.10
CALM = 0.25  # a point whose middle repetitions spread by more than this share of their mean says little about a price
Row = dict[str, Any]


def write(out: Path) -> str:
    """Writes report.md, report.json and errors.png from the measured-*.json of a folder; returns the summary."""
    files = sorted(out.glob("measured-*.json"))
    if not files:
        raise ValueError(f"{out} holds no measured-*.json; run this command with --ranks 2,4 first")
    data = [json.loads(f.read_text()) for f in files]
    rows: list[Row] = [row for d in data for row in d["rows"]]
    summary = summarise(rows)
    (out / "report.json").write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    text = _markdown(summary, rows, data[0])
    (out / "report.md").write_text(text)
    _plot(rows, out / "errors.png")
    return text.split("\n## Rows")[0]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean and median absolute error and the share within 10 %, by exam, group size and kind ("all" for all kinds), of
    all sizes and of the calm points alone (`spread` of 0.25 or less)."""
    found = []
    for how in dict.fromkeys(r["how"] for r in rows):
        for ranks in sorted({r["ranks"] for r in rows if r["how"] == how}):
            own = [r for r in rows if (r["how"], r["ranks"]) == (how, ranks)]
            groups: list[tuple[str, Callable[[Row], bool]]] = [("all", lambda r: True)]
            groups += [(k, lambda r, k=k: r["kind"] == k) for k in dict.fromkeys(r["kind"] for r in own)]  # type: ignore[misc]
            for kind, wanted in groups:
                errors = [abs(r["error"]) for r in own if wanted(r)]
                calm = [abs(r["error"]) for r in own if wanted(r) and spread(r) <= CALM]
                found.append({
                    "how": how, "ranks": ranks, "kind": kind, "points": len(errors),
                    "mean": statistics.fmean(errors), "median": statistics.median(errors), "within": _share(errors),
                    "bias": statistics.fmean(r["error"] for r in own if wanted(r)),
                    "noise": statistics.fmean(noise(r) for r in own if wanted(r)), "calm_points": len(calm),
                    "calm_mean": statistics.fmean(calm) if calm else None,
                    "calm_within": _share(calm) if calm else None,
                })  # fmt: skip
    return found


def spread(row: Row) -> float:
    """Half the distance from the 10th to the 90th percentile of a point's repetitions, over their mean."""
    return float((row["high"] - row["low"]) / 2 / row["seconds"])


def noise(row: Row) -> float:
    """Standard error of a point's mean, relative, from its 10 to 90 % range (2.56 standard deviations of a normal
    distribution)."""
    return float((row["high"] - row["low"]) / 2.56 / row["repeats"] ** 0.5 / row["seconds"])


def _share(errors: Sequence[float]) -> float:
    return sum(e <= NEAR for e in errors) / len(errors)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _markdown(summary: Sequence[Row], rows: Sequence[Row], first: Row) -> str:
    lines = [
        "# gloo's collectives on this machine at sizes that calibration did not measure",
        "",
        "`python -m validation.collective_local --out reports/collectives/local` writes this folder. Predictions were",
        "written before their sizes were measured. *in place*: calls after a round of work, from when the last rank",
        "calls, by the calibration file; *plain*: calls in a loop, from a table of the calibrated sizes measured just",
        "before;",
        "*interleaved*: the same with calibrated and tested sizes measured in turn, raw. Times of the first two",
        f"are at the pace of the calibration (anchor {1e3 * first['reference']:.2f} ms); {first['cores']} cores, which",
        "more ranks share. Calm: half the 10 to 90 % range of the repetitions is within 25 % of their mean. Noise: the",
        "standard error of a measured mean; that of a table's point comes on top.",
        "",
        "| exam | ranks | kind | points | mean error | median | bias | within 10 % | noise | calm | mean | within |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in summary:
        cells: tuple[Any, ...] = (
            s["how"], s["ranks"], s["kind"], s["points"], _percent(s["mean"]), _percent(s["median"]),
            _percent(s["bias"]), _percent(s["within"]), _percent(s["noise"]), s["calm_points"],
            _percent(s["calm_mean"]),
            _percent(s["calm_within"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    lines += ["", "## Rows", "", "Worst first. ms; pace: the anchor beside the point over that of the calibration.", ""]
    columns = ["exam", "ranks", "kind", "bytes", "predicted", "at pace", "measured", "10 to 90 %", "n", "pace", "load"]
    columns += ["error", "by"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in sorted(rows, key=lambda r: -abs(r["error"])):
        pace = r["anchor"] / first["reference"] if first["reference"] else 1.0
        cells = (
            r["how"], r["ranks"], r["kind"], f"{r['bytes']:,}", f"{1e3 * r['predicted']:.2f}",
            f"{1e3 * r['at_pace']:.2f}", f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['low']:.2f} to {1e3 * r['high']:.2f}",
            r["repeats"], f"{pace:.2f}", f"{r['load']:.1f}", f"{100 * r['error']:+.0f} %", r["source"],
        )  # fmt: skip
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Error by size, a panel for each exam and group size; bars: 10th to 90th percentile of the repetitions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(r["how"], r["ranks"]) for r in rows})
    figure = Figure(figsize=(4.2 * len(panels), 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (how, ranks) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        own = [r for r in rows if (r["how"], r["ranks"]) == (how, ranks)]
        for kind in dict.fromkeys(r["kind"] for r in own):
            line = sorted((r for r in own if r["kind"] == kind), key=lambda r: r["bytes"])
            ratio = [r["predicted"] / r["at_pace"] for r in line]
            low = [q - q * r["seconds"] / max(r["high"], r["seconds"]) for q, r in zip(ratio, line)]
            high = [q * r["seconds"] / max(min(r["low"], r["seconds"]), 1e-5) - q for q, r in zip(ratio, line)]
            style = {"marker": "o", "ms": 4, "lw": 1, "elinewidth": 0.5, "label": kind}
            axes.errorbar([r["bytes"] for r in line], ratio, (low, high), **style)
        axes.axhspan(1 - NEAR, 1 + NEAR, color="#0072B2", alpha=0.12, linewidth=0)
        axes.set(xscale="log", yscale="log", ylim=(0.2, 5), xlabel="bytes", title=f"{how}, {ranks} ranks")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("predicted / measured, at pace")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)
