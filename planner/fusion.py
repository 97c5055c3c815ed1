"""Which ops run as one kernel, and what that kernel then reads and writes.

Pointwise work, norms, softmax, reductions and copies that follow each other are joined: over the ops of one module
(hand-written kernels), or over all that lie between two products (compilers). A joined kernel reads what comes from
outside it once and writes what others read. What only the backward of the same module reads is made again there from
the kernel's inputs, which is what such kernels do (bias and GELU, SwiGLU, masked softmax); random masks are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from costmodels.families import COMPUTE, FREE, base_name, family
from costmodels.ops import OpShape
from opgraph.graph import Op
from planner.folded_local import Local, read_by
from planner.layout import accumulates
from planner.software import Software
from planner.stages import LOSS

RANDOM = frozenset({"bernoulli", "native_dropout", "rand", "rand_like", "uniform"})
NORMS = ("norm", "norm1", "norm2", "q_norm", "kv_norm")
_RANK = {"norm_backward": 4, "norm": 4, "softmax": 3, "loss": 2, "reduction": 1}


@dataclass(slots=True)
class Fused:
    """Groups of ops that run as one kernel each. `hidden`: storages that a forward kernel keeps to itself -> the
    tensors that it read."""

    local: Local
    software: Software
    hidden: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def groups(self, ops: Sequence[Op]) -> Iterator[list[Op]]:
        """Consecutive ops of one kernel; a product or attention is alone, views go with what follows them."""
        group: list[Op] = []
        key: object = None
        for op in ops:
            own = self._key(op)
            if own is None:  # a view, or what allocates without writing
                group.append(op)
                continue
            if group and key is not None and (own != key or own == op.id):
                yield group
                group = []
            group.append(op)
            key = own
        if group:
            yield group

    def _key(self, op: Op) -> object:
        kind = family(op.name)
        if op.is_view or kind in FREE:
            return None
        fusion = self.software.fusion
        if kind in COMPUTE or kind == "embedding" or op.module in self.local.plan.style:
            return op.id
        if op.module == LOSS and not self.software.fused_loss:
            return op.id
        norm = self.software.fused_norms and op.module.rpartition(".")[2] in NORMS
        if fusion == "none" and not norm and op.module != LOSS:
            return op.id
        if fusion == "chain":
            return "chain"
        return op.id if self._joins_branches(op) else op.module

    def _joins_branches(self, op: Op) -> bool:
        """Whether autograd sums gradients here that other modules made: the engine does it, in a kernel of its own."""
        makers = (self.local.makers.get(t) for t in op.inputs)
        return accumulates(op) and any(m is not None and m.module != op.module for m in makers)

    def shape(self, group: Sequence[Op]) -> OpShape | None:
        """The kernel of a group; None where it launches nothing."""
        real = [op for op in group if self._key(op) is not None]
        if not real:
            return None
        if len(real) == 1 and not any(self.local.graph.tensors[t].storage in self.hidden for t in real[0].inputs):
            return self.local.shape(real[0])
        main = max(real, key=lambda op: (_RANK.get(family(op.name), 0), _size(self.local, op)))
        read, written = self._traffic(real, joined=self._key(real[0]) != real[0].id)
        whole = self.local.shape(main)
        name = whole.name
        if len(real) > 1 and real[0].module.rpartition(".")[2] in NORMS:  # traces spell out what kernels do at once
            backward = real[0].phase == "backward"
            name = f"aten._fused_rms_norm{'_backward' if backward else ''}.default"
        return OpShape(
            name, whole.phase, whole.in_shapes, whole.out_shapes, whole.dtype,
            sum(self.local.shape(op).flops for op in real), read, written,
        )  # fmt: skip

    def _traffic(self, real: Sequence[Op], joined: bool) -> tuple[int, int]:
        tensors = self.local.graph.tensors
        made: dict[int, int] = {}  # storage -> bytes
        outside: dict[int, dict[int, int]] = {}  # storage -> the tensors of it that are read -> bytes
        sources: list[int] = []
        own = {op.id for op in real}
        for op in real:
            for t in read_by(op):
                s = tensors[t].storage
                if s in made:
                    continue
                for source in self.hidden.get(s, (t,)):
                    size = self.local.storage_bytes(source, op)
                    seen = outside.setdefault(tensors[source].storage, {})
                    seen[source] = max(seen.get(source, 0), size)
                    sources.append(source)
            for t in (*op.outputs, *op.mutates):
                made[tensors[t].storage] = max(made.get(tensors[t].storage, 0), self.local.storage_bytes(t, op))
        random = {tensors[t].storage for op in real if base_name(op.name) in RANDOM for t in (*op.outputs, *op.mutates)}
        modules = {op.module for op in real}
        written = 0
        for s, size in made.items():
            readers = [op for op in self.local.readers.get(s, ()) if op.id not in own]
            again = joined and real[0].phase == "forward" and s not in random
            if readers and again and all(op.phase == "backward" and op.module in modules for op in readers):
                self.hidden[s] = tuple(dict.fromkeys(sources))
            elif readers or self.local.graph.storages[s].death > self.local.end:
                written += size if s not in random else size // 2  # a mask is a byte per element
        return sum(self._read_of(s, views) for s, views in outside.items()), written

    def _read_of(self, storage: int, views: dict[int, int]) -> int:
        """Bytes that are read of a storage through several views: of halves both, of views of everything once."""
        if len(views) == 1:
            return next(iter(views.values()))
        graph = self.local.graph
        share = max(size / max(graph.tensors[t].bytes, 1) for t, size in views.items())  # that this rank has
        return min(sum(views.values()), max(int(share * graph.storages[storage].bytes), *views.values()))


def _size(local: Local, op: Op) -> int:
    shape = local.shape(op)
    return shape.bytes_read + shape.bytes_written
