"""Whether a model's own code works on parts: its forward pass is traced with the parameters that one rank would have.

Shapes tell which Linears can be split, not what the model does between them. `view(batch, length, heads, head_dim)`
with the model's number of heads fails on a rank that has fewer of them, and `view(batch, length, heads, -1)` goes on
with heads that are too narrow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from costmodels.families import family
from opgraph.graph import OpGraph
from opgraph.workload import Workload
from planner.inference_graph import trace_forward
from planner.layout import propagate
from planner.plan import ParallelPlan, Sharding
from planner.rules import local_shape

if TYPE_CHECKING:
    from torch import nn

Shardings = tuple[tuple[str, Sharding], ...]
Products = dict[tuple[str, tuple[tuple[int, ...], ...]], str]  # op and shapes of what it reads -> a module that runs it
HEAVY = ("gemm", "attention")
ADVICE = "Let views take the number of heads from what they get: view(..., -1, head_dim)"


def forward_of(workload: Workload) -> OpGraph:
    """The forward pass that parts are compared with."""
    return trace_forward(workload, "fp32", accelerator=False)


def workable(workload: Workload, whole: OpGraph, shardings: Shardings, tp: int) -> tuple[Shardings, str]:
    """The shardings with which the model runs on a rank's parts: all, or those of the kinds of pairs that run alone, as
    far as they run together; and why the others are left out ("" where none is). whole: `forward_of` the workload."""
    why = _trial(workload, whole, shardings, tp)
    if not why:
        return shardings, ""
    kept: Shardings = ()
    for kind in dict.fromkeys(map(_kind, _pairs(shardings))):
        own = {s for pair in _pairs(shardings) if _kind(pair) == kind for s in pair}
        more = tuple(s for s in shardings if s in own or s in kept)
        if not _trial(workload, whole, more, tp):
            kept = more
    return kept, why


def _pairs(shardings: Shardings) -> Iterator[Shardings]:
    """The colwise Linears up to and with the rowwise one that they belong to."""
    begin = 0
    for i, (_, style) in enumerate(shardings):
        if style == "rowwise":
            yield shardings[begin : i + 1]
            begin = i + 1


def _kind(pair: Shardings) -> str:
    """The same for the pairs of all blocks."""
    return re.sub(r"\d+", "*", pair[-1][0])


def kinds(shardings: Shardings) -> str:
    """The pairs in words, those of all blocks once."""
    return ", ".join(dict.fromkeys(map(_kind, _pairs(shardings))))


def _trial(workload: Workload, whole: OpGraph, shardings: Shardings, tp: int) -> str:
    """Why the forward pass of one rank does not run, or computes something else; empty where it does not."""
    def build() -> nn.Module:
        module = workload.build()
        _keep_part(module, shardings, tp)
        return module

    try:
        part = forward_of(replace(workload, build=build))
    except ValueError as error:
        what = str(error).removeprefix(f"{workload.name} cannot be traced: ").partition("; check that")[0]
        return f"on a part of what it works on, its code fails: {what}. {ADVICE}"
    if whole.traced_on == "real":  # how many rows an expert gets depends on data
        return ""
    wanted = _products(whole, ParallelPlan(global_batch=1, tp=tp, shardings=shardings))
    for (name, shapes), module in _products(part, ParallelPlan(global_batch=1)).items():
        if (name, shapes) not in wanted:
            read = " and ".join(str(list(s)) for s in shapes)
            return f"{module!r} would compute {name} of {read}, no part of what it computes on one device. {ADVICE}"
    return ""


def _keep_part(module: nn.Module, shardings: Shardings, tp: int) -> None:
    """Leaves the first rank's parts of the sharded Linears' parameters; `in_features` and `out_features` stay, as they
    do on a rank."""
    from torch import nn

    for path, style in shardings:
        linear = module.get_submodule(path)
        dim = 0 if style == "colwise" else 1
        names = ("weight", "bias") if style == "colwise" else ("weight",)
        for name in names:
            found = getattr(linear, name, None)
            if isinstance(found, nn.Parameter):
                part = found.detach().narrow(dim, 0, found.shape[dim] // tp).clone()
                setattr(linear, name, nn.Parameter(part, requires_grad=found.requires_grad))


def _products(graph: OpGraph, plan: ParallelPlan) -> Products:
    """Products and attentions by their names and the local shapes of what they read."""
    placements = propagate(graph, plan).placements
    return {
        (
            op.name,
            tuple(local_shape(graph.tensors[t].shape, placements[t], plan.tp) for t in op.inputs),
        ): op.module
        for op in graph.ops
        if family(op.name) in HEAVY
    }


__all__ = ["forward_of", "kinds", "workable"]
