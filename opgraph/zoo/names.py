"""The models of the zoo: a name is a family and its published numbers, whose sources stand beside them."""

from __future__ import annotations

from typing import Any

from opgraph.zoo.sizes import (
    AlexNet,
    Bert,
    GoogLeNet,
    Gpt,
    LeNet,
    Llama,
    Lstm,
    Mixtral,
    Mlp,
    ResNet,
    Sizes,
    Vgg,
    Vit,
)


def _gpt(layers: int, hidden: int, heads: int, context: int = 1024) -> Gpt:
    return Gpt(layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, positions=context, seq=context)


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, generation: int, **more: Any) -> Llama:
    vocab, seq, theta = {2: (32000, 4096, 1e4), 3: (128256, 8192, 5e5)}[generation]
    return Llama(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab, seq=seq,
                 rope_theta=theta, **more)  # fmt: skip


def _mixtral(layers: int, hidden: int, heads: int, ffn: int) -> Mixtral:
    return Mixtral(layers=layers, hidden=hidden, heads=heads, kv_heads=8, ffn=ffn, vocab=32000, seq=4096,
                   rope_theta=1e6)  # fmt: skip


ZOO: dict[str, Sizes] = {
    "mlp": Mlp(),
    "lenet5": LeNet(),
    "alexnet": AlexNet(),
    **{f"vgg{depth}": Vgg(depth=depth) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": ResNet(depth=depth) for depth in (50, 101, 152)},
    "googlenet": GoogLeNet(),
    # Zaremba et al. 2014, section 4.1: 650 and 1500 units, 35 steps, Penn treebank's 10 k words.
    "lstm-medium": Lstm(hidden=650),
    "lstm-large": Lstm(hidden=1500),
    # Radford et al. 2019, table 2.
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    # Brown et al. 2020, table 2.1, all layers dense. Two rows there contradict d_model = heads x d_head:
    # 1.3b (24 x 128 for 2048) has 16 heads here, 13b (d_model 5140) has 40 x 128 = 5120.
    "gpt3-125m": _gpt(12, 768, 12, 2048),
    "gpt3-350m": _gpt(24, 1024, 16, 2048),
    "gpt3-760m": _gpt(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    # Touvron et al. 2023 and the published configurations; Dubey et al. 2024, table 3.
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 2),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 2),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 2),
    "llama3-1b": _llama(16, 2048, 32, 8, 8192, 3, head_dim=64, tied=True),
    "llama3-3b": _llama(28, 3072, 24, 8, 8192, 3, tied=True),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 3),
    "llama3-405b": _llama(126, 16384, 128, 8, 53248, 3),
    # Jiang et al. 2024, table 1; the 8x22b's published configuration.
    "mixtral-8x7b": _mixtral(32, 4096, 32, 14336),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 16384),
    # Devlin et al. 2019, section 3.
    "bert-base": Bert(layers=12, hidden=768, heads=12, ffn=3072),
    "bert-large": Bert(layers=24, hidden=1024, heads=16, ffn=4096),
    # Dosovitskiy et al. 2021, table 1.
    "vit-b16": Vit(layers=12, hidden=768, heads=12, ffn=3072),
    "vit-l16": Vit(layers=24, hidden=1024, heads=16, ffn=4096),
}
