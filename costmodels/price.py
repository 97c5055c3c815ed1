"""What a price is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "interpolated", "extrapolated", "roofline"]


@dataclass(frozen=True, slots=True)
class Price:
    """Device seconds of one op, where they come from, the expected relative error (0.1 is 10 %), and what a reader
    should know of it besides."""

    seconds: float
    source: Source
    error: float
    note: str = ""
