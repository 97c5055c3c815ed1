"""Which family an aten op belongs to: ops of one family follow one kind of law."""

from __future__ import annotations

from functools import lru_cache

_MEMBERS = {
    "gemm": "mm addmm bmm baddbmm addbmm linear matmul mv addmv dot vdot einsum _scaled_mm _grouped_mm _int_mm "
    "linear_backward mkldnn_linear mkldnn_linear_backward_weights",
    "conv": "convolution _convolution conv1d conv2d conv3d mkldnn_convolution thnn_conv2d slow_conv2d "
    "conv_transpose2d convolution_overrideable",
    "conv_backward": "convolution_backward mkldnn_convolution_backward conv_tbc_backward",
    "attention": "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math scaled_dot_product_attention _flash_attention_forward",
    "attention_backward": "_scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention_backward _flash_attention_backward",
    "norm": "native_layer_norm native_batch_norm _native_batch_norm_legit native_group_norm _batch_norm_with_update "
    "_fused_rms_norm rms_norm batch_norm cudnn_batch_norm layer_norm group_norm _native_batch_norm_legit_no_training "
    "_batch_norm_impl_index",
    "norm_backward": "native_layer_norm_backward native_batch_norm_backward native_group_norm_backward "
    "batch_norm_backward _fused_rms_norm_backward cudnn_batch_norm_backward _batch_norm_impl_index_backward",
    "softmax": "_softmax _log_softmax softmax log_softmax _softmax_backward_data _log_softmax_backward_data "
    "_safe_softmax logsumexp",
    "loss": "nll_loss_forward nll_loss_backward nll_loss nll_loss2d_forward nll_loss2d_backward mse_loss "
    "mse_loss_backward cross_entropy_loss binary_cross_entropy binary_cross_entropy_backward "
    "binary_cross_entropy_with_logits smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward",
    "pool": "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool2d mkldnn_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d max_pool3d_with_indices avg_pool3d avg_pool1d",
    "pool_backward": "max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward "
    "adaptive_max_pool2d_backward mkldnn_max_pool2d_backward upsample_nearest2d_backward "
    "upsample_bilinear2d_backward max_pool3d_with_indices_backward avg_pool3d_backward",
    "reduction": "sum mean amax amin max min argmax argmin var var_mean std prod any all norm linalg_vector_norm "
    "cumsum cumprod topk sort count_nonzero nansum max_backward",
    "embedding": "embedding embedding_dense_backward embedding_backward embedding_bag _embedding_bag "
    "_embedding_bag_dense_backward index_select index gather scatter scatter_add index_put index_add take "
    "index_copy masked_select nonzero bincount",
    "copy": "copy clone _to_copy contiguous cat stack constant_pad_nd repeat roll flip slice_backward "
    "select_backward index_fill new_zeros new_full new_ones zeros zeros_like ones ones_like full full_like fill "
    "zero as_strided_copy split_with_sizes_copy unfold_backward arange tril triu repeat_interleave "
    "native_dropout rand rand_like randn randn_like randint bernoulli uniform normal randperm "
    "as_strided_scatter slice_scatter select_scatter diagonal_backward scalar_tensor "
    "_chunk_cat all_gather_copy_in split_with_sizes_copy_out expand_copy one_hot linspace eye",
    "optimizer": "_fused_adamw _fused_adam _fused_sgd _fused_adagrad _foreach_add _foreach_mul _foreach_addcdiv "
    "_foreach_addcmul _foreach_sqrt _foreach_div _foreach_lerp _foreach_neg _foreach_zero _foreach_norm _foreach_copy "
    "_foreach_sub _foreach_pow _foreach_reciprocal _amp_foreach_non_finite_check_and_unscale",
    "rnn": "mkldnn_rnn_layer lstm gru rnn_tanh _thnn_fused_lstm_cell _thnn_fused_gru_cell quantized_lstm _cudnn_rnn",
    "rnn_backward": "mkldnn_rnn_layer_backward _thnn_fused_lstm_cell_backward_impl "
    "_thnn_differentiable_lstm_cell_backward _cudnn_rnn_backward",
    "view": "view _unsafe_view reshape t transpose permute expand expand_as slice select split split_with_sizes chunk "
    "unsqueeze squeeze detach alias as_strided unbind narrow view_as unfold diagonal _reshape_alias movedim flatten "
    "swapaxes lift_fresh unsafe_split unsafe_chunk view_as_real view_as_complex real imag _conj numpy_T mT adjoint "
    "result_type is_same_size",
    "free": "empty empty_like empty_strided new_empty new_empty_strided resize sym_size sym_stride sym_numel "
    "sym_storage_offset _local_scalar_dense item set_ _has_compatible_shallow_copy_type device record_stream "
    "is_pinned sym_is_contiguous stride size dim numel wait_tensor _version",
}
_FAMILY = {op: family for family, ops in _MEMBERS.items() for op in ops.split()}

FAMILIES: tuple[str, ...] = (*_MEMBERS, "pointwise")
COMPUTE = frozenset({"gemm", "conv", "conv_backward", "attention", "attention_backward", "rnn", "rnn_backward"})
# Which part of the anchor benchmark (`validation.anchor.Beat`) ops of a CPU go by; all other families pass over memory.
PARTS = {
    "gemm": "products", "attention": "products", "attention_backward": "products", "rnn": "products",
    "rnn_backward": "products", "conv": "convolutions", "conv_backward": "convolutions",
}  # fmt: skip
FREE = frozenset({"view", "free"})
# Ops that ask a tensor for its shape or overwrite it, and read none of it.
UNREAD = frozenset({
    "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "randint_like", "fill", "zero",
})  # fmt: skip

# Known element-wise ops; a name in none of the tables is priced as pointwise too, but `is_known` says no.
_POINTWISE_NAMES = (
    "add sub mul div neg abs exp log log1p sqrt rsqrt pow square reciprocal sin cos tanh tanh_backward sigmoid "
    "sigmoid_backward relu threshold threshold_backward gelu gelu_backward silu silu_backward hardtanh "
    "hardtanh_backward hardswish hardswish_backward hardsigmoid hardsigmoid_backward elu elu_backward leaky_relu "
    "leaky_relu_backward softplus softplus_backward mish mish_backward log_sigmoid_forward log_sigmoid_backward "
    "clamp clamp_min clamp_max minimum maximum where masked_fill eq ne lt le gt ge logical_and logical_not "
    "logical_or bitwise_and bitwise_not bitwise_or addcmul addcdiv lerp sign erf erfc floor ceil round remainder "
    "fmod rsub floor_divide sgn isnan isinf isfinite native_dropout_backward dropout celu selu glu glu_backward "
    "prelu _prelu_kernel _prelu_kernel_backward relu6 atan2 logit expm1 bitwise_xor trunc "
)
_POINTWISE = frozenset(_POINTWISE_NAMES.split())


@lru_cache(maxsize=4096)
def base_name(name: str) -> str:
    """'aten.add_.Tensor', 'aten::add.out' and 'add' are all 'add'."""
    name = name.replace("::", ".")
    parts = name.split(".")
    if len(parts) > 1 and parts[0] in ("aten", "prims", "c10d", "_c10d_functional", "fsdp", "inductor", "mkldnn"):
        parts = parts[1:]
    base = parts[0]
    return base[:-1] if base.endswith("_") and not base.endswith("__") and base != "set_" else base


@lru_cache(maxsize=4096)
def family(name: str) -> str:
    """The family of an aten op by its name, with or without namespace and overload.

    >>> family("aten.addmm.default"), family("aten::relu_"), family("view")
    ('gemm', 'pointwise', 'view')
    """
    return _FAMILY.get(base_name(name), "pointwise")


def is_known(name: str) -> bool:
    """Whether the tables name this op; an unknown op is priced by its bytes, and a report should say so."""
    base = base_name(name)
    return base in _FAMILY or base in _POINTWISE
