"""The rooms import downwards only, and the lower ones need no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"opgraph": 0, "costmodels": 1, "simulator": 2, "planner": 3, "validation": 4, "parplan": 5}
WITHOUT_TORCH = ("costmodels", "simulator")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import of a file, wherever it stands in it, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*parts, *filter(None, [node.module])))


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down_the_floors(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        for line, name in imports(path):
            head = name.partition(".")[0]
            above = FLOORS.get(head, -1) > FLOORS[room]
            if above or (head == "torch" and room in WITHOUT_TORCH) or head == "tests":
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(FLOORS)
