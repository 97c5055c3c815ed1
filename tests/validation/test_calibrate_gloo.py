"""Rounds of work and a call: whose time is whose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from validation import calibrate_gloo as gloo


def test_a_message_begins_when_the_last_of_its_ranks_calls(monkeypatch):
    """This rank works 2 s and waits 3 s for a call of 1 s: the other one works 5 s. A third is in another group."""
    clock = iter([10.0, 12.0, 16.0, 20.0, 22.0, 26.0])
    monkeypatch.setattr(gloo, "time", SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: 0.0))
    monkeypatch.setattr(gloo, "_work", lambda: lambda: None)

    def all_gather(everyone, marks):
        for rank, later in enumerate((0.0, 3.0, 50.0)):
            everyone[rank].copy_(marks + torch.tensor([0.0, later, 0.0], dtype=torch.float64))

    monkeypatch.setattr(gloo, "dist", SimpleNamespace(get_world_size=lambda: 3, all_gather=all_gather))
    rounds = gloo.rounds_of(lambda: None, 2, members=(0, 1))
    assert [r.seconds for r in rounds] == [1.0, 1.0]
    assert [r.skew for r in rounds] == pytest.approx([5.0 / 3.5 - 1] * 2)


def test_the_error_of_a_broadcast_is_not_that_of_its_root(monkeypatch):
    """The root is through 1 us after the last rank calls, give or take 1 ms; the slowest rank takes 10 ms."""
    rounds = [gloo.Round(1e-6 + shift, 0.0, 0.0) for shift in (-1e-3, 1e-3) * 50]
    monkeypatch.setattr(gloo, "_point", lambda kind, size, seconds: rounds)
    monkeypatch.setattr(gloo, "_over_ranks", list)
    monkeypatch.setattr(gloo, "_slowest", lambda means: [1e-2] * len(means))
    monkeypatch.setattr(gloo, "dist", SimpleNamespace(get_world_size=lambda: 4))
    monkeypatch.setattr("validation.anchor.make_anchor", lambda clock: lambda: 1.0)
    monkeypatch.setattr("validation.calibrate_worker.together", lambda go_on: go_on)
    (row,) = gloo.measure_collectives(("broadcast",), (4096, 2**20), 0.1, until=0.0)
    assert row["error"] == pytest.approx(1e-3 / 80**0.5 / 1e-2)
    assert row["seconds"] == pytest.approx([1e-2, 1e-2])
