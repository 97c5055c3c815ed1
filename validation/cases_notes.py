"""What is predicted of a transformer row in place of what it says, in words."""

from __future__ import annotations

import re

from costmodels.device import Device
from costmodels.ops import peak_of
from costmodels.relatives import section_for
from costmodels.rounding import rounded_families
from planner.plan import expert_parts
from validation.cases import Case
from validation.cases_cluster import nodes_of
from validation.cases_model import attention_named, family_of, fused_attention, kv_heads_of
from validation.cases_software import is_per_op, software_known, software_of
from validation.cases_transformer import is_replaced_by_zero1, precision_of, replicas_of

HUGGING_FACE = "Hugging Face"
TYPES = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# Whose rate `peak_of` takes where a type is not listed, the likeliest first: several may be equally fast.
LIKELIEST = ("float32", "bfloat16", "float16", "float8_e4m3fn")
NO_OFFLOAD = re.compile(r"\b(no|not|without)\b[^.;,]*offload|offload\w*[ :=]+(off|none|no|false|disabled)\b")


def notes_of(case: Case, device: Device) -> tuple[str, ...]:
    """The notes of a row that was predicted on this device."""
    said, built = case.text("family") or case.text("model"), family_of(case)
    notes = [f"family {said} is predicted as {built}"] if said.lower() != built else []
    usual = {"ffn": "" if case.whole("moe_experts", 0) else "four times hidden", "precision": precision_of(case),
             "dp": str(replicas_of(case))}  # fmt: skip
    notes += [f"{name} is not stated and taken as {what}" for name, what in usual.items()
              if what and not case.stated(name)]  # fmt: skip
    if case.stated("attention") and attention_named(case) is None:
        taken = "one fused kernel" if fused_attention(case) else "unfused, products with a softmax between"
        notes.append(f"attention {case.text('attention')!r} is not known and taken as {taken}, its software's default")
    if not case.stated("attention") and HUGGING_FACE in software_of(case).name:
        kernel = "torch's fused attention, the default since transformers 4.36" if fused_attention(case) else "eager"
        notes.append(f"attention is not stated and taken as {kernel}")
    if attention_named(case) is False and case.degree("cp") > 1:
        notes.append("context parallelism passes keys and values around with fused attention, which is predicted")
    if not software_known(case):
        notes.append(f"software {case.text('software')!r} is not known and predicted as {software_of(case).name}")
    if is_replaced_by_zero1(case):
        notes.append(
            "zero3 in a pipeline is predicted as zero1: FSDP then keeps what it gathered until the step ends and "
            "scatters gradients once (torchtitan's default), so messages and memory are those of zero1"
        )
    stated, built_heads = case.whole("kv_heads", 0), kv_heads_of(case)
    if stated and built_heads != stated:
        notes.append(
            f"{stated} kv_heads are replicated to {built_heads}, one for each tensor-parallel rank: weights, gradients "
            "and optimizer state of the projections of keys and values grow by that"
        )
    return (*notes, *_notes_of_experts(case, device), *_left_out(case), *_missing_types(precision_of(case), device))


def _notes_of_experts(case: Case, device: Device) -> list[str]:
    dp, (cp, tp, ep) = replicas_of(case), (case.degree(axis) for axis in ("cp", "tp", "ep"))
    if not case.whole("moe_experts", 0):
        return []
    notes, split = [], expert_parts(dp * cp, tp, ep)
    if tp > 1:
        said = f"split over tp = {tp}, as Megatron's default (expert_tensor_parallel_size)" if split > 1 else (
            f"not split over tp = {tp}: ep = {ep} does not divide dp x cp, so that it spans tp"
        )  # fmt: skip
        notes.append(f"experts are {said}")
    if ep * split > nodes_of(case, device)[1]:
        notes.append(
            f"ep = {ep} spans nodes: all moe_topk copies of each token are taken to cross the network in the "
            "activations' dtype; routing that is limited to a few nodes, with one copy each, or dispatch in fp8 "
            "(DeepSeek-V3's own system) sends less"
        )
    return notes


def _left_out(case: Case) -> list[str]:
    """What the row's program does otherwise than predicted, and what a word was taken for."""
    found = []
    said = f"{case.text('software')}; {case.text('notes')}".lower()
    if case.word("recompute") == "selective" and "per-op" not in said and "whole layers" not in said:
        if is_per_op(case):
            found.append(
                "selective recomputation is taken as torchtitan's per-op policy, which keeps attention and every "
                "second product; notes that say 'whole layers' stand for every second layer"
            )
        elif fused_attention(case):
            found.append(
                "selective recomputation is taken as Megatron's, of attention's core alone: with a fused kernel that "
                "takes time and hardly saves memory"
            )
    vpp, pp = case.degree("vpp"), case.degree("pp")
    micro = case.whole("global_batch") // (replicas_of(case) * case.whole("micro_batch"))
    if vpp > 1 and micro % pp:
        found.append(
            f"{micro} micro-batches are no multiple of pp = {pp}: Megatron refuses that for interleaved stages; the "
            "last ones are predicted as a smaller round"
        )
    if vpp > 1 and all((case.whole("layers") + more) % (pp * vpp) for more in (0, 2)):
        found.append(
            f"{case.whole('layers')} layers do not divide by pp x vpp = {pp * vpp}: Megatron wants a layout for that; "
            "predicted with a stage's equal share of them, spread over its chunks"
        )
    if "offload" in said and not NO_OFFLOAD.search(said):
        found.append(
            "offload is not predicted: everything stays on the device; parplan simulate predicts plans with offload"
        )
    return found


def notes_of_pictures(case: Case, precision: str, device: Device) -> tuple[str, ...]:
    """The notes of a CNN's row that was predicted in this precision."""
    notes = []
    if (dtype := TYPES[precision]) not in device.peak_flops:
        notes.append(f"{device.name} has no {dtype}: convolutions and products reach {_taken(device, dtype)} at most")
    if not case.stated("precision"):
        notes.append(f"precision is not stated and taken as {precision}")
    if precision == "fp32" and rounded_families(device, precision):
        notes.append("convolutions run in tf32 as torch does it unasked; a row in full float32 took longer")
    return tuple(notes)


def _missing_types(precision: str, device: Device) -> list[str]:
    """What a transformer's products run in, or are priced as, where a device lacks their type."""
    dtype = TYPES[precision]
    if dtype in device.peak_flops:
        return []
    lacks = f"{device.name} has no {dtype.partition('_')[0]}: products"
    if precision == "fp8":
        return [f"{lacks} run in bfloat16", *_missing_types("bf16", device)]
    lender = section_for(device, "gemm", dtype) if precision != "tf32" else None
    if lender is None or lender.own:
        return [f"{lacks} run at {_taken(device, dtype)}"]
    of = f" of {lender.device}" if lender.device else ""
    kernels = f"{lender.dtype.partition('_')[0]} kernels{of}"
    return [f"{lacks} are priced as {kernels} that reach {_taken(device, dtype)} at most"]


def _taken(device: Device, dtype: str) -> str:
    """Whose rate `peak_of` takes; the number where it is no listed one."""
    rate = peak_of(device, dtype)
    names = [name for name in (*LIKELIEST, *device.peak_flops) if device.peak_flops.get(name) == rate]
    return f"{names[0].partition('_')[0]}'s rate" if names else f"{rate / 1e12:.3g} TFLOP/s"
