"""The replayed step: a few micro-batches stand for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner import folded_events
from planner.folded import predict_folded
from planner.folded_events import _replayed_micro_batches
from tests.planner.test_folded import FAST_HOST, cluster, model, plan


@pytest.mark.parametrize("axes", [{"pp": 2, "vpp": 2}, {"pp": 4, "vpp": 2}, {"pp": 2, "vpp": 4}, {"pp": 4}, {"pp": 1}])
def test_the_peaks_of_a_few_micro_batches_are_those_of_all(axes: dict[str, Any], monkeypatch: Any) -> None:
    own = plan(global_batch=128, **axes)
    software = replace(FAST_HOST, fusion="none")
    few = predict_folded(model(), own, cluster(), software, replay=True)
    assert _replayed_micro_batches(own) < own.micro_batches == 32
    monkeypatch.setattr(folded_events, "_replayed_micro_batches", lambda plan: plan.micro_batches)
    every = predict_folded(model(), own, cluster(), software, replay=True)
    assert (few.allocated_bytes, few.reserved_bytes) == (every.allocated_bytes, every.reserved_bytes)


def test_all_micro_batches_of_gpipe_and_of_short_steps_are_replayed() -> None:
    assert _replayed_micro_batches(plan(global_batch=128, pp=2, schedule="gpipe")) == 32
    assert _replayed_micro_batches(plan(global_batch=8, pp=2, vpp=2)) == 2
    assert _replayed_micro_batches(plan(global_batch=36, pp=2, vpp=2)) == 7  # as ragged as all 9
