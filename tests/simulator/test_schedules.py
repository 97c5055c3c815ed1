from fractions import Fraction

import pytest

from simulator import Timeline, breakdown, gpipe, one_f_one_b, pipeline_program, replay, simulate
from simulator.schedules import Order

SCHEDULES = pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
SIZES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 4, 5, 8, 16, 33)]


def text(order: Order) -> list[str]:
    return [" ".join(f"{direction}{k}" for direction, k in stage) for stage in order]


def test_orders_by_hand() -> None:
    assert text(gpipe(2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2
    assert text(one_f_one_b(3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert text(one_f_one_b(3, 1)) == ["F0 B0"] * 3


@SCHEDULES
def test_every_stage_runs_everything_once(schedule) -> None:
    for p, m in SIZES:
        for order in schedule(p, m):
            assert sorted(order) == sorted((d, k) for d in "FB" for k in range(m))


@SCHEDULES
def test_bubble_of_uniform_stages_is_exact(schedule) -> None:
    """(p - 1) / (m + p - 1) of the step on every rank; durations are exact in binary, so nothing rounds."""
    for p, m in SIZES:
        for forward, backward in [(1.0, 2.0), (1.0, 1.0), (0.75, 0.125)]:
            timeline = simulate(pipeline_program(schedule(p, m), [forward] * p, [backward] * p))
            assert timeline.makespan == (m + p - 1) * (forward + backward)
            for part in breakdown(timeline).values():
                assert Fraction(part.bubble) / Fraction(timeline.makespan) == Fraction(p - 1, m + p - 1)
                assert part.exposed_communication == 0.0


def in_flight(timeline: Timeline, stage: int) -> int:
    """Most micro-batches of a stage between the start of their forward and the end of their backward."""
    program = timeline.program
    events = []
    for i in range(len(program)):
        if program.resource[i] == stage:
            forward = program.categories[program.category[i]] == "forward"
            events.append((timeline.start[i], 1) if forward else (timeline.finish[i], -1))
    running = most = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return most


def test_1f1b_keeps_fewer_micro_batches() -> None:
    p, m = 4, 12
    times = [1.0] * p, [2.0] * p
    assert [in_flight(simulate(pipeline_program(gpipe(p, m), *times)), s) for s in range(p)] == [m] * p
    assert [in_flight(simulate(pipeline_program(one_f_one_b(p, m), *times)), s) for s in range(p)] == [4, 3, 2, 1]


@SCHEDULES
def test_replay_agrees_with_transfers_and_uneven_stages(schedule) -> None:
    for p, m in SIZES:
        forward, backward = [1.0 + 0.1 * s for s in range(p)], [2.0 - 0.1 * s for s in range(p)]
        program = pipeline_program(schedule(p, m), forward, backward, [0.3] * (p - 1), [0.7] * (p - 1))
        assert len(program) == 2 * m * p + 2 * m * (p - 1)
        assert replay(program).finish.tolist() == simulate(program).finish.tolist()


def test_transfers_by_hand() -> None:
    timeline = simulate(pipeline_program(gpipe(2, 1), [1.0, 1.0], [2.0, 2.0], [0.5], [0.25]))
    assert timeline.makespan == 1.0 + 0.5 + 1.0 + 2.0 + 0.25 + 2.0
    assert breakdown(timeline)[0].exposed_communication == 0.5  # what rank 0 sends; the gradient is rank 1's


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="0 stages"):
        gpipe(0, 1)
    with pytest.raises(ValueError, match="1 times per stage are given; this pipeline needs 2"):
        pipeline_program(gpipe(2, 1), [1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="transfer times per boundary"):
        pipeline_program(gpipe(2, 1), [1.0] * 2, [1.0] * 2, [1.0, 1.0])
    with pytest.raises(ValueError, match="waits for ever to run B1"):
        pipeline_program([[("F", 0), ("F", 1), ("B", 0), ("B", 1)], [("F", 0), ("B", 0)]], [1.0] * 2, [1.0] * 2)
