"""Memory-bound ops: launches, bandwidth, caches, rows, and what each family adds; no host time in a device's price."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.device import Device, load_device
from costmodels.ops import OpShape, price
from costmodels.rowwise import kind_of, rowwise_price, rowwise_prices, work_of

H100, A100, V100, L40S = (load_device(n) for n in ("h100-sxm", "a100-pcie-80gb", "v100-pcie-32gb", "l40s"))
Shape = tuple[int, ...]


def op(name: str, ins: tuple[Shape, ...], outs: tuple[Shape, ...], dtype: str = "float32") -> OpShape:
    size = 4 if dtype == "float32" else 2
    read, written = (size * sum(prod(s) for s in shapes) for shapes in (ins, outs))
    return OpShape(f"aten.{name}.default", "forward", ins, outs, dtype, 0, read, written)


def norm(rows: int, columns: int, dtype: str = "float32") -> OpShape:
    x, moments = (rows, columns), (rows, 1)
    return op("native_layer_norm", (x, (columns,), (columns,)), (x, moments, moments), dtype)


def softmax(rows: int, columns: int, dtype: str = "float32") -> OpShape:
    return op("_softmax", ((rows, columns),), ((rows, columns),), dtype)


def relu(elements: int, dtype: str = "float32") -> OpShape:
    return op("relu", ((elements,),), ((elements,),), dtype)


def seconds(device: Device, shape: OpShape) -> float:
    found = rowwise_price(device, shape)
    assert found is not None
    return found.seconds


@pytest.mark.parametrize("device", [H100, A100, V100, L40S], ids=lambda d: d.name)
@given(size=st.integers(1, 10**8), more=st.integers(1, 10**7))
def test_more_elements_cost_no_less(device: Device, size: int, more: int) -> None:
    assert 0 < seconds(device, relu(size)) <= seconds(device, relu(size + more))


@pytest.mark.parametrize("device", [H100, A100, V100, L40S], ids=lambda d: d.name)
@given(rows=st.integers(1, 60000), columns=st.integers(8, 9000), more=st.integers(1, 3000), by_row=st.booleans())
def test_larger_norms_cost_no_less(device: Device, rows: int, columns: int, more: int, by_row: bool) -> None:
    larger = norm(rows + more * by_row, columns + more * (not by_row))
    assert 0 < seconds(device, norm(rows, columns)) <= seconds(device, larger) * (1 + 1e-9)


@pytest.mark.parametrize("device", [H100, A100, V100], ids=lambda d: d.name)
def test_large_tensors_reach_most_of_the_bandwidth_and_never_more(device: Device) -> None:
    for name in ("relu", "add", "native_dropout", "clone"):
        shape = op(name, ((2**28,),), ((2**28,),))
        share = (shape.bytes_read + shape.bytes_written) / seconds(device, shape) / device.memory_bandwidth
        assert 0.8 < share < 0.95


def test_an_empty_kernel_is_a_launch_without_the_host() -> None:
    """The tables of the A100 and the V100 are eager: 17 to 25 us of theirs are the host's."""
    for device in (H100, A100, V100):
        assert 1e-6 < seconds(device, relu(1)) < 3e-6
    assert A100.kernels["rowwise"]["float32"]["host_floor"] > 1e-5


def test_a_cache_that_holds_the_tensor_is_faster_than_memory() -> None:
    launch = seconds(L40S, relu(1))
    small, large = (bytes_ / (seconds(L40S, relu(bytes_ // 8)) - launch) for bytes_ in (2**25, 2**32))
    assert small > 3 * large  # 32 MiB of a 96 MB cache
    assert large < L40S.memory_bandwidth


def test_rows_are_read_from_the_moments() -> None:
    x = (8, 512, 1024)
    layer = op("native_layer_norm", (x, (1024,), (1024,)), (x, (8, 512, 1), (8, 512, 1)))
    assert work_of(layer, "norm")[1:3] == (8 * 512, 1024)
    group = op("native_group_norm", ((8, 64, 32, 32), (64,), (64,)), ((8, 64, 32, 32), (8, 4), (8, 4)))
    assert work_of(group, "norm")[1:3] == (32, 64 * 32 * 32 // 4)
    back = op("native_layer_norm_backward", (x, x, (8, 512, 1), (8, 512, 1), (1024,), (1024,)), (x, (1024,), (1024,)))
    assert work_of(back, "norm")[1:3] == (8 * 512, 1024)


def test_wide_rows_cost_more_a_byte_and_few_rows_leave_units_idle() -> None:
    byte = [seconds(V100, norm(2**26 // c, c)) for c in (1024, 16384)]
    assert 1.1 < byte[1] / byte[0] < 2
    assert seconds(A100, softmax(8, 2**20)) > 2 * seconds(A100, softmax(8 * 64, 2**14))


@pytest.mark.parametrize("name", ["a100-pcie-80gb", "a100-pcie-40gb", "v100-pcie-32gb", "t4", "p100-pcie", "p4", "l4"])
def test_softmax_of_odd_rows_costs_about_what_its_bytes_cost(name: str) -> None:
    """Tables without odd rows (A100 80GB, L4) have a price for them too."""
    device = load_device(name)
    for columns in (2052, 5001):
        aligned, odd = (seconds(device, softmax(20000, columns + i)) for i in (-columns % 4, 1 + -columns % 4))
        assert 0.85 < odd / aligned < 1.6


def test_batch_norm_and_backward_norms_pass_twice() -> None:
    x = (64, 256, 56, 56)
    forward = op("native_batch_norm", (x, (256,), (256,)), (x, (256,), (256,)))
    copy = op("clone", (x,), (x,))
    assert seconds(A100, forward) / seconds(A100, copy) == pytest.approx(1.5, rel=0.02)
    back = op("native_batch_norm_backward", (x, x, (256,)), (x, (256,), (256,)))
    assert seconds(A100, back) / seconds(A100, copy) == pytest.approx(2.5, rel=0.02)


def test_optimizers_launch_once_per_so_many_tensors() -> None:
    few, many = (op("_fused_adamw_", ((64,),) * 4 * n, ((64,),) * 3 * n) for n in (8, 800))
    assert work_of(few, "stream")[3] == 1
    assert work_of(many, "stream")[3] == 25
    assert seconds(H100, many) > 20 * seconds(H100, few)
    huge = op("_fused_adamw_", ((2**30,),) * 4, ((2**30,),) * 3)
    assert work_of(huge, "stream")[3] == 2**30 / 65536 / 320 // 1 + 1


def test_kinds() -> None:
    kinds = {
        "aten.relu.default": "stream", "aten.native_batch_norm.default": "stream", "aten._fused_rms_norm": "norm",
        "aten._log_softmax_backward_data.default": "softmax", "aten.view.default": "", "aten.lstm.input": "",
        "aten._thnn_fused_lstm_cell.default": "stream", "mine.unknown.default": "stream",
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_scatters_cost_more_than_copies() -> None:
    x = (4096, 1024)
    assert seconds(A100, op("index_add_", (x,), (x,))) > 1.5 * seconds(A100, op("clone", (x,), (x,)))


def test_devices_without_a_table_borrow_and_say_so() -> None:
    own, lent = rowwise_price(A100, relu(10**7)), rowwise_price(load_device("a100-sxm-80gb"), relu(10**7))
    assert own is not None and lent is not None
    assert own.source == "interpolated" and lent.source == "extrapolated" and lent.error > own.error
    assert lent.seconds < own.seconds  # 2,039 of 1,935 GB/s
    assert rowwise_price(H100, norm(4096, 4096, "bfloat16")).source == "extrapolated"  # type: ignore[union-attr]
    assert rowwise_price(load_device("tpu-v4"), relu(10**7)) is None


def test_many_prices_are_the_single_ones() -> None:
    shapes = [relu(1000), norm(64, 128), softmax(64, 128), relu(2000, "bfloat16"), op("view", ((4,),), ((4,),))]
    many = rowwise_prices(H100, shapes)
    assert many == [*(rowwise_price(H100, s) for s in shapes)]
    assert many[-1] is None and price(H100, shapes[1]) == many[1]
