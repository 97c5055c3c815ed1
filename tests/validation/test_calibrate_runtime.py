"""Host overheads of runtimes: differences of cases that run in turn, in anchors."""

from __future__ import annotations

import itertools

import pytest
import torch

from validation import calibrate_runtime as runtime
from validation.calibrate_runtime import LAYERS, alone, in_turn, stack, steps_of


def test_cases_run_in_turn_beside_the_anchor():
    order, paces = [], itertools.cycle((0.01, 0.03))

    def case(name, seconds):
        def run():
            order.append(name)
            share = 1.0 if runtime._Sweep.on else 0.5
            return (share * seconds, 2 * share * seconds)

        return run

    found, full = in_turn({"a": case("a", 1.0), "b": case("b", 3.0)}, lambda: next(paces))
    again = runtime.BEFORE_WARM + 2
    assert order == (["a"] * again + ["b"] * again) * (runtime.ROUNDS + 2)
    assert found == {"a": pytest.approx((50.0, 100.0)), "b": pytest.approx((150.0, 300.0))}
    assert full == {"a": pytest.approx((25.0, 50.0)), "b": pytest.approx((75.0, 150.0))}
    assert runtime._Sweep.on


def test_sweeps_do_not_count(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(runtime, "CLOCK", lambda: float(next(clock)))
    monkeypatch.setattr(runtime._Sweep, "memory", torch.ones(8))
    swept = runtime._Sweep.spent
    forward, backward, _ = steps_of(stack())()
    # The clock ticks when it is read: once after each part, and twice a sweep, of which the sweep is one. No gradient
    # reaches the first sweep.
    assert forward == 1 + LAYERS and backward == LAYERS and runtime._Sweep.spent - swept == 2 * LAYERS - 1
    assert alone(lambda: None, calls=4)() == (0.25,)


def test_a_runtime_that_fails_is_left_out(monkeypatch, capsys):
    def broken():
        raise RuntimeError("moved to another module")

    def works():
        own = lambda: (3.0 if runtime._Sweep.on else 2.5,)  # noqa: E731
        return {"mine": own}, lambda found: {"key": found["mine"][0] - 1.0, "below": -1.0, "dtensor_op": 5.0}

    monkeypatch.setattr(runtime._Sweep, "memory", torch.ones(8))
    assert runtime._measured((broken, works), lambda: 1.0) == {
        "key": 2.0, "below": 0.0, "key_warm": 1.5, "below_warm": 0.0, "dtensor_op": 5.0,
    }  # fmt: skip
    assert "broken could not be measured: moved to another module" in capsys.readouterr().err
