"""What the ranks of a process group hand to gloo, in order: the sends and receives of its collectives, with barriers.

Of gloo 5898507: alltoall.cc, allgather.cc, allreduce.cc, broadcast.cc, barrier.cc; of torch's ProcessGroupGloo: a
collective is handed to a worker thread and back, a send or receive is posted by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

MIB = 2**20
SEND, RECEIVE, HAND_OVER, HAND_BACK, NOTE = "send", "receive", "hand over", "hand back", "note"


@dataclass(frozen=True, slots=True)
class Post:
    """One thing that `rank` does when all of `after` (ids of its own earlier posts) are done. SEND to or RECEIVE from
    `peer` (done: written to the socket, or come in whole), HAND_OVER to the thread that posts, HAND_BACK to the one
    that asked for it, or NOTE the time. delay: seconds after these that it waits for."""

    rank: int
    what: str
    peer: int
    bytes: float
    after: Sequence[int]
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """posts: of all ranks; those that are due at once happen in this order. begin, end: [repetition][rank] ids of the
    notes before and after each repetition."""

    posts: list[Post]
    begin: list[list[int]]
    end: list[list[int]]


def program(kind: str, nbytes: float, ranks: int, repetitions: int, apart: float = 0.0) -> Program:
    """As `emulate_rank.measure` runs it: a barrier, then the collective, again and again. nbytes as nccl-tests counts;
    send: rank r to r + P/2 and back. apart: seconds by which one rank comes later than the others, in turn."""
    found = Program([], [], [])
    last: list[Sequence[int]] = [()] * ranks
    for i in range(repetitions):
        begin, end = [], []
        for rank in range(ranks):
            add = _Rank(found.posts, rank, ranks)
            late = apart if (i + rank) % ranks == 0 else 0.0
            begin.append(add.step(NOTE, add.handed_over(_barrier, 0.0, last[rank]), delay=late))
            after = [begin[-1]]
            done = _send(add, nbytes, after) if kind == "send" else add.handed_over(FORMS[kind], nbytes, after)
            end.append(add.step(NOTE, done))
            last[rank] = [end[-1]]
        found.begin.append(begin)
        found.end.append(end)
    return found


@dataclass(frozen=True, slots=True)
class _Rank:
    """Adds posts of one rank; peers are counted from it."""

    posts: list[Post]
    rank: int
    size: int

    def step(self, what: str, after: Sequence[int], peer: int = 0, nbytes: float = 0.0, delay: float = 0.0) -> int:
        self.posts.append(Post(self.rank, what, (self.rank + peer) % self.size, nbytes, after, delay))
        return len(self.posts) - 1

    def handed_over(self, form: Form, nbytes: float, after: Sequence[int]) -> Sequence[int]:
        return [self.step(HAND_BACK, form(self, nbytes, [self.step(HAND_OVER, after)]))]


Form = Callable[[_Rank, float, Sequence[int]], Sequence[int]]


def _barrier(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    """Rounds of distance 1, 2, 4 ..."""
    distance = 1
    while distance < add.size:
        after = [add.step(RECEIVE, after, -distance, nbytes), add.step(SEND, after, distance, nbytes)]
        distance *= 2
    return after


def _send(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    half = add.size // 2
    for what in (SEND, RECEIVE) if add.rank < half else (RECEIVE, SEND):
        after = [add.step(what, after, half, nbytes)]
    return after


def _all_to_all(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    """All at once; to r + i before from r - i."""
    part = nbytes / add.size
    done: list[int] = []
    for i in range(1, add.size):
        done += [add.step(SEND, after, i, part), add.step(RECEIVE, after, -i, part)]
    return done


def _broadcast(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    """Binomial tree from rank 0, to all children at once."""
    done: list[int] = []
    step = 1
    while step < add.size:
        if step <= add.rank < 2 * step:
            after = [add.step(RECEIVE, after, -step, nbytes)]
            done += after
        elif add.rank < step and add.rank + step < add.size:
            done.append(add.step(SEND, after, step, nbytes))
        step *= 2
    return done


def _all_gather(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    """A ring in halves; each send is posted before the receive."""
    return _ring(add, nbytes / (2 * add.size), 2, after, (SEND, RECEIVE))


def _all_reduce(add: _Rank, nbytes: float, after: Sequence[int]) -> Sequence[int]:
    """Segments of up to 1 MiB, two or more a rank, twice around; reduce_scatter is the same, whole."""
    each = max(ceil(nbytes / MIB / add.size), 2)
    for _ in range(2):
        after = _ring(add, nbytes / (each * add.size), each, after, (RECEIVE, SEND))
    return after


def _ring(add: _Rank, segment: float, each: int, after: Sequence[int], order: Sequence[str]) -> Sequence[int]:
    """(P - 1) * each segments to the next rank and from the one before; the i-th when those two before it are done."""
    pairs: list[list[int]] = []
    for i in range((add.size - 1) * each):
        due = pairs[i - 2] if i >= 2 else after
        pairs.append([add.step(what, due, 1 if what == SEND else -1, segment) for what in order])
    return [post for pair in pairs[-2:] for post in pair]


FORMS = {
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "reduce_scatter": _all_reduce,
}
