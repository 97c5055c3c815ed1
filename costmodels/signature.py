"""What equal ops share, and how device files write it."""

from __future__ import annotations

import re
from typing import Any

Shape = tuple[int, ...]
Signature = tuple[str, tuple[Shape, ...], tuple[Shape, ...]]  # kernel, shapes of the operands, of the results
SCALAR: tuple[Shape, ...] = ((),)  # also stands for no tensor at all, as the text does not tell them apart


def written(signature: Signature) -> str:
    """As a short text: kernel, operands, results.

    >>> written(("mm.nn/float32", ((2, 3), (3, 4)), ((2, 4),)))
    'mm.nn/float32|2,3;3,4|2,4'
    """
    kernel, ins, outs = signature
    return f"{kernel}|{_text(ins)}|{_text(outs)}"


def parsed(text: str) -> Signature:
    """What `written` wrote.

    >>> parsed("sum/float32|2,3|")
    ('sum/float32', ((2, 3),), ((),))
    """
    kernel, ins, outs = text.split("|")
    return kernel, _shapes(ins), _shapes(outs)


def is_written(text: str) -> bool:
    """Whether this is what `written` writes."""
    return re.fullmatch(r"[^|]+/\w+\|[\d,;]*\|[\d,;]*", text) is not None


def _text(shapes: tuple[Any, ...]) -> str:
    """((3,), (), (4, 5)) as "3;;4,5": by what Python prints of it, which is three times as fast as joining numbers."""
    return str(shapes).replace(" ", "").replace(",)", ")").replace("),(", ";")[2:-2]


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(tuple(map(int, s.split(","))) if s else () for s in text.split(";")) if text else SCALAR
