"""Unfolding: from the step of a model with four of its N identical blocks to the step of the whole model, exactly.

Blocks 1 and 2 of the short graph must run the same segments, where every reference either is to the same thing (before
the blocks, after them, in the first or last block) or moves with the block (same key, same distance). Then block 1's
segment is what any block in the middle runs. Everything else is copied as it is; lists over all parameters (fused
optimizers) grow in parameter order. Whatever does not fit this raises UnfoldError, and the model is traced whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from opgraph.alike import check
from opgraph.fold import KEPT, Fold
from opgraph.graph import Op, OpGraph, Ref, Storage, Tensor
from opgraph.segments import (
    LISTS,
    BlockOf,
    Renamed,
    Source,
    Things,
    UnfoldError,
    expanded,
    find,
    made_by,
    need,
    ordered,
    own_storages,
    own_tensors,
    pieces,
)

__all__ = ["UnfoldError", "unfold"]

Placed = tuple[int, int | None]  # a thing of the short graph, and the block of the long one that it goes to


def unfold(graph: OpGraph, fold: Fold) -> OpGraph:
    """The graph of the model with all of `fold.count` blocks, from the graph of the model with KEPT of them."""
    ops, tensors, storages = (Things(len(them), fold.count) for them in (graph.ops, graph.tensors, graph.storages))
    block_of, renamed = partial(_block_of, fold), partial(_renamed, fold)
    segments = list(pieces(graph, ops, block_of))
    made = made_by(graph)
    own_tensors(graph, made, ops, tensors, block_of)
    holder = own_storages(graph, tensors, storages)
    for things in (ops, tensors, storages):
        things.pair()
    check(graph, ops, tensors, storages, block_of, renamed)

    # Ids of the long graph, in the order in which its trace would give them.
    order = [(op, block) for piece in segments for op, block in ordered(piece, fold.count)]
    for new, (op, block) in enumerate(order):
        ops.assign(op, block, new)
    born = _numbered_tensors(order, made, tensors)
    kept = _numbered_storages(graph, born, holder, storages)

    long_ops = tuple(_write_ops(graph, order, ops, tensors, renamed))
    long_tensors = tuple(_write_tensors(graph, born, tensors, storages, renamed))
    long_storages = tuple(_write_storages(graph, kept, len(order), ops, storages))
    gradients = _gradients(graph, ops, block_of, renamed)
    return OpGraph(
        graph.name, graph.batch, long_ops, long_tensors, long_storages, gradients,
        graph.precision, graph.traced_on, graph.notes, (*graph.repeats, fold.paths),
        idle=graph.idle,
    )  # fmt: skip


def _block_of(fold: Fold, path: str) -> int | None:
    """Which of the KEPT blocks a path of the short graph lies in; None outside of them."""
    place = fold.place(path)
    return place[0] - fold.start if place and 0 <= place[0] - fold.start < KEPT else None


def _renamed(fold: Fold, path: str, blocks: int) -> str:
    """The path of what moves so many `blocks` from its place in the short graph."""
    place = fold.place(path)
    if place is None or place[0] < fold.start:
        return path
    index = place[0] + (fold.count - KEPT if place[0] >= fold.start + KEPT else blocks)
    return f"{fold.container}.{index}" + (f".{place[1]}" if place[1] else "")


def _numbered_tensors(order: list[Placed], made: list[list[int]], tensors: Things) -> list[Placed]:
    """The tensors of the long graph as its ops make them, each given its id there."""
    born: list[Placed] = []
    for op, block in [(-1, None), *order]:
        new_ones = made[op + 1]
        born += expanded(new_ones, tensors) if block is None else [(i, block) for i in new_ones]
    for new, (i, block) in enumerate(born):
        tensors.assign(i, block, new)
    return born


def _numbered_storages(graph: OpGraph, born: list[Placed], holder: dict[int, int], storages: Things) -> list[Placed]:
    """The storages of the long graph in the order of the tensors that hold them, each given its id there."""
    kept: list[Placed] = []
    for i, block in born:
        storage = graph.tensors[i].storage
        if holder[storage] == i:
            storages.assign(storage, block, len(kept))
            kept.append((storage, block))
    return kept


def _write_tensors(
    graph: OpGraph, born: list[Placed], tensors: Things, storages: Things, renamed: Renamed
) -> Iterator[Tensor]:
    for new, (i, block) in enumerate(born):
        t, owner = graph.tensors[i], tensors.owner[i]
        twin = graph.tensors[tensors.twin[i]].storage
        storage = find(storages.source(owner, t.storage, twin), block or 0)
        name = renamed(t.name, shift(owner, block)) if t.name else ""
        yield Tensor(new, t.shape, t.strides, t.dtype, storage, t.role, t.per_batch, name, t.strides_per_batch)


def _write_storages(
    graph: OpGraph, kept: list[Placed], count: int, ops: Things, storages: Things
) -> Iterator[Storage]:
    """`count`: ops of the long graph, after the last of which dies what lives until the end."""
    ends = {-1: -1, len(graph.ops): count}
    for new, (i, block) in enumerate(kept):
        s, twin, owner = graph.storages[i], graph.storages[storages.twin[i]], storages.owner[i]
        birth, death = (
            ends[op] if op in ends else find(ops.source(owner, op, like), block or 0)
            for op, like in ((s.birth, twin.birth), (s.death, twin.death))
        )
        yield Storage(new, s.bytes, s.bytes_per_batch, s.role, birth, death)


def shift(owner: int | None, block: int | None) -> int:
    return 0 if owner is None or block is None else block - owner


def _write_ops(
    graph: OpGraph, order: list[Placed], ops: Things, tensors: Things, renamed: Renamed
) -> Iterator[Op]:
    sources: dict[int, dict[int, Source]] = {}
    shifted: dict[tuple[str, int], str] = {}

    def grown(items: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(tensors.id_of(t, b) for t, b in expanded(items, tensors))

    def grown_args(value: Any, model: tuple[Any, ...]) -> Any:
        """Lists of tensors grow; lists of as many numbers (step sizes per parameter) grow like `model`."""
        if isinstance(value, Ref):
            return Ref(grown((value.tensor,))[0])
        if not isinstance(value, tuple):
            return value
        if value and all(isinstance(v, Ref) for v in value):
            return tuple(Ref(t) for t in grown(tuple(v.tensor for v in value)))
        if model and len(value) == len(model) and not any(isinstance(v, tuple) for v in value):
            place = {ref.tensor: n for n, ref in enumerate(model)}
            return tuple(value[place[t]] for t, _ in expanded(list(place), tensors))
        return tuple(grown_args(v, model) for v in value)

    for new, (i, block) in enumerate(order):
        op, owner = graph.ops[i], ops.owner[i]
        if owner is None and op.name.startswith(LISTS):
            model = next((a for a in op.args if isinstance(a, tuple) and a and isinstance(a[0], Ref)), ())
            yield Op(
                new, op.name, op.phase, op.module, grown(op.inputs), grown(op.outputs), grown(op.mutates),
                tuple(grown_args(a, model) for a in op.args), grown_args(op.kwargs, ()), op.flops, op.is_view,
                op.forward, op.flops_per_batch, op.args_per_batch,
            )  # fmt: skip
            continue
        if i not in sources:
            sources[i] = _op_sources(op, graph.ops[ops.twin[i]], owner, tensors)
        now = {t: find(source, block or 0) for t, source in sources[i].items()}
        place = (op.module, shift(owner, block))
        if place not in shifted:
            shifted[place] = renamed(*place)
        twin = graph.ops[ops.twin[i]].forward
        yield Op(
            new, op.name, op.phase, shifted[place], tuple([now[t] for t in op.inputs]),
            tuple([now[t] for t in op.outputs]), tuple([now[t] for t in op.mutates]), _filled(op.args, now),
            _filled(op.kwargs, now) if op.kwargs else (), op.flops, op.is_view,
            -1 if op.forward < 0 else find(ops.source(owner, op.forward, twin), block or 0), op.flops_per_batch,
            op.args_per_batch,
        )  # fmt: skip


def _op_sources(op: Op, twin: Op, owner: int | None, tensors: Things) -> dict[int, Source]:
    sources: dict[int, Source] = {}
    for mine, other in zip(_tensors_of(op), _tensors_of(twin)):
        source = tensors.source(owner, mine, other)
        need(sources.setdefault(mine, source) == source, f"op {op.id} uses a tensor in two ways")
    return sources


def _tensors_of(op: Op) -> Iterator[int]:
    def refs(value: Any) -> Iterator[int]:
        if isinstance(value, Ref):
            yield value.tensor
        elif isinstance(value, tuple):
            for v in value:
                yield from refs(v)

    yield from (*op.inputs, *op.outputs, *op.mutates)
    yield from refs(op.args)
    yield from refs(op.kwargs)


def _filled(value: Any, now: dict[int, int]) -> Any:
    if type(value) is Ref:
        return Ref(now[value.tensor])
    if type(value) is tuple:
        return tuple([_filled(v, now) for v in value])
    return value


def _gradients(
    graph: OpGraph, ops: Things, block_of: BlockOf, renamed: Renamed
) -> tuple[tuple[str, int], ...]:
    done = dict(graph.gradient_ops)
    long: list[tuple[str, int]] = []
    for name, op in graph.gradient_ops:
        owner = block_of(name)
        if owner == 1:
            twin = done.get(renamed(name, 1), -1)
            need(twin >= 0 and ops.same(op, twin), f"the gradient of {name} is made elsewhere than that of its twin")
            source = ops.source(1, op, twin)
            long += [(renamed(name, block - 1), find(source, block)) for block in range(1, ops.count - 2)]
        elif owner == 2:
            twin = done.get(renamed(name, -1), -1)
            need(twin >= 0, f"there is no gradient like that of {name}")
            block = ops.count - 2
            long.append((renamed(name, block - 2), find(ops.source(2, op, twin), block)))
        else:
            block = 0 if owner is None else ops.far(owner)
            shift = 0 if owner is None else block - owner
            long.append((renamed(name, shift), find(ops.source(owner, op), block)))
    return tuple(sorted(long, key=lambda item: item[1]))
