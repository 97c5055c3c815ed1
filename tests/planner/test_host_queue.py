"""The three numbers of a run give what running kernel by kernel gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.host_queue import EMPTY, Run, joined, repeated, run_of

SECONDS = st.floats(0, 10, allow_subnormal=False)
OPS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=30)


def finish(ops: list[tuple[float, float]], begin: float, free: float) -> float:
    """Kernel by kernel: an op without device seconds launches nothing."""
    host, device = begin, free
    for issue, seconds in ops:
        host += issue
        if seconds > 0:
            device = max(device, host) + seconds
    return device


def by_run(run: Run, begin: float, free: float) -> float:
    return max(free + run.device, begin + run.tail)


def made(ops: list[tuple[float, float]]) -> Run:
    return run_of(np.array([o[0] for o in ops]), np.array([o[1] for o in ops]))


@given(OPS, SECONDS, SECONDS)
def test_a_run_is_its_kernels(ops: list[tuple[float, float]], begin: float, free: float) -> None:
    assert by_run(made(ops), begin, free) == pytest.approx(finish(ops, begin, free))


@given(OPS, OPS, SECONDS, SECONDS)
def test_runs_join(a: list[tuple[float, float]], b: list[tuple[float, float]], begin: float, free: float) -> None:
    whole = joined(made(a), made(b))
    assert by_run(whole, begin, free) == pytest.approx(finish(a + b, begin, free))
    assert whole.host == pytest.approx(sum(o[0] for o in a + b))


@given(OPS, st.integers(1, 7), SECONDS, SECONDS)
def test_a_run_repeats(ops: list[tuple[float, float]], times: int, begin: float, free: float) -> None:
    assert by_run(repeated(made(ops), times), begin, free) == pytest.approx(finish(ops * times, begin, free))


def test_launch_bound_steps_take_the_hosts_time() -> None:
    slow_host = made([(1.0, 0.1)] * 10)
    assert slow_host.alone == pytest.approx(10.1)
    assert made([(0.1, 1.0)] * 10).alone == pytest.approx(10.1)
    assert joined(EMPTY, slow_host) == slow_host
