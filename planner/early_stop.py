"""Where a checkpoint stops computing a region again: torch.utils.checkpoint's early stop (`set_checkpoint_early_stop`,
on by default since torch 2.1 for checkpoints that do not reenter autograd). Compilers that drop dead code do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opgraph.graph import Op, OpGraph


def until_saved(graph: OpGraph, region: Sequence[Op], forward: Iterable[Op], backward: Iterable[Op]) -> list[Op]:
    """The forward ops of a region up to the last one that saves something for backward. An op that saves only what it
    reads is not run any more: autograd saves before the kernel runs.

    forward, backward: all ops of the part of the step in which the region lies.
    """
    where = {op.id: i for i, op in enumerate(region)}
    made = {t for op in forward for t in op.outputs}
    saved = {graph.tensors[t].storage for t in made} | {t.storage for t in graph.tensors if t.role == "parameter"}
    end = 0
    for back in backward:
        at = where.get(back.forward)
        if at is None:
            continue
        used = {graph.tensors[t].storage for t in back.inputs} & saved
        if not used or back.is_view:
            continue
        outputs = {graph.tensors[t].storage for t in (*region[at].outputs, *region[at].mutates)}
        end = max(end, at + 1 if used & outputs else at)
    return list(region[:end])
