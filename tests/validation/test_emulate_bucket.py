"""Flows through token buckets, against closed forms and against plain sharing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.flows import FlowBuilder, simulate_flows
from validation.emulate_bucket import through_buckets


def test_a_burst_passes_at_once_and_the_rest_at_the_rate() -> None:
    builder = FlowBuilder()
    builder.flow(10e6, [0], latency=0.5)
    finish, tokens = through_buckets(builder.build(), [2e6], 4e6, np.array([4e6]))
    assert finish.tolist() == pytest.approx([0.5 + 3.0]) and tokens.tolist() == pytest.approx([1e6])


def test_an_idle_bucket_fills_up_to_its_burst() -> None:
    builder = FlowBuilder()
    first = builder.flow(6e6, [0], latency=1.0)  # 3 s, then 1 s without bytes: 2e6 tokens
    second = builder.flow(6e6, [0], [first], latency=9.0)  # 2 s, then 9 s: more than the burst
    builder.flow(6e6, [0], [second])
    finish, _ = through_buckets(builder.build(), [2e6], 4e6, np.zeros(1))
    assert finish.tolist() == pytest.approx([4.0, 4.0 + 2.0 + 9.0, 15.0 + 1.0])


def test_the_slowest_bucket_of_a_path_holds_back() -> None:
    builder = FlowBuilder()
    builder.flow(10e6, [0, 1])
    finish, tokens = through_buckets(builder.build(), [2e6, 5e6], 4e6, np.array([1e6, 4e6]))
    assert finish.tolist() == pytest.approx([4.5]) and tokens.tolist() == pytest.approx([0.0, 4e6])


flow = st.tuples(
    st.floats(1.0, 1e3), st.floats(0.0, 5.0), st.sets(st.integers(0, 3), max_size=3), st.sets(st.integers(0, 9))
)


def built(flows: list[tuple[float, float, set[int], set[int]]]) -> FlowBuilder:
    builder = FlowBuilder()
    for i, (size, latency, path, after) in enumerate(flows):
        builder.flow(size, sorted(path), [j for j in after if j < i], latency=latency)
    return builder


@given(st.lists(flow, min_size=1, max_size=8))
def test_without_a_burst_it_is_plain_sharing(flows: list[tuple[float, float, set[int], set[int]]]) -> None:
    capacity = [1.0, 2.0, 5.0, 9.0]
    finish, _ = through_buckets(built(flows).build(), capacity, 0.0, np.zeros(4))
    assert finish == pytest.approx(simulate_flows(built(flows).build(), capacity, "reference").finish, rel=1e-9)


@given(st.lists(flow, min_size=1, max_size=8), st.floats(1.0, 500.0))
def test_no_link_passes_more_than_its_tokens_and_its_rate(
    flows: list[tuple[float, float, set[int], set[int]]], burst: float
) -> None:
    capacity = np.array([1.0, 2.0, 5.0, 9.0])
    finish, tokens = through_buckets(built(flows).build(), capacity, burst, np.full(4, burst))
    for link in range(4):
        passed = sum(size for size, _, path, _ in flows if link in path)
        assert passed <= burst + capacity[link] * finish.max() + 0.1
        assert 0.0 <= tokens[link] <= burst
