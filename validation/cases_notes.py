"""What is predicted of a transformer row in place of what it says, in words."""

from __future__ import annotations

from costmodels.device import Device
from costmodels.ops import peak_of
from costmodels.rounding import rounded_families
from planner.plan import expert_parts
from validation.cases import Case
from validation.cases_transformer import family_of, is_replaced_by_zero1, kv_heads_of, precision_of

TYPES = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# Whose rate `peak_of` takes where a type is not listed, the likeliest first: several may be equally fast.
FALLBACKS = {"float8_e4m3fn": ("bfloat16", "float16", "float32")}
OTHERS = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def notes_of(case: Case, device: Device) -> tuple[str, ...]:
    """The notes of a row that was predicted on this device."""
    said, built = case.text("family"), family_of(case)
    notes = [f"family {said} is predicted as {built}"] if said.lower() != built else []
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
    return (*notes, *_notes_of_experts(case), *_missing_types(precision_of(case), device))


def _notes_of_experts(case: Case) -> list[str]:
    dp, cp, tp, ep = (case.degree(axis) for axis in ("dp", "cp", "tp", "ep"))
    if not case.whole("moe_experts", 0):
        return []
    notes, split = [], expert_parts(dp * cp, tp, ep)
    if tp > 1:
        said = f"split over tp = {tp}, as Megatron's default (expert_tensor_parallel_size)" if split > 1 else (
            f"not split over tp = {tp}: ep = {ep} does not divide dp x cp, so that it spans tp"
        )  # fmt: skip
        notes.append(f"experts are {said}")
    if ep * split > (case.whole("gpus_per_node", 8) or 8):
        notes.append(
            f"ep = {ep} spans nodes: all moe_topk copies of each token are taken to cross the network in the "
            "activations' dtype; routing that is limited to a few nodes, with one copy each, or dispatch in fp8 "
            "(DeepSeek-V3's own system) sends less"
        )
    return notes


def notes_of_pictures(precision: str, device: Device) -> tuple[str, ...]:
    """The notes of a CNN's row in this precision."""
    notes = _missing_types(precision, device)
    if precision == "fp32" and rounded_families(device, precision):
        notes.append("convolutions run in tf32 as torch does it unasked; a row in full float32 took longer")
    return tuple(notes)


def _missing_types(precision: str, device: Device) -> list[str]:
    wanted = [(TYPES[precision], "products")]
    if precision == "fp8" and "bfloat16" not in device.peak_flops:  # only products with weights are in float8
        wanted = [("float8_e4m3fn", "products with weights"), ("bfloat16", "other products")]
    return [
        f"{device.name} has no {dtype.partition('_')[0]}: {what} run at {_taken(device, dtype)}'s rate"
        for dtype, what in wanted
        if dtype not in device.peak_flops
    ]


def _taken(device: Device, dtype: str) -> str:
    rate = peak_of(device, dtype)
    names = [*FALLBACKS.get(dtype, OTHERS), *device.peak_flops]
    name: str = next(name for name in names if device.peak_flops.get(name) == rate)
    return name.partition("_")[0]
