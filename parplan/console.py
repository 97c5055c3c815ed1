"""What all verbs print: results on stdout, progress and remarks on stderr, units only here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

Progress = Callable[[str, float], None]
QUIET_SECONDS = 5.0  # between two lines of progress of one kind, where there is no terminal


def seconds(value: float) -> str:
    """A time for people: 1.23 s, 45.6 ms, 7.8 us."""
    if value != value:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}" if abs(value) < 1000 * scale else f"{value / scale:,.0f} {unit}"
    raise AssertionError


def size(value: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


def number(value: float, unit: str = "") -> str:
    """A count or rate for people: 124 M, 989 TFLOP/s."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None or value != value else f"{value:{sign}.1%}"


def emit(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(_strict(data), indent=1))


def _strict(value: Any) -> Any:
    from validation.report_files import plain  # needs neither torch nor numpy

    return plain(value)


def remark(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(*things: Any) -> None:
    """Text and rich tables on stdout; nothing is cut where stdout is a file or a pipe."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False)
    for thing in things:
        console.print(thing)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Any:
    """A rich table; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", show_header=any(columns))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


@contextmanager
def working() -> Iterator[Progress]:
    """While a verb works, what models or libraries print goes to stderr: stdout carries the result alone.

    Yields a callback `(what, fraction)`: a bar where stderr is a terminal, else plain lines, few of one kind.
    """
    with redirect_stdout(sys.stderr), _progress() as update:
        yield update


@contextmanager
def _progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bars:
        task = bars.add_task("", total=1.0)

        def update(what: str, fraction: float) -> None:
            if is_result(what):  # results stay on the screen
                bars.console.print(what, markup=False)
            bars.update(task, description=what.replace("[", "\\["), completed=fraction)

        yield update


def is_result(what: str) -> bool:
    """Whether a line of progress says what came out of executing a plan."""
    return ", measured " in what or ": FAILED, " in what


def _lines() -> Progress:
    began, said, last = time.monotonic(), 0.0, ""

    def update(what: str, fraction: float) -> None:
        nonlocal said, last
        now = time.monotonic() - began
        other_kind = what.partition(" ")[0] != last.partition(" ")[0]
        if what != last and (is_result(what) or other_kind or now > said + QUIET_SECONDS):
            said, last = now, what
            remark(f"[{now:5.1f} s] {what}")

    return update
