"""Prices of attentions: which kernel an op runs, and whose constants the law of `costmodels.attention_law` takes.

Fitted by `validation.fit_kernels` to the bfloat16 tables of aiconfigurator-core 0.12 (prefill and encoder attention:
FlashAttention-2 on A100 and L40S, FlashAttention-3 on H100 and H200, TensorRT-LLM's kernels on Blackwell); errors in
`reports/kernels`. Backward passes and the other kernels are ASSUMPTIONS over the fitted law, named below and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from costmodels.attention_law import Array, Law, decode_law, flash_law, math_law
from costmodels.device import Device
from costmodels.families import base_name, family
from costmodels.ops import OpShape
from costmodels.price import Price
from costmodels.relatives import Found, find, section_for

Kernel = Literal["flash", "flash2", "efficient", "math", "decode"]
Call = tuple[int, ...]  # `attention_law.FIELDS`

# Where a machine's backward passes were measured, too, the section of that name has the law's constants for them, with
# rates over BACKWARD_RATE (`validation.fit_machine`).
BACKWARD = "_backward"
# FlashAttention-2 on Hopper and later, of the rate of the tables' kernel: 370 of 648 TFLOP/s at 16k and 309 of 467 at
# 512 (head dim 128, H100), 324 of 497 (head dim 64): FlashAttention-3 paper, in shared/facts/compute.md B3.
FLASH2_SHARE = 0.60
# Memory-efficient attention (CUTLASS), of FlashAttention-2's rate: FlashAttention-1, which works alike, reaches 25 to
# 40 % of an A100's peak where FlashAttention-2 reaches 50 to 73 % (B3).
EFFICIENT_SHARE = 0.55


@dataclass(frozen=True, slots=True, eq=False)
class Pricing:
    """All that prices attentions of one kernel, dtype and direction on a device. held: the share of the lender's rate
    that the device holds."""

    law: Law
    found: Found
    held: float


def attention_prices(device: Device, shapes: Sequence[OpShape]) -> list[Price | None]:
    """The prices of attentions, forward and backward; None where no device of this kind was measured."""
    prices: list[Price | None] = [None] * len(shapes)
    groups: dict[tuple[Kernel, str, bool], tuple[list[int], list[Call]]] = {}
    for i, shape in enumerate(shapes):
        read = _read(shape)
        if read is not None:
            kernel, backward, call = read
            members, calls = groups.setdefault((kernel, shape.dtype, backward), ([], []))
            members.append(i)
            calls.append(call)
    for (kernel, dtype, backward), (members, calls) in groups.items():
        pricing = _pricing_of(device, kernel, dtype, backward)
        if pricing is not None:
            for i, seconds in zip(members, pricing.law.seconds(np.array(calls, float)).tolist()):
                prices[i] = pricing.found.price(seconds / pricing.held)
    return prices


def attention_price(device: Device, shape: OpShape) -> Price | None:
    """The price of one attention."""
    return attention_prices(device, [shape])[0]


def _pricing_of(device: Device, kernel: Kernel, dtype: str, backward: bool) -> Pricing | None:
    """What prices attentions of a kernel on a device; kept in the device's cache."""
    key = ("attention law", kernel, dtype, backward)
    if key not in device.cache:
        found = find(device, "attention", dtype if dtype != "float32" else "bfloat16", "rates")
        device.cache[key] = None if found is None else _pricing(device, found, kernel, dtype, backward)
    kept: Pricing | None = device.cache[key]
    return kept


def _pricing(device: Device, found: Found, kernel: Kernel, dtype: str, backward: bool) -> Pricing:
    constants = found.constants
    if backward and found.whose == "own" and kernel == "flash":  # a machine's own table of backward passes
        constants = device.kernels["attention"].get(f"{dtype}{BACKWARD}", constants)
    return Pricing(law_of(constants, device, dtype, kernel), found, _held(device, found, dtype))


def _held(device: Device, found: Found, dtype: str) -> float:
    """The share of the lender's rate that a device holds under a lower power limit, as for products: both run on the
    tensor cores (`costmodels.gemm_lending.sustained`)."""
    if found.whose != "relative":
        return 1.0
    from costmodels.gemm_lending import sustained

    section = section_for(device, "gemm", dtype if dtype != "float32" else "bfloat16")
    return min(sustained(device, section, dtype), 1.0) if section is not None and section.device else 1.0


def law_of(constants: Mapping[str, Any], device: Device, dtype: str, kernel: Kernel) -> Law:
    """The law of one kernel of `kernel_of`."""
    if kernel == "math":
        return math_law(device, dtype)
    if kernel == "decode" and "decode_stream" in constants:
        return decode_law(constants, device, dtype)
    own = constants.get("kernel", "")
    share = FLASH2_SHARE if kernel in ("flash2", "efficient") and own != "FlashAttention-2" else 1.0
    return flash_law(constants, device, dtype, share * (EFFICIENT_SHARE if kernel == "efficient" else 1.0))


def kernel_of(shape: OpShape) -> Kernel:
    """Which kernel an op runs: "flash2" is FlashAttention-2 as torch ships it, "flash" the best that the device's table
    has (cuDNN's on newer devices), "efficient", "math", and "decode" for one query against many keys."""
    read = _read(shape)
    return _named(shape.name)[0] if read is None else read[0]


def calls_of(shapes: Sequence[OpShape]) -> Array:
    """The calls of ops whose shapes are those of an attention, a row each."""
    return np.array([read[2] for read in map(_read, shapes) if read is not None], float)


def _read(shape: OpShape) -> tuple[Kernel, bool, Call] | None:
    """An op's kernel, whether it goes backward, and its call; None where queries, keys and values are not of the form
    (batch, heads, tokens, width)."""
    kernel, backward, tokens_first = _named(shape.name)
    ins = shape.in_shapes[backward : backward + 3]
    if len(ins) < 3 or not len(ins[0]) == len(ins[1]) == len(ins[2]) == 4 or 0 in ins[0] + ins[1] + ins[2]:
        return None
    (batch, heads, queries, width), (_, kv_heads, keys, _), (_, _, _, value_width) = ins
    if tokens_first:
        heads, queries, kv_heads, keys = queries, heads, keys, kv_heads
    if queries <= 8 and keys >= 16 * queries and not backward and kernel in ("flash", "flash2"):
        kernel = "decode"
    return kernel, backward, (batch, heads, kv_heads, queries, keys, width, value_width, shape.causal, backward)


@lru_cache(maxsize=256)
def _named(name: str) -> tuple[Kernel, bool, bool]:
    """What an op's name says: its kernel unless it decodes, whether it goes backward, and whether its tensors have
    tokens before heads."""
    base = base_name(name)
    kernel: Kernel = "flash2" if "flash" in base and "for_cpu" not in base else "flash"
    if "_math" in base or base == "scaled_dot_product_attention":
        kernel = "math"
    elif "efficient" in base:
        kernel = "efficient"
    return kernel, family(name) == "attention_backward", base.startswith("_flash_attention")
