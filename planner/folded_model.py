"""A model of equal blocks for folded lowering, and how many of them each chunk of a pipeline has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from opgraph.graph import OpGraph
from planner.folded_pieces import Where
from planner.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class FoldedModel:
    """graph: the step with three blocks at the plan's micro-batch (see `planner.folded_pieces`). layers: blocks of the
    whole model. seq: tokens per sequence on one context-parallel rank. vocab: size that embedding and logits share
    (0: neither). different: so many blocks at the front are like block 0, the rest like block 1."""

    graph: OpGraph
    layers: int
    seq: int
    vocab: int
    different: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Parts of one model chunk in forward order, with how often each runs."""

    parts: tuple[tuple[Where, int], ...]

    def count(self, where: Where) -> int:
        return sum(n for w, n in self.parts if w == where)


def chunks_of(model: FoldedModel, plan: ParallelPlan) -> list[Chunk]:
    """All pp * vpp chunks in execution order; they begin at the plan's cuts ("blocks.12")."""
    bounds = [0, *(_block(cut, model.layers) for cut in plan.cuts), model.layers]
    if any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cuts {', '.join(plan.cuts)} are not in execution order; sort them by block")
    found = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        parts: list[tuple[Where, int]] = [("first", 1)] if i == 0 else []
        special = max(min(model.different, end) - begin, 0)
        parts += [("block0", special)] if special else []
        parts += [("block", end - begin - special)] if end - begin > special else []
        parts += [("last", 1)] if i == len(bounds) - 2 else []
        found.append(Chunk(tuple(parts)))
    return found


def _block(cut: str, layers: int) -> int:
    head, _, number = cut.partition(".")
    if head != "blocks" or not number.isdigit() or int(number) > layers:
        raise ValueError(f"cut {cut!r} is no block of a model of {layers}; write blocks.0 to blocks.{layers}")
    return int(number)
