"""The report of a run over emulated networks: a table of errors, the rows that missed, a picture, CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from validation.emulate_net import BURST, PAYLOAD, TCP

if TYPE_CHECKING:
    from validation.emulate import Row, Timing

TARGET = 0.08
# Busier cores than this are the network that is measured: where two cores are busy for a third of the time, who wants
# one waits for an eighth of the time that it needs it (M/M/2).
BUSY = 1 / 3


def write(folder: Path, rows: Sequence[Row], scored_from: int, command: str, rounds: Sequence[Timing] = ()) -> None:
    """report.md, results.csv, results.json and predicted_vs_measured.png in `folder`. Rows of fewer than `scored_from`
    bytes, with cores that were busy and races of two ranks are listed, not scored (where a run was cut short before any
    other, all are). rounds: of 4-byte messages."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = [r for r in rows if r.bytes >= scored_from and r.busy <= BUSY and not r.modes] or list(rows)
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*asdict(rows[0]), "error"])
        table.writeheader()
        table.writerows(asdict(row) | {"error": row.error} for row in rows)
    summary = {"n": len(scored), "mape": _mape(scored), "within_target": _share(scored), "scored_from": scored_from}
    data = {"summary": summary, "rows": [asdict(r) | {"error": r.error} for r in rows]}
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "report.md").write_text(_text(rows, scored, scored_from, command, rounds))
    _plot(folder / "predicted_vs_measured.png", scored)


def _text(rows: Sequence[Row], scored: Sequence[Row], scored_from: int, command: str, rounds: Sequence[Timing]) -> str:
    plain, late = [r for r in scored if not r.added], [r for r in scored if r.added]
    races = [r for r in rows if r.modes and r.bytes >= scored_from]
    busy = [r for r in rows if r.busy > BUSY and r.bytes >= scored_from and not (r.modes or r.added)]
    lines = [
        "# Collectives of gloo over emulated networks",
        "",
        "Network namespaces joined by veth pairs and bridges, every wire shaped by a token bucket. Predicted from",
        f"the rate of the buckets, the headers of frames (payload {PAYLOAD:.4f}), their burst ({BURST} bytes) and the",
        "latency of 4-byte messages on the same network, by gloo's own order of messages, packet by packet",
        "(`validation/emulate_predict.py`).",
        "Nothing is fitted to a row. Measured: the slowest rank, median over the repetitions (of all_gather and",
        "all_to_all a trimmed mean, see below).",
        "",
        f"From {scored_from // 1024} KiB up: {len(plain)} rows, mean absolute error {_mape(plain):.1%}, median "
        f"{median(abs(r.error) for r in plain):.1%}, {_share(plain):.0%} within {TARGET:.0%}.",
        "",
        *(_by(plain, "rate", lambda r: f"{r.rate * 8e-6:g} Mbit/s")),
        *(_by(plain, "bytes", lambda r: f"{r.bytes // 1024} KiB")),
        *(_by(sorted(plain, key=lambda r: r.busy), "share of busy cores", lambda r: f"up to {_tenths(r.busy):.0%}")),
        "",
        *_unscored(races, busy),
        "",
        "![predicted over measured](predicted_vs_measured.png)",
        "",
        *_latencies(rounds, rows),
        "| network | collective | n | mean error | bias | worst | within 8 % | closed form (`costmodels.gloo`) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for key, group in _groups(plain):
        worst = max((r.error for r in group), key=abs)
        closed = fmean(abs(r.closed_form / r.measured - 1) for r in group)
        lines.append(
            f"| {key[0]} | {key[1]} | {len(group)} | {_mape(group):.1%} | {fmean(r.error for r in group):+.1%} "
            f"| {worst:+.1%} | {_share(group):.0%} | {closed:.1%} |"
        )
    lines += ["", *_causes(), "", *_races(races)]
    if late:
        lines += ["", f"## {1e3 * late[0].added:g} ms late by the transport shim", "", _shim_note(), ""]
        lines += ["| network | collective | bytes | measured ms | predicted ms | error |", "|---|---|--:|--:|--:|--:|"]
        lines += [_row(r) for r in late]
    head = "network | Mbit/s | collective | bytes | measured ms | spread | predicted ms | error | cores busy"
    lines += ["", "## Every row", "", f"| {head} |", "|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    for r in (r for r in rows if not r.added):
        lines.append(
            f"| {r.network} | {r.rate * 8e-6:g} | {_what(r)} | {r.bytes} | {1e3 * r.measured:.2f} | {r.spread:.0%} "
            f"| {1e3 * r.predicted:.2f} | {r.error:+.1%} | {r.busy:.0%} |"
        )
    return "\n".join([*lines, "", *_environment(rows, command)]) + "\n"


def _by(rows: Sequence[Row], name: str, key: Callable[[Row], str]) -> list[str]:
    """One line of mean errors by rate or by size."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    parts = [f"{k} {_mape(group):.1%} ({_share(group):.0%})" for k, group in found.items()]
    return [f"By {name}, mean error (share within {TARGET:.0%}): {', '.join(parts)}.  "]


def _unscored(races: Sequence[Row], busy: Sequence[Row]) -> list[str]:
    """What is listed and not scored, and how far off it is."""
    said = [f"Listed and not scored: {len(races)} rows of two ranks that race (below)"]
    if busy:
        said += [
            f", and {len(busy)} rows during which the cores of this machine were busy for more",
            f"than {BUSY:.0%} of the time, so that ranks waited for them and not for the network:",
            f"{_mape(busy):.1%} off in the mean, {_share(busy):.0%} within {TARGET:.0%}",
        ]
    said[-1] += "."
    return [said[0] + said[1], *said[2:]] if busy else said


def _tenths(share: float) -> float:
    return ceil(10 * max(share, 0.001)) / 10


def _what(r: Row) -> str:
    return f"{r.kind}, one {1e3 * r.apart:g} ms later" if r.apart else r.kind


def _races(rows: Sequence[Row]) -> list[str]:
    """Rows whose ranks race: both times, and how often it was the slow one."""
    if not rows:
        return []
    off = [abs(p / m - 1) for r in rows for m, p in zip(r.modes[0][:2], r.modes[1][:2])]
    apart = fmean(abs(r.modes[0][2] - r.modes[1][2]) for r in rows)
    lines = [
        "## Two ranks that exchange at once",
        "",
        f"They take one of two times. Both, as predicted, are {fmean(off):.1%} off in the mean"
        f" ({fmean(e <= TARGET for e in off):.0%} within {TARGET:.0%}); how often it is the slower one differs by",
        f"{apart:.0%} of all repetitions in the mean, so that means are {_mape(rows):.1%} off"
        f" ({_share(rows):.0%} within {TARGET:.0%}).",
        "",
        "| network | Mbit/s | collective | bytes | fast ms, measured | predicted | slow ms, measured | predicted "
        "| slow ones, measured | predicted | error of the mean |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        measured, predicted = r.modes
        times = " | ".join(f"{1e3 * m:.2f} | {1e3 * p:.2f}" for m, p in zip(measured[:2], predicted[:2]))
        shares = f"{measured[2]:.0%} | {predicted[2]:.0%}"
        of_row = f"{r.network} | {r.rate * 8e-6:g} | {r.kind} | {r.bytes}"
        lines.append(f"| {of_row} | {times} | {shares} | {r.error:+.1%} |")
    return lines


def _row(r: Row) -> str:
    times = f"{1e3 * r.measured:.2f} | {1e3 * r.predicted:.2f} | {r.error:+.1%}"
    return f"| {r.network} | {r.kind} | {r.bytes} | {times} |"


def _latencies(rounds: Sequence[Timing], rows: Sequence[Row]) -> list[str]:
    """Latency by network and rate: what the rounds of 4-byte messages gave, and what the predictions took."""
    found: dict[tuple[str, float, float], list[float]] = {}
    for t in rounds:
        found.setdefault((t.network.name, t.rate, t.pause), []).append(1e6 * median(t.times))
    if not found:
        return []
    taken = {r.network: (f"{1e6 * r.latency:.0f}", f"{1e6 * r.cold:.0f}") for r in rows}
    lines = ["| network | Mbit/s | after a pause of ms | rounds | lowest us | median us | highest us |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for (name, rate, pause), us in found.items():
        spread = f"{min(us):.0f} | {median(us):.0f} | {max(us):.0f}"
        lines.append(f"| {name} | {rate * 8e-6:g} | {1e3 * pause:g} | {len(us)} | {spread} |")
    said = ", ".join(f"{name} {warm} and {cold} us" for name, (warm, cold) in taken.items())
    head = (
        "Messages of 4 bytes, one way (half of the way there and back), medians of rounds. Of a network the lowest are"
    )
    tail = f"taken, of ranks that are awake and, for the way there alone, of ranks that have slept for 0.1 s: {said}."
    return [f"{head} {tail}", "", *lines, ""]


def _causes() -> list[str]:
    return [
        "What a plain formula misses and packets in gloo's order explain, without a constant fitted to these rows:",
        "",
        "* Ranks leave the barrier before a collective one by one. Of two ranks that send to each other, the later",
        "  one finds the other's word of readiness and writes its data at once; all_gather and all_to_all post sends",
        "  before receives, so its own word waits behind them, and the two exchange one after the other. An all_to_all",
        "  of two ranks takes twice what full duplex allows; of four, half of the pairs do it.",
        "* Ports serve first come, first served, and every socket keeps two packets in the port of its host: flows on",
        "  one wire do not end together, and whoever ends first lets its answer use the other direction early. Words",
        "  and acknowledgements wait in the same queues; acknowledgements take 0.4 % of a wire.",
        "* A connection is one stream: the end of a message, a word and the beginning of the next message leave in one",
        "  packet, and come in when all of it does.",
        "* A thread that has slept for 20 ms takes several times as long to wake as one that has just run. Ranks that",
        "  wait for the bytes of others sleep, so waking decides which of two leaves the next barrier first.",
        "* Buckets save tokens while a port is idle: in the barrier, between phases, on the way back of a round trip.",
        "",
        "Hosts grow their windows while nothing is lost and buffer whole messages (`emulate_net.TCP`), whatever the",
        "machine's own congestion control does: windows that differ by chance would share a wire unequally.",
        "",
        "An all_gather or all_to_all of two ranks that come at once takes one of two times, by which of their threads",
        "wakes first; the odds change from run to run. They are timed twice: like this, below, and with one rank that",
        "comes later, in turn, as ranks do whose work differs. Of all all_gathers and all_to_alls a mean counts,",
        "without a tenth at each end, of the others the median.",
    ]


def _shim_note() -> str:
    return (
        "Where the kernel has no netem, a c10d backend over gloo makes every message of the longest chain of a"
        " collective late. This shows that the delays arrive as ordered, not how gloo behaves when each packet is late."
    )


def _environment(rows: Sequence[Row], command: str) -> list[str]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    busy = [r.busy for r in rows]
    return [
        f"Command: `{command}`; commit {commit or 'unknown'}; {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores, no GPU used; Python {platform.python_version()}, torch {torch.__version__}; "
        f"congestion control {TCP['tcp_congestion_control']}; "
        f"cores busy while it ran: median {median(busy):.0%}, most {max(busy):.0%}; "
        f"{min(r.repetitions for r in rows)} repetitions or more.",
    ]


def _groups(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.network, _what(row)), []).append(row)
    return list(found.items())


def _mape(rows: Sequence[Row]) -> float:
    return fmean(abs(r.error) for r in rows) if rows else 0.0


def _share(rows: Sequence[Row]) -> float:
    return fmean(abs(r.error) <= TARGET for r in rows) if rows else 0.0


def _plot(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(dict.fromkeys(r.network for r in rows), "os^Dv"))
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(_what(r) for r in rows))}
    for (network, kind), group in _groups(rows):
        points = [1e3 * r.measured for r in group], [1e3 * r.predicted for r in group]
        axes.scatter(*points, s=22, marker=markers[network], color=colours[kind], alpha=0.75)
    low, high = min(1e3 * r.measured for r in rows) / 1.3, max(1e3 * r.measured for r in rows) * 1.3
    axes.plot([low, high], [low, high], color="0.4", linewidth=0.8)
    axes.fill_between([low, high], [low * 0.92, high * 0.92], [low * 1.08, high * 1.08], color="0.5", alpha=0.15)
    for name, marker in markers.items():
        axes.scatter([], [], marker=marker, color="0.3", label=name)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=4, label=name)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="measured, ms", ylabel="predicted, ms", title="gloo over emulated networks; band: 8 %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
