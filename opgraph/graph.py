"""The operator graph of one training step: operators, tensors, storages.

Every dimension and every storage size is an affine function of the batch size, so that one traced
graph answers for every micro-batch: `OpGraph.at_batch(n)` is exact, not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from os import PathLike
from typing import Any, Literal

Phase = Literal["forward", "backward", "recompute", "optimizer"]
Role = Literal["parameter", "buffer", "input", "activation", "gradient", "optimizer_state"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "optimizer")

MOST_SAMPLES = 2**31  # of a batch: bytes of tensors stay within 64-bit integers
DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor among an op's recorded arguments."""

    tensor: int


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of memory that one or more tensors (views) share.

    `birth` is the op that allocated it (-1: it was there before the step), `death` the op after which it was
    freed (`len(ops)`: it outlives the step). `bytes_per_batch` is d(bytes)/d(batch).
    """

    id: int
    bytes: int
    bytes_per_batch: int
    role: Role
    birth: int
    death: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage as an op saw it; `name` is set for parameters, buffers and inputs.

    dim i at batch n is `shape[i] + per_batch[i] * (n - graph.batch)`, stride i likewise with `strides_per_batch`
    (empty: strides do not depend on the batch).
    """

    id: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    storage: int
    role: Role
    per_batch: tuple[int, ...]
    name: str = ""
    strides_per_batch: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that reading this tensor touches: expanded (stride 0) dims count once."""
        return prod(n for n, s in zip(self.shape, self.strides) if s != 0) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Op:
    """One aten call. `args` are its arguments with `Ref` in place of tensors; `forward` is the forward op
    that a backward op differentiates (-1 where autograd does not say); `flops` at the graph's batch size.
    `args_per_batch` is d(args)/d(batch) in the form of `args` (empty: they do not depend on the batch)."""

    id: int
    name: str
    phase: Phase
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mutates: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    flops: int
    is_view: bool
    forward: int = -1
    flops_per_batch: int = 0
    args_per_batch: tuple[Any, ...] = ()


@dataclass(frozen=True)
class OpGraph:
    """One training step of one model, in execution order.

    `gradient_ops` are (parameter, op) pairs in the order in which backward finishes the gradients: the op is the
    last one of that gradient. `precision` is the autocast dtype name or "fp32"; `traced_on` is "fake" or "real";
    `notes` are sentences that every report about this graph must show. `repeats` are groups of block paths that
    tracing found alike: same modules, and all but the first and last of a group run the same ops on the same shapes.
    `idle` are trainable parameters that no gradient reached. `varies`: other data lead the forward through other code.
    `on_accelerators` is the same step as accelerators run it where that differs (recurrent layers); see `run_by`.
    """

    name: str
    batch: int
    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    storages: tuple[Storage, ...]
    gradient_ops: tuple[tuple[str, int], ...]
    precision: str = "fp32"
    traced_on: Literal["fake", "real"] = "fake"
    notes: tuple[str, ...] = field(default=())
    repeats: tuple[tuple[str, ...], ...] = ()
    on_accelerators: OpGraph | None = None
    idle: tuple[str, ...] = ()
    varies: bool = False

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their first module path (tied parameters appear once)."""
        return {t.name: t for t in self.tensors if t.role == "parameter" and t.name}

    @cached_property
    def memo(self) -> dict[str, Any]:
        """What other rooms derive from this graph and keep with it."""
        return {}

    @property
    def param_count(self) -> int:
        return sum(t.numel for t in self.parameters.values())

    def flops(self, phase: Phase | None = None) -> int:
        """FLOP of one step (one FMA is two), of one phase or of all."""
        return sum(op.flops for op in self.ops if phase is None or op.phase == phase)

    def bytes_read(self, op: Op) -> int:
        """Bytes an op reads; a view reads nothing."""
        return 0 if op.is_view else sum(self.tensors[t].bytes for t in dict.fromkeys(op.inputs))

    def bytes_written(self, op: Op) -> int:
        """Bytes an op writes: its outputs, and what it changes in place, once each."""
        if op.is_view:
            return 0
        return sum(self.tensors[t].bytes for t in dict.fromkeys((*op.outputs, *op.mutates)))

    def run_by(self, kind: str) -> OpGraph:
        """The step as a device of this kind ("cpu", "gpu", "tpu", "npu") runs it. What prices a graph asks for it."""
        return self if kind == "cpu" or self.on_accelerators is None else self.on_accelerators

    def at_batch(self, batch: int) -> OpGraph:
        """The same step at another batch size; exact for every dim that is affine in the batch."""
        if batch == self.batch:
            return self
        if batch < 1:
            raise ValueError(f"the batch size is {batch}; it must be at least 1")
        if batch > MOST_SAMPLES:
            raise ValueError(f"the batch size is {batch}; it must be {MOST_SAMPLES:,} at most")
        from opgraph.batch import rescaled

        return rescaled(self, batch)

    def to_networkx(self) -> Any:
        """The ops as a `networkx.DiGraph` (see `opgraph.export.to_networkx`)."""
        from opgraph.export import to_networkx

        return to_networkx(self)

    def to_pandas(self) -> Any:
        """One row per op (see `opgraph.export.to_pandas`)."""
        from opgraph.export import to_pandas

        return to_pandas(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the graph to a file that `opgraph.export.load_graph` reads."""
        from opgraph.export import save

        save(self, path)
