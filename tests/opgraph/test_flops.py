"""FLOP formulas: torch's own numbers where torch has a formula, hand-made ones where it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import flop_registry

from opgraph.flops import FORMULAS, LIGHT, NoFormulaError, base_name, check_formula, flops_of, is_light

aten = torch.ops.aten
dims = st.integers(1, 9)


@dataclass
class Call:
    args: tuple[Any, ...]


@dataclass
class Like:
    shape: tuple[int, ...]


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def ours(op: str, ins: list[Any], outs: list[Any], args: tuple[Any, ...] = ()) -> int:
    return flops_of(f"aten.{op}.default", ins, outs, Call(args))


@settings(deadline=None)
@given(dims, dims, dims, dims)
def test_matrix_products(b: int, m: int, k: int, n: int) -> None:
    for name, tensors in {
        "mm": (meta(m, k), meta(k, n)),
        "addmm": (meta(n), meta(m, k), meta(k, n)),
        "bmm": (meta(b, m, k), meta(b, k, n)),
        "baddbmm": (meta(b, m, n), meta(b, m, k), meta(b, k, n)),
    }.items():
        op = getattr(aten, name)
        out = op(*tensors)
        assert ours(name, list(tensors), [out]) == flop_registry[op](*tensors, out_val=out)
        assert ours(name, list(tensors), [out]) == 2 * m * k * n * (b if "b" in name.removeprefix("add") else 1)


@settings(deadline=None)
@given(
    rank=st.integers(1, 3), batch=st.integers(1, 3), channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), size=st.integers(6, 9), transposed=st.booleans(),
)  # fmt: skip
def test_convolutions(
    rank: int, batch: int, channels: tuple[int, int], groups: int, kernel: int, stride: int, padding: int,
    dilation: int, size: int, transposed: bool,
) -> None:  # fmt: skip
    inside, outside = channels[0] * groups, channels[1] * groups
    x = meta(batch, inside, *[size] * rank)
    w = meta(*((inside, channels[1]) if transposed else (outside, channels[0])), *[kernel] * rank)
    settings_of = ([stride] * rank, [padding] * rank, [dilation] * rank, transposed, [0] * rank, groups)
    args = (x, w, None, *settings_of)
    out = aten.convolution(*args)
    forward = ours("convolution", [x, w], [out], args)
    assert forward == flop_registry[aten.convolution](*args, out_val=out)
    for mask in ([True, True, True], [False, True, True], [True, False, False]):
        back = (out, x, w, [outside], *settings_of, mask)
        grads = aten.convolution_backward(*back)
        counted = ours("convolution_backward", [out, x, w], [g for g in grads if g is not None], back)
        assert counted == forward * sum(mask[:2])  # each gradient meets every weight as often as forward does
        if groups == 1:  # torch forgets the groups in the gradient of the weight
            assert counted == flop_registry[aten.convolution_backward](*back, out_val=grads)


@settings(deadline=None)
@given(dims, dims, dims, dims, dims, st.integers(1, 3))
def test_attention(b: int, h: int, s: int, t: int, d: int, extra: int) -> None:
    e = d * extra
    q, k, v = Like((b, h, s, d)), Like((b, h, t, d)), Like((b, h, t, e))
    out = Like((b, h, s, e))
    forward = ours("_scaled_dot_product_flash_attention_for_cpu", [q, k, v], [out])
    assert forward == 2 * b * h * s * t * (d + e)
    like = (meta(*x.shape) for x in (q, k, v))
    assert forward == flop_registry[aten._scaled_dot_product_flash_attention](
        *like, False, out_val=(meta(*out.shape),)
    )
    back = ours("_scaled_dot_product_flash_attention_for_cpu_backward", [out, q, k, v, out], [q, k, v])
    tensors = [meta(*x.shape) for x in (out, q, k, v)]
    assert back == flop_registry[aten._scaled_dot_product_flash_attention_backward](
        *tensors, out_val=tuple(tensors[1:])
    )


def test_every_formula_of_torch_that_a_dispatched_cpu_or_cuda_op_has_is_here() -> None:
    inner = {"_flash_attention", "_efficient_attention", "flex_attention"}  # never dispatched by themselves in training
    theirs = {str(op).split(".")[-1] for op in flop_registry}
    assert {name for name in theirs if not any(name.startswith(i) for i in inner)} <= set(FORMULAS)


def test_formulas_that_torch_lacks() -> None:
    assert ours("mv", [Like((3, 4)), Like((4,))], [Like((3,))]) == 24
    assert ours("dot", [Like((5,)), Like((5,))], [Like(())]) == 10
    assert ours("_grouped_mm", [Like((10, 4)), Like((3, 4, 6)), Like((3,))], [Like((10, 6))]) == 2 * 10 * 4 * 6
    assert ours("_grouped_mm", [Like((4, 10)), Like((10, 6)), Like((3,))], [Like((3, 4, 6))]) == 2 * 10 * 4 * 6
    x, w, u = Like((7, 2, 5)), Like((12, 5)), Like((12, 3))
    assert ours("mkldnn_rnn_layer", [x, w, u], [Like((7, 2, 3))]) == 2 * 7 * 2 * 12 * (5 + 3)
    assert ours("mkldnn_rnn_layer_backward", [x, w, u], [x]) == 2 * 2 * 7 * 2 * 12 * (5 + 3)
    assert ours("_fft_c2c", [Like((3, 8))], [Like((3, 8))], ((), (1,))) == 5 * 24 * 3
    assert ours("_cdist_forward", [Like((4, 6)), Like((5, 6))], [Like((4, 5))]) == 3 * 20 * 6


def test_pointwise_ops_count_as_zero() -> None:
    for op in (aten.add.Tensor, aten.relu.default, aten.sum.dim_IntList, aten._softmax.default, aten.embedding.default):
        check_formula(str(op), op.tags, "m")
        assert ours(base_name(str(op)), [Like((3, 4))], [Like((3, 4))]) == 0
    assert not LIGHT & set(FORMULAS)
    assert is_light("aten._foreach_add_.Scalar", ()) and is_light("aten._fused_adamw_.default", ())


def test_heavy_ops_nobody_can_count() -> None:
    op = aten.linalg_eig.default  # its iterations depend on the matrix
    with pytest.raises(NoFormulaError, match=r"linalg_eig.default in module '<root>' has no FLOP formula.*pass flops="):
        check_formula(str(op), op.tags, "")
    check_formula(str(op), op.tags, "", {"aten.linalg_eig.default": lambda ins, outs, args: 1})
    assert flops_of(str(op), [], [], Call(()), {"linalg_eig": lambda ins, outs, args: 7}) == 7


def test_decompositions() -> None:
    square = Like((2, 6, 6))
    assert ours("linalg_cholesky_ex", [square], [square]) == 2 * 72
    assert ours("linalg_inv_ex", [square], [square]) == 2 * 432
    assert ours("_linalg_solve_ex", [square, Like((2, 6, 5))], [Like((2, 6, 5))]) == 2 * 144 + 2 * 6 * 60
    assert ours("linalg_solve_triangular", [square, Like((2, 6, 5))], [Like((2, 6, 5))]) == 6 * 60
    assert ours("linalg_qr", [Like((9, 6))], [Like((9, 6)), Like((6, 6))]) == 4 * 9 * 36 - 4 * 72
    assert ours("_linalg_svd", [Like((9, 6))], []) == 14 * 9 * 36 + 8 * 216
