"""Who holds how many bytes: an account of blocks by category, with its worst moment and, on request, its events."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

Category = Literal["parameters", "gradients", "optimizer_state", "activations", "workspace", "communication", "inputs"]
CATEGORIES: tuple[Category, ...] = (
    "parameters", "gradients", "optimizer_state", "activations", "workspace", "communication", "inputs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """A block is made (`bytes` > 0) or freed (< 0). block: the same number in both. where: phase, micro-batch and op
    that did it; phase "rest" for what is there between steps."""

    block: int
    bytes: int
    category: Category
    phase: str
    micro: int
    op: str
    module: str


@dataclass(slots=True)
class Ledger:
    """live: bytes now; peak: most so far; at_peak: by category, then. Blocks have keys; making one twice replaces it.

    events: filled where `recording`; `place` is what the events say about where they happened.
    """

    recording: bool = False
    live: int = 0
    peak: int = 0
    held: dict[Hashable, tuple[int, Category, int]] = field(default_factory=dict)
    by: dict[Category, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    at_peak: dict[Category, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    events: list[Event] = field(default_factory=list)
    place: tuple[str, int, str, str] = ("rest", 0, "", "")
    _made: int = 0

    def hold(self, key: Hashable, size: int, category: Category) -> None:
        if key in self.held:
            self.drop(key)
        self.held[key] = (size, category, self._made)
        self._change(size, category, self._made)
        self._made += 1

    def drop(self, key: Hashable) -> None:
        """Frees a block; nothing happens where there is none."""
        if (found := self.held.pop(key, None)) is not None:
            self._change(-found[0], found[1], found[2])

    def pulse(self, size: int, category: Category) -> None:
        """A block that is freed at once."""
        if size > 0:
            self.hold("pulse", size, category)
            self.drop("pulse")

    def size(self, key: Hashable) -> int:
        return self.held[key][0] if key in self.held else 0

    def _change(self, size: int, category: Category, block: int) -> None:
        self.live += size
        self.by[category] += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = self.by.copy()
        if self.recording and size:
            self.events.append(Event(block, size, category, *self.place))
