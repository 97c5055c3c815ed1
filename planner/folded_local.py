"""What one rank holds of every tensor of a folded step: split by tensor, sequence and vocabulary parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from costmodels.families import UNREAD, base_name
from costmodels.ops import OpShape, is_causal
from opgraph.flops import flops_of
from opgraph.graph import DTYPE_BYTES, Op, OpGraph, Phase, Tensor
from planner.layout import Layout, Reduction, propagate
from planner.plan import ParallelPlan
from planner.rules import ShardingError, local_shape
from planner.stages import within

Shape = tuple[int, ...]
OUTSIDE = ("embed", "positions", "head", "<loss>", "transform", "norm", "")  # modules around the blocks

# What traces on a CPU call by another name than a GPU does.
DEVICE_NAMES = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default":
        "aten._scaled_dot_product_flash_attention_backward.default",
    "aten.mkldnn_convolution.default": "aten.convolution.default",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Local:
    """seq: tokens per sequence on a context-parallel rank; vocab: size that embedding and logits share (0: none)."""

    graph: OpGraph
    plan: ParallelPlan
    layout: Layout
    seq: int
    vocab: int
    vocab_parallel: bool
    reductions: dict[int, list[Reduction]] = field(default_factory=dict)
    # storage -> the ops that read it
    readers: dict[int, list[Op]] = field(default_factory=dict)
    makers: dict[int, Op] = field(default_factory=dict)  # tensor -> the op that made it
    end: int = 0  # the last op of backward
    apart: tuple[str, ...] = ()  # modules with experts: they are traced on the part of the sequence that a rank has

    @property
    def tp(self) -> int:
        return self.plan.tp

    def tensor(self, t: Tensor, tokens: bool) -> tuple[Shape, int]:
        """Shape and bytes of one rank's part. `tokens`: what is whole under tp is split along the sequence."""
        placement, parts = self.placement(t), self.tp
        if placement < 0 and tokens and t.role not in ("parameter", "buffer"):
            placement = self._token_dim(t.shape)
        if placement < 0 or parts == 1:
            return t.shape, t.bytes
        if t.shape[placement] % parts:
            raise ShardingError(f"dim {placement} of size {t.shape[placement]} does not divide into {parts} parts")
        shape = local_shape(t.shape, placement, parts)
        return shape, t.bytes // parts if not t.strides or t.strides[placement] else t.bytes

    def placement(self, t: Tensor) -> int:
        if self.vocab_parallel and self.vocab and self.vocab in t.shape:
            return t.shape.index(self.vocab)
        return self.layout.placements[t.id]

    def _token_dim(self, shape: Shape) -> int:
        if len(shape) >= 3 and shape[1] == self.seq:
            return 1
        if len(shape) == 2 and shape[0] and shape[0] % self.seq == 0:
            return 0
        return -1

    def by_tokens(self, op: Op) -> bool:
        """Whether sequence parallelism splits this op: nothing that it reads or makes is split by tp already."""
        if not self.plan.sequence_parallel or self.tp == 1 or op.module in self.plan.style:
            return False
        if op.module.split(".")[0] not in ("blocks", "norm", "positions"):
            return False
        if any(within(op.module, path) for path in self.apart) and not op.module.endswith((".take", ".give")):
            return False
        tensors = (self.graph.tensors[t] for t in (*op.inputs, *op.outputs))
        return all(self.placement(t) < 0 for t in tensors if t.role != "parameter")

    def shape(self, op: Op, phase: Phase | None = None) -> OpShape:
        """The op as one rank runs it on a device."""
        tensors = self.graph.tensors
        tokens = self.by_tokens(op)
        ins = tuple(self.tensor(tensors[t], tokens)[0] for t in op.inputs)
        outs = tuple(self.tensor(tensors[t], tokens)[0] for t in op.outputs)
        flops = op.flops
        split = any(self.placement(tensors[t]) >= 0 for t in (*op.inputs, *op.outputs))
        if flops and split and self.tp > 1:
            flops = flops_of(op.name, [_Shape(s) for s in ins], [_Shape(s) for s in outs], op)
        read = written = 0
        if not op.is_view:
            read = sum(self.tensor(tensors[t], tokens)[1] for t in read_by(op))
            written = sum(self.tensor(tensors[t], tokens)[1] for t in dict.fromkeys((*op.outputs, *op.mutates)))
            if base_name(op.name) in ("nll_loss_forward", "nll_loss_backward"):  # one entry of every row
                read = 32 * ins[op.phase == "backward"][0] if len(ins) > 1 else read
        name = DEVICE_NAMES.get(op.name, op.name)
        dtype = dtype_of(self.graph, op)
        return OpShape(name, phase or op.phase, ins, outs, dtype, flops, read, written, is_causal(op))

    def storage_bytes(self, tensor: int, op: Op) -> int:
        return self.tensor(self.graph.tensors[tensor], self.by_tokens(op))[1]

    def parameter(self, name: str) -> Shape:
        return self.tensor(self.graph.parameters[name], False)[0]

    def parameter_elements(self, names: tuple[str, ...]) -> int:
        return sum(prod(self.parameter(n)) for n in names)


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: Shape


def read_by(op: Op) -> tuple[int, ...]:
    """The tensors whose values an op reads, once each."""
    return () if base_name(op.name) in UNREAD else tuple(dict.fromkeys(op.inputs))


def dtype_of(graph: OpGraph, op: Op) -> str:
    """The floating type that an op computes in: a product's that of its factors, else that of its result."""
    order = (*op.outputs, *op.inputs, *op.mutates)
    if base_name(op.name) in ("mm", "addmm", "bmm", "baddbmm"):
        order = (*op.inputs, *op.outputs)
    dtypes = [graph.tensors[i].dtype for i in order]
    return next((d for d in dtypes if "float" in d), dtypes[0] if dtypes else "float32")


def local_step(graph: OpGraph, plan: ParallelPlan, seq: int, vocab: int, vocab_parallel: bool) -> Local:
    """Placements of a folded step. ValueError where a shape does not divide."""
    layout = propagate(graph, plan) if plan.tp > 1 and plan.shardings else Layout(
        plan.tp, (-1,) * len(graph.tensors), ()
    )  # fmt: skip
    end = max((op.id for op in graph.ops if op.phase == "backward"), default=0)
    experts = [name.rpartition(".up.")[0] for name, t in graph.parameters.items() if len(t.shape) == 3]
    local = Local(
        graph, plan, replace(layout, parts=plan.tp), seq, vocab, vocab_parallel and plan.tp > 1, end=end,
        apart=tuple(name for name in dict.fromkeys(experts) if name),
    )  # fmt: skip
    for reduction in layout.reductions:
        local.reductions.setdefault(reduction.after, []).append(reduction)
    for op in graph.ops:
        for t in op.outputs:
            local.makers.setdefault(t, op)
        if op.phase in ("forward", "backward") and not op.is_view:
            for s in {graph.tensors[t].storage for t in op.inputs}:
                local.readers.setdefault(s, []).append(op)
    return local


def element_bytes(dtype: str) -> int:
    return DTYPE_BYTES[dtype]
