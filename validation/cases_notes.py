"""What is predicted of a transformer row in place of what it says, in words."""

from __future__ import annotations

from costmodels.device import Device
from costmodels.ops import peak_of
from costmodels.rounding import rounded_families
from validation.cases import Case
from validation.cases_transformer import family_of, is_replaced_by_zero1, kv_heads_of, precision_of, replicas_of

TYPES = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# Whose rate `peak_of` takes where a type is not listed, the likeliest first: several may be equally fast.
FALLBACKS = {"float8_e4m3fn": ("bfloat16", "float16", "float32")}
OTHERS = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def notes_of(case: Case, device: Device) -> tuple[str, ...]:
    """The notes of a row that was predicted on this device."""
    said, built = case.text("family") or case.text("model"), family_of(case)
    notes = [f"family {said} is predicted as {built}"] if said.lower() != built else []
    usual = {"ffn": "" if case.whole("moe_experts", 0) else "four times hidden", "precision": precision_of(case),
             "dp": str(replicas_of(case))}  # fmt: skip
    notes += [f"{name} is not stated and taken as {what}" for name, what in usual.items()
              if what and not case.stated(name)]  # fmt: skip
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
    return (*notes, *_missing_types(precision_of(case), device))


def notes_of_pictures(case: Case, precision: str, device: Device) -> tuple[str, ...]:
    """The notes of a CNN's row that was predicted in this precision."""
    notes = _missing_types(precision, device)
    if not case.stated("precision"):
        notes.append(f"precision is not stated and taken as {precision}")
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
    for name in names:
        if device.peak_flops.get(name) == rate:
            return name.partition("_")[0]
    narrow = next(name for name in ("float32", "bfloat16", *device.peak_flops) if name in device.peak_flops)
    return f"1/{device.peak_flops[narrow] / rate:.0f} of {narrow}"
