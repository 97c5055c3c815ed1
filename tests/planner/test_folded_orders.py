"""Orders of 1F1B and of its interleaved form are legal and overlap as Megatron's do."""

from __future__ import annotations

import pytest

from planner.folded_orders import Step, order

SIZES = [(1, 1, 3), (4, 1, 8), (4, 1, 2), (4, 2, 8), (3, 5, 6), (2, 3, 5)]


@pytest.mark.parametrize(("stages", "chunks", "micro"), SIZES)
def test_every_stage_runs_every_pass_once_and_can_be_fed(stages: int, chunks: int, micro: int) -> None:
    orders = [order(s, stages, chunks, micro) for s in range(stages)]
    for own in orders:
        assert sorted((x.backward, x.chunk, x.micro) for x in own) == sorted(
            (b, c, k) for b in (False, True) for c in range(chunks) for k in range(micro)
        )
    done: set[tuple[bool, int, int]] = set()
    at = [0] * stages
    while any(a < len(o) for a, o in zip(at, orders)):
        moved = False
        for s, own in enumerate(orders):
            while at[s] < len(own):
                x = own[at[s]]
                place = x.chunk * stages + s
                before = place + (1 if x.backward else -1)
                fed = not 0 <= before < stages * chunks or (x.backward, before, x.micro) in done
                own_forward = not x.backward or (False, place, x.micro) in done
                if not (fed and own_forward):
                    break
                done.add((x.backward, place, x.micro))
                at[s] += 1
                moved = True
        assert moved, "the stages wait for each other"


def test_one_f_one_b_holds_one_micro_batch_per_stage_left() -> None:
    own = order(1, 4, 1, 8)
    assert own[:3] == [Step(False, 0, 0), Step(False, 0, 1), Step(False, 0, 2)]
    assert own[3] == Step(True, 0, 0)
    assert order(3, 4, 1, 8)[:2] == [Step(False, 0, 0), Step(True, 0, 0)]


def test_interleaving_warms_up_by_twice_the_stages_behind_and_a_chunk() -> None:
    own = order(0, 4, 2, 8)
    assert [x.backward for x in own].index(True) == 2 * 3 + 4 + 1


def test_gpipe_runs_all_forwards_first() -> None:
    own = order(0, 2, 1, 3, gpipe=True)
    assert [x.backward for x in own] == [False] * 3 + [True] * 3
