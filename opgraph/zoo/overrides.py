"""Overrides of a model's dimensions: texts in, checked sizes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from opgraph.zoo.sizes import Sizes, check


def parse_overrides(text: str, spec: str) -> dict[str, str]:
    """`layers=4,hidden=256` as a dict of texts."""
    values: dict[str, str] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{part.strip()!r} in {spec} is no override: write name=value, separated by commas")
        if key in values:
            raise ValueError(f"{spec} gives {key} twice: give it once")
        values[key] = value
    return values


def with_overrides(sizes: Sizes, changes: Mapping[str, str], name: str) -> Sizes:
    """`sizes` with the fields in `changes` (texts) replaced; widths that follow from others follow.

    ffn keeps its ratio to hidden, kv_heads its ratio to heads, head_dim is hidden / heads - unless given too.
    """
    known = [f.name for f in fields(sizes)]
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
            raise ValueError(
                f"{name}: heads={heads} does not divide hidden={hidden}: give a number of heads that does, "
                "or head_dim too"
            )
        values["head_dim"] = hidden // heads
    changed = replace(sizes, **values)
    check(changed, name)
    return changed


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
