"""Recurrent layers: a chain of steps, whatever the device could do at once."""

from __future__ import annotations

import pytest

from costmodels.device import load_device
from costmodels.ops import OpShape, price
from costmodels.recurrent import layer_price

V100 = load_device("v100-pcie-32gb")


def lstm(steps: int, batch: int, width: int, hidden: int, backward: bool = False, layers: int = 1) -> OpShape:
    weights = ((4 * hidden, width), (4 * hidden, hidden)) + ((4 * hidden, hidden), (4 * hidden, hidden)) * (layers - 1)
    ins, out = ((steps, batch, width), *weights, (4 * hidden,)), (steps, batch, hidden)
    flops = 2 * steps * batch * 4 * hidden * (width + hidden) * (1 + backward)
    name = f"aten.mkldnn_rnn_layer{'_backward' * backward}.default"
    return OpShape(name, "forward", ins, (out,), "float32", flops, 0, 0)


def seconds(shape: OpShape) -> float:
    found = layer_price(V100, shape)
    assert found is not None
    return found.seconds


def test_small_batches_cost_their_steps_and_large_ones_their_work() -> None:
    small = seconds(lstm(100, 1, 512, 512))
    assert 100 * 3e-6 < small < 100 * 40e-6
    assert seconds(lstm(200, 1, 512, 512)) == pytest.approx(2 * small, rel=0.05)
    assert seconds(lstm(100, 4, 512, 512)) < 1.5 * small
    large = lstm(50, 4096, 1024, 1024)
    assert 0.4 < large.flops / seconds(large) / V100.peak_flops["float32"] < 1.0


def test_backward_and_layers() -> None:
    one = lstm(100, 64, 512, 512)
    assert seconds(lstm(100, 64, 512, 512, backward=True)) == pytest.approx(2 * seconds(one))
    assert seconds(lstm(100, 64, 512, 512, layers=3)) == pytest.approx(3 * seconds(one))


def test_prices_of_traced_layers_take_this_road_and_other_shapes_do_not() -> None:
    shape = lstm(100, 64, 512, 512)
    assert price(V100, shape) == layer_price(V100, shape)
    assert layer_price(V100, OpShape("aten.lstm.input", "forward", ((4, 4),), (), "float32", 0, 0, 0)) is None


def cudnn(steps: int, batch: int, width: int, hidden: int, gates: int = 3, layers: int = 1, both: bool = False,
          first: bool = False, backward: bool = False, out: int = 0) -> OpShape:  # fmt: skip
    """All layers in one call, as `opgraph.recurrent` traces it."""
    state, directions, ins = out or hidden, 1 + both, list[tuple[int, ...]]()
    for layer in range(layers):
        wide = width if layer == 0 else directions * state
        cell = [(gates * hidden, wide), (gates * hidden, state), (gates * hidden,), (gates * hidden,)]
        ins += (cell + [(out, hidden)] * bool(out)) * directions
    x = (batch, steps, width) if first else (steps, batch, width)
    ins = [x, *ins, (layers * directions, batch, state)]
    flops = 2 * steps * batch * sum(s[0] * s[1] for s in ins if len(s) == 2)
    name = f"aten._cudnn_rnn{'_backward' * backward}.default"
    return OpShape(name, "forward", tuple(ins), (x,), "float32", flops * (1 + backward), 0, 0)


def test_a_call_of_all_layers_is_their_sum() -> None:
    one = cudnn(100, 64, 512, 512)
    assert seconds(cudnn(100, 64, 512, 512, layers=3)) == pytest.approx(3 * seconds(one))
    assert seconds(cudnn(100, 64, 512, 512, both=True)) == pytest.approx(2 * seconds(one))
    assert seconds(cudnn(100, 64, 512, 512, backward=True)) == pytest.approx(2 * seconds(one))
    assert seconds(cudnn(100, 64, 512, 512, gates=4)) == pytest.approx(seconds(lstm(100, 64, 512, 512)))
    second = seconds(cudnn(100, 64, 1024, 512))  # behind two directions
    assert seconds(cudnn(100, 64, 512, 512, both=True, layers=2)) == pytest.approx(2 * (seconds(one) + second))


def test_the_batch_may_come_first_at_the_price_of_a_copy() -> None:
    plain, first = seconds(cudnn(100, 64, 512, 512)), seconds(cudnn(100, 64, 512, 512, first=True))
    copied = 2 * 4 * 100 * 64 * 512 / V100.memory_bandwidth
    assert copied < first - plain < 2 * copied + 3e-6


def test_a_projection_is_a_product_more_a_step_but_narrows_the_others() -> None:
    wide, narrow = cudnn(200, 8, 512, 2048, gates=4), cudnn(200, 8, 512, 2048, gates=4, out=256)
    assert narrow.flops < wide.flops and seconds(narrow) < seconds(wide)
    assert seconds(narrow) > seconds(cudnn(200, 8, 512, 256, gates=32))  # its products without the projection
