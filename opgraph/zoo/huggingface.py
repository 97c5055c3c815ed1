"""Sizes from a Hugging Face config.json of the GPT-2 or Llama family; needs neither transformers nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opgraph.zoo.sizes import Gpt, Llama, Sizes, check


def read_config(path: Path) -> Sizes:
    """The sizes in a Hugging Face config.json of the GPT-2 or Llama family."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: give the path of a config.json") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}): give a Hugging Face config.json") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} has no model_type: give a Hugging Face config.json")
    match config["model_type"]:
        case "gpt2":
            sizes: Sizes = _gpt2(config, path)
        case "llama":
            sizes = _llama(config, path)
        case other:
            raise ValueError(f"{path} is of model_type {other!r}: only gpt2 and llama configurations can be read")
    check(sizes, str(path))
    return sizes


def _gpt2(config: dict[str, Any], path: Path) -> Gpt:
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise ValueError(f"{path} has activation_function {activation!r}: only gelu_new can be built")
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
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path} has hidden_act {config['hidden_act']!r}: only silu can be built")
    hidden, heads = _int(config, "hidden_size", path), _int(config, "num_attention_heads", path)
    if "head_dim" not in config and hidden % heads:
        raise ValueError(f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}: give head_dim")
    # transformers 5 writes the base of the rotary angles into rope_parameters.
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return Llama(layers=_int(config, "num_hidden_layers", path), hidden=hidden, heads=heads,
                 kv_heads=_int(config, "num_key_value_heads", path, heads),
                 head_dim=_int(config, "head_dim", path, hidden // heads),
                 ffn=_int(config, "intermediate_size", path), vocab=_int(config, "vocab_size", path),
                 # A step at the longest context is seldom what is trained: 131072 in Llama 3.1.
                 seq=min(_int(config, "max_position_embeddings", path, 2048), 8192), rope_theta=float(theta),
                 eps=float(config.get("rms_norm_eps", 1e-6)),
                 tied=bool(config.get("tie_word_embeddings", False)))  # fmt: skip


def _int(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"{path} has no {key}: its model_type needs one")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path} has {key}={value!r}: give a whole number above 0")
    return value
