"""What gloo takes on an emulated network, from its rates alone: gloo's own order of messages as packets on the wires.

Every pair of ranks has one connection, and a word of readiness ("I expect your message i") goes on it behind whatever
was written to it before (pair.cc: one queue, `tx_`, a connection). Data go when the word of who receives them is there:
of two ranks that send to each other, the later one finds the word of the other, sends at once, and its own word waits
behind its data, so that they exchange one after the other. Which rank is later the barrier before decides, which is
simulated too, repetition after repetition.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil, log2
from random import Random
from statistics import fmean, median, quantiles

from validation.emulate_gloo import program
from validation.emulate_net import BURST, GSO_BYTES, Network
from validation.emulate_ports import HEADERS, SEGMENT, Port, Transport, run

PACKET = (GSO_BYTES - HEADERS) // SEGMENT * SEGMENT  # payload of the largest packet before it is cut into frames
# A socket puts two packets into the queue of its own host before it waits for one to leave (`tcp_small_queue_check` of
# Linux).
TRANSPORT = Transport(2 * PACKET, PACKET)
# Collectives whose ranks post sends before receives: by chance, both directions go at once or one after the other, so
# that their times have two modes and more, and a median jumps between them. What counts is their mean. Of two ranks
# that come at once it is a race (`races`), whose odds change from run to run; where one comes `APART` after the other
# it is none. Waking two threads that slept takes 1 ms: with 1 ms apart a fifth of some rows still went the other way.
MIXED = ("all_to_all", "all_gather")
APART = 3e-3
TRIMMED = 0.1  # left out at each end of a mean: repetitions that something else on the machine disturbed
SLEEPS = (1e-4, 2e-3, 2e-2, 1e-1)  # seconds that a thread has slept, for which its latency is measured
REPETITIONS = 65  # simulated, after one that finds full buckets and is left out; of `MIXED` four times as many


def races(kind: str, ranks: int, apart: float) -> bool:
    """Whether a rank's place in a queue of two decides between two times."""
    return kind in MIXED and ranks == 2 and not apart


def seconds(
    network: Network, kind: str, nbytes: float, rate: float, latency: Sequence[float], apart: float = 0.0
) -> float:
    """Seconds of the slowest rank, as `typical` of all repetitions. rate: bytes/s of a host's wire. latency: seconds of
    a message of a few bytes, one way, to threads that have slept for `SLEEPS`, measured once a network. apart: seconds
    by which one rank comes later than the others, in turn."""
    return max(typical(kind, simulated(network, kind, nbytes, rate, latency, apart)), latency[0])


def simulated(
    network: Network, kind: str, nbytes: float, rate: float, latency: Sequence[float], apart: float = 0.0
) -> list[float]:
    """Seconds of the slowest rank in every repetition; a send is half of its way there and back."""
    steps = program(kind, nbytes, network.ranks, 1 + REPETITIONS * (4 if kind in MIXED else 1), apart)
    done = run(steps.posts, wires(network, rate), TRANSPORT, lambda slept: after(slept, latency), Random(0))
    ways = 2 if kind == "send" else 1
    return [max(done[j] - done[i] for i, j in zip(*notes)) / ways for notes in zip(steps.begin[1:], steps.end[1:])]


def after(slept: float, latency: Sequence[float]) -> float:
    """Latency of a thread that slept for so long: straight lines over the logarithm of `SLEEPS`."""
    i = bisect_left(SLEEPS, slept)
    if i == 0 or i == len(SLEEPS):
        return latency[min(i, len(SLEEPS) - 1)]
    part = log2(slept / SLEEPS[i - 1]) / log2(SLEEPS[i] / SLEEPS[i - 1])
    return latency[i - 1] + part * (latency[i] - latency[i - 1])


def typical(kind: str, times: Sequence[float]) -> float:
    """The median, or of `MIXED` collectives the mean without `TRIMMED` of them at each end."""
    if kind not in MIXED:
        return median(times)
    cut = int(TRIMMED * len(times))
    return fmean(sorted(times)[cut : len(times) - cut])


def modes(times: Sequence[float]) -> tuple[float, float, float]:
    """Of times around two values: the median of the lower ones, that of the higher ones, and the share of these, parted
    in the middle between the 5th and the 95th percentile."""
    cuts = quantiles(times, n=20, method="inclusive")
    middle = (cuts[0] + cuts[-1]) / 2
    fast, slow = [t for t in times if t <= middle], [t for t in times if t > middle]
    return median(fast), median(slow or fast), len(slow) / len(times)


def hops(kind: str, ranks: int) -> int:
    """Messages one after another in a collective: rings pass P - 1 times around, or twice that, trees lg P levels."""
    if kind in ("all_reduce", "reduce_scatter"):
        return 2 * (ranks - 1)
    if kind == "all_gather":
        return ranks - 1
    return ceil(log2(ranks)) if kind in ("broadcast", "barrier") else 1


def wires(network: Network, rate: float) -> dict[tuple[int, int], tuple[Port, ...]]:
    """The ports between every two ranks: out of a host, from its bridge to another, into a host. Ranks of one host meet
    none."""
    hosts, bridges = range(len(network.bridges)), sorted(set(network.bridges))
    out, into = ([Port(rate, BURST / rate) for _ in hosts] for _ in range(2))
    trunk = rate * network.trunk
    between = {(a, b): Port(trunk, BURST / trunk) for a in bridges for b in bridges if a != b}

    def way(a: int, b: int) -> tuple[Port, ...]:
        x, y = a // network.ranks_per_host, b // network.ranks_per_host
        if x == y:
            return ()
        pair = network.bridges[x], network.bridges[y]
        return (out[x], *([between[pair]] if pair in between else []), into[y])

    ranks = range(network.ranks)
    return {(a, b): way(a, b) for a in ranks for b in ranks if a != b}
