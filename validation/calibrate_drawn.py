"""Further calibration models for those who give calibration more time: drawn at random, the same ones every time.

Families, widths, batches and lengths are spread evenly over the logarithms of what a core does in a tenth of a second
(`drawn`) or in a few milliseconds (`drawn_small`); none is chosen for a model that is validated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from torch import nn

from validation.calibrate_models import SMALL_MICRO, Source
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
    tied,
    transformer,
    windows,
)

Draw = random.Random
TABLE = 12_000_000  # most elements of a table of tokens: larger ones leave no time for other ops
BLOCK, HEAD = 120_000_000, 1_500_000_000  # most terms of a product with a square matrix, and with the table of tokens
HALF_OF = 12  # one model in so many runs its forward pass in bfloat16


def drawn(number: int) -> Source:
    """The model with this number, from 0 on."""
    draw = Draw(number)
    family, make = draw.choice(FAMILIES)
    half = family in _HALF and draw.randrange(HALF_OF) == 0
    return Source(f"drawn{number}-{family}", make(draw), bf16=half)


def drawn_small(number: int) -> Source:
    """The model with this number, from 0 on, whose steps leave the caches of a core full."""
    draw = Draw(f"small {number}")
    family, make = draw.choice(SMALL_FAMILIES)
    return Source(f"small{number}-{family}", make(draw), micro=SMALL_MICRO)


def _between(draw: Draw, low: float, high: float) -> int:
    """Evenly over the logarithm."""
    times: float = (high / low) ** draw.random()
    return round(low * times)


def _tokens(draw: Draw) -> tuple[int, int, int, int, int]:
    """Width, heads, batch, length and vocabulary of a transformer."""
    size = draw.choice((32, 32, 64, 64, 64, 96, 128))
    heads = min(draw.choice((2, 3, 4, 5, 6, 8, 10, 12)), 1024 // size)
    width = heads * size
    tokens = min(_between(draw, 64, 1500), BLOCK // width**2)
    length = max(16, min(tokens, _between(draw, 32, 512)))
    vocabulary = min(_between(draw, 600, 40_000), TABLE // width, HEAD // (width * tokens))
    return width, heads, max(1, tokens // length), length, vocabulary


def _gpt(draw: Draw) -> Callable[[], Case]:
    dropout, packed = draw.choice((0.0, 0.0, 0.1)), draw.random() < 0.5
    return partial(transformer, *_tokens(draw), dropout=dropout, packed=packed, layers=draw.choice((1, 2)))


def _bert(draw: Draw) -> Callable[[], Case]:
    layers, kinds = draw.choice((1, 2)), draw.choice((0, 2, 4))
    return partial(transformer, *_tokens(draw), causal=False, packed=False, layers=layers, kinds=kinds)


def _llama(draw: Draw) -> Callable[[], Case]:
    width, heads, *rest = _tokens(draw)
    inner = int(width * draw.choice((2.0, 2.5, 2.667, 3.5, 4.0)))
    kv_heads = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    layers, inside = draw.choice((1, 2)), draw.random() < 0.5
    options = {"inner": inner, "kv_heads": kv_heads, "layers": layers, "inside": inside}
    return partial(transformer, width, heads, *rest, llama=True, **options)


def _vit(draw: Draw) -> Callable[[], Case]:
    patch, side, heads = draw.choice((8, 12, 14, 16)), draw.randint(5, 14), draw.choice((2, 3, 4, 6, 8, 12))
    batch = draw.choice((1, 2, 3, 4, 6))
    return lambda: pictures(Patches(64 * heads, heads, side * patch, patch), batch, 3, side * patch)


def _pictures(
    draw: Draw, net: Callable[..., Case], widths: tuple[int, ...], sides: tuple[int, int], work: float
) -> Callable[[], Case]:
    """A network of convolutions: pictures of any side, as many as make about `work` pixels times channels."""
    width = draw.choice(widths)
    side = _between(draw, *sides) // 8 * 8
    batch = max(1, min(16, int(draw.choice((0.5, 1, 2)) * work / (side * side * width))))
    return partial(net, batch, side, width)


def _branches(draw: Draw) -> Callable[[], Case]:
    return partial(branch_net, draw.choice((1, 2, 3, 6, 8)), 16 * draw.randint(2, 8))


def _depthwise(draw: Draw) -> Callable[[], Case]:
    return partial(depthwise_net, draw.choice((1, 2, 4, 8)), 16 * draw.randint(3, 12))


def _digits(draw: Draw) -> Callable[[], Case]:
    first, second = draw.choice((4, 6, 8, 16)), draw.choice((12, 16, 20, 32))
    return partial(digits_net, _between(draw, 16, 128), first, second, draw.choice((1, 3)), draw.choice((28, 32)))


def _mlp(draw: Draw) -> Callable[[], Case]:
    widths = [_between(draw, 100, 4096) for _ in range(draw.choice((3, 4)))]
    activation = draw.choice((nn.ReLU, nn.ReLU, nn.GELU, nn.Tanh))
    return partial(perceptron, _between(draw, 2, 400), *widths, draw.choice((10, 100, 1000)), activation=activation)


def _lstm(draw: Draw) -> Callable[[], Case]:
    sizes = (_between(draw, 2, 24), _between(draw, 12, 60), _between(draw, 1000, 14_000))
    return partial(recurrent, *sizes, _between(draw, 64, 512), _between(draw, 80, 640), draw.choice((1, 2, 3)))


def _experts(draw: Draw) -> Callable[[], Case]:
    width = _between(draw, 64, 640)
    inner, experts, batch = _between(draw, width // 2, width * 3.5), draw.choice((4, 6, 8)), draw.choice((1, 2, 4))
    return partial(routed, width, inner, experts, batch, _between(draw, 64, 320), bias=draw.random() < 0.4)


def _kernels(draw: Draw) -> Callable[[], Case]:
    batch, side = draw.choice((2, 4, 8)), draw.choice((112, 120, 136, 160, 192))
    return partial(large_kernels, batch, side, draw.choice((16, 24, 32, 48)), _between(draw, 300, 1500))


def _tied(draw: Draw) -> Callable[[], Case]:
    width, batch, length = _between(draw, 48, 400), draw.choice((1, 2, 4)), _between(draw, 16, 96)
    return partial(tied, width, batch, length, min(_between(draw, 2000, 90_000), 2 * TABLE // width))


def _bottlenecks(draw: Draw) -> Callable[[], Case]:
    return _pictures(draw, bottleneck_net, (16, 24, 32, 40, 48, 64, 80, 96, 128), (24, 160), 1.1e6)


def _residuals(draw: Draw) -> Callable[[], Case]:
    return _pictures(draw, residual_net, (16, 24, 32, 48, 64), (32, 200), 2.9e6)


def _plain(draw: Draw) -> Callable[[], Case]:
    return _pictures(draw, plain_net, (16, 24, 32, 48, 64), (32, 128), 1.3e6)


FAMILIES: tuple[tuple[str, Callable[[Draw], Callable[[], Case]]], ...] = (
    ("gpt", _gpt), ("gpt", _gpt), ("bert", _bert), ("llama", _llama), ("llama", _llama), ("vit", _vit),
    ("bottleneck", _bottlenecks), ("bottleneck", _bottlenecks), ("residual", _residuals), ("plain", _plain),
    ("branches", _branches), ("depthwise", _depthwise), ("digits", _digits), ("mlp", _mlp), ("mlp", _mlp),
    ("lstm", _lstm), ("lstm", _lstm), ("experts", _experts), ("experts", _experts), ("kernels", _kernels),
    ("tied", _tied),
)  # fmt: skip
_HALF = ("gpt", "bert", "llama", "vit", "bottleneck", "residual", "plain", "kernels", "mlp")


def _few_tokens(draw: Draw) -> tuple[int, int, int, int, int]:
    """Width, heads, batch, length and vocabulary of a small transformer."""
    heads = draw.choice((1, 2, 3, 4, 6, 8))
    width = heads * draw.choice([size for size in (8, 16, 24, 32, 48, 64) if heads * size <= 192])
    return width, heads, draw.choice((1, 1, 2, 3, 4)), _between(draw, 4, 48), _between(draw, 20, 1500)


def _small_gpt(draw: Draw) -> Callable[[], Case]:
    return partial(transformer, *_few_tokens(draw), packed=draw.random() < 0.5, layers=draw.choice((1, 2)))


def _small_bert(draw: Draw) -> Callable[[], Case]:
    options = {"layers": draw.choice((1, 2)), "kinds": draw.choice((0, 2))}
    return partial(transformer, *_few_tokens(draw), causal=False, packed=False, **options)


def _small_llama(draw: Draw) -> Callable[[], Case]:
    width, heads, *rest = _few_tokens(draw)
    options = {"inner": int(width * draw.choice((2.0, 2.667, 3.5))), "inside": draw.random() < 0.5}
    return partial(transformer, width, heads, *rest, llama=True, layers=draw.choice((1, 2)), **options)


def _small_mlp(draw: Draw) -> Callable[[], Case]:
    widths = [_between(draw, 8, 320) for _ in range(draw.choice((3, 4, 5)))]
    activation = draw.choice((nn.ReLU, nn.GELU, nn.Tanh))
    return partial(perceptron, _between(draw, 1, 32), *widths, draw.choice((2, 10, 40)), activation=activation)


def _small_pictures(draw: Draw) -> Callable[[], Case]:
    net = draw.choice((residual_net, plain_net, bottleneck_net))
    return partial(net, draw.choice((2, 2, 3, 4)), 8 * draw.randint(2, 5), draw.choice((4, 6, 8, 12)))


def _small_digits(draw: Draw) -> Callable[[], Case]:
    first, second, inputs = draw.choice((3, 4, 6, 8)), draw.choice((6, 8, 12, 16)), draw.choice((1, 3))
    return partial(digits_net, _between(draw, 1, 8), first, second, inputs, draw.choice((16, 20, 24, 28)))


def _small_lstm(draw: Draw) -> Callable[[], Case]:
    sizes = (draw.choice((1, 2, 4)), _between(draw, 3, 16), _between(draw, 30, 800))
    return partial(recurrent, *sizes, _between(draw, 12, 96), _between(draw, 16, 96), draw.choice((1, 2)))


def _small_windows(draw: Draw) -> Callable[[], Case]:
    heads = draw.choice((1, 2, 3, 4))
    return partial(windows, heads * draw.choice((8, 16, 24)), heads, _between(draw, 1, 8), _between(draw, 4, 36))


def _small_experts(draw: Draw) -> Callable[[], Case]:
    width = _between(draw, 16, 96)
    inner, experts = _between(draw, width // 2, width * 3), draw.choice((2, 4, 6))
    return partial(routed, width, inner, experts, draw.choice((1, 2)), _between(draw, 6, 40), bias=draw.random() < 0.4)


SMALL_FAMILIES: tuple[tuple[str, Callable[[Draw], Callable[[], Case]]], ...] = (
    ("gpt", _small_gpt), ("gpt", _small_gpt), ("bert", _small_bert), ("llama", _small_llama), ("mlp", _small_mlp),
    ("mlp", _small_mlp), ("pictures", _small_pictures), ("pictures", _small_pictures), ("digits", _small_digits),
    ("lstm", _small_lstm), ("windows", _small_windows), ("experts", _small_experts),
)  # fmt: skip
