"""Fully sharded data parallelism of a folded step: every block gathered before it is used, twice a micro-batch."""

from __future__ import annotations

from costmodels.ops import OpShape, price
from costmodels.overlap import beside
from planner.folded_groups import Groups
from planner.folded_lane import Lane
from planner.folded_overlap import lost
from planner.folded_pieces import Where
from planner.folded_step import SIXTEEN, Context, optimizer

# FSDP2 copies on the compute stream (torch distributed/fsdp/_fully_shard/_fsdp_collectives.py): `all_gather_copy_out`
# reads the gathered buffer and writes each parameter; `foreach_reduce_scatter_copy_in` reads the gradients and writes
# the buffer that is scattered, in the dtype of the reduction.
# When a gather may begin: with FSDP2 in forward as soon as the block two before it has been copied out, in backward the
# block before it (_fsdp_param_group.py: `wait_for_unshard` lets the gathering streams wait for one event or the other,
# `_backward_prefetch`); with FSDP1 when the block two before it has been freed (`limit_all_gathers`).
AHEAD = 2


def fsdp_step(c: Context, lane: Lane) -> None:
    """The step of one rank; first and last part are one unit that stays whole from forward to backward."""
    plan = c.plan
    if plan.pp > 1:
        raise ValueError("zero3 (FSDP) inside a pipeline is not folded yet; use zero1 with pp, or pp = 1")
    blocks: list[Where] = [w for where, n in c.chunks[0].parts if where not in ("first", "last") for w in [where] * n]
    c.count_pass(c.chunks[0], plan.micro_batches)
    elements = {w: part.elements for w, part in c.parts.by_where.items()}
    root = elements["first"] + elements["last"]
    own = 2 if plan.precision in SIXTEEN else 4
    reduced = c.software.reduce_bytes if plan.precision in SIXTEEN else 4
    micro = plan.micro_batches
    times = {w: micro * n for w, n in c.chunks[0].parts}
    again = {w: 2 * n - (micro if c.software.fsdp_keeps_last and w == blocks[-1] else 0) for w, n in times.items()}
    gather = {w: _message(c, "all_gather", w, own, again[w]) for w in dict.fromkeys(blocks)}
    scatter = {w: _message(c, "reduce_scatter", w, reduced, times[w]) for w in gather}
    whole = (
        c.message("all_gather", root * own, "dp", times=micro),
        c.message("reduce_scatter", root * reduced, "dp", times=micro),
    )
    out = {w: _copied(c, elements[w] * own, elements[w] * own, again[w] if w in gather else micro) for w in times}
    into = {w: _copied(c, elements[w] * own, elements[w] * reduced, n) for w, n in times.items()}
    first, last = c.parts.by_where["first"], c.parts.by_where["last"]
    forward, backward = (_with_loss(c, gather, own, "all_gather", b) for b in (False, True))
    scattered = _with_loss(c, scatter, reduced, "reduce_scatter", True)
    reduces: list[int] = []
    for _ in range(plan.micro_batches):
        root_here = lane.message("gather root", "all_gather", whole[0], [lane.free])
        copied = lane.busy("copy out root", "copy", out["first"] + out["last"], [root_here])
        lane.run("F first", "forward", first.forward.run)
        _passes(c, lane, blocks, forward, out, {}, {}, (root_here, copied))
        begun = lane.run("F last", "forward", last.forward.run)
        lane.run("B last", "backward", last.backward.run)
        reduces += _passes(c, lane, blocks[::-1], backward, out, into, scattered, (begun, begun))
        lane.run("B first", "backward", first.backward.run)
        lane.busy("copy in root", "copy", into["first"] + into["last"])
        reduces.append(lane.message("scatter root", "reduce_scatter", whole[1], [lane.free]))
    dense, experts = (sum(held) for held in zip(*(c.elements(chunk) for chunk in c.chunks)))
    optimizer(c, lane, dense, reduces[-len(blocks) - 1 :], experts)


def _message(c: Context, kind: str, where: Where, element: int, times: int) -> float:
    """Seconds of gathering or scattering a unit, so many times a step; expert-parallel experts are a message of their
    own, among the ranks that have the same ones."""
    part = c.parts.by_where[where]
    if c.plan.ep == 1:
        return c.message(kind, part.elements * element, "dp", times=times)
    shared = part.experts and c.plan.expert_replicas > 1
    apart = c.message(kind, part.experts * element, "edp", times=times) if shared else 0.0
    return c.message(kind, (part.elements - part.experts) * element, "dp", times=times) + apart


def _with_loss(
    c: Context, seconds: dict[Where, float], element: int, kind: str, backward: bool
) -> dict[Where, tuple[float, float]]:
    """Seconds of a block's message and the share of them that a block like it loses beside it, by kind of block; none
    where messages do not run beside kernels."""
    found = {}
    for where, length in seconds.items():
        part = c.parts.by_where[where]
        other = beside(c.cluster, kind, part.elements * element, Groups(c.plan).ranks("dp"), length)
        share = lost(c.cluster, [(part.backward if backward else part.forward, 1)], other)
        found[where] = length, share if c.software.dp_overlap else 0.0
    return found


def _copied(c: Context, read: int, written: int, times: int) -> float:
    """Seconds of one of the step's copies between parameters and buffer; 0 where they are views of each other."""
    if not c.software.fsdp_copies or not read:
        return 0.0
    flat = ((read // 2,),)
    shape = OpShape("aten.copy_.default", "forward", flat, flat, "bfloat16", 0, read, written)
    cost = price(c.cluster.device, shape)
    c.tally.add("fsdp copies", cost.seconds * times, cost.source, cost.error)
    return cost.seconds


def _passes(
    c: Context, lane: Lane, blocks: list[Where], gather: dict[Where, tuple[float, float]], out: dict[Where, float],
    into: dict[Where, float], scatter: dict[Where, tuple[float, float]], before: tuple[int, int],
) -> list[int]:  # fmt: skip
    """One pass; the next blocks are gathered while one computes, and backward (which scatters) hands on the gradients
    of a block meanwhile. gather, scatter: seconds, and the share of them that kernels beside lose. out, into: seconds
    of copies before and after a block. before: tasks after which the first gather, and the second, may begin. Returns
    the messages of gradients."""
    copied: list[int] = []
    ends: list[int] = []
    sent: list[int] = []
    overlapped = c.software.dp_overlap
    for i, where in enumerate(blocks):
        part = c.parts.by_where[where]
        seconds, lost = gather[where]
        after = before[i] if i < len(before) else ends[i - AHEAD]
        if c.software.fsdp_copies and i:
            after = copied[i - 1] if scatter else copied[i - AHEAD] if i >= AHEAD else before[1]
        if not scatter or i or not c.software.fsdp_keeps_last:
            # Beside the first runs what came before the blocks, which is little.
            wait = after if overlapped else lane.free
            ready = lane.message("gather", "all_gather", seconds, [wait], lost if i else 0.0)
            copied.append(lane.busy("copy out", "copy", out[where], [ready]))
        else:
            copied.append(before[0])
        run = (part.backward if scatter else part.forward).run
        end = lane.run("B" if scatter else "F", "backward" if scatter else "forward", run)
        ends.append(lane.busy("copy in", "copy", into[where]) if into.get(where) else end)
        if scatter:
            sent.append(lane.message("scatter", "reduce_scatter", scatter[where][0], [ends[-1]], scatter[where][1]))
            if not overlapped:
                lane.busy("wait", "wait", 0.0, sent[-1:])
    return sent
