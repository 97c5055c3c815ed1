"""Fully sharded data parallelism of a folded step: every block gathered before it is used, twice a micro-batch."""

from __future__ import annotations

from planner.folded_kernels import SLOWED
from planner.folded_pieces import Where
from planner.folded_step import SIXTEEN, Context, Lane, optimizer

AHEAD = 2  # blocks whose whole parameters exist at once: the one that computes, and the next


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
    before = dict(c.tally.seconds)
    gather = {w: c.message("all_gather", n * own, "dp") for w, n in elements.items() if n}
    scatter = {w: c.message("reduce_scatter", n * reduced, "dp") for w, n in elements.items() if n}
    whole = (c.message("all_gather", root * own, "dp"), c.message("reduce_scatter", root * reduced, "dp"))
    c.tally.seconds = before
    first, last = c.parts.by_where["first"], c.parts.by_where["last"]
    reduces: list[int] = []
    for _ in range(plan.micro_batches):
        ready = lane.message("gather root", "all_gather", whole[0], [lane.free])
        lane.run("F first", "forward", first.forward.run, [ready])
        ends = _passes(c, lane, blocks, gather, False)
        lane.run("F last", "forward", last.forward.run)
        lane.run("B last", "backward", last.backward.run)
        ends = _passes(c, lane, blocks[::-1], gather, True)
        for end, where in zip(ends, blocks[::-1]):
            reduces.append(lane.message("scatter", "reduce_scatter", scatter[where], [end]))
            lane.busy("slowed", "backward", SLOWED * scatter[where])
        lane.run("B first", "backward", first.backward.run)
        reduces.append(lane.message("scatter root", "reduce_scatter", whole[1], [lane.free]))
    for where in blocks:
        c.tally.add("dp all_gather", 2 * gather[where] * plan.micro_batches, "roofline", 0.0)
        c.tally.add("dp reduce_scatter", scatter[where] * plan.micro_batches, "roofline", 0.0)
    optimizer(c, lane, sum(sum(c.elements(chunk)) for chunk in c.chunks), reduces[-len(blocks) - 1 :])


def _passes(c: Context, lane: Lane, blocks: list[Where], gather: dict[Where, float], backward: bool) -> list[int]:
    """One pass; block i + 1 is gathered while block i computes. Returns the task that ends each block."""
    ends: list[int] = []
    for i, where in enumerate(blocks):
        part = c.parts.by_where[where]
        after = ends[i - AHEAD] if i >= AHEAD else lane.free if not ends else ends[0]
        ready = lane.message("gather", "all_gather", gather[where], [after if i else lane.free])
        lane.busy("slowed", "wait", SLOWED * gather[where])
        run = (part.backward if backward else part.forward).run
        ends.append(lane.run("B" if backward else "F", "backward" if backward else "forward", run, [ready]))
    return ends
