"""Small training steps whose ops calibration measures. They are never used for validation.

Every entry is a function without arguments that returns (module, inputs, targets, loss). Together they spread over
widths 64-1024, 64-4096 tokens, vocabularies 1k-100k, 3-1024 channels on maps of 2-160, matrices with few rows, tokens
that are routed to experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from validation.calibrate_nets import (
    Case,
    Patches,
    bottleneck_net,
    branch_net,
    depthwise_net,
    digits_net,
    large_kernels,
    perceptron,
    pictures,
    plain_net,
    recurrent,
    residual_net,
    routed,
    streams,
    tied,
    transformer,
    windows,
)


@dataclass(frozen=True, slots=True)
class Source:
    """One training step to measure; `bf16` runs its forward under autocast. `large`: it holds more than 200 MB. The
    step has `micro` forward and backward passes before its update: from the second one on, what is small lies in the
    caches."""

    name: str
    make: Callable[[], Case]
    bf16: bool = False
    large: bool = False
    micro: int = 1


def _all() -> tuple[Source, ...]:
    vit = lambda width, heads, batch, image, patch: pictures(Patches(width, heads, image, patch), batch, 3, image)  # noqa: E731
    steps: dict[str, Callable[[], Case]] = {
        "t160": partial(transformer, 160, 5, 1, 256, 8000),
        "residual24": partial(residual_net, 4, 112, 24),
        "mlp-skinny": partial(perceptron, 8, 784, 1024, 1536, 640, 10),
        "t448": partial(transformer, 448, 7, 4, 128, 3000, packed=False),
        "large-kernels": partial(large_kernels, 8, 160, 48, 1000),
        "lstm192": partial(recurrent, 8, 32, 5000, 128, 192),
        "llama192": partial(transformer, 192, 6, 2, 128, 2000, llama=True, inner=512, kv_heads=2),
        "bottleneck32": partial(bottleneck_net, 4, 72, 32),
        "t320": partial(transformer, 320, 5, 2, 128, 16000, packed=False),
        "digits": partial(digits_net, 64),
        "digits-color": partial(digits_net, 32, 10, 32, 3, 32),
        "digits-thin": partial(digits_net, 96, 4, 16, 1, 24),
        "t1024": partial(transformer, 1024, 8, 2, 48, 1000),
        "plain24": partial(plain_net, 2, 128, 24),
        "vit288": partial(vit, 288, 6, 4, 96, 8),
        "t128": partial(transformer, 128, 4, 16, 128, 1000, dropout=0.1),
        "mlp-wide": partial(perceptron, 128, 512, 3072, 768, 256, activation=nn.GELU),
        "branches": partial(branch_net, 4, 80),
        "t96": partial(transformer, 96, 3, 4, 32, 2000, causal=False, layers=2, kinds=2),
        "llama448": partial(transformer, 448, 7, 1, 192, 6000, llama=True, inner=1184, inside=True),
        "t512-vocab": partial(transformer, 512, 8, 1, 96, 24000, packed=False),
        "residual48": partial(residual_net, 2, 96, 48),
        "lstm384": partial(recurrent, 20, 20, 2000, 256, 384),
        "lstm96": partial(recurrent, 4, 24, 1000, 64, 96, 3),
        "t256": partial(transformer, 256, 4, 2, 640, 4000),
        "depthwise": partial(depthwise_net, 4, 112),
        "t64": partial(transformer, 64, 2, 2, 64, 1000, layers=2),
        "streams-50": partial(streams, 2048, 2048),
        "streams-16": partial(streams, 640, 2048),
        "streams-28": partial(streams, 3072, 768),
        "routed160": partial(routed, 160, 400, 6, 2, 192),
        "routed320": partial(routed, 320, 576, 4, 1, 320, bias=True),
        "routed96": partial(routed, 96, 224, 8, 4, 160),
        "bottleneck128-tiny": partial(bottleneck_net, 3, 24, 128),
        "mlp-one": partial(perceptron, 2, 2048, 1024, 512, activation=nn.Tanh),
        "bottleneck56": partial(bottleneck_net, 8, 40, 56),
        "bottleneck96": partial(bottleneck_net, 4, 24, 96),
        "plain64": partial(plain_net, 1, 64, 64),
        "vit192": partial(vit, 192, 3, 2, 144, 12),
        "t768": partial(transformer, 768, 12, 1, 160, 1500, packed=False, causal=False, kinds=3),
        "large-kernels24": partial(large_kernels, 8, 120, 24, 640),
        "llama128": partial(transformer, 128, 4, 8, 64, 12000, llama=True, inner=336, inside=True),
        "tied256": partial(tied, 256, 1, 48, 100000),  # a table larger than any cache: 102 MB
        "tied96": partial(tied, 96, 4, 24, 60000),
        "mlp-heavy": partial(perceptron, 3, 1152, 7168, 2304, 200),  # weights of 33 and 66 MB pass by short ops
        "windows96": partial(windows, 96, 3, 16, 49),
        "windows80": partial(windows, 80, 5, 40, 12),
        "windows256": partial(windows, 256, 4, 3, 144),
        "windows144": partial(windows, 144, 6, 6, 30),
        "plain96": partial(plain_net, 1, 40, 96),
        "mlp-tall": partial(perceptron, 512, 256, 640, 640, 64),
    }
    return (
        *(Source(n, m, large=n in ("tied256", "mlp-heavy", "plain96")) for n, m in steps.items()),
        *(Source(n, m, True) for n, m in _half().items()),
        *(Source(n, m, micro=SMALL_MICRO) for n, m in _small().items()),
    )


def _half() -> dict[str, Callable[[], Case]]:
    return {
        "t192-bf16": partial(transformer, 192, 6, 4, 96, 3000),
        "t512-bf16": partial(transformer, 512, 8, 2, 128, 6000, packed=False),
        "residual32-bf16": partial(residual_net, 4, 96, 32),
        "t128-bf16": partial(transformer, 128, 4, 4, 160, 1000),
        "large-kernels24-bf16": partial(large_kernels, 4, 136, 32, 800),
    }


def _small() -> dict[str, Callable[[], Case]]:
    """Steps of a few milliseconds whose weights and activations stay in the caches of a core, as those of micro-batches
    of one or two short samples do: there an op of 3 us was priced at 20, as all others had met it cold."""
    return {
        "mlp-small": partial(perceptron, 3, 80, 160, 112, 20),
        "mlp-small-gelu": partial(perceptron, 12, 64, 192, 64, 12, activation=nn.GELU),
        "mlp-small-tanh": partial(perceptron, 1, 144, 224, 144, 10, activation=nn.Tanh),
        "t48": partial(transformer, 48, 2, 1, 20, 300, layers=2),
        "t80": partial(transformer, 80, 4, 2, 12, 400, packed=False, layers=2),
        "t112": partial(transformer, 112, 7, 1, 40, 200, causal=False, layers=1, kinds=2),
        "llama56": partial(transformer, 56, 2, 1, 24, 250, llama=True, inner=144, kv_heads=1, layers=2),
        "digits-small": partial(digits_net, 2, 4, 8, 1, 16),
        "residual6": partial(residual_net, 2, 20, 6),
        "plain5": partial(plain_net, 1, 24, 5),
        "lstm40": partial(recurrent, 2, 6, 200, 24, 40, 1),
        "windows24": partial(windows, 24, 2, 3, 9),
        "routed40": partial(routed, 40, 72, 4, 1, 18),
        "tied40": partial(tied, 40, 1, 10, 500),
    }


SMALL_MICRO = 3
SOURCES = _all()
