"""What gloo takes on an emulated network, from its rates alone: gloo's own order of messages as packets on the wires.

Every pair of ranks has one connection, and a word of readiness ("I expect your message i") goes on it behind whatever
was written to it before (pair.cc: one queue, `tx_`, a connection). Data go when the word of who receives them is there:
of two ranks that send to each other, the later one finds the word of the other, sends at once, and its own word waits
behind its data, so that they exchange one after the other. Which rank is later the barrier before decides, which is
simulated too, repetition after repetition.
"""

from __future__ import annotations

from math import ceil, log2
from random import Random
from statistics import median

from validation.emulate_gloo import program
from validation.emulate_net import BURST, GSO_BYTES, Network
from validation.emulate_ports import HEADERS, SEGMENT, Port, Transport, run

# Bytes of a connection on their way, at most: BBR keeps three bursts of 45 segments and 2 to 3 more for a rate that it
# takes for 0.5 Gbit/s or above (`bbr_quantization_budget`, `bbr_tso_segs_goal` of Linux), and the bursts of the buckets
# look like such rates. `ss -ti` showed 136 to 150 at 500 Mbit/s, and 36 to 150 at 100, on this machine; cubic's windows
# are as large as buffers let them be. The state of the kernel, not a time.
WINDOW = 138 * SEGMENT
PACKET = (GSO_BYTES - HEADERS) // SEGMENT * SEGMENT  # payload of the largest packet before it is cut into frames
# What a socket puts into the queue of its own host before it waits: two packets, or 1/1024 s of its pacing rate
# (`tcp_small_queue_check` of Linux), for which up to 1.25 times the wire's rate is taken (BBR; cubic: 1.2). ASSUMPTION:
# connections whose BBR believes in more hold more.
PACING, PACED = 1.25, 1 / 1024
REPETITIONS = 65  # simulated, after one that finds full buckets and is left out


def seconds(network: Network, kind: str, nbytes: float, rate: float, latency: float) -> float:
    """Seconds of the slowest rank, median over repetitions. rate: bytes/s of a host's wire. latency: seconds of a
    message of a few bytes, one way, between threads that wait for it, measured once a network."""
    steps = program(kind, nbytes, network.ranks, 1 + REPETITIONS)
    transport = Transport(WINDOW, max(2 * PACKET, PACING * rate * PACED), PACKET)
    done = run(steps.posts, wires(network, rate), transport, latency, Random(0))
    times = [max(done[j] - done[i] for i, j in zip(*notes)) for notes in zip(steps.begin[1:], steps.end[1:])]
    return max(median(times) / (2 if kind == "send" else 1), latency)


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
