from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import (
    Breakdown,
    Program,
    ProgramBuilder,
    Resource,
    breakdown,
    critical_path,
    overall,
    program_from_arrays,
    replay,
    simulate,
    utilisation,
)
from simulator.timeline import Timeline, covered
from tests.simulator.programs import SEEDS, SIZES, edge_list, random_program

FEW = settings(max_examples=200, deadline=None)


def two_ranks() -> Program:
    """Rank 0 computes 0-2 and 5-6 and communicates 1-4; rank 1 waits for that and computes 4-7."""
    builder = ProgramBuilder()
    gpu = [builder.resource(f"gpu {rank}", rank=rank) for rank in range(2)]
    link = builder.resource("link", rank=0, kind="link")
    first = builder.task("first half", "forward", 1.0, gpu[0])
    builder.task("second half", "forward", 1.0, gpu[0], deps=[first])
    send = builder.task("send", "send", 3.0, link, deps=[first])
    wait = builder.task("delay", "delay", 1.0, deps=[send], rank=0)
    builder.task("step", "update", 1.0, gpu[0], deps=[wait])
    builder.task("other", "forward", 3.0, gpu[1], deps=[send])
    return builder.build()


def test_breakdown_by_hand() -> None:
    parts = breakdown(simulate(two_ranks()))
    assert parts == {0: Breakdown(3.0, 2.0, 2.0), 1: Breakdown(3.0, 0.0, 4.0)}
    assert overall(parts) == Breakdown(3.0, 1.0, 3.0)


def test_rank_without_tasks_waits_for_all_of_the_step_and_ranks_are_needed() -> None:
    program = program_from_arrays([2.0], [], [], rank=0, resource=0, resources=[Resource("a"), Resource("b", rank=7)])
    assert breakdown(simulate(program)) == {0: Breakdown(2.0, 0.0, 0.0), 7: Breakdown(0.0, 0.0, 2.0)}
    with pytest.raises(ValueError, match="no rank"):
        overall(breakdown(simulate(program_from_arrays([1.0], [], []))))


@FEW
@given(SEEDS, SIZES, st.sampled_from(range(1, 7)), st.sampled_from(range(0, 3)), st.booleans())
def test_breakdown_sums_to_the_step(seed: int, tasks: int, resources: int, pools: int, ties: bool) -> None:
    timeline = simulate(random_program(seed, tasks, resources, pools, ties))
    for part in breakdown(timeline).values():
        assert min(part.compute, part.exposed_communication, part.bubble) >= 0.0
        assert part.total == pytest.approx(timeline.makespan, rel=1e-12)


@FEW
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=20))
def test_covered_counts_each_moment_once(intervals: list[tuple[int, int]]) -> None:
    intervals = sorted(intervals)
    start = np.array([a for a, _ in intervals], float)
    finish = np.array([a + length for a, length in intervals], float)
    assert covered(start, finish) == len({t for a, length in intervals for t in range(a, a + length)})


def test_critical_path_by_hand() -> None:
    assert critical_path(simulate(two_ranks())) == [0, 2, 5]
    queue = program_from_arrays([2.0, 1.0, 4.0], [], [], resource=0, resources=[Resource("r")])
    assert critical_path(simulate(queue)) == [0, 1, 2]
    assert critical_path(simulate(ProgramBuilder().build())) == []


def explained(timeline: Timeline) -> None:
    path = critical_path(timeline)
    edges, resource = set(edge_list(timeline.program)), timeline.program.resource
    assert timeline.start[path[0]] == 0.0 and timeline.finish[path[-1]] == timeline.makespan
    assert len(set(path)) == len(path)
    for a, b in pairwise(path):
        assert timeline.finish[a] == timeline.start[b]
        assert (a, b) in edges or resource[a] == resource[b] >= 0


@FEW
@given(SEEDS, SIZES, st.sampled_from(range(1, 5)), st.sampled_from(range(0, 3)), st.booleans())
def test_critical_path_has_no_gap(seed: int, tasks: int, resources: int, pools: int, ties: bool) -> None:
    explained(simulate(random_program(seed, tasks, resources, pools, ties)))


@FEW
@given(SEEDS, SIZES, st.booleans())
def test_critical_path_of_replay_has_no_gap(seed: int, tasks: int, ties: bool) -> None:
    explained(replay(random_program(seed, tasks, 3, ties=ties, ascending=True, wide=1)))


def test_utilisation() -> None:
    program = program_from_arrays(
        [3.0, 1.0, 4.0], [], [], resource=[0, 0, 1], resources=[Resource("a", 2), Resource("b"), Resource("c")]
    )
    assert utilisation(simulate(program)) == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert utilisation(simulate(program_from_arrays([], [], [], resources=[Resource("a")]))) == {"a": 0.0}
