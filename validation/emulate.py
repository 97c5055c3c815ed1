"""Collectives of gloo over networks that this machine emulates, beside what was predicted from the rates alone.

    python -m validation.emulate --out reports/emulated

Needs root and iproute2. Nothing is fitted to a timed collective: rates are those of the token buckets, and the latency
is that of 4-byte messages on the same network before its wires are shaped.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validation.emulate_net import NETWORKS, Network, emulated, shape, why_not
from validation.emulate_predict import hops, seconds
from validation.environment import RANK_ENV

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
RATES = (12.5e6, 25e6, 62.5e6)  # bytes/s of a host's wire: 100, 200, 500 Mbit/s
SIZES = (2**16, 2**18, 2**20, 2**22)
SCORED = 2**18  # errors count from here up
LATE = 5e-3  # seconds by which the transport shim makes messages late
TIMEOUT = 180.0  # seconds without an answer of a rank


@dataclass(frozen=True, slots=True)
class Row:
    """One collective. rate: bytes/s of a host's wire. measured: median over `repetitions` of the slowest rank's
    seconds; spread: half of their interquartile range over it. latency: seconds of a 4-byte message. added: seconds
    that the transport shim makes every message late. load: of the machine, per core, afterwards."""

    network: str
    ranks: int
    rate: float
    kind: str
    bytes: int
    repetitions: int
    measured: float
    spread: float
    predicted: float
    closed_form: float
    latency: float
    added: float
    load: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def run(
    networks: Sequence[Network] = NETWORKS,
    rates: Sequence[float] = RATES,
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = KINDS,
    repetitions: int = 20,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measures and predicts everything; removes the networks again whatever happens."""
    if reason := why_not():
        raise ValueError(reason)
    rows: list[Row] = []
    for network in networks:
        with emulated(network) as hosts, ranks_on(network, hosts) as ask:
            latency = min(statistics.median(ask("send", 4, 50)) for _ in range(3))
            progress(f"{network.name}: a message of 4 bytes takes {1e6 * latency:.0f} us")
            for rate in rates:
                shape(network, hosts, rate)
                for kind in kinds:
                    rows += [_row(network, rate, kind, nbytes, repetitions, latency, 0.0, ask) for nbytes in sizes]
                    progress(_line(rows[-len(sizes) :]))
    return rows


def run_late(
    network: Network,
    rate: float,
    latency: float,
    added: float,
    repetitions: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """All collectives at one rate with a transport shim that makes every message `added` seconds later than `latency`,
    what the network takes without it."""
    rows: list[Row] = []
    with emulated(network) as hosts, ranks_on(network, hosts, added) as ask:
        shape(network, hosts, rate)
        for kind in KINDS:
            rows += [_row(network, rate, kind, nbytes, repetitions, latency, added, ask) for nbytes in SIZES[1:3]]
            progress(_line(rows[-2:]))
    return rows


def _line(rows: Sequence[Row]) -> str:
    shown = ", ".join(f"{100 * row.error:+.1f} %" for row in rows)
    late = f", {1e3 * rows[0].added:g} ms late" if rows[0].added else ""
    return f"{rows[0].network} {rows[0].rate * 8e-6:g} Mbit/s{late} {rows[0].kind}: {shown}"


Ask = Callable[[str, int, int], list[float]]


def _row(
    network: Network,
    rate: float,
    kind: str,
    nbytes: int,
    repetitions: int,
    latency: float,
    added: float,
    ask: Ask,
) -> Row:
    times = ask(kind, nbytes, repetitions)
    low, middle, high = statistics.quantiles(times, n=4)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    late = hops(kind, network.ranks) * added
    predicted = seconds(network, kind, nbytes, rate, latency) + late
    closed = _closed_form(network, kind, nbytes, rate, latency) + late
    of_row = (network.name, network.ranks, rate, kind, nbytes, len(times), middle, (high - low) / 2 / middle)
    return Row(*of_row, predicted, closed, latency, added, load)


def _closed_form(network: Network, kind: str, nbytes: int, rate: float, latency: float) -> float:
    """What `costmodels.gloo` says of equal ranks on one wire each; it knows of no shared wires."""
    from costmodels import gloo
    from costmodels.cluster import Link
    from validation.emulate_net import PAYLOAD

    return gloo.seconds(kind, nbytes, network.ranks, Link("tbf", rate * PAYLOAD, latency))


@contextmanager
def ranks_on(network: Network, hosts: Sequence[str], latency: float = 0.0) -> Iterator[Ask]:
    """Starts the ranks; yields a function that runs one collective and returns the slowest rank's seconds of each
    repetition. latency: seconds that a transport shim adds to every message (0: plain gloo)."""
    replies: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    ranks: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="parplan-") as scratch:
        try:
            for rank in range(network.ranks):
                host = hosts[rank // network.ranks_per_host]
                ranks.append(_start(host, rank, network.ranks, f"{scratch}/store", latency))
                threading.Thread(target=_listen, args=(rank, ranks[-1], replies), daemon=True).start()
            _answers(replies, network.ranks, "ready")

            def ask(kind: str, nbytes: int, repetitions: int) -> list[float]:
                task = json.dumps({"kind": kind, "nbytes": nbytes, "repetitions": repetitions})
                for process in ranks:
                    assert process.stdin is not None
                    process.stdin.write(task + "\n")
                    process.stdin.flush()
                return [max(times) for times in zip(*_answers(replies, network.ranks, "seconds"))]

            yield ask
        finally:
            _stop(ranks)


def _start(host: str, rank: int, size: int, store: str, latency: float) -> subprocess.Popen[str]:
    environment = {**os.environ, **RANK_ENV, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "validation.emulate_rank", str(rank), str(size), store, str(latency)]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def _listen(rank: int, process: subprocess.Popen[str], replies: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put((rank, json.loads(line)))
    replies.put((rank, None))


def _answers(replies: queue.Queue[tuple[int, dict[str, Any] | None]], ranks: int, key: str) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < ranks:
        try:
            rank, reply = replies.get(timeout=TIMEOUT)
        except queue.Empty:
            silent = ", ".join(str(r) for r in range(ranks) if r not in found)
            raise RuntimeError(f"rank(s) {silent} of the emulated network gave no answer in {TIMEOUT:g} s") from None
        if reply is None:
            raise RuntimeError(f"rank {rank} of the emulated network ended; its message stands above")
        found[rank] = reply[key]
    return [found[r] for r in range(ranks)]


def _stop(ranks: Sequence[subprocess.Popen[str]]) -> None:
    for process in ranks:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.emulate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, results.csv, results.json, png")
    parser.add_argument("--networks", default=",".join(n.name for n in NETWORKS))
    parser.add_argument("--rates", default=",".join(f"{r * 8e-6:g}" for r in RATES), help="Mbit/s")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the networks are removed
    try:
        rates = [float(text) / 8e-6 for text in options.rates.split(",")]
        names = options.networks.split(",")
        networks = [n for n in NETWORKS if n.name in names]
        if len(networks) != len(names):
            raise ValueError(f"'{options.networks}': use some of {', '.join(n.name for n in NETWORKS)}")

        def progress(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        rows = run(networks, rates, repetitions=options.repetitions, progress=progress)
        for network in networks[:2]:
            latency = next(row.latency for row in rows if row.network == network.name)
            rows += run_late(network, rates[len(rates) // 2], latency, LATE, options.repetitions, progress)
    except ValueError as error:
        print(f"emulate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("emulate: interrupted; the networks are removed", file=sys.stderr)
        return 130
    from validation.emulate_report import write

    write(options.out, rows, SCORED, f"python -m validation.emulate --out {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
