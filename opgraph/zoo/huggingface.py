"""Sizes from a Hugging Face config.json of the model types in `READERS`; needs neither transformers nor torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opgraph.zoo.sizes import Bert, Gpt, Llama, Mixtral, Sizes, Vit, check


def read_config(path: Path) -> Sizes:
    """The sizes in a Hugging Face config.json. ValueError for a model type, or a field, that the zoo cannot build."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: give the path of a config.json") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}): give a Hugging Face config.json") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} has no model_type: give a Hugging Face config.json")
    reader = READERS.get(config["model_type"]) if isinstance(config["model_type"], str) else None
    if reader is None:
        known = ", ".join(READERS)
        raise ValueError(f"{path} is of model_type {config['model_type']!r}: configurations of {known} can be read")
    sizes = reader(config, path)
    check(sizes, str(path))
    return sizes


def _gpt2(config: dict[str, Any], path: Path) -> Gpt:
    _activation(config, path, "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    hidden, positions = _int(config, "n_embd", path), _int(config, "n_positions", path, config.get("n_ctx"))
    ffn = _int(config, "n_inner", path, 4 * hidden)
    return Gpt(layers=_int(config, "n_layer", path), hidden=hidden, heads=_int(config, "n_head", path), ffn=ffn,
               vocab=_int(config, "vocab_size", path), positions=positions, seq=positions,
               eps=float(config.get("layer_norm_epsilon", 1e-5)),
               tied=bool(config.get("tie_word_embeddings", True)))  # fmt: skip


def _llama(config: dict[str, Any], path: Path) -> Llama:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{path} has {key}=true: only Llama models without biases can be built")
    return Llama(**_decoder(config, path))


def _mistral(config: dict[str, Any], path: Path) -> Llama:
    return Llama(**_windowed(config, path, config.get("sliding_window")))


def _qwen2(config: dict[str, Any], path: Path) -> Llama:
    """Llama with biases of q, k and v; its window is off unless `use_sliding_window`."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return Llama(**_windowed(config, path, window), qkv_bias=True)


def _mixtral(config: dict[str, Any], path: Path) -> Mixtral:
    return Mixtral(**_windowed(config, path, config.get("sliding_window")),
                   experts=_int(config, "num_local_experts", path, 8),
                   top_k=_int(config, "num_experts_per_tok", path, 2))  # fmt: skip


def _windowed(config: dict[str, Any], path: Path, window: int | None) -> dict[str, Any]:
    """The sizes of a decoder whose default sequence is within its sliding window."""
    sizes = _decoder(config, path)
    if window is None:
        return sizes
    size = _int({"sliding_window": window}, "sliding_window", path)
    return {**sizes, "window": size, "seq": min(sizes["seq"], size)}


def _decoder(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What Llama and its relatives share."""
    _activation(config, path, "hidden_act", "silu")
    hidden, heads = _int(config, "hidden_size", path), _int(config, "num_attention_heads", path)
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}: give head_dim")
    # transformers 5 writes the base of the rotary angles into rope_parameters.
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return {
        "layers": _int(config, "num_hidden_layers", path), "hidden": hidden, "heads": heads,
        "kv_heads": _int(config, "num_key_value_heads", path, heads),
        "head_dim": _int(config, "head_dim", path, hidden // heads),
        "ffn": _int(config, "intermediate_size", path), "vocab": _int(config, "vocab_size", path),
        # A step at the longest context is seldom what is trained: 131072 in Llama 3.1.
        "seq": min(_int(config, "max_position_embeddings", path, 2048), 8192), "rope_theta": float(theta),
        "eps": float(config.get("rms_norm_eps", 1e-6)), "tied": bool(config.get("tie_word_embeddings", False)),
    }  # fmt: skip


def _bert(config: dict[str, Any], path: Path) -> Bert:
    _activation(config, path, "hidden_act", "gelu")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{path} has position_embedding_type {config['position_embedding_type']!r}: only absolute "
                         "positions can be built")  # fmt: skip
    positions = _int(config, "max_position_embeddings", path, 512)
    return Bert(**_encoder(config, path), vocab=_int(config, "vocab_size", path), positions=positions,
                seq=positions, tied=bool(config.get("tie_word_embeddings", True)))  # fmt: skip


def _vit(config: dict[str, Any], path: Path) -> Vit:
    """The classes are those of id2label; 1000 where none are named, as the zoo has them."""
    _activation(config, path, "hidden_act", "gelu")
    if _int(config, "num_channels", path, 3) != 3 or not config.get("qkv_bias", True):
        raise ValueError(f"{path} has num_channels other than 3, or qkv_bias=false: only the usual ViT can be built")
    labels = config.get("id2label")
    classes = len(labels) if isinstance(labels, dict) and labels else _int(config, "num_labels", path, 1000)
    return Vit(**_encoder(config, path), patch=_int(config, "patch_size", path, 16),
               image=_int(config, "image_size", path, 224), classes=classes)  # fmt: skip


def _encoder(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What BERT and ViT share."""
    return {
        "layers": _int(config, "num_hidden_layers", path), "hidden": _int(config, "hidden_size", path),
        "heads": _int(config, "num_attention_heads", path), "ffn": _int(config, "intermediate_size", path),
        "eps": float(config.get("layer_norm_eps", 1e-12)),
    }  # fmt: skip


def _activation(config: dict[str, Any], path: Path, key: str, *known: str) -> None:
    if (found := config.get(key, known[0])) not in known:
        raise ValueError(f"{path} has {key} {found!r}: only {known[0]} can be built")


def _int(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"{path} has no {key}: its model_type needs one")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path} has {key}={value!r}: give a whole number above 0")
    return value


READERS: dict[str, Callable[[dict[str, Any], Path], Sizes]] = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "mixtral": _mixtral, "bert": _bert,
    "vit": _vit,
}  # fmt: skip
