"""Allocations and frees of a folded step on one stage, from the traced lifetimes, for the caching allocator.

A part's storages are born and die with its ops, once for every block and micro-batch. A forward storage that backward
reads lives until that part's backward; one that only the next part reads dies when that part begins. What a joined
kernel keeps to itself is never allocated. Parameters, gradient buffer and optimizer state are there from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from costmodels.allocator import CachingAllocator, replay
from costmodels.families import base_name
from opgraph.graph import DTYPE_BYTES, Op
from planner.folded_fsdp import AHEAD
from planner.folded_local import Local
from planner.folded_memory import Memory, cached, leaves
from planner.folded_orders import order
from planner.folded_parts import recomputed
from planner.folded_pieces import WHERES, Where
from planner.folded_step import SIXTEEN, Context
from planner.fusion import RANDOM

STEPS = 2  # steps that are replayed: the second finds the cache of the first


@dataclass(slots=True)
class _PartEvents:
    """Storages of one part: (storage, bytes) by op in forward and backward; what is kept for backward."""

    forward: list[tuple[list[tuple[int, int]], list[int]]] = field(default_factory=list)
    backward: list[tuple[list[tuple[int, int]], list[int]]] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)


def replayed(c: Context, stage: int, memory: Memory) -> tuple[int, int]:
    """Peak bytes allocated and reserved on a stage."""
    events = list(_events(c, stage, memory))
    found = replay([key for key, _ in events], [size for _, size in events], CachingAllocator())
    return found.peak_allocated, found.peak_reserved + _gathering(c)


def _gathering(c: Context) -> int:
    """Bytes that the stream of FSDP2's all-gathers reserves: it allocates the gathered buffers, and the allocator never
    lends a block of one stream to another (torch distributed/fsdp/_fully_shard/_fsdp_collectives.py, c10
    CUDACachingAllocator). The root's is the largest; those of blocks are cut from it."""
    if c.plan.data_parallel != "fsdp" or not c.software.fsdp_copies:
        return 0
    elements = {w: part.elements for w, part in c.parts.by_where.items()}
    largest = max(elements["first"] + elements["last"], AHEAD * max(elements["block0"], elements["block"]))
    return largest * (2 if c.plan.precision in SIXTEEN else 4)


def _events(c: Context, stage: int, memory: Memory) -> Iterator[tuple[int, int]]:
    plan = c.plan
    own = [c.chunks[i * plan.pp + stage] for i in range(plan.vpp)]
    parts = {w: _part(c, w) for w in WHERES}
    ids: dict[tuple[int, ...], int] = {}

    def key(*what: int) -> int:
        return ids.setdefault(what, len(ids))

    for i, size in enumerate((memory.parameters, memory.gradients, memory.optimizer, memory.gathered)):
        if size:
            yield key(-1, i), size
    micro = min(plan.micro_batches, 2 * plan.pp * plan.vpp + 2) if plan.vpp == 1 else plan.micro_batches
    live: dict[tuple[int, ...], int] = {}
    for turn in range(STEPS):
        for step in order(stage, plan.pp, plan.vpp, micro, plan.schedule == "gpipe"):
            runs: list[tuple[Where, int]] = [(w, i) for w, n in own[step.chunk].parts for i in range(n)]
            passing: list[tuple[int, ...]] = []
            for w, i in reversed(runs) if step.backward else runs:
                part = parts[w]
                name = (turn, step.chunk, step.micro, WHERES.index(w), i)
                for old in passing:
                    yield key(*old), -live.pop(old)
                passing = []
                for births, deaths in part.backward if step.backward else part.forward:
                    for s, size in births:
                        if size and (*name, s) not in live:
                            live[*name, s] = size
                            yield key(*name, s), size
                    for s in deaths:
                        if (*name, s) in live:
                            yield key(*name, s), -live.pop((*name, s))
                for old in [k for k in live if k[:5] == name and (step.backward or k[5] not in part.kept)]:
                    passing.append(old)
            for old in passing:
                yield key(*old), -live.pop(old)


def _part(c: Context, where: Where) -> _PartEvents:
    local, pieces = c.parts.local, c.parts.pieces
    graph, hidden = local.graph, c.parts.kernels.fused.hidden
    forward, backward = pieces.forward[where], pieces.backward[where]
    again, regions = recomputed(local.plan, where, list(forward))
    inside = {op.id for op in again} if c.software.recompute_share >= 1 else set()
    here = {op.id for op in (*forward, *backward)}
    end = max((op.id for op in graph.ops if op.phase == "forward"), default=0)
    gradients = {op for _, op in graph.gradient_ops}
    masks = {graph.tensors[t].storage for op in forward if base_name(op.name) in RANDOM for t in op.mutates}
    found = _PartEvents()
    held = cached(c, where, forward)
    sizes: dict[int, int] = {}
    remade: list[tuple[int, int]] = []
    for op in forward:
        births = _births(local, op, sizes, hidden, masks)
        found.forward.append((births, [s for s in _deaths(local, op, here) if s not in held]))
        for s, size in births:
            if graph.storages[s].death > end or s in held:
                if op.id in inside and not leaves(local, s, regions):
                    remade.append((s, size))
                else:
                    found.kept.add(s)
    first = True
    for op in backward:
        births = _births(local, op, sizes, hidden, masks)
        if op.id in gradients and c.software.main_grads:
            births = []
        found.backward.append(((remade if first else []) + births, _deaths(local, op, here)))
        first = False
    return found


def _births(
    local: Local, op: Op, sizes: dict[int, int], hidden: dict[int, tuple[int, ...]], masks: set[int]
) -> list[tuple[int, int]]:
    """Storages that an op makes, with their bytes on one rank."""
    found = []
    for t in op.outputs:
        tensor = local.graph.tensors[t]
        s = local.graph.storages[tensor.storage]
        if s.birth != op.id or s.id in hidden or s.id in sizes or s.role == "parameter":
            continue
        size = local.storage_bytes(t, op)
        sizes[s.id] = size // DTYPE_BYTES[tensor.dtype] if s.id in masks else size
        found.append((s.id, sizes[s.id]))
    return found


def _deaths(local: Local, op: Op, here: set[int]) -> list[int]:
    """Storages after whose last op of this part nothing reads them."""
    storages = {local.graph.tensors[t].storage for t in (*op.inputs, *op.outputs)}
    return [s for s in storages if local.graph.storages[s].death == op.id and op.id in here]

