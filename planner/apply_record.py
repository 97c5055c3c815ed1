"""Records every local op and every collective of one applied step, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opgraph.graph import Phase
from planner.apply_model import RECOMPUTING


@dataclass(frozen=True, slots=True)
class LocalOp:
    """One aten call on local tensors. `order` counts ops and collectives of the step together."""

    order: int
    name: str
    phase: Phase
    module: str
    in_shapes: tuple[tuple[int, ...], ...]
    out_shapes: tuple[tuple[int, ...], ...]
    in_dtypes: tuple[str, ...]
    out_dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Collective:
    """One message. kind: all_reduce, all_gather, reduce_scatter, broadcast, send, recv, all_to_all.

    bytes by the convention of nccl-tests (the full gathered buffer for all_gather and reduce_scatter). ranks: the
    group's global ranks; (source, destination) for send and recv; the source first for broadcast.
    """

    order: int
    kind: str
    bytes: int
    dtype: str
    ranks: tuple[int, ...]
    phase: Phase
    module: str


_KINDS = {
    "c10d::allreduce_": "all_reduce", "c10d::_allgather_base_": "all_gather", "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather", "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter", "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::broadcast_": "broadcast", "c10d::send": "send", "c10d::recv_": "recv",
    "c10d::alltoall_base_": "all_to_all", "c10d::alltoall_": "all_to_all",
    "_c10d_functional::all_reduce": "all_reduce", "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter", "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::all_to_all_single": "all_to_all",
}  # fmt: skip
_autograd: Any = torch.autograd
_c10d: Any = dist.distributed_c10d
_SILENT = ("prim", "profiler")  # attribute reads under fake tensors


class StepRecorder(TorchDispatchMode):
    """Records while `recording`; always follows the storages that it sees, for `live_bytes` and `peak_bytes`."""

    def __init__(self, backend: str = "gloo") -> None:
        super().__init__()
        self.backend = backend
        self.recording = False
        self.hooked_reducer = False  # DDP runs with a communication hook that stands for its native all-reduce
        self.records: list[LocalOp | Collective] = []
        self.part: Phase = "forward"
        self.live_bytes = self.peak_bytes = 0
        self.names: dict[int, str] = {}  # id of a module or parameter -> module path
        self.backward_messages: set[int] = set()  # storages of gradients that travel between pipeline stages
        self._stack: list[str] = []
        self._sizes: dict[int, int] = {}
        self._backward = 0
        self._module_of_node: dict[int, str] = {}

    def know(self, model: nn.Module) -> None:
        """Learns module paths and parameter names."""
        for path, module in model.named_modules():
            self.names[id(module)] = path
        for name, p in model.named_parameters():
            self.names[id(p)] = name.rpartition(".")[0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active as a dispatch mode, with module calls and backward passes followed."""
        call, backward = nn.Module.__call__, torch.autograd.backward

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._stack.append(self.names.get(id(module), self._stack[-1] if self._stack else ""))
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()

        def went_back(*args: Any, **kwargs: Any) -> Any:
            self._backward += 1
            try:
                return backward(*args, **kwargs)
            finally:
                self._backward -= 1

        nn.Module.__call__ = called  # type: ignore[method-assign]
        torch.autograd.backward = went_back
        try:
            with self:
                yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            torch.autograd.backward = backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ in ("DTensor", "AsyncCollectiveTensor") for t in types):
            return NotImplemented  # they come back as their local ops
        kwargs = kwargs or {}
        if func.namespace in _SILENT:
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        phase, module = self._place()
        in_shapes = tuple(tuple(t.shape) for t in inputs)
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for t in (*inputs, *outputs):
            self.follow(t)
        if self.recording:
            self._record(func, args, inputs, outputs, phase, module, in_shapes)
        return result

    def _record(
        self, func: Any, args: Any, inputs: Any, outputs: Any, phase: Phase, module: str, in_shapes: Any
    ) -> None:
        order, name = len(self.records), func.name().split(".")[0]
        if name in _KINDS:
            kind, ranks = _KINDS[name], _ranks(name, args)
            if phase != "optimizer" and inputs and inputs[0].untyped_storage()._cdata in self.backward_messages:
                phase = "backward"
            elif not self._stack and not RECOMPUTING and phase == "forward" and kind not in ("send", "recv"):
                phase = "backward"  # gradients that are reduced after the last backward
            sizes = [t.numel() * t.element_size() for t in (*inputs, *outputs)]
            total = max(sizes) if kind in ("all_gather", "reduce_scatter") else sum(sizes[: max(1, len(inputs))])
            if "base" not in name and "::_c10d" not in name and name in ("c10d::allgather_", "c10d::reduce_scatter_"):
                total = max(sizes) * len(ranks)
            # gloo all-reduces a copy of the whole buffer, and gathers into one of its own
            if kind in ("reduce_scatter", "all_gather") and self.backend == "gloo":
                self.peak_bytes = max(self.peak_bytes, self.live_bytes + total)
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            self.records.append(Collective(order, kind, total, dtype, ranks, phase, module))
        elif func.namespace not in ("c10d", "_c10d_functional"):
            dtypes = [tuple(str(t.dtype).removeprefix("torch.") for t in ts) for ts in (inputs, outputs)]
            out_shapes = tuple(tuple(t.shape) for t in outputs)
            called = str(func)
            if self.hooked_reducer and called == "aten.copy_.default" and _accumulates():
                called = "aten.mul.out"  # without a hook the reducer divides by the group's size while it copies
            self.records.append(LocalOp(order, called, phase, module, in_shapes, out_shapes, dtypes[0], dtypes[1]))

    def _place(self) -> tuple[Phase, str]:
        """Phase and module path of what is running now."""
        if self.part == "optimizer":
            return "optimizer", ""
        stack = RECOMPUTING or self._stack
        here = self._stack[-1] if self._stack else (RECOMPUTING[-1] if RECOMPUTING else "")
        if not self._backward and self.part == "forward":
            self._module_of_node.setdefault(_autograd._get_sequence_nr() - 1, here)
            return "forward", here
        if stack:
            self._module_of_node.setdefault(_autograd._get_sequence_nr() - 1, here)
            return "recompute", here
        node = torch._C._current_autograd_node()
        if node is None:
            return "backward", ""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return "backward", self.names.get(id(variable), "")
        return "backward", self._module_of_node.get(node._sequence_nr(), "")

    def follow(self, t: torch.Tensor) -> None:
        """Counts the tensor's storage as long as it lives, at its present size."""
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._died, key)
        self.live_bytes += size - self._sizes[key]
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _died(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)


def _accumulates() -> bool:
    return getattr(torch._C._current_autograd_node(), "variable", None) is not None


def _ranks(name: str, args: Any) -> tuple[int, ...]:
    """Global ranks of a collective from its arguments."""
    if name.startswith("_c10d_functional"):
        group: Any = _c10d._resolve_process_group(next(a for a in reversed(args) if isinstance(a, str)))
    else:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
    ranks = tuple(dist.get_process_group_ranks(group))
    me = dist.get_rank()
    if name == "c10d::send":
        return (me, ranks[args[2]])
    if name == "c10d::recv_":
        return (ranks[args[2]], me)
    if name == "c10d::broadcast_":
        root = ranks[args[2]]
        return (root, *(r for r in ranks if r != root))
    return ranks


@contextmanager
def following_fsdp(recorder: StepRecorder) -> Iterator[None]:
    """Tells the recorder when FSDP frees and allocates the storages of unsharded parameters."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    with ExitStack() as undo:
        for name in ("alloc_storage", "free_storage"):
            original = getattr(_fsdp_param, name)

            def changed(tensor: torch.Tensor, original: Any = original) -> None:
                original(tensor)
                recorder.follow(tensor)

            setattr(_fsdp_param, name, changed)
            undo.callback(setattr, _fsdp_param, name, original)
        yield
