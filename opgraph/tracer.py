"""The recorder: a `TorchDispatchMode` that sees every aten call of forward, backward and optimizer.

How a backward op finds its module: autograd numbers its nodes; the forward op that made node number s is
remembered, and while node s runs, what it calls belongs to that op and to its module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opgraph.flops import Formula, check_formula, flops_of
from opgraph.graph import Op, Phase, Ref, Role, Tensor

LOSS = "<loss>"

# Ops that write their running statistics (arguments 3 and 4) in training without saying so in their schema.
RUNNING_STATS = {"native_batch_norm": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5}  # position of `training`

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

# Ops that return one tensor twice: the fake mode's cache of past calls would hand out two.
TWICE = {"mkldnn_rnn_layer_backward"}


def plain_path(path: str) -> str:
    """A module or parameter path without what torch.compile puts into it."""
    return path.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


class StepTracer(TorchDispatchMode):
    """Records ops, tensors and storage lifetimes. One instance traces one step."""

    def __init__(self, names: dict[int, str], flops: Mapping[str, Formula] | None) -> None:
        super().__init__()
        self.names, self.formulas = names, flops
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self.storages: list[dict[str, Any]] = []
        self.part: Phase = "forward"  # which part of the step is running; recompute is told apart in `_place`
        self.gradient_ops: dict[str, int] = {}  # parameter -> last op of its gradient accumulation
        self.idle: list[str] = []  # trainable parameters that got no gradient
        self._stack: list[str] = []
        self._live: dict[int, int] = {}  # storage address -> index into self.storages
        self._views: dict[tuple[Any, ...], int] = {}  # how a tensor looks at its storage -> tensor id
        self._nodes: dict[int, tuple[str, int]] = {}  # autograd sequence number -> module, forward op
        self._first_node: int = torch._C._autograd._get_sequence_nr()
        self._owner: dict[int, str] = {}  # storage index of parameters and optimizer state -> parameter name
        self._checked: dict[str, bool] = {}  # ops that are known to have a FLOP formula or to need none

    # -- what exists before the step ------------------------------------------------------------------------
    def register(self, tensor: torch.Tensor, role: Role, name: str = "") -> None:
        """Makes a tensor that exists before the step known, with its role and name."""
        known = self._storage(tensor, role, birth=-1)
        if role in ("parameter", "optimizer_state"):
            self._owner.setdefault(known, name)
        self._tensor(tensor, name)

    def mark(self, tensor: torch.Tensor, role: Role) -> None:
        """Gives a storage made during the step its final role (gradients of parameters)."""
        self.storages[self._storage(tensor, role, birth=len(self.ops) - 1)]["role"] = role

    def _storage(self, tensor: torch.Tensor, role: Role, birth: int) -> int:
        if tensor.layout in SPARSE:
            raise ValueError(self._sparse(tensor))
        untyped = tensor.untyped_storage()
        address = untyped._cdata
        index = self._live.get(address)
        if index is None:
            index = len(self.storages)
            self.storages.append({"bytes": untyped.nbytes(), "role": role, "birth": birth, "death": None})
            self._live[address] = index
            weakref.finalize(untyped, self._died, address, index)
        return index

    def _sparse(self, tensor: torch.Tensor) -> str:
        """Why a sparse tensor cannot be recorded."""
        where = self._place()[1] if self.part != "optimizer" else ""
        what = "the gradient" if self.part == "backward" else "a tensor"
        return (
            f"{what} in module '{where or '<root>'}' is sparse ({str(tensor.layout).removeprefix('torch.')}): plans "
            "are made for dense ones only, so build embeddings with sparse=False"
        )

    def _died(self, address: int, index: int) -> None:
        self.storages[index]["death"] = len(self.ops) - 1
        if self._live.get(address) == index:
            del self._live[address]

    def _tensor(self, tensor: torch.Tensor, name: str = "") -> int:
        storage = self._storage(tensor, self._role(), birth=len(self.ops))
        shape = tuple(int(n) for n in tensor.shape)
        dense = tensor.layout == torch.strided
        strides = tuple(int(s) for s in tensor.stride()) if dense else (1,) * len(shape)
        offset = tensor.storage_offset() if dense else 0
        key = (storage, offset, shape, strides, tensor.dtype)
        if key not in self._views or name:
            self._views[key] = len(self.tensors)
            role = cast(Role, self.storages[storage]["role"])
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.tensors.append(
                Tensor(len(self.tensors), shape, strides, dtype, storage, role, (0,) * len(shape), name)
            )
        return self._views[key]

    def _role(self) -> Role:
        return "gradient" if self.part == "backward" and not self._stack else "activation"

    # -- where we are ---------------------------------------------------------------------------------------
    def enter_module(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self.names.get(id(module), self._stack[-1] if self._stack else LOSS))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()

    def _place(self) -> tuple[Phase, str, int]:
        """Phase, module path and differentiated forward op of the call that is running now."""
        if self.part == "optimizer":
            return "optimizer", "", -1
        node = torch._C._current_autograd_node()
        # Nodes run with gradients off: where they are on, a checkpoint recomputes.
        if self.part == "forward" or self._stack or (node is not None and torch.is_grad_enabled()):
            module = self._stack[-1] if self._stack else self._of_node(node)[0] if node is not None else LOSS
            self._nodes.setdefault(torch._C._autograd._get_sequence_nr() - 1, (module, len(self.ops)))
            return ("forward" if self.part == "forward" else "recompute"), module, -1
        if node is None:
            return "backward", LOSS, -1
        variable = getattr(node, "variable", None)
        if variable is not None:
            owner = self._owner.get(self._live.get(variable.untyped_storage()._cdata, -1), "")
            if owner:
                self.gradient_ops[owner] = len(self.ops)
            return "backward", owner.rpartition(".")[0], -1
        return "backward", *self._of_node(node)

    def _of_node(self, node: Any) -> tuple[str, int]:
        """Module and forward op of an autograd node. Some ops make a second node (as_strided, copies of slices)
        after they were seen: such a node belongs to the op before."""
        sequence = node._sequence_nr()
        while sequence not in self._nodes:
            if sequence < self._first_node:
                return LOSS, -1
            sequence -= 1
        return self._nodes[sequence]

    # -- the recording --------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):  # `.device` reads are dispatched under fake tensors
            return func(*args, **kwargs)
        before = [self._tensor(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {self.tensors[t].storage for t in before}
        phase, module, forward = self._place()
        with _uncached() if func._schema.name.partition("::")[2] in TWICE else nullcontext():
            out = func(*args, **kwargs)
        mutates = tuple(dict.fromkeys(self._tensor(t) for t in written(func, args, kwargs)))
        produced = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        outputs = tuple(self._tensor(t) for t in produced)
        name = str(func)
        is_view = bool(outputs) and not mutates and all(self.tensors[t].storage in known for t in outputs)
        if phase == "optimizer":
            owners = {self._owner[s].rpartition(".")[0] for s in known if s in self._owner}
            module = owners.pop() if len(owners) == 1 else ""
        if not is_view and name not in self._checked:
            check_formula(name, func.tags, module, self.formulas)
            self._checked[name] = True
        plain_args, plain_kwargs = _plain(args, self), tuple((k, _plain(v, self)) for k, v in kwargs.items())
        flops = 0
        if not is_view:
            ins = [self.tensors[t] for t in before]
            flops = flops_of(name, ins, [self.tensors[t] for t in outputs] or ins, _Call(plain_args), self.formulas)
        self.ops.append(
            Op(
                id=len(self.ops), name=name, phase=phase, module=module, inputs=tuple(before),
                outputs=tuple(t for t in outputs if t not in mutates), mutates=mutates, args=plain_args,
                kwargs=plain_kwargs, flops=flops, is_view=is_view, forward=forward,
            )
        )  # fmt: skip
        return out


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a call writes in place: those its schema names, and running statistics."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, torch.Tensor))
    training = RUNNING_STATS.get(func._schema.name.partition("::")[2])
    if training is not None and len(args) > training and args[training]:
        yield from (t for t in args[3:5] if isinstance(t, torch.Tensor))


class _Call:
    """The arguments of a call that is being recorded."""

    __slots__ = ("args",)

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def _plain(value: Any, tracer: StepTracer) -> Any:
    """Arguments as data: tensors become `Ref`, lists tuples, dtypes and devices their names."""
    if isinstance(value, torch.Tensor):
        return Ref(tracer._tensor(value))
    if isinstance(value, list | tuple):
        return tuple(_plain(v, tracer) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


@contextmanager
def _uncached() -> Iterator[None]:
    """Turns off the cache of the fake mode that is active, if one is."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is None:
        yield
        return
    enabled, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = enabled


@contextmanager
def module_hooks(tracer: StepTracer) -> Iterator[None]:
    """Tells the tracer which module runs, as long as the context lasts."""
    handles = (
        nn.modules.module.register_module_forward_pre_hook(tracer.enter_module),
        nn.modules.module.register_module_forward_hook(tracer.leave_module, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class WithoutMetaInit(TorchFunctionMode):
    """Skips filling meta tensors, which have no values: Python code that takes longer than the rest of the build."""

    FILLS = frozenset({"normal_", "uniform_", "zero_", "fill_", "constant_", "kaiming_uniform_"})

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)
