import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import Pool, ProgramBuilder, Resource, engine, program_from_arrays, replay, simulate
from simulator.timeline import Timeline
from tests.simulator.programs import SEEDS, SIZES, edge_list, exact_times, random_program

ENGINES = pytest.mark.parametrize("name", ["compiled", "reference"])
FEW = settings(max_examples=200, deadline=None)
MANY = settings(max_examples=1000, deadline=None)


def same(a: Timeline, b: Timeline) -> None:
    np.testing.assert_array_equal(a.start, b.start)
    np.testing.assert_array_equal(a.finish, b.finish)
    assert a.makespan == b.makespan


@ENGINES
def test_tasks_queue_on_a_resource(name: str) -> None:
    timeline = simulate(program_from_arrays([2.0, 1.0, 4.0], [], [], resource=0, resources=[Resource("r")]), name)
    assert timeline.start.tolist() == [0.0, 2.0, 3.0] and timeline.finish.tolist() == [2.0, 3.0, 7.0]
    assert timeline.makespan == 7.0


@ENGINES
def test_capacity_serves_several(name: str) -> None:
    program = program_from_arrays([3.0, 1.0, 1.0, 1.0], [], [], resource=0, resources=[Resource("r", 2)])
    timeline = simulate(program, name)
    assert timeline.start.tolist() == [0.0, 0.0, 1.0, 2.0]


@ENGINES
def test_no_resource_means_no_queue(name: str) -> None:
    timeline = simulate(program_from_arrays([3.0, 1.0, 2.0], [1], [2]), name)
    assert timeline.start.tolist() == [0.0, 0.0, 1.0]


@ENGINES
def test_earlier_ready_goes_first_and_ties_go_by_id(name: str) -> None:
    builder = ProgramBuilder()
    r = builder.resource("r")
    late = builder.task("late, low id", "x", 1.0, r)
    blocker = builder.task("blocker", "x", 4.0, r)
    one, two = builder.task("one", "x", 1.0), builder.task("two", "x", 2.0)
    tie_a, tie_b = builder.task("tie a", "x", 1.0, r), builder.task("tie b", "x", 1.0, r)
    for before, after in [(two, late), (one, tie_b), (one, tie_a)]:
        builder.edge(before, after)
    start = simulate(builder.build(), name).start
    assert start[blocker] == 0.0
    assert (start[tie_a], start[tie_b], start[late]) == (4.0, 5.0, 6.0)


@ENGINES
def test_tasks_ready_at_one_instant_go_by_id_whoever_made_them_ready(name: str) -> None:
    # Tasks 0 and 1 end together; the one that readies task 3 is completed first, but task 2 has the lower id.
    program = program_from_arrays(
        [1.0, 1.0, 1.0, 1.0], [0, 1], [3, 2], resource=[-1, -1, 0, 0], resources=[Resource("r")]
    )
    assert simulate(program, name).start.tolist() == [0.0, 0.0, 1.0, 2.0]


@ENGINES
def test_zero_length_tasks_take_no_time(name: str) -> None:
    program = program_from_arrays(np.zeros(5), [0, 1, 2], [1, 2, 3], resource=0, resources=[Resource("r")])
    assert simulate(program, name).finish.tolist() == [0.0] * 5


@ENGINES
def test_empty_program(name: str) -> None:
    assert simulate(ProgramBuilder().build(), name).makespan == 0.0
    assert replay(ProgramBuilder().build(), engine=name).makespan == 0.0


def shared(durations: list[float], cores: float, demands: float | list[float] = 1.0) -> np.ndarray:
    n = len(durations)
    resources, pools = [Resource("r", n, pool=0)], [Pool("p", cores)]
    program = program_from_arrays(durations, [], [], resource=0, demand=demands, resources=resources, pools=pools)
    same(simulate(program), simulate(program, "reference"))
    return simulate(program).finish


@pytest.mark.parametrize(("n", "cores"), [(1, 1), (3, 1), (4, 2), (7, 2), (2, 4), (16, 16), (5, 2.5), (100, 8)])
def test_equal_tasks_share_equally(n: int, cores: float) -> None:
    assert shared([3.0] * n, cores).tolist() == pytest.approx([3.0 * max(1.0, n / cores)] * n, rel=1e-14)


def test_processor_sharing_by_hand() -> None:
    assert shared([1.0, 2.0], 1).tolist() == [2.0, 3.0]
    assert shared([1.0, 2.0, 3.0], 2).tolist() == pytest.approx([1.5, 2.5, 3.5])
    assert shared([1.0, 1.0], 2, [2.0, 1.0]).tolist() == pytest.approx([1.5, 1.5])
    assert shared([1.0, 1.0], 1, [2.0, 0.0]).tolist() == [2.0, 1.0]  # no demand: neither slowed nor slowing


@ENGINES
def test_newcomer_slows_the_running_task(name: str) -> None:
    builder = ProgramBuilder()
    pool = builder.pool("cores", 1)
    r, s = builder.resource("r", pool=pool), builder.resource("s", pool=pool)
    first = builder.task("first", "x", 3.0, r)
    second = builder.task("second", "x", 1.0, s, deps=[builder.task("delay", "x", 1.0)])
    finish = simulate(builder.build(), name).finish
    assert (finish[second], finish[first]) == (3.0, 4.0)


@FEW
@given(st.lists(st.tuples(st.floats(0.01, 9.0), st.floats(1.0, 4.0)), min_size=1, max_size=30))
def test_one_core_conserves_work(tasks: list[tuple[float, float]]) -> None:
    """Demands of 1 or more keep one core busy to the end: the makespan is the work."""
    durations, demands = [d for d, _ in tasks], [c for _, c in tasks]
    assert shared(durations, 1.0, demands).max() == pytest.approx(sum(d * c for d, c in tasks), rel=1e-12)


@MANY
@given(SEEDS, SIZES, st.sampled_from(range(1, 6)), st.sampled_from(range(0, 4)), st.booleans())
def test_compiled_equals_reference_bit_for_bit(seed: int, tasks: int, resources: int, pools: int, ties: bool) -> None:
    program = random_program(seed, tasks, resources, pools, ties)
    same(simulate(program), simulate(program, "reference"))


@FEW
@given(SEEDS, st.sampled_from([1, 2, 3, 5, 8, 13, 21]), st.sampled_from(range(1, 5)), st.sampled_from(range(0, 3)))
def test_engine_equals_exact_fractions(seed: int, tasks: int, resources: int, pools: int) -> None:
    program = random_program(seed, tasks, resources, pools)
    start, finish = exact_times(program)
    timeline = simulate(program)
    np.testing.assert_allclose(timeline.start, start, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(timeline.finish, finish, rtol=1e-12, atol=1e-12)


@FEW
@given(SEEDS, st.booleans())
def test_ample_cores_change_nothing(seed: int, ties: bool) -> None:
    """A pool that is never full gives, bit for bit, the timeline without pools: two kernels, one answer."""
    plain = random_program(seed, 50, 4, ties=ties)
    arrays = {"resource": plain.resource, "resources": [Resource(r.name, r.capacity, 0) for r in plain.resources]}
    source, target = np.array(edge_list(plain), np.int64).reshape(-1, 2).T
    ample = program_from_arrays(plain.duration, source, target, demand=1.0, pools=[Pool("p", 50.0)], **arrays)
    same_times = simulate(ample)
    np.testing.assert_array_equal(same_times.start, simulate(plain).start)
    np.testing.assert_array_equal(same_times.finish, simulate(plain).finish)


@FEW
@given(SEEDS, SIZES, st.sampled_from(range(0, 3)), st.booleans())
def test_schedule_is_feasible(seed: int, tasks: int, pools: int, ties: bool) -> None:
    program = random_program(seed, tasks, 3, pools, ties)
    timeline = simulate(program)
    assert all(timeline.finish[a] <= timeline.start[b] for a, b in edge_list(program))
    assert (timeline.finish - timeline.start >= program.duration - 1e-12 * timeline.makespan).all()
    assert (timeline.finish == timeline.start)[program.duration == 0].all()
    for r, item in enumerate(program.resources):
        mine = np.flatnonzero(program.resource == r)
        for instant in timeline.start[mine]:
            running = (timeline.start[mine] <= instant) & (instant < timeline.finish[mine])
            assert running.sum() <= item.capacity


@MANY
@given(SEEDS, SIZES, st.sampled_from(range(1, 9)), st.booleans())
def test_brents_bound(seed: int, tasks: int, p: int, ties: bool) -> None:
    """Greedy schedules on p servers: max(W/p, D) <= T <= W/p + D, for work W and longest path D."""
    free = random_program(seed, tasks, 0, ties=ties, ascending=True)
    source, target = np.array(edge_list(free), np.int64).reshape(-1, 2).T
    bound = program_from_arrays(free.duration, source, target, resource=0, resources=[Resource("r", p)])
    work, depth, makespan = free.duration.sum(), replay(free).makespan, simulate(bound).makespan
    assert max(work / p, depth) <= makespan * (1 + 1e-12)
    assert makespan <= (work / p + depth) * (1 + 1e-12)


@FEW
@given(SEEDS, st.booleans())
def test_same_program_same_timeline(seed: int, ties: bool) -> None:
    program = random_program(seed, 60, 4, 2, ties)
    source, target = np.array(edge_list(program), np.int64).reshape(-1, 2).T
    order = np.random.default_rng(seed).permutation(source.size)
    columns = {"resource": program.resource, "demand": program.demand}
    rooms = {"resources": program.resources, "pools": program.pools}
    again = program_from_arrays(program.duration, source[order], target[order], **columns, **rooms)
    same(simulate(program), simulate(program))
    np.testing.assert_array_equal(simulate(again).finish, simulate(program).finish)


@FEW
@given(SEEDS, st.booleans())
def test_replay_compiled_equals_reference(seed: int, ties: bool) -> None:
    program = random_program(seed, 50, 3, ties=ties, ascending=True, wide=1)
    same(replay(program), replay(program, engine="reference"))


def in_order(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Resource]]:
    """A program whose resources run their tasks in id order, forced by edges."""
    program = random_program(seed, 50, 3, ascending=True, wide=1)
    edges = edge_list(program)
    for r in range(3):
        mine = np.flatnonzero(program.resource == r).tolist()
        edges += list(pairwise(mine))
    source, target = np.array(edges, np.int64).reshape(-1, 2).T
    return program.duration, source, target, program.resource, list(program.resources)


@FEW
@given(SEEDS)
def test_replay_equals_simulate_where_edges_fix_the_order(seed: int) -> None:
    duration, source, target, resource, resources = in_order(seed)
    program = program_from_arrays(duration, source, target, resource=resource, resources=resources)
    same(replay(program), simulate(program))


@FEW
@given(SEEDS, st.integers(0, 49), st.floats(0.0, 5.0))
def test_longer_tasks_never_help_in_a_fixed_order(seed: int, task: int, more: float) -> None:
    """Not true of free FIFO order, where Graham's anomalies exist."""
    duration, source, target, resource, resources = in_order(seed)
    program = program_from_arrays(duration, source, target, resource=resource, resources=resources)
    slower = duration + more * (np.arange(50) == task)
    assert (replay(program, slower).finish >= replay(program).finish).all()
    assert replay(program, slower).program.duration[task] == duration[task] + more


def test_longer_tasks_never_help_a_queue() -> None:
    resources = [Resource("r")]
    finishes = [
        simulate(program_from_arrays([1.0, d, 2.0], [], [], resource=0, resources=resources)).makespan
        for d in (0.0, 0.5, 1.0, 3.0)
    ]
    assert finishes == sorted(finishes)


def test_replay_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="capacity 2"):
        replay(program_from_arrays([1.0], [], [], resource=0, resources=[Resource("r", 2)]))
    with pytest.raises(ValueError, match="pools"):
        resources, pools = [Resource("r", pool=0)], [Pool("p", 1.0)]
        replay(program_from_arrays([1.0], [], [], resource=0, resources=resources, pools=pools))
    for name in ("compiled", "reference"):
        with pytest.raises(ValueError, match="topological order"):
            replay(program_from_arrays([1.0, 1.0], [1], [0]), engine=name)
    program = program_from_arrays([1.0, 1.0], [], [])
    with pytest.raises(ValueError, match="one per task"):
        replay(program, np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        replay(program, np.array([1.0, -1.0]))


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="'compiled' or 'reference'"):
        simulate(program_from_arrays([1.0], [], []), "fast")  # type: ignore[arg-type]


def test_without_numba_the_reference_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "simulator.kernels", raising=False)
    monkeypatch.delattr("simulator.kernels", raising=False)
    engine._compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="numba does not work here"):
            timeline = simulate(program_from_arrays([1.0, 2.0], [0], [1]))
        assert timeline.finish.tolist() == [1.0, 3.0]
    finally:
        engine._compiled.cache_clear()


def test_simulator_imports_no_torch() -> None:
    code = "import sys, simulator; sys.exit('torch' in sys.modules or 'opgraph' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
