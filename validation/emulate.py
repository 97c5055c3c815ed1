"""Collectives of gloo over networks that this machine emulates, beside what was predicted from the rates alone.

    python -m validation.emulate --out reports/emulated

Needs root and iproute2. Nothing is fitted to a timed collective: rates are those of the token buckets, and the latency
is that of 4-byte messages, which pass a bucket at once, measured in rounds before and after the rows of each rate.
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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validation.emulate_net import NETWORKS, Network, emulated, shape, why_not
from validation.emulate_predict import APART, MIXED, SLEEPS, hops, modes, races, seconds, simulated, typical
from validation.environment import RANK_ENV

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
RATES = (6.25e6, 12.5e6, 25e6, 62.5e6)  # bytes/s of a host's wire: 50, 100, 200, 500 Mbit/s
SIZES = (2**16, 2**18, 3 * 2**17, 2**20, 3 * 2**20, 2**22)
LATE_SIZES = (2**18, 2**20)  # of the rows with late messages
SCORED = 2**18  # errors count from here up
LONG, FEW = 3 * 2**20 / 12.5e6, 7  # a row whose bytes take the wire `LONG` seconds is repeated a third, or `FEW` times
ROUNDS, PER_ROUND = 5, 50  # of 4-byte messages, before and after the rows of each rate
PER_PAUSE = 15  # 4-byte messages after each pause, before and after the rows of each rate
LATENCY = "latency"
LATE = 5e-3  # seconds by which the transport shim makes messages late
TIMEOUT = 180.0  # seconds without an answer of a rank


@dataclass(frozen=True, slots=True)
class Row:
    """One collective. rate: bytes/s of a host's wire. measured: seconds of the slowest rank, the median over
    `repetitions` (or a mean: `emulate_predict.typical`); spread: half of their interquartile range over it. latency:
    seconds of a 4-byte message, cold: to a thread that has slept long. added: seconds that the transport shim makes
    every message late. apart: seconds by which one rank comes later than the others, in turn. busy: share of the
    time for which the machine's cores were busy meanwhile. modes: of a race, fast and slow time and the share of slow
    ones, as measured and as predicted."""

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
    cold: float
    added: float
    busy: float
    apart: float = 0.0
    modes: tuple[tuple[float, float, float], ...] = ()

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured at once. kind: a collective, or LATENCY for a round of messages of 4 bytes. rate, added, busy,
    apart: as in `Row`. times: seconds of every repetition, of its slowest rank. pause: seconds for which ranks waited
    for a message of 4 bytes, else 0."""

    network: Network
    rate: float
    kind: str
    bytes: int
    times: tuple[float, ...]
    added: float
    busy: float
    pause: float = 0.0
    apart: float = 0.0


Ask = Callable[..., list[float]]  # kind, bytes, repetitions, and perhaps `pause` or `apart` of `emulate_rank.measure`


def run(
    networks: Sequence[Network] = NETWORKS,
    rates: Sequence[float] = RATES,
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = KINDS,
    repetitions: int = 20,
) -> list[Row]:
    """Measures and predicts everything; removes the networks again whatever happens."""
    return rows_of(list(measure(networks, rates, sizes, kinds, repetitions)))


def measure(
    networks: Sequence[Network],
    rates: Sequence[float],
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = KINDS,
    repetitions: int = 20,
) -> Iterator[Timing]:
    """One timing after another; rounds of 4-byte messages before and after those of each rate."""
    if reason := why_not():
        raise ValueError(reason)
    for network in networks:
        with emulated(network) as hosts, ranks_on(network, hosts) as ask:
            ask("send", 4, PER_ROUND)  # what starts up while ranks connect is over then
            for rate in rates:
                shape(network, hosts, rate)
                yield from _latencies(network, rate, ask)
                for kind, nbytes in ((k, n) for k in kinds for n in sizes):
                    yield _timing(network, rate, kind, nbytes, repetitions, ask)
                    if races(kind, network.ranks, 0.0):
                        yield _timing(network, rate, kind, nbytes, repetitions, ask, apart=APART)
                yield from _latencies(network, rate, ask)


def measure_late(network: Network, rate: float, added: float, repetitions: int) -> Iterator[Timing]:
    """All collectives at one rate with a transport shim that makes every message `added` seconds later."""
    with emulated(network) as hosts, ranks_on(network, hosts, added) as ask:
        shape(network, hosts, rate)
        for kind, nbytes in ((k, n) for k in KINDS for n in LATE_SIZES):
            yield _timing(network, rate, kind, nbytes, repetitions, ask, added)


def _latencies(network: Network, rate: float, ask: Ask) -> Iterator[Timing]:
    for pause in (0.0,) * ROUNDS + SLEEPS[1:]:
        times = ask("send", 4, PER_PAUSE if pause else PER_ROUND, pause=pause)
        yield Timing(network, rate, LATENCY, 4, tuple(times), 0.0, 0.0, pause)


def _timing(
    network: Network, rate: float, kind: str, nbytes: int, repetitions: int, ask: Ask, added: float = 0.0,
    apart: float = 0.0,
) -> Timing:  # fmt: skip
    before = _cores()
    times = ask(kind, nbytes, _repeated(kind, nbytes / rate, repetitions), apart=apart)
    idle, passed = (now - then for now, then in zip(_cores(), before))
    busy = 1 - idle / passed if passed else 0.0
    return Timing(network, rate, kind, nbytes, tuple(times), added, busy, apart=apart)


def _cores() -> tuple[float, float]:
    """Seconds for which all cores of the machine together have been idle, and in all."""
    import psutil

    spent = psutil.cpu_times()
    return spent.idle + getattr(spent, "iowait", 0.0), sum(spent)


def _repeated(kind: str, seconds: float, repetitions: int) -> int:
    """How often a row is repeated: a mean over several modes asks for more than a median, long ones get fewer."""
    wanted = 3 * repetitions if kind in MIXED else repetitions
    return max(wanted // 3, min(wanted, FEW)) if seconds >= LONG else wanted


def latency_of(timings: Sequence[Timing], network: Network) -> tuple[float, ...]:
    """Seconds of a message of 4 bytes to a rank that has waited for `SLEEPS`, while the others send theirs: the least
    of the medians of all rounds on this network, as disturbances only ever lengthen a round. Only the way there wakes
    a rank after a pause, the one back is as quick as without."""
    rounds = {
        pause: [
            statistics.median(t.times) for t in timings if (t.network, t.kind, t.pause) == (network, LATENCY, pause)
        ]
        for pause in (0.0, *SLEEPS[1:])
    }
    found = [min(rounds[0.0])]
    for pause in SLEEPS[1:]:
        found.append(max(2 * min(rounds[pause]) - found[0], found[-1]) if rounds[pause] else found[-1])
    return tuple(found)


def rows_of(timings: Sequence[Timing]) -> list[Row]:
    """Every timed collective beside its prediction. Every network needs a round of 4-byte messages."""
    latency = {n: latency_of(timings, n) for n in dict.fromkeys(t.network for t in timings)}
    return [_row(t, latency[t.network]) for t in timings if t.kind != LATENCY]


def _row(t: Timing, latency: Sequence[float]) -> Row:
    low, _, high = statistics.quantiles(t.times, n=4)
    middle = typical(t.kind, t.times)
    late = hops(t.kind, t.network.ranks) * t.added
    what = t.network, t.kind, t.bytes, t.rate, latency, t.apart
    predicted = seconds(*what) + late
    race = races(t.kind, t.network.ranks, t.apart) and not t.added
    closed = _closed_form(t.network, t.kind, t.bytes, t.rate, latency[0]) + late
    of_row = (t.network.name, t.network.ranks, t.rate, t.kind, t.bytes, len(t.times), middle, (high - low) / 2 / middle)
    both = tuple(modes(times) for times in (t.times, simulated(*what))) if race else ()
    return Row(*of_row, predicted, closed, latency[0], latency[-1], t.added, t.busy, t.apart, both)


def _line(t: Timing) -> str:
    said = ((t.added, "{:g} ms late"), (t.pause, "after {:g} ms"), (t.apart, "{:g} ms apart"))
    how = "".join(", " + text.format(1e3 * seconds) for seconds, text in said if seconds)
    return f"{t.network.name} {t.rate * 8e-6:g} Mbit/s{how} {t.kind} {t.bytes} bytes: " + (
        f"{1e3 * typical(t.kind, t.times):.3f} ms"
    )


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

            def ask(kind: str, nbytes: int, repetitions: int, **how: float) -> list[float]:
                task = json.dumps({"kind": kind, "nbytes": nbytes, "repetitions": repetitions, **how})
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
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the networks are removed
    try:
        return _measured(options)
    finally:  # None: a handler that was not installed from Python, which cannot be put back
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _measured(options: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code."""
    try:
        rates = [float(text) / 8e-6 for text in options.rates.split(",")]
        names = options.networks.split(",")
        networks = [n for n in NETWORKS if n.name in names]
        if len(networks) != len(names):
            raise ValueError(f"'{options.networks}': use some of {', '.join(n.name for n in NETWORKS)}")
        timings: list[Timing] = []
        code = _collect(timings, _all(networks, rates, options.repetitions))
    except ValueError as error:
        print(f"emulate: {error}", file=sys.stderr)
        return 2
    command = f"python -m validation.emulate --out {options.out}" + ("" if code == 0 else " (interrupted)")
    _write(options.out, timings, command)
    return code


def _all(networks: Sequence[Network], rates: Sequence[float], repetitions: int) -> Iterator[Timing]:
    yield from measure(networks, rates, repetitions=repetitions)
    for network in networks[:2]:
        yield from measure_late(network, rates[len(rates) // 2], LATE, repetitions)


def _collect(timings: list[Timing], source: Iterator[Timing]) -> int:
    """Puts what comes into `timings`, with a line for each; returns the exit code, not 0 where it was interrupted."""
    begun = time.monotonic()
    try:
        with closing(source):  # type: ignore[type-var]
            for timing in source:
                timings.append(timing)
                print(f"[{time.monotonic() - begun:5.0f} s] {_line(timing)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except SystemExit:  # SIGTERM, as `main` sets it
        code = 143
    except RuntimeError as error:  # a rank died or fell silent
        print(f"emulate: {error}", file=sys.stderr)
        code = 1
    else:
        return 0
    print("emulate: interrupted; the networks are removed", file=sys.stderr)
    return code


def _write(folder: Path, timings: Sequence[Timing], command: str) -> None:
    """The report of all rows there are."""
    from validation.emulate_report import write

    rows = rows_of(timings)
    if rows:
        write(folder, rows, SCORED, command, [t for t in timings if t.kind == LATENCY])
        print(f"emulate: {len(rows)} rows in {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
