"""Packets through ports with token buckets, and gloo's posts on them, against closed forms."""

from __future__ import annotations

from math import ceil, inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validation.emulate_gloo import FORMS, HAND_BACK, HAND_OVER, NOTE, RECEIVE, SEND, Post, program
from validation.emulate_ports import HEADERS, PREAMBLE, SEGMENT, Port, Transport, run

PACKET = 10 * SEGMENT
WIDE = Transport(share=1e12, packet=PACKET)
RATE = 1e6


def awake(slept: float) -> float:
    """No thread needs any time to wake up."""
    return 0.0


def framed(nbytes: float) -> float:
    """Bytes on a wire of a message of gloo, whose packets are whole segments but for the last."""
    return nbytes + PREAMBLE + HEADERS * ceil((nbytes + PREAMBLE) / SEGMENT)


def star(ranks: int, full: float = 0.0) -> dict[tuple[int, int], tuple[Port, ...]]:
    out, into = ([Port(RATE, full) for _ in range(ranks)] for _ in range(2))
    return {(a, b): (out[a], into[b]) for a in range(ranks) for b in range(ranks) if a != b}


def sent(nbytes: float, transport: Transport = WIDE, full: float = 0.0) -> float:
    """When a message from rank 0 is at rank 1, which expects it already."""
    posts = [
        Post(1, RECEIVE, 0, nbytes, ()),
        Post(0, RECEIVE, 1, 0.0, ()),
        Post(1, SEND, 0, 0.0, ()),
        Post(0, SEND, 1, nbytes, [1]),
    ]
    done = run(posts, star(2, full), transport, awake, Random(0))
    return done[0] - done[1]


def test_a_bucket_lets_a_burst_pass_and_then_its_rate() -> None:
    port = Port(rate=2.0, full=4.0)  # 8 bytes
    assert port.passes(0.0, 8.0) == 0.0
    assert port.passes(0.0, 6.0) == 3.0
    assert port.passes(4.0, 2.0) == 4.0  # 2 bytes saved up in a second
    assert port.passes(100.0, 10.0) == 101.0  # never more than 8


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(1.0, 100.0)), min_size=1), st.floats(0.0, 3.0))
def test_packets_leave_in_order_and_no_faster_than_the_rate(packets: list[tuple[float, float]], full: float) -> None:
    port, now, before, size = Port(10.0, full), 0.0, 0.0, 0.0
    for gap, nbytes in packets:
        now, size = now + gap, size + nbytes
        left = port.passes(now, nbytes)
        assert left >= max(now, before)
        assert size <= 10.0 * (left + full) * (1 + 1e-12)
        before = left


@pytest.mark.parametrize("nbytes", [4.0, 1e3, 1e6])
def test_a_message_takes_its_frames_and_is_stored_once_at_the_bridge(nbytes: float) -> None:
    """The bridge has a whole packet before it sends any of it. The acknowledgement of the word goes first."""
    first = min(PACKET, nbytes + PREAMBLE)
    passed = HEADERS + first + HEADERS * ceil(first / SEGMENT) + framed(nbytes)
    assert sent(nbytes) == pytest.approx(passed / RATE, rel=1e-9)


def test_a_bucket_at_the_bridge_hides_the_second_port() -> None:
    burst = 16384.0
    assert sent(1e6, full=burst / RATE) == pytest.approx((framed(1e6) - burst) / RATE, rel=1e-3)


def test_same_host_takes_the_latency_only() -> None:
    ways: dict[tuple[int, int], tuple[Port, ...]] = {(0, 1): (), (1, 0): ()}
    posts = [Post(1, RECEIVE, 0, 1e9, ()), Post(0, SEND, 1, 1e9, ())]
    halves = [run(posts, ways, WIDE, lambda slept: 1.0, Random(seed))[0] for seed in range(400)]
    assert max(halves) < 3.0 and min(halves) > 0.0
    assert sum(halves) / 400 == pytest.approx(1.5, rel=0.05)  # half for the word, a whole latency for the data


def test_a_packet_takes_the_end_of_a_message_and_the_beginning_of_the_next() -> None:
    """Two messages of a packet and a half each: three packets, the second with both, so that the first message is
    there when the second packet is, not half a packet earlier."""
    nbytes = 1.5 * PACKET - PREAMBLE
    posts = [Post(1, RECEIVE, 0, nbytes, ()), Post(1, RECEIVE, 0, nbytes, ()), Post(0, RECEIVE, 1, 0.0, ())]
    posts += [Post(1, SEND, 0, 0.0, ())] + [Post(0, SEND, 1, nbytes, [2]) for _ in range(2)]
    eager = Transport(0.0, PACKET)  # a packet waits for the one before to leave the port
    done = run(posts, star(2), eager, awake, Random(0))
    packet = PACKET + 10 * HEADERS
    assert [(t - done[2]) * RATE for t in done[:2]] == pytest.approx([3 * packet, 4 * packet], rel=0.01)


def test_a_thread_is_woken_after_the_sleep_that_it_had() -> None:
    """Rank 1 waits a second for its bytes: its loop meets every packet, its worker sleeps until all are there."""
    slept = []

    def latency(seconds: float) -> float:
        slept.append(seconds)
        return 0.0

    ways = star(2) | {(2, 1): (Port(RATE, 0.0),), (1, 2): (Port(RATE, 0.0),)}
    posts = [Post(1, RECEIVE, 2, 1e6, ()), Post(2, SEND, 1, 1e6, ()), Post(1, HAND_OVER, 0, 0.0, [0])]
    run(posts, ways, WIDE, latency, Random(0))
    word, data, worker, again = slept
    assert word == worker == inf and 0 < data < 0.1 and again == 0.0


def two_at_once(share: float) -> list[float]:
    """Two messages of 100 packets from rank 0, to ranks 1 and 2: when they are there, as part of the later."""
    ways = star(3)
    nbytes = 100 * PACKET - PREAMBLE
    posts = [Post(r, RECEIVE, 0, nbytes, ()) for r in (1, 2)] + [Post(0, SEND, r, nbytes, ()) for r in (1, 2)]
    done = run(posts, ways, Transport(share, PACKET), awake, Random(0))
    return [done[0] / done[1], done[1] * RATE / (200 * (PACKET + 10 * HEADERS))]


def test_what_fits_into_the_port_leaves_it_first() -> None:
    """With the whole message in the port the second waits for all of the first; packet by packet they share."""
    first, total = two_at_once(1e12)
    assert first == pytest.approx(0.5, abs=0.01) and total == pytest.approx(1.0, abs=0.02)
    first, total = two_at_once(2 * PACKET)
    assert first > 0.95 and total == pytest.approx(1.0, abs=0.02)


def exchange(gap: float) -> float:
    """Two ranks post a send, then a receive, the second one `gap` messages' times later; when both are done."""
    nbytes = 1e6
    ways = star(2) | {(2, 1): (Port(RATE, 0.0),), (1, 2): (Port(RATE, 0.0),)}  # rank 2 holds rank 1 up, on other wires
    posts = [Post(1, RECEIVE, 2, gap * nbytes, ()), Post(2, SEND, 1, gap * nbytes, ())]
    posts += [Post(0, SEND, 1, nbytes, ()), Post(0, RECEIVE, 1, nbytes, ())]
    posts += [Post(1, SEND, 0, nbytes, [0]), Post(1, RECEIVE, 0, nbytes, [0])]
    if not gap:
        posts = [Post(p.rank, p.what, p.peer, p.bytes, ()) for p in posts[2:]]
    done = run(posts, ways, WIDE, awake, Random(0))
    return (max(done) - (done[0] if gap else 0.0)) * RATE / framed(nbytes)


def test_the_later_of_two_ranks_sends_first_and_its_word_waits_behind_its_data() -> None:
    assert exchange(0.0) == pytest.approx(1.0, rel=0.03)
    assert exchange(0.1) == pytest.approx(2.0, rel=0.03)


@given(st.sampled_from([*FORMS, "send"]), st.sampled_from([2, 4, 6]), st.floats(0.0, 3e6))
def test_programs_end_and_every_send_has_its_receive(kind: str, ranks: int, nbytes: float) -> None:
    found = program(kind, nbytes, ranks, 2)
    done = run(found.posts, star(ranks), WIDE, lambda slept: 1e-4, Random(0))
    for begin, end in zip(found.begin, found.end):
        assert all(done[a] <= done[b] for a, b in zip(begin, end))
    assert all(done[a] <= done[b] for a, b in zip(found.end[0], found.begin[1]))
    for i, post in enumerate(found.posts):
        assert all(found.posts[j].rank == post.rank and j < i for j in post.after)


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [("all_reduce", 1.5), ("reduce_scatter", 1.5), ("all_gather", 0.75), ("all_to_all", 0.75), ("broadcast", None)],
)
def test_programs_move_what_the_collective_needs(kind: str, buffers: float | None) -> None:
    """Bytes that every rank of four sends, over the buffer; broadcast: three in all, two of them by the root."""
    posts = program(kind, 4e6, 4, 1).posts
    sends = [sum(p.bytes for p in posts if p.what == SEND and p.rank == r) / 4e6 for r in range(4)]
    assert sends == pytest.approx([buffers] * 4 if buffers else [2.0, 1.0, 0.0, 0.0])
    assert sum(p.bytes for p in posts if p.what == RECEIVE) == pytest.approx(4e6 * sum(sends))
    assert {p.what for p in posts} == {SEND, RECEIVE, HAND_OVER, HAND_BACK, NOTE}


def test_a_send_without_its_receive_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="receive"):
        run([Post(0, SEND, 1, 1.0, ())], star(2), WIDE, awake, Random(0))
