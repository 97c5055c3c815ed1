"""Training software: what it runs in one kernel, what its host thread pays, what it overlaps. Descriptions, no code.

Nothing here is fitted to a training run that is predicted. Every number is an ASSUMPTION with its range; see `HOST`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from planner.plan import ParallelPlan

Fusion = Literal["none", "module", "chain"]

# What cross entropy keeps of the logits until its backward.
# "traced": as torch runs it: the float32 log-softmax, of a float32 copy; two float32 gradients before the logits' own.
# "softmax": the float32 copy, which became the softmax in place and becomes the gradient in place, before a cast
#   (Megatron-LM core/tensor_parallel/cross_entropy.py, core/fusions/fused_cross_entropy.py: `exp_logits`, `softmax`).
# "logits": the logits in their own dtype and a float32 number a token; their gradient is a new tensor
#   (flash-attn losses/cross_entropy.py, whose `inplace_backward` is off unless asked for).
# "in place": the same, and the gradient is written over the logits (Transformer Engine pytorch/cross_entropy.py, whose
#   backward returns `_input`; flash-attn with `inplace_backward`).
Loss = Literal["traced", "softmax", "logits", "in place"]


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Seconds that the host thread pays. op: an op that launches a kernel, through Python, autograd and the
    dispatcher. backward: the same from the autograd engine (C++ only). view: an op that launches nothing.
    module: call of a module. message: a collective (c10d bookkeeping, NCCL enqueue). step: once an optimizer step
    (loss scale, logging, data). custom: backward of a kernel that is an autograd function written in Python.
    checkpoint: a recomputed block, in forward and backward together. fork: a forward dropout that changes to the
    random state of its tensor-parallel rank and back. linear: forward of a linear layer, beyond all of these. batch:
    once a micro-batch on every stage, before its forward: its data fetched, moved and sent to tensor-parallel ranks."""

    op: float
    backward: float
    view: float
    module: float
    message: float
    step: float
    custom: float = 0.0
    checkpoint: float = 0.0
    fork: float = 0.0
    linear: float = 0.0
    batch: float = 0.0


# Eager floors of single ops: 28 us for bmm, 45 us for linear, which is one product and three views in a module
# (NeuSight's measurements, shared/facts/compute.md B1). So 28 us an op, 4 us a view, 5 us a module. Backward runs
# without Python: half of it. ASSUMPTION (range 20-45 us an op); on machines of 2023 and later an aten op takes 5-10 us
# and its autograd node about the same (range 8-20 us). Megatron's own kernels are autograd functions in Python, whose
# backward costs what their forward does. Its checkpoint reads three random states in forward; in backward it reads,
# sets and sets back three: 12 calls, each taken as an op. A fork of the random state is 4 such calls (Megatron-LM v2.x
# mpu/random.py). A forward call of Transformer Engine's column-parallel linear in Megatron takes 115 us (140 before
# September 2024, its pull request 1191, bf16 on one rank; 90 to 100 on Grace, issue 2053; less since 2026): a launch,
# the function at a border, a module, three views, and the rest. What its backward takes is not known. For the data of a
# micro-batch Megatron-LM v2.x launches ten kernels and copies and sends two messages (pretrain_gpt.py `get_batch`,
# mpu/data.py, utils.py `get_ltor_masks_and_position_ids`); what its loader takes is not counted.
TE_LINEAR = 115e-6
_TORCH = HostCosts(14e-6, 8e-6, 2.5e-6, 5e-6, 25e-6, 2e-3, 14e-6, 12 * 14e-6, 4 * 14e-6)
_TORCH_2021 = HostCosts(28e-6, 14e-6, 4e-6, 5e-6, 40e-6, 5e-3, 28e-6, 12 * 28e-6, 4 * 28e-6)
HOST = {
    "torch-2021": _TORCH_2021,
    "megatron-2021": replace(_TORCH_2021, batch=10 * _TORCH_2021.op + 2 * _TORCH_2021.message),
    "torch": _TORCH,
    "transformer-engine": replace(_TORCH, linear=TE_LINEAR - 2 * _TORCH.op - _TORCH.module - 3 * _TORCH.view),
    "static graph": HostCosts(4e-6, 4e-6, 0.0, 0.0, 10e-6, 1e-3),
    "graph": HostCosts(0.0, 0.0, 0.0, 0.0, 0.0, 1e-3),
}


@dataclass(frozen=True, slots=True)
class Software:
    """One trainer.

    fusion: "none" runs every traced op; "module" runs the pointwise work of one module as one kernel (hand-written
    kernels: bias and GELU, masked softmax, norm, dropout and add); "chain" joins pointwise work of neighbouring
    modules (compilers). fused_norms: a norm is one kernel each way, also with "none". fused_loss: so is cross entropy.
    loss: what cross entropy keeps. spelled_loss: it runs by torch's operators, in place (`planner.spelled`).
    metrics: how many times it is computed again of the same logits, by torch, for what is logged.
    tp_async: the reduction of an input's gradient runs beside the product for the weight's.
    tp_overlap: products that neighbour a tensor-parallel message run in tp pieces beside it (user buffers).
    dp_overlap: gradients are reduced (and shards gathered) beside backward (and forward).
    p2p_overlap: a stage computes while it sends; otherwise sending blocks, the host waits for the device, and posts a
    send and a receive at a time (`_communicate` in Megatron-LM's megatron/p2p_communication.py).
    timed_passes: timers wait for the device at both ends of every pass of a micro-batch, so the host never runs ahead
    of a pass (Megatron-LM before its "Timing levels" of August 2022, and forks: `torch.cuda.synchronize` in `start` and
    `stop` of megatron/global_vars.py, `forward-compute` and `backward-compute` in megatron/schedules.py).
    p2p_split: each tensor-parallel rank sends its part to the next stage, which gathers it.
    main_grads: bytes per element of the buffer that sums gradients over micro-batches (0: .grad in the
    parameter's dtype). fused_accumulation: the product for the weight adds into that buffer itself.
    reduce_bytes: bytes per element of reduced gradients. norm_clip: the gradient norm is computed each step.
    joined: products of one input (q, k, v; gate and up) are one product, and under sequence parallelism backward
    gathers that input again (Megatron, Transformer Engine); otherwise it is kept whole (DTensor's PrepareModuleInput).
    vocab_parallel: embedding and logits are split over tp. optimizer: one kernel for all parameters, or none at all.
    recompute_matmuls: share of the products in recomputed regions that run again (per-operator policies keep some).
    early_stop: recomputing ends with the last op that saves something for backward (torch's checkpoints that do not
    reenter autograd since torch 2.1, and compilers, which drop dead code), so a block's last product and reduction do
    not run again; otherwise regions run whole (Megatron's and all checkpoints that reenter).
    recompute_share: share of the recomputed regions that is recomputed (policies per operator and stage).
    recompute_shares: the same of each pipeline stage, where it differs.
    fp8_inputs: with fp8, what products with weights read is gathered between ranks and kept for backward in fp8, not in
    the dtype it came in (Transformer Engine pytorch/module: `ln_out` and `inputmat` of `save_for_backward` are
    quantized; `grad_output_preprocess` of base.py and `with_input_all_gather_nccl` of linear.py cast, then gather).
    fsdp_copies: whole parameters are copied out of what was gathered, and gradients into one buffer of `reduce_bytes`
    that is scattered, by kernels between those of the model (FSDP2); otherwise both are views of flat buffers (FSDP1).
    fp8_weights: with fp8, weights are kept in 8 bits in both layouts for the whole run, beside those in the dtype they
    came in (`get_weight_workspace` of Transformer Engine pytorch/module/base.py, which Megatron has it cache).
    autocast: parameters and gradients are in 32 bits, and weights are cast once a forward (torch.autocast), where data
    parallelism shards nothing.
    ddp: torch's DistributedDataParallel of version 2 reduces gradients, in buckets that stay beside them
    (`gradient_as_bucket_view=False`); they are freed after every step (`zero_grad(set_to_none=True)`).
    adam_passes: of Adam as kernels of a few operands each, over float32 parameters, gradients and moments: 20 of
    torch's `foreach` implementation, its default on GPUs (reads 12, writes 8: torch/optim/adam.py). 0: one kernel.
    step_copies: bytes per parameter that exist only while the optimizer runs (copies of gradients, square roots).
    fsdp_keeps_last: the last block stays whole from forward to backward.
    softmax_keys: of Megatron's kernel for a scaled, masked softmax, the most keys that it takes; it also asks for heads
    times samples that 4 divides, and torch's operators stand in for it elsewhere. 0: a kernel that takes everything.
    attention_speed: of the attention kernel, relative to the one that `attention` names.
    attention: "flash" is FlashAttention-2 as torch ships it, "cudnn" the kernel of cuDNN and Transformer Engine, which
    is faster from Hopper on (`costmodels.attention`).
    """

    name: str
    host: HostCosts = HOST["torch"]
    fusion: Fusion = "module"
    fused_loss: bool = False
    fused_norms: bool = False
    loss: Loss = "traced"
    spelled_loss: bool = False
    metrics: int = 0
    tp_async: bool = True
    tp_overlap: bool = False
    dp_overlap: bool = True
    p2p_overlap: bool = True
    timed_passes: bool = False
    p2p_split: bool = True
    main_grads: int = 4
    fused_accumulation: bool = True
    reduce_bytes: int = 4
    norm_clip: bool = True
    joined: bool = True
    vocab_parallel: bool = True
    optimizer: Literal["adam", "sgd", "none"] = "adam"
    recompute_matmuls: float = 1.0
    early_stop: bool = False
    recompute_share: float = 1.0
    recompute_shares: tuple[float, ...] = ()
    fp8_inputs: bool = False
    fp8_weights: bool = False
    autocast: bool = False
    ddp: bool = False
    adam_passes: int = 0
    step_copies: int = 0
    fsdp_copies: bool = False
    fsdp_keeps_last: bool = False
    softmax_keys: int = 0
    attention_speed: float = 1.0
    attention: Literal["flash", "cudnn"] = "flash"

    def __post_init__(self) -> None:
        assert not (self.fused_loss and self.loss == "traced"), "one kernel does not keep what many ops keep"


def is_autocast(software: Software, plan: ParallelPlan) -> bool:
    """Whether a plan's products are in 16 bits by casts of float32 weights."""
    return software.autocast and plan.data_parallel == "ddp" and plan.precision in ("fp16", "bf16")
