"""The dimensions of every zoo model; a name is a family and its numbers. Needs no torch, so that names list fast.

Every field can be overridden (`gpt2:layers=4,hidden=256`). Sources of the numbers stand beside the tables.
`seq` is the length that one step is run at, `positions` the length of a learned position table (so parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Perceptron: a linear layer in, `layers` residual pairs (hidden to ffn to hidden), a linear layer out."""

    family: ClassVar[str] = "mlp"
    layers: int = 4
    hidden: int = 1024
    ffn: int = 4096
    features: int = 784
    classes: int = 10
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LeNet:
    """LeNet-5 (LeCun et al. 1998) as it is usually rebuilt: full connections in C3, softmax output."""

    family: ClassVar[str] = "lenet"
    classes: int = 10
    batch: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AlexNet:
    """AlexNet in one tower (Krizhevsky 2014, "One weird trick"); channels are width x (1, 3, 6, 4, 4)."""

    family: ClassVar[str] = "alexnet"
    width: int = 64
    hidden: int = 4096
    classes: int = 1000
    image: int = 224
    dropout: float = 0.5
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Vgg:
    """VGG without batch norm (Simonyan and Zisserman 2015, table 1); channels are width x (1, 2, 4, 8, 8)."""

    family: ClassVar[str] = "vgg"
    depth: int = 16
    width: int = 64
    hidden: int = 4096
    classes: int = 1000
    image: int = 224
    dropout: float = 0.5
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNet:
    """ResNet of bottlenecks (He et al. 2016), stride in the 3x3 (v1.5). `norm` is batch or group.

    Batch norm makes a step on parts of a batch differ from a step on the whole; group norm does not.
    """

    family: ClassVar[str] = "resnet"
    depth: int = 50
    width: int = 64
    classes: int = 1000
    image: int = 224
    norm: str = "batch"
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GoogLeNet:
    """GoogLeNet (Szegedy et al. 2015) with batch norm and without auxiliary heads."""

    family: ClassVar[str] = "googlenet"
    classes: int = 1000
    image: int = 224
    dropout: float = 0.0
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Lstm:
    """LSTM language model (Zaremba et al. 2014)."""

    family: ClassVar[str] = "lstm"
    layers: int = 2
    hidden: int
    vocab: int = 10000
    seq: int = 35
    tied: bool = False
    dropout: float = 0.0
    batch: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt:
    """GPT-2 and GPT-3: learned positions, pre-norm blocks, tied head."""

    family: ClassVar[str] = "gpt"
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int = 50257
    positions: int = 1024
    seq: int = 1024
    eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0
    batch: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head."""

    family: ClassVar[str] = "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    ffn: int
    vocab: int
    seq: int
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    batch: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixtral(Llama):
    """Llama with a mixture of experts in place of each feed-forward layer.

    Each expert takes at most ceil(capacity x seq x top_k / experts) tokens of a sequence.
    """

    family: ClassVar[str] = "mixtral"
    experts: int = 8
    top_k: int = 2
    capacity: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bert:
    """BERT with its masked-language-model head: post-norm blocks, tied decoder."""

    family: ClassVar[str] = "bert"
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int = 30522
    positions: int = 512
    seq: int = 512
    eps: float = 1e-12
    tied: bool = True
    dropout: float = 0.0
    batch: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Vit:
    """Vision transformer (Dosovitskiy et al. 2021): class token, learned positions, pre-norm blocks."""

    family: ClassVar[str] = "vit"
    layers: int
    hidden: int
    heads: int
    ffn: int
    patch: int = 16
    image: int = 224
    classes: int = 1000
    eps: float = 1e-6
    dropout: float = 0.0
    batch: int = 32


Sizes = Mlp | LeNet | AlexNet | Vgg | ResNet | GoogLeNet | Lstm | Gpt | Llama | Mixtral | Bert | Vit


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


def override_names(sizes: Sizes) -> list[str]:
    return [f.name for f in fields(sizes)]


def with_overrides(sizes: Sizes, changes: Mapping[str, str], name: str) -> Sizes:
    """`sizes` with the fields in `changes` (texts) replaced; widths that follow from others follow.

    ffn keeps its ratio to hidden, kv_heads its ratio to heads, head_dim is hidden / heads - unless given too.
    """
    known = override_names(sizes)
    values: dict[str, Any] = {}
    for key, text in changes.items():
        if key not in known:
            raise ValueError(f"{name} has no dimension {key!r}: give some of {', '.join(known)}")
        values[key] = _value(key, text, getattr(sizes, key))
    if "hidden" in values and "ffn" in known and "ffn" not in values:
        values["ffn"] = max(1, round(_at(sizes, "ffn") * values["hidden"] / _at(sizes, "hidden")))
    if "heads" in values and "kv_heads" in known and "kv_heads" not in values:
        values["kv_heads"] = max(1, values["heads"] * _at(sizes, "kv_heads") // _at(sizes, "heads"))
    if "head_dim" in known and "head_dim" not in values and ("heads" in values or "hidden" in values):
        hidden, heads = (values.get(k, _at(sizes, k)) for k in ("hidden", "heads"))
        if hidden % heads:
            raise ValueError(f"{name}: hidden={hidden} is no multiple of heads={heads}: give heads or head_dim too")
        values["head_dim"] = hidden // heads
    changed = replace(sizes, **values)
    check(changed, name)
    return changed


def check(sizes: Sizes, name: str) -> None:
    """Whether the numbers fit together; ValueError says which do not."""
    match sizes:
        case Gpt() | Bert() | Vit() if sizes.hidden % sizes.heads:
            raise ValueError(f"{name}: hidden={sizes.hidden} is no multiple of heads={sizes.heads}: give heads too")
        case Gpt() | Bert() if sizes.seq > sizes.positions:
            raise ValueError(
                f"{name}: seq={sizes.seq} is longer than its {sizes.positions} positions: give positions={sizes.seq}"
            )
        case Vit() if sizes.image % sizes.patch:
            raise ValueError(f"{name}: image={sizes.image} is no multiple of patch={sizes.patch}: change one of them")
        case Llama() if sizes.heads % sizes.kv_heads:
            raise ValueError(
                f"{name}: heads={sizes.heads} is no multiple of kv_heads={sizes.kv_heads}: give kv_heads too"
            )
        case Llama() if sizes.head_dim % 2:
            raise ValueError(f"{name}: head_dim={sizes.head_dim} is odd: rotary positions need an even one")
        case Vgg() if sizes.depth not in (11, 13, 16, 19):
            raise ValueError(f"{name}: there is no VGG of depth {sizes.depth}: give 11, 13, 16 or 19")
        case ResNet() if sizes.depth not in (50, 101, 152):
            raise ValueError(f"{name}: there is no bottleneck ResNet of depth {sizes.depth}: give 50, 101 or 152")
        case ResNet() if sizes.norm not in ("batch", "group"):
            raise ValueError(f"{name}: norm={sizes.norm} is neither of batch and group")
    if isinstance(sizes, Mixtral) and sizes.top_k > sizes.experts:
        raise ValueError(f"{name}: top_k={sizes.top_k} exceeds experts={sizes.experts}: give a smaller top_k")
    smallest = {"alexnet": 63, "vgg": 32, "resnet": 32, "googlenet": 32}.get(sizes.family, 0)
    if smallest and getattr(sizes, "image", smallest) < smallest:
        raise ValueError(f"{name}: its poolings leave nothing of a smaller image: give image={smallest} or more")


def _at(sizes: Sizes, field: str) -> int:
    return int(getattr(sizes, field))


def _value(key: str, text: str, old: Any) -> Any:
    """The value that `text` says, of the type of the `old` one."""
    if isinstance(old, bool):
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in known:
            raise ValueError(f"{key}={text} is neither true nor false: write {key}=1 or {key}=0")
        return known[text.lower()]
    if isinstance(old, str):
        return text
    try:
        number = type(old)(text)
    except ValueError:
        kind = "a whole number" if isinstance(old, int) else "a number"
        raise ValueError(f"{key}={text} is not {kind}") from None
    if key == "dropout":
        if not 0 <= number < 1:
            raise ValueError(f"dropout={text} is not a probability below 1: give a number from 0 up to 1")
    elif not 0 < number < float("inf"):
        raise ValueError(f"{key}={text} is not positive: give a number above 0")
    return number
