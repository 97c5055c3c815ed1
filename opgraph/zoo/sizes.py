"""The dimensions of each family of the zoo. Needs no torch, so that names list fast; `names` holds the numbers.

Every field can be overridden (`gpt2:layers=4,hidden=256`).
`seq` is the length that one step is run at, `positions` the length of a learned position table (so parameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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
    """Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head. `qkv_bias` is Qwen 2's. `window`:
    tokens that attention looks back (0: all); longer sequences, which would need it, are not built."""

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
    qkv_bias: bool = False
    window: int = 0
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


def check(sizes: Sizes, name: str) -> None:
    """Whether the numbers fit together; ValueError says which do not."""
    match sizes:
        case Gpt() | Bert() | Vit() if sizes.hidden % sizes.heads:
            raise ValueError(
                f"{name}: heads={sizes.heads} does not divide hidden={sizes.hidden}: give a number of heads that does"
            )
        case Gpt() | Bert() if sizes.seq > sizes.positions:
            raise ValueError(
                f"{name}: seq={sizes.seq} is longer than its {sizes.positions} positions: give positions={sizes.seq}"
            )
        case Vit() if sizes.image % sizes.patch:
            raise ValueError(f"{name}: image={sizes.image} is no multiple of patch={sizes.patch}: change one of them")
        case Llama() if sizes.heads % sizes.kv_heads:
            raise ValueError(
                f"{name}: kv_heads={sizes.kv_heads} does not divide heads={sizes.heads}: give kv_heads that do"
            )
        case Llama() if sizes.seq > sizes.window > 0:
            raise ValueError(
                f"{name}: seq={sizes.seq} is longer than its sliding window, which is not modelled: give "
                f"seq={sizes.window} or less, or window={sizes.seq} for attention to all tokens"
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
