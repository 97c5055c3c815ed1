"""What calls into torch's runtimes cost by what ran since the last one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.features import MIB
from costmodels.ops import OpShape
from planner.runtime_host import call_seconds, calls_seconds, host_seconds, least_seconds
from planner.script import Host, Work

HOST = {"checkpoint_forward": 9e-5, "checkpoint_forward_warm": 3e-5, "checkpoint_saved_forward": 3e-5,
        "checkpoint_saved_forward_warm": 1e-5, "pp_action": 5e-5, "optimizer_step": 1e-4}  # fmt: skip


def work(nbytes: int) -> Work:
    shape = OpShape("aten.relu.default", "forward", ((nbytes // 8,),), ((nbytes // 8,),), "float32", 0, nbytes // 2,
                    nbytes // 2)  # fmt: skip
    return Work(shape, "forward", "")


def test_both_ends_are_what_was_measured() -> None:
    assert call_seconds(HOST, "checkpoint_forward", 0.0) == least_seconds(HOST, "checkpoint_forward") == 3e-5
    for between in (16 * MIB, 2**40):
        assert call_seconds(HOST, "checkpoint_forward", between) == pytest.approx(9e-5)
    middle = call_seconds(HOST, "checkpoint_forward", (17**0.5 - 1) * MIB)
    assert middle == pytest.approx(6e-5), "the logarithm of what was moved"
    assert call_seconds(HOST, "pp_action", 0.0) == 5e-5, "measured once"
    assert call_seconds(HOST, "unknown", 1.0) == 0.0


@given(st.floats(0, 2**36), st.floats(0, 2**36))
def test_more_in_between_costs_no_less(first: float, second: float) -> None:
    less, more = calls_seconds(HOST, "checkpoint_forward", np.array(sorted((first, second))))
    assert 3e-5 <= less <= more <= 9e-5 * (1 + 1e-12)


def test_a_pass_shares_its_bytes_among_its_calls() -> None:
    """Two regions in 8 MiB lie 4 MiB apart; what they save goes with them. Views move nothing."""
    shape = OpShape("aten.view.default", "forward", ((2**24,),), ((2**24,),), "float32", 0, 2**26, 0)
    view = Work(shape, "forward", "", is_view=True)
    calls = (Host("checkpoint_forward", 2, "forward"), Host("checkpoint_saved_forward", 6, "forward"))
    items = [work(6 * MIB), *calls, view, work(2 * MIB), Host("optimizer_step", 1, "optimizer")]
    region, saved, step = host_seconds(items, HOST)
    assert region == pytest.approx(2 * call_seconds(HOST, "checkpoint_forward", 4 * MIB))
    assert saved == pytest.approx(6 * call_seconds(HOST, "checkpoint_saved_forward", 4 * MIB))
    assert step == 1e-4
    cold = {key: value for key, value in HOST.items() if not key.endswith("_warm")}
    assert host_seconds([work(64), *calls], cold) == [pytest.approx(1.8e-4), pytest.approx(1.8e-4)]
