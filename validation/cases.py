"""Published training runs: the rows of a CSV file in one of the schemas of docs/cases.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["transformer", "vision"]

# Columns without which no row can be predicted; all others may be missing, and blank is what is usual.
TRANSFORMER = ("layers", "hidden", "heads", "seq_len", "vocab", "gpu", "num_gpus", "global_batch", "micro_batch")
VISION = ("model", "gpu", "num_gpus", "global_batch")
SHAPE = {"layers", "hidden", "heads", "seq_len", "ffn", "tp", "vocab"}  # only a table of transformers has such columns
# How tables write that nothing was published.
UNSTATED = ("", "nan", "none", "null", "n/a", "na", "-", "?", "not stated", "unknown")
# The most of a whole number; more is a slip. What a step repeats is worked through, so that its time and memory grow.
MOST = {"layers": 10_000, "num_gpus": 10_000_000, "chunks": 65_536}
MOST_ELSE = 10**12
MOST_MICRO_BATCHES, MOST_PASSES = 65_536, 8_000_000  # of a replica in a step; times the blocks of a stage
FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class CaseError(ValueError):
    """A row that cannot be predicted; the sentence is its reason."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: text by column; empty text where nothing was published."""

    kind: Kind
    fields: dict[str, str]

    @property
    def id(self) -> str:
        return self.fields.get("case_id", "").strip()

    @property
    def set(self) -> str:
        return self.fields.get("set") or "(no set)"

    def text(self, name: str) -> str:
        return self.fields.get(name, "").strip()

    def word(self, name: str) -> str:
        """A word of the schema: lower case, empty where nothing was published ("none" stays: it is a word)."""
        text = self.text(name).lower()
        return text if text == "none" or text not in UNSTATED else ""

    def whole(self, name: str, default: int | None = None, least: int = 0) -> int:
        """A whole number. CaseError where the row has none."""
        try:
            value = self.number(name)
        except CaseError:
            raise CaseError(f"column {name} is {self.text(name)!r}; a whole number is needed") from None
        if value is None:
            if default is not None:
                return default
            raise CaseError(f"column {name} is {self.text(name)!r}; a whole number is needed")
        most = MOST.get(name, MOST_ELSE)
        if not least <= value <= most or value != int(value):
            raise CaseError(f"column {name} is {self.text(name)}; a whole number from {least} to {most:,} is needed")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """0 or 1, in words or numbers. CaseError for others."""
        if not self.stated(name):
            return default
        word = self.text(name).lower().removesuffix(".0")  # as spreadsheets write them
        if word not in FLAGS:
            raise CaseError(f"{name} is {self.text(name)!r}; it must be 0 or 1")
        return FLAGS[word]

    def stated(self, name: str) -> bool:
        return self.text(name).lower() not in UNSTATED

    def degree(self, name: str) -> int:
        """A parallel degree: 1 where it is not stated, or 0 as some tables write for "off"."""
        return self.whole(name, 1) or 1

    def number(self, name: str) -> float | None:
        """A number, None where it is not stated."""
        text = self.text(name)
        if text.lower() in UNSTATED:
            return None
        try:
            return float(text)
        except ValueError:
            raise CaseError(f"column {name} is {text!r}; a number is needed") from None

    @property
    def measured(self) -> float | None:
        return self.number("step_time_s")

    @property
    def scored(self) -> bool:
        """Whether the row counts: what was quoted from memory, or marked as suspect by who collected it, does not."""
        return self.text("from_memory").lower() not in ("1", "1.0", "true", "yes")


def read_cases(path: Path) -> list[Case]:
    """All rows of a file. ValueError, in one sentence, where it is no such file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            reader.fieldnames = [c.strip().lower() for c in reader.fieldnames or ()]
            columns = list(reader.fieldnames)
            rows = [{k: v or "" for k, v in row.items() if k is not None} for row in reader]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file; give a CSV file with a header line") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file ({error}); give a CSV file with a header line") from None
    if not columns:
        raise ValueError(f"{path} is empty; give a CSV file with a header line")
    kind = _kind(columns, path)
    if not rows:
        raise ValueError(f"{path} has a header line and no rows; give at least one case")
    return [Case(kind, row | {"case_id": row.get("case_id") or f"row {i}"}) for i, row in enumerate(rows, 1)]


def _kind(columns: Sequence[str], path: Path) -> Kind:
    kind: Kind = "transformer" if len(SHAPE & {*columns}) > 1 else "vision"
    needed = TRANSFORMER if kind == "transformer" else VISION
    other = {"global_batch": "per_gpu_batch"} if kind == "vision" else {}
    if missing := [name for name in needed if not {name, other.get(name, name)} & {*columns}]:
        what = f"cases of transformers need {', '.join(TRANSFORMER)}, those of vision models {', '.join(VISION)}"
        lacks = f"{path} lacks the column(s) {', '.join(missing)} of {kind} cases"
        raise ValueError(f"{lacks}; {what}; docs/cases.md says what they hold")
    return kind
