"""Fit the attention law to the bfloat16 attention tables of aiconfigurator-core: prefill (causal), encoder, decode.

Timed in CUDA graphs, with a paged cache of keys and values: the prefill op also writes keys and values into the cache.
That has terms of its own (`cache_stream`, `cache_launch`), fitted with the rest, and is no part of a training op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from costmodels.attention_law import FIELDS, calls_from, decode_seconds, flash_seconds
from costmodels.device import Device, load_device
from validation.fit_common import Array, Constant, Fitted, Flags, fit_constants, held_out

SOURCE = "aiconfigurator-core 0.12, bfloat16, window 0"
DTYPE = "bfloat16"
FIT_ROWS = 4000  # rows that a fit looks at: its constants change by less than 1 % beyond


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile, and keys of a step for head dims of up to 64, up to 128, and above."""

    rows: int
    keys: tuple[int, int, int]


# FlashAttention-2 on a paged cache runs its split-KV kernel, whose blocks are the same on every device: 64 queries by
# 256, 128 or 64 keys (its source, flash_fwd_launch_template.h).
PAGED = Tiles(64, (256, 128, 64))


@dataclass(frozen=True, slots=True)
class Table:
    """system: folder of the tables. device: file stem. framework: whose kernel stands for the device. kernel: its name.
    encoder: whether the table of non-causal attention is of the same kernel and joins the fit. tiles: of kernels whose
    tiles are not the law's defaults."""

    system: str
    device: str
    framework: str
    kernel: str
    sources: tuple[str, ...]
    encoder: bool = False
    tiles: Tiles | None = None


TABLES = (
    Table("a100_sxm", "a100-sxm-80gb", "sglang", "FlashAttention-2", ("flash_attention",)),
    Table("h100_sxm", "h100-sxm", "vllm", "FlashAttention-3", ("vllm_flash_attn_fa3",), True),
    Table("h200_sxm", "h200", "vllm", "FlashAttention-3", ("vllm_flash_attn_fa3",), True),
    Table("l40s", "l40s", "vllm", "FlashAttention-2", ("vllm_flash_attn_fa2",), tiles=PAGED),
    Table("b200_sxm", "b200", "vllm", "TensorRT-LLM", ("vllm_flashinfer_trtllmprefill",)),
    Table("b300_sxm", "b300", "vllm", "TensorRT-LLM", ("vllm_flashinfer_trtllmprefill",)),
    Table("gb200", "gb200", "vllm", "TensorRT-LLM", ("vllm_flashinfer_trtllmprefill",)),
    Table("gb300", "gb300", "vllm", "TensorRT-LLM", ("vllm_flashinfer_trtllmprefill",)),
)
CONSTANTS = (
    Constant("launch", 8e-6), Constant("tile", 2e-6), Constant("join", 1.5), Constant("tile_stream", 1.5),
    Constant("short", 0.5), Constant("split", 2e-6), Constant("memory", 1.0), Constant("memory_join", 1.5),
    Constant("cache_stream", 0.3),
)  # fmt: skip
# Where the encoder table is of the same kernel, the launch of the kernel that writes the cache can be told apart. Head
# dims that no kernel is built for are padded first, by kernels whose launch shows.
ENCODER = (Constant("cache_launch", 3e-6), Constant("pad_launch", 2e-6))
BUILT_FOR = (64, 96, 128, 192, 256)
STARTS: tuple[dict[str, float], ...] = (
    {}, {"memory": 8.0, "split": 2e-5}, {"tile": 4e-6, "short": 0.25, "split": 5e-6}, {"launch": 1.2e-5, "short": 0.9},
)  # fmt: skip
DECODE = (
    Constant("decode_launch", 8e-6), Constant("decode_stream", 0.7), Constant("decode_cached", 1.0),
    Constant("decode_grain", 512.0), Constant("decode_row", 1e-7),
)  # fmt: skip
DECODE_STARTS: tuple[dict[str, float], ...] = tuple(
    {"decode_grain": g, "decode_cached": c} for g in (64.0, 512.0, 4096.0) for c in (0.7, 3.0)
)


def fit_attentions(tables: Path) -> list[Fitted]:
    """The law of every device of `TABLES` whose files are there; decode's constants join the same section."""
    fits = []
    for table in TABLES:
        rows = _rows(tables, table)
        if len(rows):
            fits.append(_fit_device(table, rows, _read(tables, table, "generation")))
    return fits


def _rows(tables: Path, table: Table) -> pd.DataFrame:
    """Prefill and, where it is the same kernel, encoder rows. One query is decode and has a law of its own."""
    prefill = _read(tables, table, "context")
    parts = [prefill[(prefill.isl > 1) & prefill.kernel_source.isin(table.sources)].assign(causal=True)]
    if table.encoder:
        parts.append(_read(tables, table, "encoder").assign(causal=False))
    return pd.concat(parts, ignore_index=True)


def _read(tables: Path, table: Table, what: str) -> pd.DataFrame:
    """One table: bfloat16 throughout, no sliding window, head dims of up to 256."""
    folder = "encoder_attention" if what == "encoder" else "attention"
    found = sorted(tables.rglob(f"{table.system}/{folder}/{table.framework}/*/{what}_attention_perf.parquet"))
    if not found:
        return pd.DataFrame()
    rows = pd.read_parquet(found[-1])
    for column, wanted in (("window_size", 0), ("attn_dtype", "bfloat16"), ("kv_cache_dtype", "bfloat16")):
        if column in rows:
            rows = rows[rows[column] == wanted]
    if "num_key_value_heads" not in rows:
        rows = rows.assign(num_key_value_heads=rows.num_heads)
    return rows[rows.head_dim <= 256].reset_index(drop=True)


def _fit_device(table: Table, rows: pd.DataFrame, decode: pd.DataFrame) -> Fitted:
    device = load_device(table.device)
    scored, measured = _scored(rows), rows.latency.to_numpy() * 1e-3
    widths = sorted(int(w) for w in rows.head_dim.unique())
    stated = stated_of(table, widths)
    law = _law(device, rows, widths, stated)
    rates = tuple(Constant(f"rate{w}", 0.6, True) for w in widths)
    wanted = (*CONSTANTS, *rates, *(ENCODER if table.encoder else ()))
    fitting = _some(~scored)
    x = fit_constants(wanted, lambda x: law(x, fitting), measured[fitting], STARTS)
    predicted = law(x, np.ones(len(rows), bool))
    constants = section_of(x, widths, stated) | {"kernel": table.kernel}
    extra: dict[str, float] = {}
    if len(decode):
        more, error, n = _fit_decode(device, decode)
        constants |= more | {"decode_error": error, "decode_held_out": n}
        extra = {"decode_error": error, "decode_n": float(n)}
    kinds = np.where(rows.causal, "causal ", "full ") + rows.head_dim.astype(str).to_numpy()
    data = f"{table.framework}/context{'+encoder' if table.encoder else ''} ({SOURCE})"

    def again(lent: Mapping[str, Any]) -> Array:
        calls = calls_of_rows(rows)[scored]
        cache = predicted[scored] - flash_seconds(constants, device, DTYPE, calls)
        return cache + flash_seconds(lent, device, DTYPE, calls)

    return Fitted(table.device, "attention", DTYPE, constants, data, len(rows), predicted[scored], measured[scored],
                  kinds.astype(str)[scored], again, extra)  # fmt: skip


def _scored(rows: pd.DataFrame) -> Flags:
    shape = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "step")
    return held_out(*(rows[c] for c in shape if c in rows))


def _some(fitting: Flags) -> Flags:
    """At most `FIT_ROWS` of the fitting half, evenly drawn."""
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(fitting))[:FIT_ROWS]
    flags = np.zeros(len(fitting), bool)
    flags[chosen] = True
    return flags


def stated_of(table: Table, widths: list[int]) -> dict[str, Any]:
    """What is known of a table's kernel without fitting: whether it packs heads, and its tiles."""
    stated: dict[str, Any] = {"packs": table.kernel == "FlashAttention-3"}
    if table.tiles:
        keys = [table.tiles.keys[(w > 64) + (w > 128)] for w in widths]
        stated |= {"tile_rows": table.tiles.rows, "tile_keys": keys}
    return stated


def _law(
    device: Device, rows: pd.DataFrame, widths: list[int], stated: Mapping[str, Any]
) -> Callable[[dict[str, float], Flags], Array]:
    """Seconds of the rows under a mask, by the law that prices ops and the writing of keys and values to the cache."""
    calls, causal = calls_of_rows(rows), rows.causal.to_numpy(bool)
    padded = ~rows.head_dim.isin(BUILT_FOR).to_numpy(bool)
    stored = 4.0 * rows.batch_size * rows.isl * rows.num_key_value_heads * rows.head_dim * rows.causal

    def law(x: dict[str, float], mask: Flags) -> Array:
        cache = stored.to_numpy(float)[mask] / device.memory_bandwidth / x["cache_stream"]
        cache = cache + x.get("cache_launch", 0.0) * causal[mask] + x.get("pad_launch", 0.0) * padded[mask]
        seconds: Array = flash_seconds(section_of(x, widths, stated), device, DTYPE, calls[mask]) + cache
        return seconds

    return law


def section_of(x: dict[str, float], widths: list[int], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The constants as a section of a kernels file has them. A norm's exponent below 1 would make work disappear."""
    plain = {c.name: x[c.name] for c in (*CONSTANTS, *ENCODER) if c.name in x}
    plain |= {name: 1 + x[name] for name in ("join", "memory_join")}
    return {**plain, **stated, "head_dims": widths, "rates": [x[f"rate{w}"] for w in widths]}


def calls_of_rows(rows: pd.DataFrame) -> Array:
    """The table's rows as calls of attention of tokens to themselves."""
    columns = ("batch_size", "num_heads", "num_key_value_heads", "isl", "isl", "head_dim", "head_dim")
    batch, heads, kv_heads, queries, keys, width, values = (rows[c].to_numpy(float) for c in columns)
    return calls_from(batch, heads, kv_heads, queries, keys, width, values, rows.causal.to_numpy(bool), False)


def _fit_decode(device: Device, rows: pd.DataFrame) -> tuple[dict[str, float], float, int]:
    """Constants of one query against `step` cached keys, their held-out error, and how many rows were scored."""
    rows = rows[rows.step > 0]
    scored, measured = _scored(rows), rows.latency.to_numpy() * 1e-3
    calls = calls_of_rows(rows.assign(causal=False, isl=rows.step + 1))
    calls[:, FIELDS.index("queries")] = 1.0
    fitting = _some(~scored)

    def seconds(x: dict[str, float]) -> Array:
        return decode_seconds(x, device, DTYPE, calls[fitting])

    found = fit_constants(DECODE, seconds, measured[fitting], DECODE_STARTS)
    errors = decode_seconds(found, device, DTYPE, calls[scored]) / measured[scored] - 1
    return found, float(np.abs(errors).mean()), int(scored.sum())
