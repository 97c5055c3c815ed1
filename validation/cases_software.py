"""What the trainers of the published runs fuse, overlap and pay on the host: descriptions, by their names.

Each follows from the program's source or documents, as far as known to us; none is fitted to the runs. Marked guesses:
OneFlow and TensorFlow run static graphs whose scheduling cost we take as half of eager torch's.
"""

from __future__ import annotations

import re
from dataclasses import replace

from planner.software import HOST, Software
from validation.cases import Case

# Megatron-LM 2021 and its forks: pointwise work of a module in one kernel but in the loss, gradients reduced after
# backward, the host waits for the device around each pass and send. Megatron-DeepSpeed of vTrain's runs: "no gradient
# bucketing". Its masked softmax takes up to 2048 keys (`is_kernel_available` in megatron/model/fused_softmax.py; 4096
# in later versions). Its optimizer makes float32 copies of all gradients (`_copy_model_grads_to_main_grads` of
# megatron/optimizer/optimizer.py), and bfloat16 is refused without gradients in float32 (megatron/arguments.py).
MEGATRON_2021 = Software(
    "Megatron 2021", HOST["megatron-2021"], "module", tp_async=False, dp_overlap=False, p2p_overlap=False,
    timed_passes=True, fused_accumulation=False, reduce_bytes=2, main_grads=0, loss="softmax", spelled_loss=True,
    softmax_keys=2048, step_copies=4,
)  # fmt: skip
MEGATRON_2022 = replace(
    MEGATRON_2021, name="Megatron 2022", tp_async=True, main_grads=4, fused_accumulation=True, reduce_bytes=4,
    step_copies=0,
)  # fmt: skip
# Megatron-Core with Transformer Engine: fused accumulation into fp32, distributed optimizer. Its own cross entropy
# keeps the softmax, fused or not; a row that says "fused cross entropy" is SimuMax's, whose docs/strategy.md states
# `--cross-entropy-fusion-impl te`. Megatron-Bridge's performance recipes have Transformer Engine's, too, and gradients
# in bf16 (perf_recipes/_common.py: `cross_entropy_fusion_impl`, `grad_reduce_in_fp32 = False`).
MEGATRON_CORE = Software(
    "Megatron-Core", HOST["transformer-engine"], "module", attention="cudnn", loss="softmax", fp8_inputs=True,
    fp8_weights=True, p2p_split=False,
)  # fmt: skip
TORCHTITAN = Software(
    "torchtitan", HOST["torch"], "none", tp_async=False, main_grads=0, fused_accumulation=False, joined=False,
    fsdp_copies=True, fsdp_keeps_last=True, early_stop=True, autocast=True, ddp=True, adam_passes=20, step_copies=4,
)  # fmt: skip
# Its AdamW is torch's `foreach` one unless `optimizer.fused` is set, which its train_configs of 2024 do not.
# Its checkpoints are torch's `checkpoint_wrapper`, which does not reenter autograd, and `apply_fsdp` does not reshard
# the last block after forward (torchtitan parallelisms/parallelize_llama.py, 2024).
# Its runs of April 2024 (docs/performance.md, FSDP2 in eager mode) have Triton's norm, which keeps its input alone
# (`norm_type = "fused_rmsnorm"` in the train_configs of that day), those of December 2024 the spelled-out one. Its loss
# is compiled in neither (train.py: "compiling loss function causes CUDA errors, turning off for now").
# Its per-operator policy keeps the results of every second product, counted in order within a block: key, output and
# gate of seven run again (torchtitan models/llama/parallelize_llama.py). Full recomputation keeps none; by layers it
# is every second one (the default of `selective_ac_option`).
PER_OP_MATMULS, LAYERS_AGAIN = 0.5, 0.5
# llm-foundry of 2023: FlashAttention of the first generation (or its Triton version), 25-40 % of the peak where the
# second, which devices' tables hold, reaches 50-73 % (Dao 2023, shared/facts/compute.md B3): 32.5 / 61.5.
# Its loss is flash-attn's cross entropy unless the configuration says otherwise, and `inplace_backward` is not passed
# (llm-foundry models/mpt/modeling_mpt.py: `loss_fn` defaults to "fused_crossentropy"). The same file gives the model
# two metrics, LanguageCrossEntropy and LanguagePerplexity, of which the benchmarks' scripts know nothing; Composer
# updates them after every micro-batch (trainer.py, `_train_microbatch`). Checkpoints do not reenter
# autograd, and torch is 2.1.0 (scripts/train/yamls/pretrain and benchmarking/sweep.sh of October 2023).
# Its DecoupledAdamW is nine kernels a parameter (composer/optim/decoupled_weight_decay.py).
COMPOSER = replace(
    TORCHTITAN, name="Composer", fsdp_copies=False, fsdp_keeps_last=False, attention_speed=0.53, fused_loss=True,
    loss="logits", metrics=2, adam_passes=22, step_copies=0,
)  # fmt: skip
HUGGING_FACE = Software(
    "Hugging Face eager", HOST["torch"], "none", main_grads=0, dp_overlap=True, fused_accumulation=False,
    joined=False, vocab_parallel=False, tp_async=False, p2p_overlap=False, reduce_bytes=4, autocast=True, ddp=True,
    adam_passes=20, step_copies=4,
)  # fmt: skip
ONEFLOW = replace(
    MEGATRON_2021, name="OneFlow", host=HOST["static graph"], dp_overlap=True, p2p_overlap=True, norm_clip=False,
    timed_passes=False, spelled_loss=False, softmax_keys=0, step_copies=0,
)  # fmt: skip
DDP_2020 = Software(
    "torch DDP 2020", HOST["torch-2021"], "module", main_grads=0, fused_accumulation=False, vocab_parallel=False,
)  # fmt: skip
# Programs of today that are none of these: eager torch with its DistributedDataParallel, or XLA, which fuses.
TORCH_DDP = replace(
    TORCHTITAN, name="torch DDP", fsdp_copies=False, fsdp_keeps_last=False,
)  # fmt: skip
XLA = replace(TORCHTITAN, name="XLA", host=HOST["static graph"], fusion="chain", fused_loss=True, loss="logits",
              fsdp_copies=False, fsdp_keeps_last=False, autocast=False, ddp=False,
              adam_passes=0, step_copies=0)  # fmt: skip
TENSORFLOW = replace(DDP_2020, name="TensorFlow", host=HOST["static graph"], fusion="none", joined=False)  # without XLA
# What was timed, where that is less than a step with its optimizer.
FORWARD_AND_BACKWARD = r"forward (\+|and|&) backward(?! (\+|and|&) optimi)|no optimizer|without (the )?optimizer"
# Names that are told apart below, and those of eager torch.
KNOWN = (
    r"megatron|nemo|oneflow|tensorflow|jax|maxtext|xla|flax|pax|t5x|8aa4619|aceso|hugging ?face|composer|llm-foundry"
    r"|torch|apex|\bddp\b|fsdp|deepspeed|horovod|accelerate|lightning|colossal|transformers"
)


def software_of(case: Case) -> Software:
    """The trainer of a row; one that is not known is taken as Megatron-Core where it is tensor-parallel, else torch."""
    name, notes = case.text("software").lower(), case.text("notes").lower()
    found = _named(case, name)
    if is_per_op(case):
        found = replace(found, recompute_matmuls=PER_OP_MATMULS)
    if found.name == "torchtitan" and "fsdp2 1d eager" in notes:
        found = replace(found, fused_norms=True)
    if found.fsdp_copies and "whole layers, frequency not restated" in notes:
        found = replace(found, recompute_share=LAYERS_AGAIN)
    if "compile" in notes:
        found = replace(found, fusion="chain", host=HOST["static graph"])
        if not found.fsdp_copies:
            found = replace(found, fused_loss=True, loss="logits")
    if "fused cross entropy" in notes or "megatron-bridge" in name:
        found = replace(found, fused_loss=True, loss="in place")
    if "megatron-bridge" in name:
        found = replace(found, main_grads=2, reduce_bytes=2)
    if "communication overlap switched off" in notes:
        found = replace(found, dp_overlap=False, tp_overlap=False, p2p_overlap=False)
    if "tp user-buffer" in notes or "tp user buffer" in notes:
        found = replace(found, tp_overlap=True)
    if "cuda graphs" in notes:
        found = replace(found, host=HOST["graph"])
    if operators := _operators(case):  # of all stages together, and of each
        every, again = operators
        shares = tuple(b / a for a, b in zip(every, again))
        found = replace(found, recompute_share=sum(again) / sum(every), recompute_shares=shares)
    if "mode pure" in notes:
        found = replace(found, reduce_bytes=2)
    if found.name == "Megatron-Core" and case.degree("vpp") == 1:  # overlap_p2p_comm is for interleaved stages alone
        found = replace(found, p2p_overlap=False)
    if found.name == "Megatron 2021" and "bf16" in case.word("precision"):
        found = replace(found, main_grads=4, reduce_bytes=4, step_copies=0)
    if found.fsdp_copies and case.degree("pp") > 1:  # gradients that are not scattered yet are summed in float32
        found = replace(found, main_grads=4)
    if re.search(r"fp8[_ -]?(param|primary)", notes):
        found = replace(found, fp8_weights=False)
    if case.number("vocab") == 0:  # a layer alone, not a training step
        found = replace(found, optimizer="none", timed_passes=False, host=replace(found.host, step=0.0))
    if re.search(FORWARD_AND_BACKWARD, f"{case.text('step_time_how')}; {notes}".lower()):
        found = replace(found, optimizer="none")
    return found


def software_known(case: Case) -> bool:
    """Whether the name of a row's trainer says which of these it is; true where there is none."""
    return not case.stated("software") or bool(re.search(KNOWN, case.text("software").lower()))


def is_per_op(case: Case) -> bool:
    """Whether selective recomputation is torchtitan's policy by operators: as the notes say, or where torchtitan runs
    and they name no layers (`selective_ac_option = 'op'` in its train_configs for Llama 3 of 8B)."""
    notes = case.text("notes").lower()
    named = case.word("recompute") == "selective" and "torchtitan" in case.text("software").lower()
    return "per-op" in notes or (named and "whole layers" not in notes)


def _operators(case: Case) -> tuple[list[int], list[int]] | None:
    """Operators of every stage and those of them that are recomputed, where the notes list both."""
    listed = re.findall(r"(?:recomputed )?operators per stage \[([\d, ]+)\]", case.text("notes"))
    if len(listed) != 2:
        return None
    every, again = ([int(n) for n in numbers.split(",")] for numbers in listed)
    return (every, again) if all(every) and any(again) and len(every) == len(again) else None


def _named(case: Case, name: str) -> Software:
    if "oneflow" in name:
        return ONEFLOW
    if "tensorflow" in name:
        return TENSORFLOW
    if any(w in name for w in ("jax", "maxtext", "xla", "flax", "pax", "t5x")):
        return XLA
    old = re.search(r"megatron(-lm)?[ (]+(20(19|20|21)\b|v[12]\.)", name)
    if old or "megatron-deepspeed" in name or "8aa4619" in name or "aceso" in name:
        return MEGATRON_2021
    if "megatron-lm 2022" in name:
        return MEGATRON_2022
    if re.search(r"hugging ?face|\btransformers\b", name):
        # Where Megatron runs the layers, they are its own, and it splits embedding and logits, too.
        own = "megatron" in name
        return replace(HUGGING_FACE, vocab_parallel=own, joined=own, autocast=not own, ddp=not own)
    if "composer" in name or "llm-foundry" in name:
        return COMPOSER
    if "torchtitan" in name:
        return TORCHTITAN
    if "apex" in name or "pytorch 1." in name:
        return DDP_2020
    if "megatron" in name or "nemo" in name or case.degree("tp") > 1 or case.degree("pp") > 1:
        return MEGATRON_CORE
    return TORCHTITAN if case.word("zero_fsdp") in ("zero3", "fsdp") else TORCH_DDP
