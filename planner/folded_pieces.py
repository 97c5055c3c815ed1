"""The parts of a traced step that repeat: what comes before the blocks, one block of each kind, what comes after.

A model of equal blocks is traced with three of them; block 0 and block 1 stand for all (block 0 may differ from the
others). Each part is lowered and priced once, however often a plan runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opgraph.graph import Op, OpGraph
from planner.stages import within

Where = Literal["first", "block0", "block", "last"]
WHERES: tuple[Where, ...] = ("first", "block0", "block", "last")
TRACED_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Pieces:
    """Ops of each part in execution order, and its parameters by name."""

    forward: dict[Where, tuple[Op, ...]]
    backward: dict[Where, tuple[Op, ...]]
    parameters: dict[Where, tuple[str, ...]]


def pieces(graph: OpGraph) -> Pieces:
    """Cuts the step of a model whose blocks are `blocks.0`, `blocks.1` and `blocks.2`."""
    forward = [op for op in graph.ops if op.phase == "forward"]
    backward = [op for op in graph.ops if op.phase == "backward"]
    f = [_begin(forward, i) for i in range(TRACED_BLOCKS)]
    b = [_begin(backward, i) for i in range(TRACED_BLOCKS)]
    end_f = _end(forward, TRACED_BLOCKS - 1)
    end_b = _end(backward, 0)
    return Pieces(
        {"first": tuple(forward[: f[0]]), "block0": tuple(forward[f[0] : f[1]]), "block": tuple(forward[f[1] : f[2]]),
         "last": tuple(forward[end_f:])},
        {"last": tuple(backward[: b[2]]), "block": tuple(backward[b[1] : b[0]]),
         "block0": tuple(backward[b[0] : end_b]), "first": tuple(backward[end_b:])},
        _parameters(graph, forward, f[0], end_f),
    )  # fmt: skip


def _begin(ops: list[Op], block: int) -> int:
    return next(i for i, op in enumerate(ops) if within(op.module, f"blocks.{block}"))


def _end(ops: list[Op], block: int) -> int:
    return next(i for i in range(len(ops), 0, -1) if within(ops[i - 1].module, f"blocks.{block}"))


def _parameters(graph: OpGraph, forward: list[Op], begin: int, end: int) -> dict[Where, tuple[str, ...]]:
    by_storage = {t.storage: name for name, t in graph.parameters.items()}
    used: dict[Where, dict[str, None]] = {where: {} for where in WHERES}
    for i, op in enumerate(forward):
        where: Where = "first" if i < begin else "last" if i >= end else "block"
        if where == "block" and within(op.module, "blocks.0"):
            where = "block0"
        elif where == "block" and not within(op.module, "blocks.1"):
            continue
        for t in op.inputs:
            name = by_storage.get(graph.tensors[t].storage)
            if name:
                used[where][name] = None
    return {where: tuple(names) for where, names in used.items()}
