"""What DDP, ZeroRedundancyOptimizer and fully_shard add to a step: buckets, units, partitions, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from opgraph.graph import DTYPE_BYTES, OpGraph
from planner.layout import Layout
from planner.plan import ParallelPlan
from planner.rules import local_shape
from planner.stages import StageOps, within

MIB = 2**20
DEFAULT_BUCKET = 25 * MIB
FIRST_BUCKET = 1 * MIB


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter as one rank of a stage holds it before data parallelism divides it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Unit:
    """A `fully_shard` unit: its path ("" is the root) and its parameters in module order."""

    path: str
    parameters: tuple[LocalParameter, ...]

    def gathered_bytes(self, dp: int) -> int:
        """Bytes of the gathered buffer: dim 0 of every parameter is padded to a multiple of dp."""
        return sum(padded(p, dp) * DTYPE_BYTES[p.dtype] for p in self.parameters)


def padded(p: LocalParameter, dp: int) -> int:
    """Elements of a parameter whose dim 0 is padded to a multiple of dp."""
    return ceil(p.shape[0] / dp) * dp * prod(p.shape[1:]) if p.shape else dp


def local_parameters(graph: OpGraph, layout: Layout, names: Iterable[str]) -> dict[str, LocalParameter]:
    """Parameters by name under tensor parallelism."""
    found = {}
    for name in names:
        tensor = graph.parameters[name]
        shape = local_shape(tensor.shape, layout.placements[tensor.id], layout.parts)
        found[name] = LocalParameter(name, shape, tensor.dtype)
    return found


def gradient_order(graph: OpGraph, stage: StageOps) -> dict[str, int]:
    """Parameter -> id of the op after which its gradient is complete on this stage, in that order."""
    here = {op.id for op in stage.backward}
    known = dict(graph.gradient_ops)
    ready: dict[str, int] = {}
    for name in stage.parameters:
        if known.get(name) in here:
            ready[name] = known[name]
            continue
        shape = graph.parameters[name].shape  # tied: the gradient of this stage's use ends elsewhere in the graph
        ends = [op.id for op in stage.backward if any(graph.tensors[t].shape == shape for t in op.outputs)]
        if ends and (name in known):
            ready[name] = ends[0] if len(ends) == 1 else _last_of_run(stage, ends[0])
    return dict(sorted(ready.items(), key=lambda item: item[1]))


def _last_of_run(stage: StageOps, first: int) -> int:
    at = next(i for i, op in enumerate(stage.backward) if op.id == first)
    module = stage.backward[at].module
    while at + 1 < len(stage.backward) and stage.backward[at + 1].module == module:
        at += 1
    return stage.backward[at].id


def ddp_buckets(plan: ParallelPlan, parameters: list[LocalParameter]) -> list[list[LocalParameter]]:
    """DDP's buckets of parameters in gradient order.

    A bucket closes as soon as it holds its cap; the first one's cap is 1 MiB where the default size is asked for.
    Source: torch/csrc/distributed/c10d/reducer.cpp `compute_bucket_assignment_by_size`, torch 2.13.
    """
    buckets: list[list[LocalParameter]] = [[]]
    held = 0
    for p in parameters:
        cap = FIRST_BUCKET if plan.bucket_bytes == DEFAULT_BUCKET and len(buckets) == 1 else plan.bucket_bytes
        buckets[-1].append(p)
        held += p.bytes
        if held >= cap:
            buckets.append([])
            held = 0
    return [b for b in buckets if b]


def zero1_owners(parameters: list[LocalParameter], dp: int) -> list[list[LocalParameter]]:
    """Parameters by owner: largest first, to the least laden (`ZeroRedundancyOptimizer._partition_parameters`)."""
    owned: list[list[LocalParameter]] = [[] for _ in range(dp)]
    sizes = [0] * dp
    for p in sorted(parameters, key=lambda p: -p.numel):
        rank = sizes.index(min(sizes))
        owned[rank].append(p)
        sizes[rank] += p.numel
    return owned


def no_fully_shard(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why torch's `fully_shard` refuses parameters of these shapes, in one sentence; empty where it takes them."""
    scalar = next((name for name, shape in shapes.items() if not shape), "")
    return scalar and f"fully_shard takes no scalar parameter, and {scalar} is one; make it a tensor of one element"


def no_zero1(dtypes: Mapping[str, str]) -> str:
    """Why torch's ZeroRedundancyOptimizer refuses parameters of these dtypes; empty where it takes them."""
    kinds = {dtype: name for name, dtype in reversed(list(dtypes.items()))}
    if len(kinds) < 2:
        return ""
    (a, first), (b, second) = sorted(kinds.items())[:2]
    return f"ZeroRedundancyOptimizer takes parameters of one dtype, and {first} is {a}, {second} is {b}"


def fsdp_units(plan: ParallelPlan, stage: StageOps, parameters: dict[str, LocalParameter]) -> list[Unit]:
    """Units in the order in which forward reaches them; the root, with what is left over, first. ValueError for what
    `fully_shard` refuses."""
    if plan.dp > 1 and (why := no_fully_shard({name: p.shape for name, p in parameters.items()})):
        raise ValueError(f"{why}, or use ddp or zero1")
    order: list[str] = []
    for op in stage.forward:
        for path in plan.fsdp_units:
            if within(op.module, path) and path not in order:
                order.append(path)
    taken: dict[str, str] = {}
    for path in sorted(order, key=lambda p: -len(p)):
        for name in parameters:
            if name not in taken and within(name.rpartition(".")[0], path):
                taken[name] = path
    root = Unit("", tuple(p for n, p in parameters.items() if n not in taken))
    return [root, *(Unit(path, tuple(p for n, p in parameters.items() if taken.get(n) == path)) for path in order)]
