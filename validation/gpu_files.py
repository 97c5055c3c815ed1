"""The folder of one run of the GPU suite: JSON files that appear whole, rows that are added one by one, time that ends.

A folder holds environment.json, ops.json, host.json, device.toml (and device.kernels.toml), fit.json, predictions.json,
steps.json, report.md, compare.csv, compare.png and snapshots/. Every piece reads what earlier pieces left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from validation.report_files import plain, replacing

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds that a call may take. now: the clock, in seconds (tests pass another)."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    begun: float = field(default=-1.0)

    def __post_init__(self) -> None:
        if self.begun < 0:
            object.__setattr__(self, "begun", self.now())

    @property
    def left(self) -> float:
        return self.seconds - (self.now() - self.begun)


@dataclass(slots=True)
class Rows:
    """Rows of a JSON file by their "key", written again after every addition so that nothing is lost; `every` of them
    at once where rows come faster than a file can be written."""

    path: Path
    every: int = 1
    rows: dict[str, Row] = field(default_factory=dict)
    unsaved: int = 0

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.rows = {row["key"]: row for row in read_json(self.path)["rows"]}

    def add(self, row: Row) -> None:
        self.rows[row["key"]] = row
        self.unsaved += 1
        if self.unsaved >= self.every:
            self.save()

    def save(self) -> None:
        write_json(self.path, {"rows": list(self.rows.values())})
        self.unsaved = 0


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with one sentence where there is none or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; run the piece that writes it first (see --help)") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and run its piece again") from None


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def utc() -> str:
    """Now, to the microsecond, so that texts sort as times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def sentence(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:300] if said else type(error).__name__
