"""The head of a language model in inference, as engines run it: logits of the last token alone, and a vocabulary split
over tensor-parallel ranks.

Training plans do neither: the loss needs the logits of all tokens, and `parallelize_module` is given pairs of Linears.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodels.families import family
from opgraph.graph import Op, OpGraph, Tensor
from planner.layout import propagate
from planner.plan import ParallelPlan, Sharding
from planner.rules import ShardingError
from planner.runtime_stage import Stage
from planner.script import Item, Message
from planner.stages import within

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True, slots=True)
class Head:
    """module: path of the module whose product makes the logits. tokens: the dim of what it is called with along which
    tokens lie, -1 where tokens have no dim of their own there. owner: path of the module that owns its weight (an
    embedding, where they are tied). vocabulary: rows of the weight."""

    module: str
    tokens: int
    owner: str
    vocabulary: int


def head_of(graph: OpGraph) -> Head | None:
    """The head of a traced forward pass: the last product of a weight, where only views and element-wise ops follow.
    None where there is none, or its weight has no vocabulary of its own (an embedding of as many rows)."""
    products = [op for op in graph.ops if op.name.split(".")[1] in PRODUCTS]
    if not products:
        return None
    last = products[-1]
    owners = {t.storage: name.rpartition(".")[0] for name, t in graph.parameters.items() if len(t.shape) == 2}
    weights = [t for t in last.inputs if graph.tensors[t].storage in owners]
    if not weights or sum(op.module == last.module for op in products) > 1:
        return None
    storage = graph.tensors[weights[-1]].storage
    rows = next(t.shape[0] for t in graph.parameters.values() if t.storage == storage)
    if rows not in {graph.tensors[op.inputs[0]].shape[0] for op in _embeddings(graph)}:
        return None
    inside = [op for op in graph.ops if op.module == last.module]
    return Head(last.module, _token_dim(graph, inside, last), owners[storage], rows)


def _embeddings(graph: OpGraph) -> list[Op]:
    return [op for op in graph.ops if op.name.split(".")[1] == "embedding"]


def _token_dim(graph: OpGraph, inside: list[Op], product: Op) -> int:
    """Follows views back to what the module is called with: (batch, tokens, width), in any order of the first two. -1
    where the module does more than the product (a model that multiplies with its embedding itself)."""
    if any(op.module != product.module and within(op.module, product.module) for op in graph.ops):
        return -1
    if any(op is not product and op.name.split(".")[1] in (*PRODUCTS, "embedding") for op in inside):
        return -1
    read = product.inputs[-2]
    for op in reversed(inside):
        if op.is_view and read in op.outputs:
            read = op.inputs[0]
    if any(read in op.outputs for op in inside):
        return -1
    called: Tensor = graph.tensors[read]
    plain = [d for d in range(len(called.shape) - 1) if not (called.per_batch and called.per_batch[d])]
    return plain[0] if len(called.shape) == 3 and len(plain) == 1 else -1


def head_shardings(
    graph: OpGraph, tp: int, pairs: tuple[tuple[str, Sharding], ...]
) -> tuple[tuple[str, Sharding], ...]:
    """`pairs` with the head split by columns and the embedding of its vocabulary by rows, as far as the model allows:
    each rank has a part of the vocabulary, looks up its own tokens, and sums of all ranks are the embeddings."""
    head = head_of(graph)
    if head is None or tp == 1 or head.vocabulary % tp or any(path in (head.module, head.owner) for path, _ in pairs):
        return pairs
    tables = {op.module for op in _embeddings(graph) if graph.tensors[op.inputs[0]].shape[0] == head.vocabulary}
    split: tuple[tuple[str, Sharding], ...] = ()
    if head.owner not in tables:
        split = ((head.owner, "colwise"),)
    both: tuple[tuple[str, Sharding], ...] = (*((path, "rowwise") for path in sorted(tables)), *pairs, *split)
    for wanted in (both, (*pairs, *split)):
        try:
            propagate(graph, ParallelPlan(global_batch=1, tp=tp, shardings=wanted))
        except ShardingError:
            continue
        return wanted
    return pairs


def whole_parts(graph: OpGraph, plan: ParallelPlan) -> tuple[str, ...]:
    """What every tensor-parallel rank has whole although engines split it, in sentences."""
    if plan.tp == 1:
        return ()
    said, head, tp = [], head_of(graph), plan.tp
    if head is not None and head.vocabulary % tp:
        said.append(
            f"every rank has the whole vocabulary: {head.vocabulary} tokens do not divide by tp = {tp}, and nothing is "
            f"padded"
        )
    elif head is not None and not {head.owner, head.module} & set(plan.style):
        said.append("every rank has the whole head and embedding: what the model does with its logits needs them whole")
    placements = propagate(graph, plan).placements
    whole = [op for op in graph.ops if family(op.name) == "attention" and placements[op.inputs[0]] < 0]
    if whole:
        said.append(
            f"attention is whole on every rank ({whole[0].module!r} and others): its heads, those of keys among them, "
            f"do not split over tp = {tp}; engines copy heads of keys, so a smaller tp may take less here"
        )
    return tuple(said)


def gathered(stage: Stage) -> tuple[int, str]:
    """Bytes of all logits that the ranks of the last stage gather, and the module that they come from; 0 where every
    rank has them whole."""
    made = next((op for op in reversed(stage.ops.forward) if op.outputs), None)
    if made is None or stage.ops.index + 1 < stage.plan.pp or stage.layout.placements[made.outputs[0]] < 0:
        return 0, ""
    return stage.graph.tensors[made.outputs[0]].bytes, made.module


def with_gathered(items: list[Item], stage: Stage) -> list[Item]:
    """The forward pass of a stage with the message that puts the parts of the logits together."""
    size, module = gathered(stage)
    return [*items, Message("all_gather", size, "tp", "forward", module)] if size else items
