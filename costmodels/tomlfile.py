"""TOML files in and out, with errors that name the file, the field and what would be right."""

from __future__ import annotations

import json
import math
import os
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, or a ValueError that says where it is broken."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; give the path of an existing TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error}); correct that place") from None


def write_toml(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` so that readers see the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_toml(data))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_toml(data: Mapping[str, Any]) -> str:
    """TOML text of a dict of scalars, arrays of scalars, tables, tables of tables, and lists of tables."""
    plain = {k: v for k, v in data.items() if not _is_table(v) and not _is_tables(v)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for name, table in data.items():
        for row in [table] if _is_table(table) else table if _is_tables(table) else []:
            flat = {k: v for k, v in row.items() if not _is_table(v)}
            if flat or not row:  # a table of tables alone needs no header of its own
                lines += ["", f"[{_key(name)}]" if _is_table(table) else f"[[{_key(name)}]]"]
            lines += [f"{_key(k)} = {_value(v)}" for k, v in flat.items()]
            for key in (k for k in row if k not in flat):
                assert _is_table(table), "a list of tables holds no tables"
                lines += ["", f"[{_key(name)}.{_key(key)}]"]
                lines += [f"{_key(k)} = {_value(v)}" for k, v in row[key].items()]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and _is_table(value[0])


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
    return key if bare else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        assert math.isfinite(value), "a non-finite number has no place in a device file"
        short = f"{value:.6g}"
        return short if abs(value) < 1e15 or float(short) == value else repr(value)
    items = [_value(v) for v in value]
    one_line = "[" + ", ".join(items) + "]"
    return one_line if len(one_line) < 110 else "[\n    " + ",\n    ".join(items) + ",\n]"


def text(data: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A string field."""
    value = data.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be a string")
    return value


def number(data: Mapping[str, Any], key: str, where: str, default: float | None = None, least: float = 0.0) -> float:
    """A finite number field, `least` or more."""
    value = data.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be a number of {least:g} or more")
    return float(value)


def flag(data: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """A true or false field."""
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be true or false")
    return value


def whole(data: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 0) -> int:
    """A whole number field, `least` or more."""
    value = number(data, key, where, default, least)
    if value != int(value):
        raise ValueError(f"{where}: field '{key}' is {value:g}; it must be a whole number of {least} or more")
    return int(value)


def table(data: Mapping[str, Any], key: str, where: str, required: bool = False) -> dict[str, Any]:
    """A table field; empty where it is absent and not required."""
    value = data.get(key, None if required else {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be a table [{key}]")
    return value


def numbers(data: Mapping[str, Any], key: str, where: str, required: bool = False) -> dict[str, float]:
    """A table of numbers, each 0 or more."""
    rows = table(data, key, where, required)
    return {k: number(rows, k, f"{where}: table [{key}]") for k in rows}


def array(data: Mapping[str, Any], key: str, where: str, least: float = 0.0) -> tuple[float, ...]:
    """An array of numbers, each `least` or more."""
    value = data.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be an array of numbers")
    return tuple(number({key: v}, key, where, least=least) for v in value)


def strings(data: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """An array of strings; empty where it is absent."""
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be an array of strings")
    return tuple(value)


def tables(data: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """An array of tables; empty where it is absent."""
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{where}: field '{key}' is {_shown(value)}; it must be an array of tables [[{key}]]")
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
