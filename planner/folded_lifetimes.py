"""When the storages of a folded part are made and freed, and how large they are, from the traced lifetimes.

What a joined kernel keeps to itself is never allocated; a loss may keep other things than the trace (`folded_loss`),
and products in fp8 keep their inputs in fp8.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from costmodels.families import base_name, family
from opgraph.graph import DTYPE_BYTES, Op
from planner.folded_local import Local
from planner.folded_loss import loss_memory
from planner.folded_parts import recomputed
from planner.folded_pieces import Where
from planner.folded_step import Context
from planner.fusion import RANDOM
from planner.stages import within


@dataclass(slots=True)
class PartEvents:
    """Storages of one part: (storage, bytes) by op in forward and backward; what is kept for backward."""

    forward: list[tuple[list[tuple[int, int]], list[int]]] = field(default_factory=list)
    backward: list[tuple[list[tuple[int, int]], list[int]]] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)

    def beside(self) -> int:
        """Most bytes that exist at once in one run of the part, beyond what it keeps for its backward. Exact."""
        peak, sizes = 0, {s: size for births, _ in self.forward for s, size in births}
        live = -sum(sizes[s] for s in self.kept)
        for i, (births, deaths) in enumerate((*self.forward, *self.backward)):
            if i == len(self.forward):  # what the next part read is gone
                live = 0
                sizes = {s: size for s, size in sizes.items() if s in self.kept}
            sizes.update(births)
            live += sum(size for _, size in births)
            peak = max(peak, live)
            live -= sum(sizes.pop(s, 0) for s in deaths)
        return peak


@dataclass(slots=True)
class Sizes:
    """Bytes of the storages of a part's forward and backward on one rank, without those that are never made; what is
    freed at which op; what is kept though no backward op reads it."""

    local: Local
    hidden: set[int]
    masks: set[int]
    factors: dict[int, float]
    stated: dict[int, int]
    until: dict[int, int]
    held: set[int]

    def births(self, op: Op) -> list[tuple[int, int]]:
        """Storages that an op makes."""
        found: dict[int, int] = {}
        for t in op.outputs:
            tensor = self.local.graph.tensors[t]
            s = self.local.graph.storages[tensor.storage]
            if s.birth == op.id and s.id not in self.hidden and s.role != "parameter":
                found.setdefault(s.id, self.bytes_of(t, op))
        return list(found.items())

    def bytes_of(self, t: int, op: Op) -> int:
        """Bytes of a tensor's storage, which this op makes; a random mask is a byte per element on a device."""
        tensor = self.local.graph.tensors[t]
        if tensor.storage in self.stated:
            return self.stated[tensor.storage]
        size = self.local.storage_bytes(t, op)
        if tensor.storage in self.masks:
            return size // DTYPE_BYTES[tensor.dtype]
        return int(size * self.factors.get(tensor.storage, 1.0))

    def deaths(self, op: Op) -> list[int]:
        """Storages that nothing needs after this op."""
        tensors, storages = self.local.graph.tensors, self.local.graph.storages
        touched = {tensors[t].storage for t in (*op.inputs, *op.outputs)}
        return [
            *(s for s in touched if s not in self.until and storages[s].death == op.id),
            *(s for s, last in self.until.items() if last == op.id),
        ]

    def kept(self, storage: int) -> bool:
        """Whether a forward's storage is there until backward."""
        return storage in self.held or self.local.graph.storages[storage].death > _end(self.local)


def sizes_of(c: Context, where: Where, again: bool) -> Sizes:
    """again: whether what the plan recomputes is recomputed, which keeps what it reads."""
    local, forward = c.parts.local, c.parts.pieces.forward[where]
    tensors = local.graph.tensors
    loss = loss_memory(local, c.software.loss)
    made = {*loss.until, *loss.sizes}
    return Sizes(
        local,
        ({*c.parts.kernels.fused.hidden} - made) | loss.never,
        {tensors[t].storage for op in forward if base_name(op.name) in RANDOM for t in (*op.outputs, *op.mutates)},
        _in_fp8(c, forward) | _gathered(c),
        loss.sizes,
        loss.until,
        cached(c, where, forward, again) | {*loss.until},
    )


def events_of(c: Context, where: Where, again: bool) -> PartEvents:
    """Births and deaths of one part; `again` as in `sizes_of`."""
    local, pieces = c.parts.local, c.parts.pieces
    forward, backward = pieces.forward[where], pieces.backward[where]
    remakes, regions = recomputed(local.plan, where, list(forward))
    inside = {op.id for op in remakes} if again else set()
    gradients = {op for _, op in local.graph.gradient_ops}
    sizes, found = sizes_of(c, where, again), PartEvents()
    remade: list[tuple[int, int]] = []
    for op in forward:
        births = sizes.births(op)
        found.forward.append((births, [s for s in sizes.deaths(op) if s not in sizes.held]))
        for s, size in births:
            if not sizes.kept(s):
                continue
            if op.id in inside and not leaves(local, s, regions):
                remade.append((s, size))
            else:
                found.kept.add(s)
    for i, op in enumerate(backward):
        births = [] if op.id in gradients and c.software.main_grads else sizes.births(op)
        found.backward.append(((remade if i == 0 else []) + births, sizes.deaths(op)))
    return found


def cached(c: Context, where: Where, forward: tuple[Op, ...], again: bool) -> set[int]:
    """Storages that are kept though no backward op reads them. What recomputed modules read of others: a checkpoint
    keeps its inputs. And that of a block's last product under a policy which keeps the results of every second one
    (torch.utils.checkpoint stores what the policy names, needed or not; a compiler cuts the graph before backward and
    saves only what backward reads: torch _functorch/partitioners.py). Of the others it keeps as many bytes as the
    traced lifetimes do: query and value for those that attention reads, and the gate."""
    graph, tensors, held = c.parts.local.graph, c.parts.local.graph.tensors, set[int]()
    remade = {op.id: op for op in recomputed(c.plan, where, list(forward))[0]} if again else {}
    for op in remade.values():
        read = {tensors[t].storage for t in op.inputs}
        held |= {s for s in read if graph.storages[s].birth not in remade}
    if 0 < c.software.recompute_matmuls < 1 and c.software.fusion != "chain":
        last = [op for op in forward if family(op.name) == "gemm" and op.module.startswith("blocks.")][-1:]
        held |= {tensors[t].storage for op in last for t in op.outputs}
    return held


def leaves(local: Local, storage: int, regions: tuple[str, ...]) -> bool:
    """Whether something outside the recomputed regions reads a storage."""
    readers = local.readers.get(storage, ())
    return any(not any(within(op.module, r) for r in regions) for op in readers if op.phase == "backward")


def _gathered(c: Context) -> dict[int, float]:
    """What column-split products read, where it stays whole for their backward, over the part that a rank made."""
    if c.software.joined or not c.plan.sequence_parallel or c.plan.tp == 1:
        return {}
    return dict.fromkeys(c.parts.kernels.read.values(), float(c.plan.tp))


def _in_fp8(c: Context, forward: tuple[Op, ...]) -> dict[int, float]:
    """Of what products with weights read, the bytes kept over the traced ones (2 an element): fp8 alone where their own
    backward is all that reads it, fp8 besides where another op keeps it, too (attention its output)."""
    graph, found = c.parts.local.graph, dict[int, float]()
    if c.plan.precision != "fp8" or not c.software.fp8_inputs:
        return found
    for op in forward:
        storages = [graph.storages[graph.tensors[t].storage] for t in op.inputs]
        if family(op.name) != "gemm" or not any(s.role == "parameter" for s in storages):
            continue
        for s in storages:
            if s.role == "activation" and op.module.startswith("blocks."):
                readers = [r for r in c.parts.local.readers.get(s.id, ()) if r.phase == "backward"]
                found[s.id] = 0.5 if all(family(r.name) == "gemm" for r in readers) else 1.5
    return found


def _end(local: Local) -> int:
    return max((op.id for op in local.graph.ops if op.phase == "forward"), default=0)
