"""Allocations and frees of a folded step on one stage, from the traced lifetimes, for the caching allocator.

A part's storages are born and die with its ops, once for every block and micro-batch (`folded_lifetimes`). A forward
storage that backward reads lives until that part's backward; one that only the next part reads dies when that part
begins. Parameters, gradient buffer and optimizer state are there from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import prod

from costmodels.allocator import CachingAllocator, replay
from planner.folded_fsdp import AHEAD
from planner.folded_lifetimes import events_of
from planner.folded_memory import Memory, state_bytes
from planner.folded_model import Chunk
from planner.folded_orders import order
from planner.folded_pieces import WHERES, Where
from planner.folded_step import SIXTEEN, Context
from planner.plan import ParallelPlan

STEPS = 2  # steps that are replayed: the second finds the cache of the first


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
    parts = {(w, again): events_of(c, w, again) for w in WHERES for again in (False, True)}
    remade = _recomputed_blocks(c, own)
    ids = count()
    each = state_bytes(c.software, plan).at_step
    sizes = [each * size for chunk in own for w, n in chunk.parts for size in _parameter_sizes(c, w) * n]
    for size in (memory.parameters, memory.gradients, memory.optimizer, memory.gathered):
        if size:
            yield next(ids), size
    live: dict[tuple[int, int, Where, int], dict[int, tuple[int, int]]] = {}  # of a part's run: storage -> id, bytes
    for _ in range(STEPS):
        for step in order(stage, plan.pp, plan.vpp, _replayed_micro_batches(plan), plan.schedule == "gpipe"):
            runs: list[tuple[Where, int]] = [(w, i) for w, n in own[step.chunk].parts for i in range(n)]
            passing: list[tuple[int, int]] = []
            for w, i in reversed(runs) if step.backward else runs:
                part = parts[w, (step.chunk, w, i) in remade]
                mine = live.setdefault((step.chunk, step.micro, w, i), {})
                for name, size in passing:
                    yield name, -size
                for births, deaths in part.backward if step.backward else part.forward:
                    for s, size in births:
                        if size and s not in mine:
                            mine[s] = next(ids), size
                            yield mine[s]
                    for s in deaths:
                        if s in mine:
                            name, size = mine.pop(s)
                            yield name, -size
                passing = [mine.pop(s) for s in list(mine) if step.backward or s not in part.kept]
            for name, size in passing:
                yield name, -size
        copies = [(next(ids), size) for size in sizes if memory.at_step]
        yield from copies
        yield from ((name, -size) for name, size in copies)


def _parameter_sizes(c: Context, where: Where) -> list[int]:
    """Elements of a part's parameters on one rank; tied ones belong to the first part where one stage has both. Where
    optimizers are sharded, each is copied by its share."""
    plan, names = c.plan, c.parts.pieces.parameters[where]
    if where == "last" and plan.pp == 1:
        names = tuple(n for n in names if n not in c.parts.pieces.parameters["first"])
    ranks = plan.dp * plan.cp if plan.data_parallel in ("zero1", "zero2", "fsdp") else 1
    return [prod(c.parts.local.parameter(name)) // ranks for name in names]


def _replayed_micro_batches(plan: ParallelPlan) -> int:
    """So many of a step's micro-batches that its schedule repeats itself at least once: those that follow find the same
    memory (peaks of all 50 published interleaved plans are those of the whole step, to the byte)."""
    if plan.schedule == "gpipe":
        return plan.micro_batches
    enough = 2 * plan.pp + 2 if plan.vpp == 1 else 3 * plan.pp + plan.micro_batches % plan.pp
    return min(plan.micro_batches, enough)


def _recomputed_blocks(c: Context, own: list[Chunk]) -> set[tuple[int, Where, int]]:
    """The blocks of a stage whose modules are recomputed, by chunk, kind and number: its first ones, as many as the
    share says (Megatron's method "block", and Aceso's plans by the share of their operators)."""
    parts = [(i, w, n) for i, chunk in enumerate(own) for w, n in chunk.parts if w.startswith("block")]
    blocks = [(i, w, k) for i, w, n in parts for k in range(n)]
    return set(blocks[: round(c.software.recompute_share * len(blocks))])
