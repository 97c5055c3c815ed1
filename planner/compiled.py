"""What `torch.compile` makes of a script: pointwise work, norms, softmaxes, reductions and copies joined into kernels.

Works from dataflow alone. As inductor does it, an op joins a kernel that already runs where both go over the same
elements (or over the rows that the kernel reduces to), where they share data (one reads what the other makes, or both
read one tensor), and where no product lies on a path between them. Views vanish. Products, attention and convolutions
stay library calls. A kernel reads what comes from outside it once, and writes what others read.

ASSUMPTIONS: each stretch of a script between messages is one compiled region; what backward reads is kept as eager
keeps it (the partitioner may make cheap values again instead); a product's epilogue is not fused into it (inductor does
that with max-autotune only). Reports name the option and list what is fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from costmodels.families import COMPUTE, FREE, base_name, family
from costmodels.features import gathers, touched
from costmodels.ops import OpShape
from opgraph.graph import OpGraph
from planner.script import Host, Item, Work

# Which member names and prices a kernel: the costliest kind.
RANK = {"norm_backward": 5, "norm": 4, "softmax": 3, "loss": 2, "reduction": 1}
# Kernels that one op needs where a kernel goes over rows: a norm's gradients of weight and bias are summed over the
# other dim; the gradient of an embedding is filled with zeros before rows are added.
PASSES = {"native_layer_norm_backward": 2, "_fused_rms_norm_backward": 2, "embedding_dense_backward": 2,
          "native_batch_norm": 2, "native_batch_norm_backward": 2}  # fmt: skip


@dataclass(slots=True)
class Kernel:
    """Ops of one kernel. elements: that it goes over; rows: results of its reductions (0: none yet)."""

    works: list[Work]
    elements: int
    rows: int
    reads: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)
    after: int = -1  # the last library call or kernel border that it depends on

    @property
    def label(self) -> str:
        """What is fused, for people: `mul + add + native_layer_norm`."""
        return " + ".join(base_name(w.shape.name) for w in self.works)


def is_fusible(name: str) -> bool:
    """Whether inductor writes a kernel for an op itself."""
    kind = family(name)
    return kind not in COMPUTE and kind not in FREE and kind not in ("optimizer", "pool", "pool_backward")


def vanishes(name: str) -> bool:
    """Whether a compiled step has no call of this op."""
    return is_fusible(name) or family(name) in FREE


def kernels_of(works: Sequence[Work], graph: OpGraph) -> list[Kernel | Work]:
    """Kernels and library calls of a stretch of work, in an order that respects what they need."""
    tensors = graph.tensors
    level: dict[int, int] = {}  # storage -> library calls on the longest path to it
    found: list[Kernel | Work] = []
    open_: list[Kernel] = []
    for work in works:
        op = graph.ops[work.op] if work.op >= 0 else None
        if op is None or (not is_fusible(work.shape.name) and family(work.shape.name) not in FREE):
            found.append(work)
            if op is not None:
                depth = max((level.get(tensors[t].storage, 0) for t in op.inputs), default=0) + 1
                for t in (*op.outputs, *op.mutates):
                    level[tensors[t].storage] = max(level.get(tensors[t].storage, 0), depth)
            continue
        if work.is_view or family(work.shape.name) in FREE:
            continue
        reads = {tensors[t].storage for t in op.inputs}
        made = {tensors[t].storage for t in (*op.outputs, *op.mutates)}
        elements, rows = _domain(work)
        depth = max((level.get(s, 0) for s in reads), default=0)
        home = next((k for k in reversed(open_) if _joins(k, reads, elements, rows, depth)), None)
        if home is None:
            home = Kernel([], elements, rows, after=depth)
            open_.append(home)
            found.append(home)
        home.works.append(work)
        home.elements, home.rows = max(home.elements, elements), max(home.rows, rows)
        home.reads |= reads - home.made
        home.made |= made
        for s in made:
            level[s] = max(level.get(s, 0), depth)
    return _inlined(found, graph)


def _inlined(found: list[Kernel | Work], graph: OpGraph) -> list[Kernel | Work]:
    """Pointwise work on fewer elements that one kernel alone reads is done inside it, again for each of its elements
    (tables of positions, broadcast scales)."""
    kernels = [k for k in found if isinstance(k, Kernel)]
    home = {w.op: i for i, k in enumerate(kernels) for w in k.works}
    readers = _readers(graph)
    gone: set[int] = set()
    for i in reversed(range(len(kernels))):
        kernel = kernels[i]
        used = {home.get(r, -1) for s in kernel.made for r in readers.get(s, ())} - {i}
        if kernel.rows or len(used) != 1:
            continue
        other = kernels[target] if (target := used.pop()) >= 0 else kernel
        if target < 0 or other.after != kernel.after or kernel.elements > other.elements:
            continue
        other.works[:0] = kernel.works
        other.made |= kernel.made
        other.reads = (other.reads | kernel.reads) - other.made
        home |= {w.op: target for w in kernel.works}
        gone.add(id(kernel))
    return [k for k in found if id(k) not in gone]


def _domain(work: Work) -> tuple[int, int]:
    """Elements that an op goes over, and results of its reduction (0: it reduces nothing)."""
    shape, kind = work.shape, family(work.shape.name)
    made = max((prod(s) for s in shape.out_shapes), default=0)
    read = max((prod(s) for s in shape.in_shapes), default=0)
    if kind in ("norm", "norm_backward", "softmax"):
        widest = max((*shape.in_shapes, *shape.out_shapes), key=prod)
        return max(made, read), max(prod(widest[:-1]), 1)
    if kind in ("reduction", "loss") and made < read:
        return read, max(made, 1)
    return made or read, 0


def _joins(kernel: Kernel, reads: set[int], elements: int, rows: int, depth: int) -> bool:
    """Whether an op may run in a kernel: same library calls before both, shared data, and elements that fit."""
    if depth != kernel.after or not reads & (kernel.reads | kernel.made):
        return False
    if rows and kernel.rows:
        return elements == kernel.elements and rows == kernel.rows
    if rows:
        return elements == kernel.elements
    return elements == kernel.elements or (kernel.rows > 0 and elements == kernel.rows)


def fused_script(items: Sequence[Item], graph: OpGraph) -> tuple[tuple[Item, ...], Counter[str]]:
    """A segment of a script as a compiled region runs it, and how often each chain was fused."""
    result: list[Item] = []
    stretch: list[Work] = []
    fused: Counter[str] = Counter()
    readers = _readers(graph)

    def close() -> None:
        for kernel in kernels_of(stretch, graph):
            if isinstance(kernel, Work):
                result.append(kernel)
                continue
            first = kernel.works[0]
            result.append(Work(_shape(kernel, graph, readers), first.phase, first.module, share=first.share))
            if len(kernel.works) > 1:
                fused[kernel.label] += 1
        stretch.clear()

    for item in items:
        if isinstance(item, Work) and item.phase != "optimizer" and (not stretch or stretch[-1].phase == item.phase):
            stretch.append(item)
            continue
        close()
        if isinstance(item, Work) and item.phase != "optimizer":
            stretch.append(item)
        else:
            result.append(item)
    close()
    if any(isinstance(i, Work) and i.op >= 0 and i.phase != "optimizer" for i in items):
        result.insert(0, Host("compiled_region", 1, next(i.phase for i in items if isinstance(i, Work))))
    return tuple(result), fused


def _readers(graph: OpGraph) -> dict[int, list[int]]:
    """Ops that read each storage, kept with the graph."""
    if "readers" not in graph.memo:
        readers: dict[int, list[int]] = {}
        for op in graph.ops:
            if not op.is_view:
                for s in {graph.tensors[t].storage for t in op.inputs}:
                    readers.setdefault(s, []).append(op.id)
        graph.memo["readers"] = readers
    found: dict[int, list[int]] = graph.memo["readers"]
    return found


def _shape(kernel: Kernel, graph: OpGraph, readers: dict[int, list[int]]) -> OpShape:
    """The kernel as an op: the costliest member's name and shapes, the bytes of what crosses its border."""
    main = max(kernel.works, key=lambda w: (RANK.get(family(w.shape.name), 0), touched(w.shape)))
    if len(kernel.works) == 1:
        return main.shape
    own = {w.op for w in kernel.works}
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for work in kernel.works:
        op = graph.ops[work.op]
        ins = dict.fromkeys(op.inputs)
        whole = sum(graph.tensors[t].bytes for t in ins)
        outs = dict.fromkeys((*op.outputs, *op.mutates))
        made = sum(graph.tensors[t].bytes for t in outs)
        for t in ins:  # the share of this rank, as the op's own local bytes say
            s = graph.tensors[t].storage
            if s not in kernel.made:
                part = graph.tensors[t].bytes * work.shape.bytes_read // max(whole, 1)
                part = min(part, work.shape.bytes_written) if gathers(work.shape.name) else part
                read[s] = max(read.get(s, 0), part)
        for t in outs:
            s = graph.tensors[t].storage
            outside = [r for r in readers.get(s, ()) if r not in own]
            if outside or graph.storages[s].death >= len(graph.ops):
                part = graph.tensors[t].bytes * work.shape.bytes_written // max(made, 1)
                written[s] = max(written.get(s, 0), part)
    shape = main.shape
    flops = sum(w.shape.flops for w in kernel.works)
    return OpShape(
        shape.name, shape.phase, shape.in_shapes, shape.out_shapes, shape.dtype, flops, sum(read.values()),
        sum(written.values()),
    )  # fmt: skip


def kernel_count(graph: OpGraph, phases: Sequence[str] = ("forward", "backward")) -> int:
    """Kernels that inductor writes itself for these phases of a traced step on one device."""
    from planner.layout import Layout
    from planner.script import local_work

    layout = Layout(1, (-1,) * len(graph.tensors), ())
    count = 0
    for phase in phases:
        works = [local_work(graph, layout, op) for op in graph.ops if op.phase == phase]
        for kernel in kernels_of(works, graph):
            if isinstance(kernel, Kernel):
                count += max(PASSES.get(base_name(w.shape.name), 1) for w in kernel.works)
    return count
