"""Experts in inference: with few tokens, kernels read the weights of those that are chosen, and of no others.

A traced model runs all its experts, on slots that hold whatever the router may send. Nothing here knows models: a
router is a `topk` over E candidates, its experts are the E numbered children of one list beside it, or a parameter with
E matrices. ASSUMPTION: routing is uniform, so that t tokens with k experts each choose E (1 - (1 - k/E)^t) of E
different ones in the mean (a token leaves one out with probability 1 - k/E), and share them evenly. Real routers prefer
some experts, and so read fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from costmodels.families import base_name, family
from costmodels.ops import OpShape
from opgraph.flops import flops_of
from opgraph.graph import DTYPE_BYTES, Op, OpGraph
from planner.script import Item, Message, Work
from planner.stages import within

NOTICED = 0.999  # share of the experts from which on all count as read


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts of one layer. tokens: that are routed at once. slots: rows of each expert in the trace."""

    experts: int
    top_k: int
    tokens: int
    slots: int

    @property
    def read(self) -> float:
        """Experts that these tokens choose, in the mean."""
        return expected_experts(self.experts, self.top_k, self.tokens)

    @property
    def rows(self) -> int:
        """Tokens of an expert that is chosen, in the mean, rounded up (but for a hundredth)."""
        return ceil(self.tokens * self.top_k / self.read - 0.01)


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """How many different of `experts` are chosen by `tokens` tokens that each draw `top_k` of them uniformly, without
    putting back: E (1 - (1 - k/E)^t)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def chosen_experts(items: Iterable[Item], graph: OpGraph) -> tuple[list[Item], tuple[str, ...]]:
    """A forward pass in which only chosen experts run, each expert's work by its share (`Work.share`), and what was
    assumed, in short sentences. Ranks that share experts add up what all of a layer made, as engines do: one message
    for all its tokens in place of one for each expert."""
    found = list(items)
    homes: dict[int, Mixture] = {}
    places: dict[str, tuple[int, Mixture]] = {}
    for index, work, mixture in _homes(found, graph):
        homes[id(work)] = mixture
        places[work.module] = index, mixture
    changed: list[Item] = []
    for item in found:
        if isinstance(item, Message) and item.module in places:
            index, mixture = places[item.module]
            if index == mixture.experts - 1:
                changed.append(replace(item, bytes=item.bytes * mixture.tokens // mixture.slots))
        else:
            mine = isinstance(item, Work) and id(item) in homes
            changed.append(_chosen(item, homes[id(item)], graph) if isinstance(item, Work) and mine else item)
    said = {
        f"uniform routing: {m.tokens:,} tokens choose {m.read:.3g} of {m.experts} experts a layer"
        for m in homes.values() if m.read < NOTICED * m.experts
    }  # fmt: skip
    return changed, tuple(sorted(said))


def _homes(items: list[Item], graph: OpGraph) -> Iterator[tuple[int, Work, Mixture]]:
    """The work of experts, with the number of the expert (0 for all at once) and the mixture that it belongs to."""
    work = [i for i in items if isinstance(i, Work) and i.op >= 0]
    for op in graph.ops:
        if op.phase != "forward" or base_name(op.name) != "topk":
            continue
        scores, top_k = graph.tensors[op.inputs[0]], next((a for a in op.args[1:] if isinstance(a, int)), 0)
        experts = scores.shape[-1] if scores.shape else 0
        if not 0 < top_k < experts:
            continue
        for place in dict.fromkeys((op.module, op.module.rpartition(".")[0])):
            mine = [w for w in work if within(w.module, place)]
            own = _listed(mine, place, experts)
            own = own or [(0, w) for w in mine if _is_packed(graph.ops[w.op], graph, experts)]
            products = [w.shape for _, w in own if family(w.shape.name) == "gemm"]
            if products:
                mixture = Mixture(experts, top_k, scores.numel // experts, products[0].in_shapes[-2][-2])
                yield from ((index, w, mixture) for index, w in own)
                break


def _listed(work: list[Work], place: str, experts: int) -> list[tuple[int, Work]]:
    """What runs inside the children 0 to E - 1 of a list below `place`, with their numbers."""
    lists: dict[str, dict[int, list[Work]]] = {}
    for w in work:
        below = w.module.removeprefix(place).lstrip(".").split(".")
        at = next((i for i, name in enumerate(below) if name.isdigit()), -1)
        if at >= 0:
            lists.setdefault(".".join(below[:at]), {}).setdefault(int(below[at]), []).append(w)
    fitting = (children for children in lists.values() if set(children) == set(range(experts)))
    return [(index, w) for index, own in next(fitting, {}).items() for w in own]


def _is_packed(op: Op, graph: OpGraph, experts: int) -> bool:
    """Whether an op is one product for all experts."""
    if base_name(op.name) not in ("bmm", "_grouped_mm") or len(op.inputs) < 2:
        return False
    weight = graph.tensors[op.inputs[1]]
    return graph.storages[weight.storage].role == "parameter" and len(weight.shape) == 3 and weight.shape[0] == experts


def _chosen(work: Work, mixture: Mixture, graph: OpGraph) -> Work:
    """The work of one expert where it is chosen, or a product of all of them with those that are."""
    shape, share, less = work.shape, mixture.read / mixture.experts, min(mixture.rows, mixture.slots)
    op = graph.ops[work.op]
    name = base_name(shape.name)
    if _is_packed(op, graph, mixture.experts):
        whole = ceil(mixture.read - 1e-9)
        rows, weight, *rest = shape.in_shapes
        given = (whole, less, rows[2]) if name == "bmm" else (min(rows[0], mixture.tokens * mixture.top_k), rows[1])
        made = (*given[:-1], weight[2])
        ins = (given, (whole, *weight[1:]), *rest)
        return replace(work, shape=_resized(shape, ins, (made,), op), share=mixture.read / whole)
    if name in ("mm", "addmm"):
        *bias, rows, weight = shape.in_shapes
        return replace(
            work, shape=_resized(shape, (*bias, (less, rows[1]), weight), ((less, weight[1]),), op), share=share
        )
    read, written = (n * less // mixture.slots for n in (shape.bytes_read, shape.bytes_written))
    return replace(work, shape=replace(shape, bytes_read=read, bytes_written=written), share=share)


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]


def _resized(
    shape: OpShape, ins: tuple[tuple[int, ...], ...], outs: tuple[tuple[int, ...], ...], op: Op
) -> OpShape:  # fmt: skip
    size = DTYPE_BYTES[shape.dtype]
    flops = flops_of(shape.name, [_Shape(s) for s in ins], [_Shape(s) for s in outs], op)
    read, written = (size * sum(map(prod, shapes)) for shapes in (ins, outs))
    return replace(shape, in_shapes=ins, out_shapes=outs, flops=flops, bytes_read=read, bytes_written=written)
