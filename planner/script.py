"""What one rank does, in program order: local ops, messages and waits. The form that lowering, the dry-run check and
the memory model share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from costmodels.context import is_stream, runs_of
from costmodels.ops import OpShape, is_causal, variant_of
from costmodels.workspace_layout import contiguous
from opgraph.flops import flops_of
from opgraph.graph import DTYPE_BYTES, Op, OpGraph, Phase
from planner.layout import Layout
from planner.rules import local_shape


@dataclass(frozen=True, slots=True)
class Work:
    """One local op: what it is priced by, where it belongs, whether it only makes a view, and how often it runs in the
    mean of many passes (experts that are not always chosen)."""

    shape: OpShape
    phase: Phase
    module: str
    is_view: bool = False
    op: int = -1  # the traced op, -1 for what a runtime adds
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Host:
    """Seconds of Python and runtime overhead, `count` times the device's `kind`."""

    kind: str
    count: float
    phase: Phase


@dataclass(frozen=True, slots=True)
class Message:
    """A collective over a mesh axis. bytes as nccl-tests counts them. `key` names it for a later `Wait`; a message
    without a key is waited for at once. `peer` is the stage at the other end of a send or recv."""

    kind: str
    bytes: int
    axis: str
    phase: Phase
    module: str = ""
    key: str = ""
    root: int = -1
    after: str = ""  # key of a copy that must be over before


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a message between pipeline stages: `source` stage to `target` stage, micro-batch `micro`. more: the
    next one is posted with it (batch_isend_irecv)."""

    source: int
    target: int
    micro: int
    bytes: tuple[int, ...]
    phase: Phase
    more: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """bytes that go to the host or to the device, beside the rank's work, once the message or copy `after` is over.
    Where both share one memory nothing is copied."""

    to: Literal["host", "device"]
    bytes: int
    phase: Phase
    key: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class HostUpdate:
    """The optimizer's step in host memory: bytes that it reads and writes."""

    bytes: int
    phase: Phase = "optimizer"


@dataclass(frozen=True, slots=True)
class Wait:
    """The rank goes on when the message, transfer or copy `key` is done."""

    key: str


Item = Work | Host | Message | Transfer | Copy | HostUpdate | Wait


def transfer_key(t: Transfer) -> str:
    return f"{t.source}>{t.target}#{t.micro}"


def tensor_shape(graph: OpGraph, layout: Layout, tensor: int) -> tuple[int, ...]:
    """Local shape of a tensor under tensor parallelism."""
    return local_shape(graph.tensors[tensor].shape, layout.placements[tensor], layout.parts)


def tensor_strides(graph: OpGraph, layout: Layout, tensor: int) -> tuple[int, ...]:
    """Local strides of a tensor under tensor parallelism."""
    t = graph.tensors[tensor]
    return tuple(local_strides(t.shape, t.strides, tensor_shape(graph, layout, tensor)))


def tensor_bytes(graph: OpGraph, layout: Layout, tensor: int) -> int:
    """Bytes that one rank reads or writes of a tensor (expanded dims once)."""
    t = graph.tensors[tensor]
    placement = layout.placements[tensor]
    parts = layout.parts if placement >= 0 and t.strides[placement] != 0 else 1
    return t.bytes // parts


def local_work(graph: OpGraph, layout: Layout, op: Op, phase: Phase | None = None) -> Work:
    """The op as one rank runs it."""
    ins = tuple(tensor_shape(graph, layout, t) for t in op.inputs)
    outs = tuple(tensor_shape(graph, layout, t) for t in op.outputs)
    dtypes = [graph.tensors[i].dtype for i in (*op.outputs, *op.inputs, *op.mutates)]
    dtype = next((d for d in dtypes if "float" in d), dtypes[0] if dtypes else "float32")
    flops = op.flops
    if flops and any(layout.placements[t] >= 0 for t in (*op.inputs, *op.outputs)):
        flops = flops_of(op.name, [_Shape(s) for s in ins], [_Shape(s) for s in outs], op)
    read = written = 0
    if not op.is_view:
        read = sum(tensor_bytes(graph, layout, t) for t in dict.fromkeys(op.inputs))
        written = sum(tensor_bytes(graph, layout, t) for t in dict.fromkeys((*op.outputs, *op.mutates)))
    phase = phase or op.phase
    operands = [graph.tensors[i].dtype for i in op.inputs if graph.tensors[i].shape]
    variant, runs = "", 1
    if not op.is_view:
        strides = ([tensor_strides(graph, layout, t) for t in ids] for ids in (op.outputs, op.inputs))
        layouts = [list(zip(shapes, steps)) for shapes, steps in zip((outs, ins), strides)]
        variant = variant_of(op.name, op.args, op.kwargs, operands, layouts[1])
        runs = runs_of(*layouts) if is_stream(op.name) else 1
    shape = OpShape(op.name, phase, ins, outs, dtype, flops, read, written, is_causal(op), variant, runs)
    return Work(shape, phase, op.module, op.is_view, op.id)


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]


def copies_nothing(graph: OpGraph, layout: Layout, op: Op) -> bool:
    """Whether a copy that makes the whole tensor contiguous is not needed on one rank: a transposed dim of which the
    rank holds one entry is contiguous already (one head per rank)."""
    if layout.parts == 1 or op.name != "aten.clone.default" or layout.placements[op.inputs[0]] < 0:
        return False
    t = graph.tensors[op.inputs[0]]
    local = tensor_shape(graph, layout, t.id)
    strides = tuple(local_strides(t.shape, t.strides, local))
    return not contiguous(t.shape, t.strides) and contiguous(local, strides)


def local_strides(shape: tuple[int, ...], strides: tuple[int, ...], local: tuple[int, ...]) -> list[int]:
    """Strides of the local tensor: those of dims that lie outside the shrunk one shrink with it."""
    shrunk = [d for d in range(len(shape)) if local[d] != shape[d]]
    result = list(strides)
    for d in shrunk:
        for e in range(len(shape)):
            if strides[e] > strides[d]:
                result[e] = strides[e] * local[d] // shape[d]
    return result


def copy_work(name: str, elements: int, dtype: str, phase: Phase, module: str) -> Work:
    """A copy that a runtime makes of `elements` elements."""
    size = elements * DTYPE_BYTES[dtype]
    return Work(OpShape(name, phase, ((elements,),), ((elements,),), dtype, 0, size, size), phase, module)


def rephased(items: Iterable[Item], phase: Phase) -> list[Item]:
    """The same items in another phase (forward ops that a checkpoint runs again)."""
    changed: list[Item] = []
    for item in items:
        if isinstance(item, Work):
            changed.append(replace(item, phase=phase, shape=replace(item.shape, phase=phase)))
        elif isinstance(item, Host | Message):
            changed.append(replace(item, phase=phase))
        else:
            changed.append(item)
    return changed
