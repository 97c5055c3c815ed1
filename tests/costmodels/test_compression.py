"""Bytes, ops and memory of compressed gradients."""

from __future__ import annotations

from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.cluster import load_cluster
from costmodels.compression import (
    DEFAULTS,
    Compression,
    compression_from,
    elements,
    factors,
    kept,
    messages,
    payload,
    reply_bytes,
    state_bytes,
    wire_bytes,
)
from costmodels.compression_ops import codec, seconds

SHAPES = ((64, 128), (128,), (32, 16, 3, 3), (4, 4))
N = sum(prod(s) for s in SHAPES)
shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)
names = st.sampled_from([*DEFAULTS, "bf16"])


@pytest.mark.parametrize(
    ("name", "size"),
    [("none", 4 * N), ("fp16", 2 * N), ("int8", N + 4 * ceil(N / 2048)), ("sign", ceil(N / 8) + 4),
     ("topk0.01", 8 * ceil(0.01 * N)), ("dgc0.001", 8 * ceil(0.001 * N)),
     ("powersgd2", 4 * (2 * (64 + 128) + 2 * (32 + 144) + 128 + 16))],
)  # fmt: skip
def test_payloads_are_the_sum_of_their_parts(name, size):
    assert payload(compression_from(name), SHAPES) == size


def test_powersgd_sends_vectors_then_p_then_q_and_leaves_small_matrices():
    sent = messages(compression_from("powersgd2"), SHAPES, 4)
    assert [m.bytes for m in sent] == [4 * (128 + 16), 4 * 2 * (64 + 32), 4 * 2 * (128 + 144)]
    assert {m.kind for m in sent} == {"all_reduce"}
    assert factors(((4, 4),), 1).matrices == () and factors(((8, 8),), 1).matrices == ((8, 8, 1),)
    assert factors(((3, 1000),), 8).matrices == ()  # rank 3 of 3 rows is no compression


def test_codes_that_cannot_be_added_are_gathered_and_grow_with_the_ranks():
    sign = compression_from("sign")
    (four,), (eight,) = messages(sign, SHAPES, 4), messages(sign, SHAPES, 8)
    assert four.kind == "all_gather" and eight.bytes == 2 * four.bytes == 8 * payload(sign, SHAPES)
    assert wire_bytes(sign, SHAPES, 8) == 7 * payload(sign, SHAPES)
    assert wire_bytes(Compression(), SHAPES, 8) == 2 * 7 / 8 * 4 * N
    assert len(codec(sign, SHAPES, 8).decode) - len(codec(sign, SHAPES, 4).decode) == 4 * 4


def test_memory_kept_from_step_to_step():
    found = factors(SHAPES, 2)
    memory = {name: state_bytes(compression_from(name), SHAPES) for name in DEFAULTS}
    assert memory["none"] == memory["fp16"] == memory["int8"] == 0
    assert memory["sign"] == memory["topk0.01"] == 4 * N and memory["dgc0.001"] == 8 * N
    assert memory["powersgd2"] == 4 * (N + found.p + found.q)


@given(shapes, names, st.integers(2, 64))
def test_a_payload_is_never_larger_than_the_gradient_but_for_its_headers(shape, name, ranks):
    c, n = compression_from(name), elements(shape)
    assert payload(c, shape) <= 4 * n + 8
    assert payload(c, shape) <= reply_bytes(c, shape, ranks) or not c.density or reply_bytes(c, shape, ranks) == 4 * n
    if c.summable:
        assert wire_bytes(c, shape, ranks) <= wire_bytes(Compression(), shape, ranks)
    parts = codec(c, shape, ranks)
    assert (not parts.encode) == (c.kind == "none")
    assert all(op.bytes_read >= 0 and op.bytes_written >= 0 for op in (*parts.encode, *parts.between, *parts.decode))


@given(st.integers(1, 10**7), names, st.integers(2, 64))
def test_bytes_grow_with_elements_and_ranks(n, name, ranks):
    c = compression_from(name)
    assert payload(c, ((n,),)) <= payload(c, ((n + 100,),))
    assert wire_bytes(c, ((n,),), ranks) <= wire_bytes(c, ((n,),), ranks + 1)
    assert not c.density or kept(c, n) == max(ceil(round(c.density * n, 6)), 1)


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n != "none"])
def test_encoding_takes_longer_with_more_bytes_and_decoding_with_more_codes(name):
    c, device = compression_from(name), load_cluster("dgx-h100").device
    small, large = (codec(c, ((n, 4096),), 8) for n in (512, 8192))
    assert seconds(device, small.encode, 0.0) < seconds(device, large.encode, 0.0)
    more = codec(c, ((512, 4096),), 64)
    assert (seconds(device, more.decode, 0.0) > seconds(device, small.decode, 0.0)) == (not c.summable)
    assert seconds(device, small.encode, 1.0) == len(small.encode)  # a slow host sets the time


def test_streams_of_a_cast_are_priced_by_their_bytes():
    device = load_cluster("dgx-h100").device
    cast = codec(compression_from("fp16"), ((2**28,),), 2).encode
    at_most = sum(op.bytes_read + op.bytes_written for op in cast) / device.memory_bandwidth
    assert at_most < seconds(device, cast, 0.0) < 2 * at_most


@pytest.mark.parametrize(
    "name", ["zip", "fp32", "powersgd0", "topk2", "topk0", "fp164", "none5", "sign1", "", "powersgd1.5"]
)
def test_bad_names_get_one_sentence(name):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        compression_from(name)


def test_names_come_back():
    assert [compression_from(n).name for n in DEFAULTS] == list(DEFAULTS)
    assert compression_from("powersgd").rank == 4 and compression_from("dgc").density == 0.001
    assert [compression_from(n).lossy for n in ("none", "fp16", "bf16", "int8")] == [False, False, False, True]
