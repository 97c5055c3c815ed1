"""What cross entropy keeps of the logits until its backward, and where the gradient of the logits is written.

A trace holds torch's own: a float32 copy of the logits, the float32 log-softmax (kept), two float32 gradients, and one
in the logits' dtype. Programs that run the loss otherwise keep other things; see `planner.software.Loss`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from costmodels.families import base_name
from opgraph.graph import Op
from planner.folded_local import Local
from planner.software import Loss
from planner.stages import LOSS

# Bytes a token that are kept besides. flash-attn: its log-sum-exp in float32 (a compiled loss keeps about as much).
# Transformer Engine pytorch/triton/cross_entropy.py: maximum, sum and target's logit in float32, of every rank that
# splits the vocabulary. Megatron-LM: which targets are this rank's (bool) and their index (int64).
LOG_SUM, ONLINE, TARGETS = 4, 12, 9


@dataclass(frozen=True, slots=True)
class LossMemory:
    """Against the trace: storages that are never made; storages that live until another op (its id) than traced;
    bytes of storages on one rank."""

    never: frozenset[int] = frozenset()
    until: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)


def loss_memory(local: Local, loss: Loss) -> LossMemory:
    """The storages of a traced loss that are other ones in a program that runs it as `loss` says."""
    graph = local.graph
    ops = [op for op in graph.ops if op.module == LOSS and op.phase in ("forward", "backward")]
    top = next((op for op in ops if base_name(op.name) == "_log_softmax"), None)
    if loss == "traced" or top is None:
        return LossMemory()
    softmax = graph.tensors[top.outputs[0]]
    made = {phase: _made(local, [op for op in ops if op.phase == phase], prod(softmax.shape)) for phase in _PHASES}
    gradient = graph.storages[made["backward"][-1]]
    never = {*made["forward"], *made["backward"]}
    logits = _logits(local, ops, prod(softmax.shape))
    rows = prod(softmax.shape[:-1])
    kept = logits
    if loss == "softmax" and len(made["forward"]) > 1:  # float32 logits have no copy: they turn into the softmax
        kept = softmax.storage
    over = loss == "in place" or (loss == "softmax" and kept == logits)
    until = {kept: gradient.death if over else gradient.birth}
    total = next(op for op in ops if base_name(op.name) == "nll_loss_forward").outputs[1]  # any small tensor it keeps
    never -= {kept} if over else {kept, gradient.id}
    besides = {"softmax": TARGETS, "logits": LOG_SUM, "in place": ONLINE * (local.tp if local.vocab_parallel else 1)}
    return LossMemory(frozenset(never), until, {graph.tensors[total].storage: rows * besides[loss]})


_PHASES = ("forward", "backward")


def _made(local: Local, ops: list[Op], elements: int) -> list[int]:
    """Storages as large as the logits that these ops make, in order."""
    tensors, storages = local.graph.tensors, local.graph.storages
    found = [tensors[t] for op in ops for t in op.outputs if storages[tensors[t].storage].birth == op.id]
    return list(dict.fromkeys(t.storage for t in found if prod(t.shape) == elements))


def _logits(local: Local, ops: list[Op], elements: int) -> int:
    """The storage that the loss is computed from."""
    tensors, own = local.graph.tensors, {op.id for op in ops}
    inputs = (tensors[t] for op in ops for t in op.inputs)
    return next(
        t.storage for t in inputs
        if prod(t.shape) == elements and local.graph.storages[t.storage].birth not in own
    )  # fmt: skip
