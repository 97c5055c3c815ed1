"""What measured ops near an op say of its law: closed forms, labels, bounds."""

from dataclasses import replace
from math import exp, log, log2
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.device import Device, Law, device_data, load_device, rescale, save_device
from costmodels.neighbours import ALONE, FARTHEST, SAME, WIDTH, Neighbours, label
from costmodels.ops import OpShape, kernel_key, price, price_many, signature

LAW = Law("add/float32", "stream", (1e-6, 2e-6, 2e-6, 0.0, 0.0, 0.0, 1e-10, 0.0, 0.0, 0.0), (0.0,), (1e12,), 0.1, 40)


def add(*dims: int, runs: int = 1, swept: int = 0, since: int = 0) -> OpShape:
    nbytes = 4
    for d in dims:
        nbytes *= d
    kind, shapes, moved = ("aten.add.Tensor", "forward"), ((dims, dims), (dims,)), (2 * nbytes, nbytes)
    return OpShape(*kind, *shapes, "float32", 0, *moved, runs=runs, swept=swept, since=since)


def known(*ops: tuple[OpShape, float]) -> Neighbours:
    return Neighbours({label(signature(s), s): ratio for s, ratio in ops})


def factor(neighbours: Neighbours, shape: OpShape) -> float:
    return neighbours.factor(kernel_key(shape), shape)[0]


def weight(squared: float) -> float:
    """Of a neighbour at this squared distance in doublings: a wide Gaussian, and a narrow one of its tenth power."""
    wide = exp(-squared / (2 * WIDTH**2))
    return wide + SAME * wide**10


def cpu(neighbours: Neighbours) -> Device:
    return Device("core", "cpu", {"float32": 1e11}, 2**34, 1e10, laws={LAW.key: LAW}, neighbours=neighbours)


def test_one_neighbour_counts_by_its_distance() -> None:
    one = known((add(64, 128), 1.4))
    assert factor(one, add(64, 128)) == pytest.approx(exp(log(1.4) * (1 + SAME) / (1 + SAME + ALONE)), rel=1e-4)
    # 64 to 128 rows: one dim of both operands and of the result, and all elements (3 * 8192, + 1 in the logarithm).
    dim = (log2(129) - log2(65)) ** 2
    size = (log2(3 * 16384 + 1) - log2(3 * 8192 + 1)) ** 2
    near = weight(3 * dim + size)
    assert factor(one, add(128, 128)) == pytest.approx(exp(log(1.4) * near / (near + ALONE)), rel=1e-4)


def test_equal_neighbours_are_averaged() -> None:
    near = known((add(64, 128), 2.0), (add(64, 128, swept=2**23), 0.5))
    same, far = weight(0.0), weight(log2(1 + 16) ** 2)
    assert factor(near, add(64, 128)) == pytest.approx(exp(log(2.0) * (same - far) / (same + far + ALONE)), rel=1e-4)


def test_far_ops_other_kernels_and_other_ranks_keep_their_law() -> None:
    one = known((add(64, 128), 3.0))
    assert factor(one, add(2**14, 2**14)) == pytest.approx(1.0, abs=1e-6)
    assert factor(one, add(64, 128, 1)) == 1.0
    assert one.factor("mul/float32", add(64, 128)) == (1.0, 1.0)


def test_a_disturbed_op_counts_as_far_off_at_most() -> None:
    most = exp(FARTHEST * (1 + SAME) / (1 + SAME + ALONE))
    assert factor(known((add(8), 1000.0)), add(8)) == pytest.approx(most, rel=1e-4)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.05, 20)), min_size=1, max_size=8),
    st.integers(1, 5000),
    st.sampled_from((0, 2**20, 2**23)),
)
def test_a_price_lies_between_what_its_neighbours_say(rows: list[tuple[int, int, float]], n: int, swept: int) -> None:
    found = factor(known(*((add(a, b), r) for a, b, r in rows)), add(n, n, swept=swept))
    ratios = [1.0, *(min(max(r, exp(-FARTHEST)), exp(FARTHEST)) for *_, r in rows)]
    assert min(ratios) * (1 - 1e-5) <= found <= max(ratios) * (1 + 1e-5)


def test_an_op_in_emptied_caches_never_takes_less() -> None:
    """Though its neighbours there took half of their law, and those in full caches twice theirs."""
    device = cpu(known((add(64, 128), 2.0), (add(64, 128, swept=2**23, since=2**24), 0.5)))
    full, emptied = add(64, 128), add(64, 128, swept=2**23, since=2**24)
    assert price(device, emptied).seconds == price(device, full).seconds > price(cpu(Neighbours({})), full).seconds
    ops = [full, emptied, add(100, 7), add(7, 100, swept=2**22)]
    one_by_one = [price(replace(device, cache={}), s).seconds for s in ops]
    assert [p.seconds for p in price_many(replace(device, cache={}), ops)] == pytest.approx(one_by_one)


def test_a_device_file_keeps_them_and_another_pace_changes_no_ratio(tmp_path: Path) -> None:
    device = cpu(known((add(64, 128, runs=3, swept=2**21, since=2**22), 1.25), (add(7), 0.8)))
    save_device(device, tmp_path / "core.toml")
    assert load_device(tmp_path / "core.toml").neighbours.ratios == device.neighbours.ratios
    assert "add/float32|64,128;64,128|64,128@3,2097152,4194304=1.25" in device_data(device)["neighbours"]
    assert price(rescale(device, 1.5), add(7)).seconds == pytest.approx(1.5 * price(device, add(7)).seconds)


@pytest.mark.parametrize(
    "row", ["mm/float32=1.2", "add/float32|8;8|8@1,0=1.1", "add/float32|8;8|8@1,0,0=zero", "add/float32|8;8|8@1,0,0=-1"]
)
def test_a_broken_neighbour_gets_a_sentence(tmp_path: Path, row: str) -> None:
    path = tmp_path / "core.toml"
    save_device(cpu(Neighbours({})), path)
    path.write_text(f'neighbours = ["{row}"]\n' + path.read_text())
    with pytest.raises(ValueError, match=r"neighbour '.*' is broken; it must read 'op/dtype") as caught:
        load_device(path)
    assert row in str(caught.value) and str(path) in str(caught.value)
