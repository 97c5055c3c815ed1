"""What surrounds an op: the caches that the ones before it emptied, and how its operands lie in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.context import in_context, inner_runs, per_op, price_in_order, price_with_host, runs_of
from costmodels.device import Device, Law, load_device
from costmodels.features import FORMS, MIB, features
from costmodels.ops import OpShape, price

VIEW = OpShape("aten.view.default", "forward", ((8,),), ((8,),), "float32", 0, 0, 0)


def op(name: str, nbytes: int) -> OpShape:
    return OpShape(f"aten.{name}.default", "forward", ((nbytes // 4,),), ((nbytes // 4,),), "float32", 0, nbytes, 0)


def core() -> Device:
    seconds = {"one": 1e-6, "swept": 2e-5, "since": 1e-5, "bytes_swept": 1e-11, "runs": 1e-8, "bytes": 1e-10}
    law = Law("relu/float32", "stream", tuple(seconds.get(f, 0.0) for f in FORMS["stream"]), (0,), (1e12,), 0.1, 20)
    return Device("core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws={law.key: law})


def test_an_op_knows_what_the_one_before_moved_and_when_its_like_ran_last() -> None:
    small, large, other, view = in_context([op("relu", 4096), op("tanh", 9 * MIB), op("relu", 4096), VIEW])
    assert (small.swept, small.since) == (0, 0), "the stretch is repeated: a relu ran just before"
    assert large.swept == 0 and large.since == 0
    assert other.swept == 8 * MIB and other.since == 16 * MIB, "9 MiB, to powers of 2 and of 4"
    assert view is VIEW


def test_what_runs_once_in_a_stretch_ran_last_in_the_one_before() -> None:
    first, second = in_context([op("relu", 40 * MIB), op("tanh", 40 * MIB)])
    assert first.since == second.since == 16 * MIB, "and no more counts"
    (alone,) = in_context([op("relu", 40 * MIB)])
    assert alone.since == 0 and alone.swept == 8 * MIB


def test_cold_caches_cost_as_the_law_says() -> None:
    device = core()
    shapes = [op("relu", 4096), op("relu", 8 * MIB), op("relu", 2**22)]
    _, after_small, after_large = price_in_order(device, shapes)
    assert after_small.seconds == price(device, shapes[1]).seconds
    assert after_large.seconds == pytest.approx(price(device, shapes[2]).seconds + 2e-5 + MIB * 1e-11)


@given(st.lists(st.tuples(st.sampled_from(["relu", "tanh", "sum"]), st.integers(1, 2**28)), min_size=1, max_size=12))
def test_nothing_is_cheaper_for_what_ran_before(ops: list[tuple[str, int]]) -> None:
    device, shapes = core(), [op(name, 4 * n) for name, n in ops]
    for shape, found in zip(shapes, price_in_order(device, shapes)):
        assert found.seconds >= price(device, shape).seconds
    assert [replace(s, swept=0, since=0) for s in in_context(shapes)] == shapes
    assert in_context(in_context(shapes)) == in_context(shapes)


def test_the_first_bytes_take_most_with_them() -> None:
    quarter = replace(op("relu", MIB // 2), swept=2 * MIB, since=MIB)
    _, swept, since, again, cold, *_ = features(quarter, "stream")
    assert (swept, since) == (0.5, 0.25), "roots of the shares of 8 and of 16 MiB"
    assert (again, cold) == (MIB / 8, 0.0), "a quarter of what it moves; the op before has touched all of it"
    beyond = replace(quarter, swept=2**30, since=2**30)
    assert features(beyond, "stream")[1:3] == (1.0, 1.0)


def test_python_beside_an_op_knows_what_the_op_before_moved() -> None:
    host = {"op_forward": 1e-6, "op_forward_swept": 4e-5, "op_backward": 2e-6}
    device = replace(core(), host=host)
    shapes = [op("relu", 4096), VIEW, op("relu", 2 * MIB), op("relu", 4096)]
    prices, beside = price_with_host(device, shapes, ["forward"] * 4)
    assert prices == price_in_order(device, shapes)
    assert beside == pytest.approx([1e-6, 1e-6, 1e-6, 1e-6 + 4e-5 / 2]), "2 MiB empty half: the root of a quarter"
    assert per_op(device, "backward", 8 * MIB) == 2e-6, "calibrated before it was told apart"
    assert per_op(device, "optimizer", 8 * MIB) == 0.0


def test_kernels_of_accelerators_go_by_shapes() -> None:
    h100 = load_device("h100-sxm")
    shapes = [op("relu", 2**26), op("relu", 4096)]
    assert price_in_order(h100, shapes) == [price(h100, s) for s in shapes]


def test_stretches_of_memory() -> None:
    whole = (2, 6, 128, 32)
    heads, dense, table = (whole, (24576, 32, 192, 1)), (whole, (24576, 4096, 32, 1)), ((128, 32), (32, 1))
    assert inner_runs(dense, (dense,)) == 1 and inner_runs(heads, (heads,)) == 1, "alike, in whatever order"
    assert inner_runs(dense, (dense, table)) == 2 * 6, "a table is walked once for every head"
    assert inner_runs(heads, (heads, table)) == 2 * 6 * 128
    assert inner_runs(dense, (heads,)) == 2 * 6 * 128, "a copy into another order"
    bias = ((32,), (1,))
    assert inner_runs(dense, (dense, bias)) == 2 * 6 * 128 and inner_runs(dense, (dense, ((1, 1), (1, 1)))) == 1
    assert inner_runs(((), ()), (((), ()),)) == inner_runs(((4, 4), (4, 1)), (((3,), (1,)),)) == 1
    assert runs_of([], [dense, heads]) == 2 * 6 * 128 and runs_of([], []) == 1
