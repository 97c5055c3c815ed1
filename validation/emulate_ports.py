"""Packets of TCP connections through ports with token buckets: first come, first served.

A connection puts packets into the port of its host until its share of that port is full; every packet that leaves it
lets the next one go. No window holds a connection back (`emulate_net.TCP`), but acknowledgements take their bytes of
the ports of the way back. A message that fits into that share leaves a port whole before what was written later, and a
message of a few bytes waits for everything that is there already: ranks that share a port do not share it equally at
any instant.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from random import Random
from typing import Any

from validation.emulate_gloo import HAND_BACK, HAND_OVER, NOTE, RECEIVE, SEND, Post

SEGMENT, HEADERS = 1448, 66  # bytes of a full frame: payload; Ethernet, IP and TCP with timestamps (1514 in all)
PREAMBLE = 48  # bytes before every message of gloo, six words (pair.h); a word of readiness is nothing else
LOOP, WORKER, MAIN = "loop", "worker", "main"  # gloo's thread that serves sockets; those that post and that ask for it


@dataclass(slots=True)
class Port:
    """rate: bytes/s. full: seconds in which an empty bucket fills. spent: when all its tokens were used up last, had it
    no limit: at `t` it holds (t - spent) seconds' worth, or what fits."""

    rate: float
    full: float
    spent: float = -inf

    def passes(self, now: float, size: float) -> float:
        """When the last of `size` bytes that come at `now` has left, behind all that came before (tc-tbf(8))."""
        self.spent = max(self.spent, now - self.full) + size / self.rate
        return max(now, self.spent)


@dataclass(frozen=True, slots=True)
class Transport:
    """share: bytes of a connection that are in the port of its own host when it still puts one more packet there.
    packet: payload of the largest packet, bytes."""

    share: float
    packet: float


@dataclass(slots=True)
class _Message:
    left: float
    post: int
    word: bool
    written: bool = False


@dataclass(slots=True)
class _Connection:
    """One direction. waiting: bytes in the first port."""

    receiver: int
    way: Sequence[Port]
    back: Sequence[Port]
    queue: deque[_Message] = field(default_factory=deque)
    waiting: float = 0.0


@dataclass(slots=True)
class _Run:
    posts: Sequence[Post]
    transport: Transport
    latency: Callable[[float], float]
    random: Random
    partner: list[int]
    later: list[list[int]]
    open: list[int]
    expected: list[bool]
    posted: list[bool]
    done: list[float]
    connections: dict[tuple[int, int], _Connection]
    awake: dict[tuple[int, str], float] = field(default_factory=dict)  # until when a thread of a rank last ran
    events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    count: int = 0

    def wake(self, now: float, rank: int, thread: str) -> float:
        """When a thread that sleeps has been woken: half of the latency after such a sleep, in the mean."""
        slept = now - self.awake.get((rank, thread), -inf)
        woken = now + self.latency(slept) * self.random.random()
        self.awake[rank, thread] = woken
        return woken

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, what, arguments))


def run(
    posts: Sequence[Post],
    ways: Mapping[tuple[int, int], Sequence[Port]],
    transport: Transport,
    latency: Callable[[float], float],
    random: Random,
) -> list[float]:
    """When each post is done, seconds. ways: the ports from a rank to another, in order; none: they share a host.
    latency: seconds of a message of a few bytes between threads that have slept for so long, without the time of its
    bytes: one half until gloo's own thread has it, which answers words of readiness with data at once, one half until
    the rank's. Every half takes from nothing to twice its mean, evenly (ASSUMPTION: two threads to wake, alike). With
    0.38 ms the ranks of the networks of four leave a barrier 0.15, 0.32 and 0.51 ms after the first; measured beside
    other operations (medians of three networks): 0.1, 0.3 to 0.6, and 0.5 to 1.1 ms.
    """
    n = len(posts)
    later: list[list[int]] = [[] for _ in posts]
    for i, post in enumerate(posts):
        for j in post.after:
            later[j].append(i)
    connections = {pair: _Connection(pair[1], way, ways[pair[::-1]]) for pair, way in ways.items()}
    state = _Run(
        posts, transport, latency, random, _partners(posts), later, [len(p.after) for p in posts],
        [False] * n, [False] * n, [inf] * n, connections,
    )  # fmt: skip
    for i, post in enumerate(posts):
        if not post.after:
            state.at(post.delay, _post, i)
    while state.events:
        now, _, what, arguments = heapq.heappop(state.events)
        what(state, now, *arguments)
    assert max(state.done, default=0.0) < inf, "a post waits for one that never happens"
    return state.done


def _partners(posts: Sequence[Post]) -> list[int]:
    """The receive of every send and the other way round: those of one rank to another match in order."""
    partner = [-1] * len(posts)
    open_: dict[tuple[str, int, int], deque[int]] = {}
    for i, post in enumerate(posts):
        if post.what not in (SEND, RECEIVE):
            continue
        other = RECEIVE if post.what == SEND else SEND
        waiting = open_.get((other, post.peer, post.rank))
        if waiting:
            partner[i] = waiting.popleft()
            partner[partner[i]] = i
        else:
            open_.setdefault((post.what, post.rank, post.peer), deque()).append(i)
    assert not any(open_.values()), "a send without its receive"
    return partner


def _post(run: _Run, now: float, i: int) -> None:
    post = run.posts[i]
    run.posted[i] = True
    if post.what == NOTE:
        _done(run, now, i)
    elif post.what in (HAND_OVER, HAND_BACK):
        run.at(run.wake(now, post.rank, WORKER if post.what == HAND_OVER else MAIN), _done, i)
    elif post.what == RECEIVE:
        _write(run, now, post, _Message(PREAMBLE, run.partner[i], True))
    elif run.expected[i]:
        _write(run, now, post, _Message(PREAMBLE + post.bytes, i, False))


def _done(run: _Run, now: float, i: int) -> None:
    run.done[i] = now
    for j in run.later[i]:
        run.open[j] -= 1
        if not run.open[j]:
            run.at(now + run.posts[j].delay, _post, j)


def _write(run: _Run, now: float, post: Post, message: _Message) -> None:
    connection = run.connections[post.rank, post.peer]
    connection.queue.append(message)
    _fill(run, now, connection)


def _fill(run: _Run, now: float, connection: _Connection) -> None:
    """Sends what the port of the own host takes (none between ranks of one host). A packet takes on bytes of all
    messages that were written, so that one may hold the end of a message and the beginning of the next."""
    transport, queue = run.transport, connection.queue
    while queue:
        if connection.way:
            size = 0.0
            for message in queue:
                size = min(size + message.left, transport.packet)
                if size == transport.packet:
                    break
            if connection.waiting > transport.share:
                return
            connection.waiting += size
        else:
            size = queue[0].left
        _pass(run, now, connection, 0, size, _taken(run, now, queue, size))


def _taken(run: _Run, now: float, queue: deque[_Message], size: float) -> list[_Message]:
    """Takes the next `size` bytes; returns the messages that end with them. Sockets buffer messages whole
    (`emulate_net.TCP`): one whose first bytes are taken is written."""
    ended = []
    while size > 0:
        message = queue[0]
        part = min(size, message.left)
        size -= part
        message.left -= part
        if message.left <= 0:
            ended.append(queue.popleft())
        if not (message.word or message.written):
            message.written = True
            _done(run, now, message.post)
    return ended


def _pass(run: _Run, now: float, connection: _Connection, port: int, size: float, ended: Sequence[_Message]) -> None:
    """A packet comes to a port of its way, or to the other rank, which has all of the messages `ended` then."""
    if port == 1:
        connection.waiting -= size
    if port < len(connection.way):
        leaves = connection.way[port].passes(now, size + HEADERS * ceil(size / SEGMENT))
        run.at(leaves, _pass, connection, port + 1, size, ended)
    else:
        receiver = connection.receiver
        if ended:
            woken = run.wake(now, receiver, LOOP)
            for message in ended:
                run.at(woken, _arrive, message)
        run.awake[receiver, LOOP] = max(now, run.awake.get((receiver, LOOP), now))
        if connection.way:
            _acknowledge(run, now, connection, 0)
    if port == 1:
        _fill(run, now, connection)


def _acknowledge(run: _Run, now: float, connection: _Connection, port: int) -> None:
    if port < len(connection.back):
        run.at(connection.back[port].passes(now, HEADERS), _acknowledge, connection, port + 1)


def _arrive(run: _Run, now: float, message: _Message) -> None:
    """gloo's thread has the whole message: a word lets data go that were waiting for it, data wake the rank."""
    if not message.word:
        receive = run.partner[message.post]
        run.at(run.wake(now, run.posts[receive].rank, WORKER), _done, receive)
        return
    run.expected[message.post] = True
    if run.posted[message.post]:
        post = run.posts[message.post]
        _write(run, now, post, _Message(PREAMBLE + post.bytes, message.post, False))
