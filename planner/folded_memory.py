"""Peak memory of a folded step: what rests on a rank between steps, and the activations that its pipeline holds.

Activations of a part are the storages that its forward makes and its backward reads (from the traced lifetimes, at
local sizes, without what fused kernels make again, and with what the loss keeps). A stage holds them for every
micro-batch that is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from opgraph.graph import Op
from planner.folded_lifetimes import events_of, leaves, sizes_of
from planner.folded_local import Local
from planner.folded_model import Chunk
from planner.folded_orders import order
from planner.folded_parts import recomputed
from planner.folded_pieces import WHERES, Where
from planner.folded_step import SIXTEEN, Context
from planner.plan import ParallelPlan
from planner.software import Software, is_autocast
from planner.stages import within


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest stage by category; allocated is their sum. gathered: of the workspace, whole parameters of
    FSDP while they compute. at_step: what only the optimizer's step needs, when activations are gone."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    gathered: int = 0
    at_step: int = 0

    @property
    def allocated(self) -> int:
        passing = max(self.activations + self.workspace, self.at_step)
        return self.parameters + self.gradients + self.optimizer + passing


def memory_of(c: Context, stage: int) -> Memory:
    """One stage's memory at its worst moment, closed form."""
    plan, software = c.plan, c.software
    own = [c.chunks[i * plan.pp + stage] for i in range(plan.vpp)]
    dense = sum(c.elements(chunk)[0] for chunk in own)
    experts = sum(c.elements(chunk)[1] for chunk in own)
    replicas, expert_replicas = plan.dp * plan.cp, plan.expert_replicas
    fsdp = plan.data_parallel == "fsdp"
    sharded = plan.data_parallel in ("zero1", "zero2", "fsdp")
    shard = (dense / replicas + experts / expert_replicas) if sharded else dense + experts
    whole = dense + experts
    state = state_bytes(software, plan)
    saved = {w: _saved(c, w) for w in WHERES}
    activations, last = _in_flight(c, own, stage, saved)
    gathered = 0
    if fsdp:  # two blocks, and the root, are whole while they compute
        blocks = [c.parts.by_where[w].elements for chunk in own for w, _ in chunk.parts if w.startswith("block")]
        root = sum(c.parts.by_where[w].elements for chunk in own for w, _ in chunk.parts if not w.startswith("block"))
        gathered = (2 * max(blocks) + root) * (2 if plan.precision in SIXTEEN else 4)
    parts = [(w, n) for chunk in own for w, n in chunk.parts if _is_cast(w, plan)]
    weights = {w: sum(prod(c.parts.local.parameter(name)) for name in c.parts.pieces.parameters[w]) for w, _ in parts}
    casts = state.casts * sum(weights[w] * n for w, n in parts)  # of a tied head, too
    return Memory(
        int((shard if fsdp else whole) * state.parameter + casts),
        int((shard if fsdp or plan.data_parallel == "zero2" else whole) * state.gradient),
        int(shard * state.optimizer),
        int(activations),
        int(last + gathered),
        int(gathered),
        int((shard if sharded else whole) * state.at_step),
    )


@dataclass(frozen=True, slots=True)
class State:
    """Bytes per parameter of what rests between steps, or while passes run. casts: of copies of weights in fewer bits.
    at_step: of what exists only when the optimizer runs."""

    parameter: int
    gradient: int
    optimizer: int
    casts: int = 0
    at_step: int = 0


def state_bytes(software: Software, plan: ParallelPlan) -> State:
    """What a trainer holds of a parameter."""
    sixteen, replicas = plan.precision in SIXTEEN, plan.dp * plan.cp
    cast = is_autocast(software, plan)
    own = 4 if plan.data_parallel == "fsdp" or cast or not sixteen else 2
    moments = {"adam": 8, "sgd": 4, "none": 0}[software.optimizer]
    master = 4 if own == 2 and software.optimizer != "none" else 0
    gradient, at_step = software.main_grads or own, 0
    if software.optimizer != "none" and (own == 2) != bool(software.adam_passes):
        at_step = software.step_copies  # Adam in several kernels is that of float32 parameters
    eight = plan.precision == "fp8" and software.fp8_weights and plan.data_parallel != "fsdp"  # FSDP frees weights
    casts = 2 if cast or eight else 0
    if software.ddp and plan.data_parallel == "ddp":
        if plan.micro_batches == 1:  # freed after each step, made while activations go
            gradient, at_step = 0, gradient + at_step
        gradient += own if replicas > 1 else 0  # buckets
    return State(own, gradient, moments + master, casts, at_step)


def _is_cast(where: Where, plan: ParallelPlan) -> bool:
    """Whether weights of a part have copies in fewer bits: in fp8 those of blocks alone, else all but embeddings'."""
    return where.startswith("block") or (where == "last" and plan.precision != "fp8")


def _in_flight(
    c: Context, own: list[Chunk], stage: int, saved: dict[Where, tuple[int, int]]
) -> tuple[float, float]:
    """Most bytes of saved activations at once, and what the running part needs beside them."""
    live = peak = 0.0
    sizes = [sum(saved[w][0] * n for w, n in chunk.parts) for chunk in own]
    running = max(saved[w][1] for chunk in own for w, _ in chunk.parts)
    for step in order(stage, c.plan.pp, c.plan.vpp, c.plan.micro_batches, c.plan.schedule == "gpipe"):
        live += -sizes[step.chunk] if step.backward else sizes[step.chunk]
        peak = max(peak, live)
    return peak, running


def _saved(c: Context, where: Where) -> tuple[int, int]:
    """Bytes that one run of a part keeps for its backward, and the most that exist only while it runs."""
    local, pieces = c.parts.local, c.parts.pieces
    forward, share = pieces.forward[where], c.software.recompute_share
    again, regions = recomputed(local.plan, where, list(forward))
    inside = {op.id for op in again}
    kept = again_bytes = 0
    sizes = sizes_of(c, where, share > 0)
    for op in forward:
        for s, size in sizes.births(op):
            if not sizes.kept(s):
                continue
            if op.id in inside and not leaves(local, s, regions):
                again_bytes += size
            else:
                kept += size
    if again and any(within(f"blocks.{0 if where == 'block0' else 1}", r) for r in regions):
        # a whole block: only what it reads is kept, where it is recomputed
        kept = int(share * _border(local, forward) + (1 - share) * (kept + again_bytes))
    elif again:
        kept += int((1 - share) * again_bytes)
    again_bytes = again_bytes if share else 0  # nothing comes back where nothing is recomputed
    if where == "last":
        return kept, events_of(c, where, False).beside()
    passing = max((_passing(local, op) for op in (*forward, *pieces.backward[where])), default=0)
    return kept, again_bytes + passing


def _border(local: Local, forward: tuple[Op, ...]) -> int:
    """Bytes of the hidden state that enters a block; a tensor-parallel rank keeps its part where it may."""
    first = next(op for op in forward if not op.is_view)
    return local.storage_bytes(first.inputs[0], first)


def _passing(local: Local, op: Op) -> int:
    """Bytes that an op makes; two such results exist at once where one is computed from the other."""
    return 0 if op.is_view else 2 * max((local.storage_bytes(t, op) for t in op.outputs), default=0)
