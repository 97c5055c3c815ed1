"""Every op has a finite price on every kind of device: empty tensors, odd shapes, dtypes that a device lacks."""

from __future__ import annotations

from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels.device import Device, load_device
from costmodels.gemm import gemm_price
from costmodels.ops import OpShape, price
from costmodels.overlap import Beside, slowdowns

DEVICES = [load_device(n) for n in ("h100-sxm", "t4", "k80", "mi300x", "tpu-v4", "apple-m1", "gaudi2")]
NAMES = (
    "mm", "bmm", "addmm", "_grouped_mm", "_scaled_mm", "convolution", "convolution_backward", "native_layer_norm",
    "native_layer_norm_backward", "_softmax", "add", "sum", "embedding", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention_backward", "_fused_adamw_", "native_batch_norm", "_cudnn_rnn",
    "max_pool2d_with_indices", "no_such_op",
)  # fmt: skip
DIMS = st.sampled_from((0, 1, 2, 3, 7, 16, 100, 4096, 10**6, 10**9))
SHAPES = st.lists(st.lists(DIMS, max_size=5).map(tuple), max_size=4).map(tuple)
DTYPES = st.sampled_from(("float32", "bfloat16", "float64", "int8", "float8_e4m3fn", "tf32", "bool", "complex64"))
COUNTS = st.sampled_from((0, 1, 10**6, 10**15))


@st.composite
def related(draw: st.DrawFn, name: str) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Shapes as the op has them, where it has a form; any otherwise."""
    b, m, n, k = (draw(DIMS) for _ in range(4))
    if name == "bmm":
        return ((b, m, k), (b, k, n)), ((b, m, n),)
    if "mm" in name:
        return (((n,),) if name == "addmm" else ()) + ((m, k), (k, n)), ((m, n),)
    image, weight, out = (b, m, k, k), (n, m, 3, 3), (b, n, k, k)
    if name == "convolution":
        return (image, weight), (out,)
    if name == "convolution_backward":
        return (out, image, weight), (image, weight)
    return ((b, m, n, k),) * 3, ((b, m, n, k),)


@st.composite
def ops(draw: st.DrawFn) -> OpShape:
    name = draw(st.sampled_from(NAMES))
    ins, outs = draw(related(name)) if draw(st.booleans()) else (draw(SHAPES), draw(SHAPES))
    moved = draw(COUNTS), draw(COUNTS), draw(COUNTS)
    return OpShape(f"aten.{name}.default", "forward", ins, outs, draw(DTYPES), *moved, draw(st.booleans()))


@settings(max_examples=400, deadline=None)
@given(ops(), st.sampled_from(DEVICES))
def test_any_op_has_a_price(shape: OpShape, device: Device) -> None:
    found = price(device, shape)
    assert isfinite(found.seconds) and found.seconds >= 0 and isfinite(found.error)


@pytest.mark.parametrize("dims", [(0, 128, 64), (128, 0, 64), (128, 64, 0)])
def test_an_empty_product_is_its_launch(dims: tuple[int, int, int]) -> None:
    """Experts that got no token multiply nothing."""
    m, n, k = dims
    empty = OpShape("aten.mm.default", "forward", ((m, k), (k, n)), ((m, n),), "bfloat16", 0, 0, 0)
    small = OpShape("aten.mm.default", "forward", ((1, 8), (8, 8)), ((1, 8),), "bfloat16", 128, 144, 16)
    found, least = gemm_price(DEVICES[0], empty), gemm_price(DEVICES[0], small)
    assert found is not None and least is not None and 0 < found.seconds <= least.seconds < 1e-5
    assert slowdowns(DEVICES[0], [empty], [found.seconds], Beside(24, 1e11)) == [1.0]


def test_an_empty_convolution_is_its_launch() -> None:
    image, weight, out = (0, 64, 28, 28), (64, 64, 3, 3), (0, 64, 28, 28)
    shape = OpShape("aten.convolution.default", "forward", (image, weight), (out,), "float32", 0, 147456, 0)
    assert 0 < price(DEVICES[0], shape).seconds < 1e-5
