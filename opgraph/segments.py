"""Whose is what in the step of a model with four of its blocks, for `opgraph.unfold`.

In the short graph the blocks are numbered 0, 1, 2, 3; in the long one 0, 1 ... N-3, N-2, N-1: block 1 is repeated.
What a block does is a segment of ops (one in forward, one in backward, maybe one in the optimizer). A tensor or op of
a segment has a key: where in its block's segment it stands; things of several blocks with one key correspond.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import groupby

from opgraph.fold import KEPT
from opgraph.graph import OpGraph, Ref

BlockOf = Callable[[str], int | None]
Renamed = Callable[[str, int], str]
Source = tuple[list[int] | None, int]  # ids of one key in all blocks and the distance from the block; or (None, id)
LISTS = ("aten._amp_foreach_", "aten._foreach_", "aten._fused_")


class UnfoldError(Exception):
    """The blocks of the short graph do not do the same, or something depends on how many there are."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise UnfoldError(what)


class Things:
    """The ops (or tensors, or storages) of the short graph: whose they are, and their ids in the long graph."""

    def __init__(self, size: int, count: int) -> None:
        self.count = count  # blocks of the long graph
        self.owner: list[int | None] = [None] * size
        self.key: list[Hashable] = [None] * size
        self.ids: dict[Hashable, list[int]] = {}  # key -> id by long block, -1 where that block has none
        self.alone = [-1] * size  # ids of what no block owns
        self.twin = list(range(size))  # of a thing of block 1 in block 2, and back; else the thing itself

    def own(self, thing: int, block: int, key: Hashable) -> None:
        self.owner[thing], self.key[thing] = block, key
        self.ids.setdefault(key, [-1] * self.count)

    def pair(self) -> list[tuple[int, int]]:
        """Things of block 1 with their twins in block 2."""
        second = {self.key[i]: i for i, owner in enumerate(self.owner) if owner == 2}
        pairs = [(i, second.get(self.key[i], -1)) for i, owner in enumerate(self.owner) if owner == 1]
        need(len(pairs) == len(second) and all(j >= 0 for _, j in pairs), "two blocks make different things")
        for i, j in pairs:
            self.twin[i], self.twin[j] = j, i
        return pairs

    def far(self, block: int) -> int:
        """Short block number -> long block number."""
        return block if block < 2 else self.count - KEPT + block

    def assign(self, thing: int, block: int | None, new: int) -> None:
        if block is None:
            self.alone[thing] = new
        else:
            self.ids[self.key[thing]][block] = new

    def id_of(self, thing: int, block: int | None) -> int:
        return self.alone[thing] if block is None else self.ids[self.key[thing]][block]

    def same(self, a: int, b: int) -> bool:
        """Whether block 1's reference to `a` is block 2's reference to `b`."""
        mine, other = self.owner[a], self.owner[b]
        if a == b:
            return mine in (None, 0, 3)
        return mine is not None and other == mine + 1 and self.key[a] == self.key[b]

    def source(self, block: int | None, thing: int, twin: int = -1) -> Source:
        """How something of `block` finds `thing`; `twin` is what its twin finds (blocks 1 and 2 only)."""
        owner = self.owner[thing]
        if owner is None:
            return None, self.alone[thing]
        table = self.ids[self.key[thing]]
        if block is not None and block in (1, 2) and thing != twin:
            return table, owner - block
        wrong: tuple[int, ...] = {None: (1, 2), 0: (2,), 3: (1,)}.get(block, ())
        need(owner not in wrong, "something outside the blocks uses a block in the middle")
        return None, table[self.far(owner)]


def find(source: Source, block: int) -> int:
    table, place = source
    new = place if table is None else table[block + place]
    need(new >= 0, "a block lacks what its neighbour uses")
    return new


# -- whose is what ------------------------------------------------------------------------------------------


def pieces(graph: OpGraph, ops: Things, block_of: BlockOf) -> Iterator[tuple[int | None, range, bool]]:
    """The short graph cut into segments: block, ops, whether blocks run backwards there.

    Blocks may run several times one after the other, as in optimizers that go over the parameters twice.
    """
    done = 0
    for kind, group in groupby(graph.ops, lambda op: "backward" if op.phase == "recompute" else op.phase):
        here = list(group)
        end, reverse = done + len(here), kind == "backward"
        order = (3, 2, 1, 0) if reverse else (0, 1, 2, 3)
        marked = ((block_of(op.module), op.id) for op in here)
        runs = [
            (block, [op for _, op in run])
            for block, run in groupby(((b, op) for b, op in marked if b is not None), lambda mark: mark[0])
        ]
        need(len(runs) % KEPT == 0, "not every block takes part in the step")
        for turn in range(0, len(runs), KEPT):
            four = runs[turn : turn + KEPT]
            need(tuple(block for block, _ in four) == order, "the blocks do not run one after the other")
            cuts = [*(marks[0] for _, marks in four), four[-1][1][-1] + 1]
            if done < cuts[0]:
                yield None, range(done, cuts[0]), reverse
            for block, low, high in zip(order, cuts, cuts[1:]):
                for op in range(low, high):
                    ops.own(op, block, (kind, turn, op - low))
                yield block, range(low, high), reverse
            done = cuts[-1]
        if done < end:
            yield None, range(done, end), reverse
        done = end


def ordered(piece: tuple[int | None, range, bool], count: int) -> Iterator[tuple[int, int | None]]:
    """Ops of the long graph, as (op of the short one, long block), in the order in which they run."""
    block, span, reverse = piece
    if block != 1:
        place = None if block is None else block if block == 0 else count - KEPT + block
        yield from ((op, place) for op in span)
        return
    middle = range(1, count - 2)
    for place in reversed(middle) if reverse else middle:
        yield from ((op, place) for op in span)


def made_by(graph: OpGraph) -> list[list[int]]:
    """Tensors made before the step, then by each op."""
    before = sum(1 for t in graph.tensors if t.name)
    made, seen = [list(range(before))], before
    for op in graph.ops:
        new = sorted({t for t in (*op.inputs, *op.outputs, *op.mutates) if t >= seen})
        need(new == list(range(seen, seen + len(new))), "tensors are not numbered as the ops make them")
        made.append(new)
        seen += len(new)
    need(seen == len(graph.tensors), "some tensors belong to no op")
    return made


def own_tensors(graph: OpGraph, made: list[list[int]], ops: Things, tensors: Things, block_of: BlockOf) -> None:
    named = [0] * KEPT
    for t in made[0]:
        block = block_of(graph.tensors[t].name)
        if block is not None:
            tensors.own(t, block, ("before", named[block]))
            named[block] += 1
    for op, new in zip(graph.ops, made[1:]):
        block = ops.owner[op.id]
        if block is not None:
            for n, t in enumerate(new):
                tensors.own(t, block, (ops.key[op.id], n))
        elif op.name.startswith(LISTS) and len(new) == len(op.outputs):
            model = next((a for a in op.args if isinstance(a, tuple) and len(a) == len(new)), ())
            listed = [0] * KEPT
            for t, like in zip(new, model):
                block = tensors.owner[like.tensor] if isinstance(like, Ref) else None
                if block is not None:
                    tensors.own(t, block, ("list", op.id, listed[block]))
                    listed[block] += 1


def own_storages(graph: OpGraph, tensors: Things, storages: Things) -> dict[int, int]:
    """Storages belong to whom their first tensor belongs; returns these first tensors."""
    holder: dict[int, int] = {}
    for t in graph.tensors:
        holder.setdefault(t.storage, t.id)
    need(list(holder) == list(range(len(graph.storages))), "storages are not numbered as the tensors")
    for storage, first in holder.items():
        owner = tensors.owner[first]
        if owner is not None:
            storages.own(storage, owner, tensors.key[first])
    return holder


def expanded(items: Iterable[int], tensors: Things) -> list[tuple[int, int | None]]:
    """A list over all blocks: what it holds of block 1 is repeated; each with its long block."""
    out: list[tuple[int, int | None]] = []
    waiting: list[int] = []
    for owner, run in groupby(items, lambda t: tensors.owner[t]):
        here = list(run)
        need(owner == 2 or not waiting, "a list does not hold the blocks one after the other")
        if owner == 1:
            waiting = here
        elif owner == 2:
            need([tensors.twin[t] for t in here] == waiting, "a list holds other things of one block than of another")
            out += [(t, block) for block in range(1, tensors.count - 2) for t in waiting]
            out += [(t, tensors.count - 2) for t in here]
            waiting = []
        else:
            out += [(t, None if owner is None else tensors.far(owner)) for t in here]
    need(not waiting, "a list does not hold the blocks one after the other")
    return out
