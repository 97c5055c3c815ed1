"""FLOP formulas of the aten operators that do more than move their bytes.

A formula sees shapes only, so the same one prices a traced op at any batch size and any shard of it. One FMA is
two FLOP. Where torch has a formula (`torch.utils.flop_counter`) ours gives the same number and a test holds them
together; torch has none for attention on the CPU, grouped matmul, recurrent layers, FFTs and matrix-vector products.
Pointwise work, reductions and copies count as zero FLOP, as is usual: their cost is their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import log2, prod
from typing import Any, Protocol

Shape = tuple[int, ...]


class Shaped(Protocol):
    @property
    def shape(self) -> Shape: ...


class Call(Protocol):
    """An op's non-tensor arguments, as `opgraph.graph.Op` records them."""

    @property
    def args(self) -> tuple[Any, ...]: ...


Formula = Callable[[list[Shape], list[Shape], tuple[Any, ...]], int]


class NoFormulaError(ValueError):
    """A heavy op without a FLOP formula: counting it as zero would be wrong."""


def _mm(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * prod(outs[0]) * ins[-2][-1]


def _mm_first(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * prod(outs[0]) * ins[0][-1]


def _mv(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * prod(ins[-2])


def _grouped_mm(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    a, b = ins[0], ins[1]
    if len(a) == 2 and len(b) == 2:  # ragged contraction: every column of `a` meets one row of `b`
        return 2 * a[0] * a[1] * b[1]
    return 2 * prod(outs[0]) * a[-1]


def _conv(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    transposed = bool(args[6]) if len(args) > 6 else False
    return 2 * prod(ins[0] if transposed else outs[0]) * prod(ins[1][1:])


def _conv_backward(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    grad_out, x, weight = ins[0], ins[1], ins[2]
    once = 2 * prod(x if args[7] else grad_out) * prod(weight[1:])
    return once * sum(bool(m) for m in args[10][:2])


def _attention(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    q, k, v = ins[0], ins[1], ins[2]
    pairs = prod(q[:-1]) * k[-2]
    return 2 * pairs * (q[-1] + v[-1])


def _attention_backward(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """Five products: the scores again, and the gradients of v, of the probabilities, of q and of k."""
    q, k, v = ins[1], ins[2], ins[3]
    pairs = prod(q[:-1]) * k[-2]
    return 2 * pairs * (3 * q[-1] + 2 * v[-1])


def attention_again(op: str, inputs: Sequence[Shaped]) -> int:
    """FLOP of the scores that a fused backward of attention computes again; 0 for every other op."""
    if FORMULAS.get(base_name(op)) is not _attention_backward:
        return 0
    q, k = inputs[1].shape, inputs[2].shape
    return 2 * prod(q) * k[-2]


def _rnn_layer(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    x, w_input, w_hidden = ins[0], ins[1], ins[2]
    return 2 * prod(x[:-1]) * (prod(w_input) + prod(w_hidden))


def _rnn_layer_backward(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * _rnn_layer(ins, outs, args)


def _recurrent(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """All layers and directions at once: every weight meets every step of every sample."""
    return 2 * prod(ins[0][:-1]) * sum(prod(w) for w in ins[1:] if len(w) == 2)


def _recurrent_backward(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * _recurrent(ins, outs, args)


def _fft(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    size = max(prod(ins[0]), prod(outs[0]))
    length = prod(ins[0][d] for d in args[1])
    return int(5 * size * log2(max(length, 2)))


def _pairwise(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 3 * prod(outs[0]) * ins[0][-1]


def _pairwise_backward(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """From the gradient of every pair: the difference, its scale, and the sum, per coordinate."""
    return 3 * prod(ins[0]) * ins[1][-1]


def _addbmm(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    return 2 * prod(ins[-2]) * ins[-1][-1]


def _square(factor: float) -> Formula:
    """`factor` n^3 for every n x n matrix."""
    return lambda ins, outs, args: int(factor * prod(ins[0][:-2]) * ins[0][-1] ** 3)


def _solve(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """An LU decomposition, and two triangular systems for every right side."""
    n = ins[0][-1]
    return int(prod(ins[0][:-2]) * (2 / 3) * n**3) + 2 * n * prod(outs[0])


def _substitute(passes: int) -> Formula:
    """n FLOP for every element of the solution, and each pass."""
    return lambda ins, outs, args: passes * ins[0][-2 if ins[0][-2] == ins[0][-1] else -1] * prod(outs[0])


def _qr(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """Householder: 2 k^2 (m - k / 3) for R with k = min(m, n), and the same again for Q."""
    m, n = ins[0][-2:]
    k = min(m, n)
    return int(prod(ins[0][:-2]) * 4 * max(m, n) * k * k - prod(ins[0][:-2]) * 4 / 3 * k**3)


def _svd(ins: list[Shape], outs: list[Shape], args: tuple[Any, ...]) -> int:
    """Golub and Reinsch with both sets of vectors: 14 m n^2 + 8 n^3 for m >= n."""
    large, small = max(ins[0][-2:]), min(ins[0][-2:])
    return prod(ins[0][:-2]) * (14 * large * small**2 + 8 * small**3)


# Decompositions: Golub and Van Loan, Matrix Computations (4th ed.), 3.2, 4.2, 5.2, 8.3, 8.6; LAPACK working note 41.
DECOMPOSITIONS: dict[str, Formula] = {
    "linalg_cholesky_ex": _square(1 / 3), "cholesky": _square(1 / 3), "cholesky_inverse": _square(2 / 3),
    "linalg_inv_ex": _square(2), "linalg_lu_factor_ex": _square(2 / 3), "linalg_lu": _square(2 / 3),
    "_linalg_det": _square(2 / 3), "_linalg_slogdet": _square(2 / 3), "_linalg_solve_ex": _solve,
    "linalg_solve_triangular": _substitute(1), "triangular_solve": _substitute(1), "cholesky_solve": _substitute(2),
    "linalg_lu_solve": _substitute(2), "_linalg_eigh": _square(9), "linalg_qr": _qr, "_linalg_svd": _svd,
    "linalg_householder_product": _qr,
}  # fmt: skip

FORMULAS: dict[str, Formula] = {
    **DECOMPOSITIONS,
    "mm": _mm, "addmm": _mm, "bmm": _mm, "baddbmm": _mm, "addbmm": _addbmm, "_addmm_activation": _mm,
    "_scaled_mm": _mm_first, "_int_mm": _mm, "linear": _mm_first, "mkldnn_linear": _mm_first,
    "mv": _mv, "addmv": _mv, "dot": _mv, "vdot": _mv,
    "_grouped_mm": _grouped_mm, "_scaled_grouped_mm": _grouped_mm,
    "convolution": _conv, "_convolution": _conv, "convolution_overrideable": _conv, "cudnn_convolution": _conv,
    "mkldnn_convolution": _conv, "_slow_conv2d_forward": _conv, "convolution_backward": _conv_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "mkldnn_rnn_layer": _rnn_layer, "mkldnn_rnn_layer_backward": _rnn_layer_backward,
    "_cudnn_rnn": _recurrent, "_cudnn_rnn_backward": _recurrent_backward,
    "_fft_r2c": _fft, "_fft_c2c": _fft, "_fft_c2r": _fft,
    "_cdist_forward": _pairwise, "_euclidean_dist": _pairwise, "_cdist_backward": _pairwise_backward,
    "_pdist_forward": _pairwise, "_pdist_backward": _pairwise_backward,
}  # fmt: skip

# Ops whose work is proportional to the bytes they move, and which torch does not tag as pointwise or reduction.
LIGHT = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward
    adaptive_max_pool3d adaptive_max_pool3d_backward _ctc_loss _ctc_loss_backward _embedding_bag_backward
    _embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward _safe_softmax _masked_softmax
    _masked_softmax_backward _weight_norm_interface _weight_norm_interface_backward affine_grid_generator
    channel_shuffle diag_embed dist fractional_max_pool2d fractional_max_pool2d_backward fractional_max_pool3d
    fractional_max_pool3d_backward grid_sampler_3d grid_sampler_3d_backward hardswish kthvalue linalg_cross
    linalg_vector_norm logit_backward max_unpool2d max_unpool3d multi_margin_loss multi_margin_loss_backward
    multilabel_margin_loss_forward multilabel_margin_loss_backward nanmedian polar reflection_pad1d_backward
    reflection_pad3d reflection_pad3d_backward renorm replication_pad1d_backward replication_pad2d_backward
    replication_pad3d replication_pad3d_backward rrelu_with_noise rrelu_with_noise_backward segment_reduce
    smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy
    binary_cross_entropy_with_logits upsample_bicubic2d_backward upsample_linear1d
    upsample_linear1d_backward upsample_nearest1d upsample_nearest1d_backward upsample_nearest3d
    upsample_nearest3d_backward upsample_trilinear3d upsample_trilinear3d_backward _upsample_bilinear2d_aa
    _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact2d_backward bernoulli exponential cauchy geometric log_normal
    random poisson binomial multinomial dropout alpha_dropout _sparse_softmax take_backward trace_backward
    _assert_async _assert_tensor_metadata
    _chunk_cat _unsafe_masked_index _unsafe_masked_index_put_accumulate addr allclose as_strided_scatter block_diag
    complex diagonal_scatter fill floor_divide histogram index_reduce lu_unpack masked_fill nonzero_static normal put
    rsub
    _prelu_kernel _prelu_kernel_backward
    _batch_norm_with_update _embedding_bag _embedding_bag_forward_only _fused_rms_norm _fused_rms_norm_backward
    _linalg_check_errors _local_scalar_dense _log_softmax _log_softmax_backward_data _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _pack_padded_sequence _pin_memory
    _reshape_copy _softmax _softmax_backward_data _thnn_fused_gru_cell _thnn_fused_gru_cell_backward
    _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl _to_copy _trilinear _unique2 _unsafe_index
    _unsafe_index_put _unsafe_view adaptive_max_pool2d adaptive_max_pool2d_backward all any arange argsort
    as_strided_copy avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward batch_norm_backward
    bernoulli_ bincount bucketize cat clone col2im constant_pad_nd contiguous copy copy_ count_nonzero cummax cummin
    cumprod cumsum diagonal_copy diff embedding embedding_backward embedding_dense_backward embedding_renorm_ empty
    empty_like empty_permuted empty_strided equal eye fill_ flip full full_like gather glu glu_backward
    grid_sampler_2d grid_sampler_2d_backward histc im2col index index_add index_add_ index_copy index_copy_
    index_fill_ index_put index_put_ index_select isin item lift lift_fresh linspace log_sigmoid_forward
    logcumsumexp logical_not logspace masked_scatter masked_scatter_backward masked_select max_pool2d_with_indices
    max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward median
    mkldnn_max_pool2d mode mse_loss multinomial nan_to_num native_batch_norm native_batch_norm_backward
    native_channel_shuffle native_dropout native_dropout_backward native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward new_empty new_empty_strided new_full new_ones new_zeros
    nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward nonzero normal_ one_hot ones ones_like
    pad_sequence pixel_shuffle pixel_unshuffle put_ rand rand_like randint randint_like randn randn_like random_
    randperm reflection_pad1d reflection_pad2d reflection_pad2d_backward repeat repeat_interleave replication_pad1d
    replication_pad2d roll rot90 scalar_tensor scatter scatter_ scatter_add scatter_add_ scatter_reduce
    scatter_reduce_ searchsorted select_backward select_scatter set_ slice_backward slice_scatter softplus sort
    stack std std_mean take take_along_dim topk trace tril tril_ tril_indices triu triu_ triu_indices
    unfold_backward uniform_ unique_consecutive upsample_bicubic2d upsample_bilinear2d upsample_bilinear2d_backward
    upsample_nearest2d upsample_nearest2d_backward var var_mean where zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)


# In-place forms of these change what a tensor looks like, not what it holds.
VIEWS = frozenset("transpose t squeeze unsqueeze swapaxes swapdims as_strided detach resize set".split())  # noqa: SIM905


def base_name(op: str) -> str:
    """`aten.addmm.default` -> `addmm`."""
    return op.split(".")[1] if op.count(".") >= 1 else op


def flops_of(
    op: str,
    inputs: Sequence[Shaped],
    outputs: Sequence[Shaped],
    call: Call,
    extra: Mapping[str, Formula] | None = None,
) -> int:
    """FLOP of one call of a heavy op; 0 for every other op.

    `extra` are the user's formulas, by full op name (`mylib.op.default`) or by base name.
    """
    name = base_name(op)
    formula = (extra or {}).get(op) or (extra or {}).get(name) or FORMULAS.get(name)
    return formula([t.shape for t in inputs], [t.shape for t in outputs], call.args) if formula else 0


def is_light(op: str, tags: Sequence[Any]) -> bool:
    """True where counting zero FLOP is right: pointwise, reductions, fills, moves, and lists of these.

    torch tags few gradients and few in-place forms, but the gradient of a pointwise op is pointwise, and what works in
    place does what the plain op does.
    """
    name = base_name(op)
    lists = ("_foreach_", "_amp_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad")
    if _light_tags(tags) or name in LIGHT or name.startswith(lists):
        return True
    plain = name.removesuffix("_")
    forward = plain.removesuffix("_backward")
    kin = {plain, forward, f"{forward}_forward"}
    return plain in VIEWS or bool(kin & LIGHT) or any(_tagged(k) for k in kin - {name})


def _light_tags(tags: Sequence[Any]) -> bool:
    return bool({str(t).rsplit(".", 1)[-1].split(":")[0] for t in tags} & {"pointwise", "reduction", "view_copy"})


@cache
def _tagged(name: str) -> bool:
    """Whether torch tags any overload of the aten op of this name as light."""
    import torch

    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(_light_tags(getattr(packet, o).tags) for o in packet.overloads())


def check_formula(op: str, tags: Sequence[Any], module: str, extra: Mapping[str, Formula] | None = None) -> None:
    """Raises NoFormulaError for an op that may be heavy and that nobody can count."""
    name = base_name(op)
    if name in FORMULAS or is_light(op, tags) or (extra and (op in extra or name in extra)):
        return
    raise NoFormulaError(
        f"{op} in module '{module or '<root>'}' has no FLOP formula, so its work cannot be counted; pass "
        f"flops={{'{op}': formula}} to trace, or return that from file.py:factory under the key flops, where "
        f"formula(input_shapes, output_shapes, args) returns FLOP (0 if the op only moves bytes)"
    )
