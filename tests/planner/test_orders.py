"""Orders of actions: torch's schedules, and no deadlock for any size."""

import pytest

from planner.orders import stage_order


def kinds(order):
    return [f"{a.kind}{a.micro}" for a in order if a.kind in "FB"]


def test_1f1b_of_two_stages_and_four_micro_batches():
    assert kinds(stage_order("1f1b", 0, 2, 4)) == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
    assert kinds(stage_order("1f1b", 1, 2, 4)) == ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]


def test_gpipe_runs_all_forwards_first():
    assert kinds(stage_order("gpipe", 0, 2, 3)) == ["F0", "F1", "F2", "B0", "B1", "B2"]


def test_one_stage_alternates_and_sends_nothing():
    order = stage_order("1f1b", 0, 1, 2)
    assert kinds(order) == ["F0", "B0", "F1", "B1"]
    assert all(a.kind in "FB" for a in order)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [2, 3, 4, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 7])
def test_every_transfer_has_two_ends_and_nobody_waits_for_ever(schedule, stages, micro_batches):
    if schedule == "1f1b" and micro_batches < stages:
        return
    orders = [list(stage_order(schedule, s, stages, micro_batches)) for s in range(stages)]
    started: list[set] = [set() for _ in range(stages)]
    at, done = [0] * stages, set()
    progress = True
    while progress:
        progress = False
        for s, order in enumerate(orders):
            while at[s] < len(order):
                action = order[at[s]]
                if action.kind == "wait" and not all(
                    t in started[t[0]] and t in started[t[1]] for t in action.transfers
                ):
                    break
                if action.kind == "start":
                    started[s] |= set(action.transfers)
                elif action.kind in "FB":
                    done.add((s, action.kind, action.micro))
                at[s] += 1
                progress = True
    assert all(at[s] == len(orders[s]) for s in range(stages))
    assert len(done) == 2 * stages * micro_batches
    assert len(set().union(*started)) == 2 * (stages - 1) * micro_batches
