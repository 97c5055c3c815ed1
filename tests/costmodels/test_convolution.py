"""Convolutions: what is inside an op, the algorithm taken, rates above the peak, workspaces, and growth."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import convolution_law
from costmodels.conv_shapes import convs_of, rows_of
from costmodels.convolution import (
    algorithm_of,
    conv_price,
    conv_prices,
    direct_flops,
    on_tensor_cores,
    pricing_of,
    seconds_by_algorithm,
    workspace_bytes,
)
from costmodels.convolution_law import ALGORITHMS, FFT, FFT_MOST, by_algorithm, chosen
from costmodels.device import Device, load_device
from costmodels.ops import OpShape, price
from costmodels.relatives import relatives

V100, A100, T4 = (load_device(n) for n in ("v100-pcie-32gb", "a100-pcie-80gb", "t4"))


def conv(
    batch: int, channels: int, filters: int, edge: int, kernel: int = 3, stride: int = 1, groups: int = 1,
    dtype: str = "float32",
) -> OpShape:  # fmt: skip
    image, weight = (batch, channels, edge, edge), (filters, channels // groups, kernel, kernel)
    out = (batch, filters, -(-edge // stride), -(-edge // stride))
    flops = 2 * prod(out) * prod(weight[1:])
    return OpShape("aten.convolution.default", "forward", (image, weight), (out,), dtype, flops, 0, 0)


def backward(forward: OpShape, image: bool = True) -> OpShape:
    x, weight = forward.in_shapes
    outs = (x, weight) if image else (weight,)
    return OpShape(
        "aten.convolution_backward.default", "backward", (forward.out_shapes[0], x, weight), outs, forward.dtype,
        forward.flops * (1 + image), 0, 0,
    )  # fmt: skip


def seconds(device: Device, shape: OpShape) -> float:
    found = conv_price(device, shape)
    assert found is not None
    return found.seconds


def test_what_is_inside_an_op() -> None:
    (one,) = convs_of(conv(8, 64, 128, 56, kernel=3))
    assert (one.batch, one.channels, one.filters, one.taps, one.out_pixels) == (8, 64, 128, 9, 56 * 56)
    assert one.winograd and one.unit_stride and not one.weight
    (strided,) = convs_of(conv(8, 64, 128, 56, stride=2))
    assert not strided.winograd and not strided.unit_stride and strided.out_pixels == 28 * 28
    (grouped,) = convs_of(conv(8, 64, 64, 56, groups=64))
    assert (grouped.groups, grouped.channels, grouped.filters) == (64, 1, 1) and not grouped.winograd
    data, weight = convs_of(backward(conv(8, 64, 128, 56)))
    assert (data.channels, data.filters, data.weight) == (128, 64, False) and data.winograd
    assert (weight.channels, weight.filters, weight.weight) == (64, 128, True)
    assert len(convs_of(backward(conv(8, 64, 128, 56), image=False))) == 1
    assert convs_of(OpShape("aten.convolution.default", "forward", ((8, 8),), (), "float32", 0, 0, 0)) == ()


@given(
    batch=st.integers(1, 64), channels=st.integers(1, 300), filters=st.integers(1, 300), edge=st.integers(20, 60),
    kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 2),
)  # fmt: skip
def test_work_is_counted_as_the_op_counts_it(
    batch: int, channels: int, filters: int, edge: int, kernel: int, stride: int
) -> None:
    forward = conv(batch, channels, filters, edge, kernel, stride)
    assert direct_flops(forward) == forward.flops
    assert direct_flops(backward(forward)) == 2 * forward.flops


def test_a_transposed_convolution_does_the_work_of_what_it_transposes() -> None:
    shape = OpShape("aten.convolution.default", "forward", ((4, 64, 16, 16), (64, 32, 4, 4)), ((4, 32, 32, 32),),
                    "float32", 0, 0, 0)  # fmt: skip
    assert direct_flops(shape) == 2 * 4 * 64 * 16 * 16 * 32 * 16


@pytest.mark.parametrize("device", [V100, A100, T4], ids=lambda d: d.name)
def test_algorithms(device: Device) -> None:
    assert algorithm_of(device, conv(32, 256, 256, 16)) in ("winograd", "winograd_fused")
    assert algorithm_of(device, conv(32, 3, 64, 64)) == "implicit_gemm"  # three channels waste transformed products
    assert algorithm_of(device, conv(32, 256, 256, 56, kernel=1)) == "implicit_gemm"
    assert algorithm_of(device, conv(32, 256, 256, 56, stride=2)) == "implicit_gemm"
    assert algorithm_of(device, conv(16, 64, 64, 56, kernel=9)) == "fft"
    assert algorithm_of(device, conv(32, 64, 64, 56, groups=64)) == "direct"


def test_winograd_beats_the_data_sheet_and_tensor_cores_do_not() -> None:
    shape = conv(64, 512, 512, 16)
    effective = shape.flops / seconds(V100, shape) / V100.peak_flops["float32"]
    assert 1.2 < effective < 4.0
    half = conv(64, 512, 512, 16, dtype="float16")
    assert on_tensor_cores(V100, "float16") and not on_tensor_cores(load_device("p100-pcie"), "float16")
    assert algorithm_of(V100, half) == "implicit_gemm"
    assert 0.2 < half.flops / seconds(V100, half) / V100.peak_flops["float16"] < 0.8


def test_prices_say_where_they_come_from() -> None:
    own, lent = conv_price(V100, conv(8, 64, 64, 28)), conv_price(load_device("v100-sxm2-16gb"), conv(8, 64, 64, 28))
    half = conv_price(V100, conv(8, 64, 64, 28, dtype="float16"))
    assert own is not None and lent is not None and half is not None
    assert (own.source, lent.source, half.source) == ("interpolated", "extrapolated", "extrapolated")
    assert own.error < lent.error and half.error >= 0.35
    assert conv_price(load_device("tpu-v4"), conv(8, 64, 64, 28)) is None


@pytest.mark.parametrize("device", [V100, A100, T4], ids=lambda d: d.name)
@given(
    dims=st.tuples(st.integers(1, 64), st.integers(1, 600), st.integers(1, 600), st.integers(4, 64)),
    axis=st.integers(0, 3), more=st.integers(1, 64), kernel=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["float32", "float16"]),
)  # fmt: skip
def test_larger_convolutions_cost_no_less(
    device: Device, dims: tuple[int, int, int, int], axis: int, more: int, kernel: int, dtype: str
) -> None:
    larger = tuple(n + more * (i == axis) for i, n in enumerate(dims))
    small = seconds(device, conv(*dims, kernel=kernel, dtype=dtype))
    # The choice is reluctant to take FFT, so a price may fall by what was lost by the reluctance: never in these sizes.
    assert 0 < small <= seconds(device, conv(*larger, kernel=kernel, dtype=dtype)) * (1 + 1e-9)  # type: ignore[misc]


@pytest.mark.parametrize("device", [V100, A100, T4], ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [conv(32, 128, 128, 28), conv(32, 256, 64, 56, kernel=1), conv(32, 3, 64, 224, 7, 2)])
def test_backward_costs_one_to_three_forwards_and_each_gradient_its_part(device: Device, shape: OpShape) -> None:
    forward, both, weight = (seconds(device, s) for s in (shape, backward(shape), backward(shape, image=False)))
    assert 0 < weight < both
    if shape.in_shapes[0][1] > 3:  # gradients of three channels fill no tile
        assert 1.5 < both / forward < 3.5


def test_workspaces() -> None:
    shape = conv(8, 64, 128, 28)
    tiles = 8 * 7 * 7
    assert workspace_bytes("winograd", shape) == 4 * 36 * (tiles * (64 + 128) + 64 * 128)
    assert workspace_bytes("implicit_gemm", shape) == workspace_bytes("winograd_fused", shape) == 0
    transformed = workspace_bytes("fft", shape)
    assert transformed == 8 * 16 * 9 * (8 * 2 * 2 * (64 + 128) + 64 * 128)


def test_many_prices_are_the_single_ones() -> None:
    shapes = [conv(4 * i, 32, 64, 28) for i in range(1, 5)] + [backward(conv(8, 32, 64, 28, dtype="float16"))]
    missing = OpShape("aten.convolution.default", "forward", ((8, 8),), (), "float32", 0, 0, 0)
    assert conv_prices(A100, [*shapes, missing]) == [*(conv_price(A100, s) for s in shapes), None]
    assert price(A100, shapes[0]) == conv_price(A100, shapes[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_compiled_law_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    forward = [
        conv(8, 64, 128, 28, dtype=dtype), conv(8, 64, 128, 28, kernel=9, dtype=dtype), conv(2, 3, 64, 224, 7, 2),
        conv(8, 64, 64, 56, groups=64),
    ]  # fmt: skip
    rows, pricing = rows_of([c for s in forward for c in (*convs_of(s), *convs_of(backward(s)))]), pricing_of(T4, dtype)
    assert pricing is not None
    compiled = convolution_law.by_algorithm(pricing.law, rows), convolution_law.fastest(pricing.law, rows)
    for name, value in list(vars(convolution_law).items()):  # those that the outer ones call, too
        monkeypatch.setattr(convolution_law, name, getattr(value, "py_func", value))
    plain = convolution_law.by_algorithm(pricing.law, rows), convolution_law.fastest(pricing.law, rows)
    assert np.isfinite(plain[0]).any(axis=1).all() == (dtype == "float32")  # every algorithm is run there
    for one, other in zip(compiled, plain):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_an_algorithm_without_constants_is_not_run() -> None:
    constants = T4.kernels["conv"]["float32"]
    some = {name: value for name, value in constants.items() if not name.startswith(("product", "fused"))}
    rows = rows_of(convs_of(conv(8, 64, 128, 28)))
    times, all_times = (seconds_by_algorithm(c, T4, "float32", rows) for c in (some, constants))
    assert times[0] == all_times[0] and np.isinf(times[1:]).all() and np.isfinite(all_times[1:3]).all()
    with pytest.raises(ValueError, match="implicit_tiles"):
        seconds_by_algorithm({**constants, "implicit_tiles": [0.5]}, T4, "float32", rows)


def test_a_borrowed_rate_is_scaled_by_what_products_reach() -> None:
    """The rates of a relative hold for a device whose best products reach as much of its peak as the lender's."""
    device = load_device("k80")
    relative = next(d for d in relatives(device) if "conv" in d.kernels)
    free = replace(device, best_flops={}, cache={})
    same = replace(device, best_flops={"float32": 0.9999 * device.peak_flops["float32"]}, cache={})
    x, w = (64, 256, 14, 14), (256, 256, 3, 3)
    out = (64, 256, 14, 14)
    shape = OpShape("aten.convolution.default", "forward", (x, w), (out,), "float32", 2 * 64 * 256 * 196 * 2304, 0, 0)
    slow, plain, equal = (price(d, shape).seconds for d in (device, free, same))
    share = device.best_flops["float32"] / device.peak_flops["float32"]
    lender = relative.kernels["gemm"]["float32"]["compute"]
    assert plain < slow <= plain / min(share / lender, 1.0) * 1.001
    assert equal == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dtype"), [("v100-sxm2-16gb", "bfloat16"), ("t4", "bfloat16"), ("apple-m1", "float16")]
)
def test_no_fft_where_no_library_has_it(name: str, dtype: str) -> None:
    """A convolution of 11x11 by FFT is faster than the peak says."""
    device, wide = load_device(name), conv(16, 64, 128, 28, kernel=11, dtype=dtype)
    assert algorithm_of(device, wide) == "implicit_gemm"
    assert price(device, wide).seconds > wide.flops / max(device.peak_flops.values())
    assert algorithm_of(load_device("v100-sxm2-16gb"), conv(16, 64, 128, 28, kernel=11)) == "fft"


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "v100-pcie-32gb", "t4", "p100-sxm2", "k20x", "mi300x"])
@pytest.mark.parametrize("kernel", [5, 7, 9, 11, 15])
def test_filters_that_no_table_has_gain_no_more_by_fft_than_was_measured(name: str, kernel: int) -> None:
    device = load_device(name)
    for shape in (conv(32, 64, 128, 112, kernel=kernel), conv(64, 256, 256, 56, kernel=kernel)):
        found = price(device, shape)
        assert shape.flops / found.seconds <= convolution_law.FFT_MOST * device.peak_flops["float32"] * 1.001
        if algorithm_of(device, shape) == "fft":
            assert found.source == "extrapolated" and found.error >= 0.5


def test_fft_of_3x3_is_as_it_was_fitted() -> None:
    """The bound holds for larger filters alone: the law is that of the table, whatever it says."""
    small, large = (conv(32, 512, 512, 112, kernel=kernel) for kernel in (3, 5))
    law = pricing_of(A100, "float32")
    assert law is not None and algorithm_of(A100, large) == "fft"
    for shape, bound in ((small, False), (large, True)):
        rows = rows_of(convs_of(shape))
        times = convolution_law.by_algorithm(law.law, rows)
        free = times[convolution_law.chosen(times)[0], 0]
        found = convolution_law.fastest(law.law, rows)[0]
        assert (found > free) == bound and (found == free) != bound
    assert conv_price(A100, small).error < 0.5  # type: ignore[union-attr]


def test_biases_are_passes_of_their_own() -> None:
    """Read and written forward, read backward, at most at the memory's rate."""
    device = load_device("p100-sxm2")
    image, weight, out = (64, 64, 56, 56), (64, 64, 3, 3), (64, 64, 56, 56)
    names = "aten.convolution.default", "aten.convolution_backward.default"
    plain = OpShape(names[0], "forward", (image, weight), (out,), "float32", 0, 0, 0)
    biased = OpShape(names[0], "forward", (image, weight, (64,)), (out,), "float32", 0, 0, 0)
    pairs = [(plain, biased, 2)]
    plain = OpShape(names[1], "backward", (out, image, weight), (image, weight), "float32", 0, 0, 0)
    biased = OpShape(names[1], "backward", (out, image, weight), (image, weight, (64,)), "float32", 0, 0, 0)
    for without, with_bias, times in [*pairs, (plain, biased, 1)]:
        a, b = (conv_price(device, shape) for shape in (without, with_bias))
        assert a is not None and b is not None
        least = times * 4 * 64 * 64 * 56 * 56 / device.memory_bandwidth
        assert least < b.seconds - a.seconds < 2 * least


def test_gradients_of_weights_have_fft_too() -> None:
    """As many products between transforms as forward; no more is claimed of them than of forward."""
    device = load_device("p100-sxm2")
    image, weight, out = (512, 64, 27, 27), (192, 64, 5, 5), (512, 192, 27, 27)
    both = (out, image, weight)
    backward = OpShape("aten.convolution_backward.default", "backward", both, (weight,), "float32", 0, 0, 0)
    forward = OpShape("aten.convolution.default", "forward", (image, weight), (out,), "float32", 0, 0, 0)
    pricing = pricing_of(device, "float32")
    assert pricing is not None
    times = [by_algorithm(pricing.law, rows_of(convs_of(shape)))[FFT, 0] for shape in (forward, backward)]
    assert 0.8 < times[1] / times[0] < 1.5
    assert ALGORITHMS[int(chosen(by_algorithm(pricing.law, rows_of(convs_of(backward))))[0])] == "fft"


def test_compute_and_memory_overlap_on_tensor_cores_as_in_products() -> None:
    """A 1x1 convolution that memory bounds takes little longer than its bytes; in float32 the two are added."""
    device = load_device("v100-sxm2-16gb")
    image, weight, out = (256, 64, 56, 56), (256, 64, 1, 1), (256, 256, 56, 56)
    shape = OpShape("aten.convolution.default", "forward", (image, weight), (out,), "float16", 0, 0, 0)
    found = conv_price(device, shape)
    assert found is not None
    moved = 2 * 256 * 56 * 56 * (64 + 256) / device.memory_bandwidth
    assert moved < found.seconds < 1.5 * moved


def test_fft_of_a_slow_board_is_held_to_what_its_products_reach() -> None:
    device = load_device("k80")
    image, weight, out = (512, 64, 27, 27), (192, 64, 5, 5), (512, 192, 27, 27)
    shape = OpShape("aten.convolution.default", "forward", (image, weight), (out,), "float32", 0, 0, 0)
    found = conv_price(device, shape)
    assert found is not None
    assert direct_flops(shape) / found.seconds < FFT_MOST * 1.05 * device.best_flops["float32"]
