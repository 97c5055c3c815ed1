"""Tracing: one whole training step of any torch module, recorded op by op as eager torch would run it.

A `TorchDispatchMode` sees every aten call of forward, backward and optimizer. Under fake tensors nothing is
allocated and nothing runs. How a backward op finds its module: autograd numbers its nodes; the forward op that
made node number s is remembered, and while node s runs, what it calls belongs to that op and to its module.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from opgraph.flops import Formula, check_formula, flops_of
from opgraph.graph import Op, OpGraph, Phase, Ref, Role, Storage, Tensor
from opgraph.workload import adamw, mean_square

LOSS = "<loss>"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TraceError(ValueError):
    """The model cannot be traced; the message says which line and what to do."""


class StepTracer(TorchDispatchMode):
    """Records ops, tensors and storage lifetimes. One instance traces one step."""

    def __init__(self, names: dict[int, str], flops: Mapping[str, Formula] | None) -> None:
        super().__init__()
        self.names, self.formulas = names, flops
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self.storages: list[dict[str, Any]] = []
        self.part: Phase = "forward"  # which part of the step is running; recompute is told apart by the module stack
        self.gradient_ops: dict[str, int] = {}  # parameter -> last op of its gradient accumulation
        self._stack: list[str] = []
        self._live: dict[int, int] = {}  # storage address -> index into self.storages
        self._views: dict[tuple[Any, ...], int] = {}  # how a tensor looks at its storage -> tensor id
        self._node_module: dict[int, str] = {}
        self._node_op: dict[int, int] = {}
        self._owner: dict[int, str] = {}  # storage index of parameters and optimizer state -> parameter name

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
        untyped = tensor.untyped_storage()
        address = untyped._cdata
        if address not in self._live:
            index = len(self.storages)
            self.storages.append({"bytes": untyped.nbytes(), "role": role, "birth": birth, "death": None})
            self._live[address] = index
            weakref.finalize(untyped, self._died, address, index)
        return self._live[address]

    def _died(self, address: int, index: int) -> None:
        self.storages[index]["death"] = len(self.ops) - 1
        if self._live.get(address) == index:
            del self._live[address]

    def _tensor(self, tensor: torch.Tensor, name: str = "") -> int:
        role: Role = self._role()
        storage = self._storage(tensor, role, birth=len(self.ops))
        shape = tuple(int(n) for n in tensor.shape)
        strides = tuple(int(s) for s in tensor.stride()) if tensor.layout == torch.strided else (1,) * len(shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        offset = tensor.storage_offset() if tensor.layout == torch.strided else 0
        key = (storage, offset, shape, strides, dtype)
        if key not in self._views or name:
            self._views[key] = len(self.tensors)
            role = cast(Role, self.storages[storage]["role"])
            self.tensors.append(
                Tensor(len(self.tensors), shape, strides, dtype, storage, role, (0,) * len(shape), name)
            )
        return self._views[key]

    def _role(self) -> Role:
        return "gradient" if self.part == "backward" and not self._stack else "activation"

    # -- where we are ---------------------------------------------------------------------------------------
    def enter_module(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self.names.get(id(module), self._stack[-1] if self._stack else ""))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()

    def _place(self) -> tuple[Phase, str, int]:
        """Phase, module path and differentiated forward op of the call that is running now."""
        if self.part == "optimizer":
            return "optimizer", "", -1
        node = torch._C._current_autograd_node()
        if self._stack or self.part == "forward":  # a module stack inside backward: a checkpoint recomputes
            module = self._stack[-1] if self._stack else LOSS
            sequence = torch.autograd._get_sequence_nr() - 1
            self._node_module.setdefault(sequence, module)
            self._node_op.setdefault(sequence, len(self.ops))
            return ("forward" if self.part == "forward" else "recompute"), module, -1
        if node is None:
            return "backward", LOSS, -1
        variable = getattr(node, "variable", None)
        if variable is not None:
            owner = self._owner.get(self._live.get(variable.untyped_storage()._cdata, -1), "")
            self.gradient_ops[owner] = len(self.ops)
            return "backward", owner.rpartition(".")[0], -1
        sequence = node._sequence_nr()
        return "backward", self._node_module.get(sequence, LOSS), self._node_op.get(sequence, -1)

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
        out = func(*args, **kwargs)
        mutates = tuple(dict.fromkeys(self._written(func, args, kwargs)))
        produced = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        outputs = tuple(self._tensor(t) for t in produced)
        name = str(func)
        is_view = bool(outputs) and not mutates and all(self.tensors[t].storage in known for t in outputs)
        if phase == "optimizer":
            owners = {self._owner[s].rpartition(".")[0] for s in known if s in self._owner}
            module = owners.pop() if len(owners) == 1 else ""
        if not is_view:
            check_formula(name, func.tags, module, self.formulas)
        op = Op(
            id=len(self.ops), name=name, phase=phase, module=module, inputs=tuple(before),
            outputs=tuple(t for t in outputs if t not in mutates), mutates=mutates, args=_plain(args, self),
            kwargs=tuple((k, _plain(v, self)) for k, v in kwargs.items()), flops=0, is_view=is_view, forward=forward,
        )  # fmt: skip
        self.ops.append(_with_flops(op, [self.tensors[t] for t in before], [self.tensors[t] for t in outputs], self.formulas))
        return out

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for t in tree_leaves(value):
                    if isinstance(t, torch.Tensor):
                        yield self._tensor(t)


def _with_flops(op: Op, ins: list[Tensor], outs: list[Tensor], formulas: Mapping[str, Formula] | None) -> Op:
    from dataclasses import replace

    flops = 0 if op.is_view else flops_of(op.name, ins, outs or ins, op, formulas)
    return replace(op, flops=flops) if flops else op


def _plain(value: Any, tracer: StepTracer) -> Any:
    """Arguments as data: tensors become `Ref`, lists tuples, dtypes and devices their names."""
    if isinstance(value, torch.Tensor):
        return Ref(tracer._tensor(value))
    if isinstance(value, list | tuple):
        return tuple(_plain(v, tracer) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


# -- preparing a step ---------------------------------------------------------------------------------------


@contextmanager
def _module_hooks(tracer: StepTracer) -> Iterator[None]:
    handles = (
        nn.modules.module.register_module_forward_pre_hook(tracer.enter_module),
        nn.modules.module.register_module_forward_hook(tracer.leave_module, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fake_weights(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Puts fake CPU tensors in place of a module's own, ties kept; puts the module back as it was."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in fakes:
            with mode:
                plain = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            is_param = isinstance(t, nn.Parameter)
            fakes[id(t)] = nn.Parameter(plain, requires_grad=t.requires_grad) if is_param else plain
        return fakes[id(t)]

    saved = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        for m, parameters, buffers in saved:
            m._parameters.update({k: cast(nn.Parameter, fake(p)) for k, p in parameters.items() if p is not None})
            m._buffers.update({k: fake(b) for k, b in buffers.items() if b is not None})
        yield
    finally:
        for m, parameters, buffers in saved:
            m._parameters.update(parameters)
            m._buffers.update(buffers)


def _fake_like(value: Any, mode: FakeTensorMode) -> Any:
    def fake(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu").requires_grad_(t.requires_grad)

    return tree_map(fake, value)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for parameter, state in optimizer.state.items():
        yield from ((parameter, t) for t in tree_leaves(state) if isinstance(t, torch.Tensor))


def _settle(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """One optimizer step on empty gradients, so that its state exists as it does in every step but the first."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _record(
    module: nn.Module,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    make_optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None,
    precision: str,
    flops: Mapping[str, Formula] | None,
) -> StepTracer:
    tracer = StepTracer({id(m): path for path, m in module.named_modules()}, flops)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters) if make_optimizer and parameters else None
    if optimizer:
        _settle(optimizer, parameters)
    owner = {id(p): name for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        tracer.register(p, "parameter", name)
    for name, b in module.named_buffers():
        tracer.register(b, "buffer", name)
    for i, t in enumerate(t for t in tree_leaves((inputs, targets)) if isinstance(t, torch.Tensor)):
        tracer.register(t, "input", f"<input {i}>")
    for parameter, state in _state_tensors(optimizer) if optimizer else ():
        tracer.register(state, "optimizer_state", owner.get(id(parameter), "") or "?")
    dtype = PRECISIONS[precision]
    casting = torch.autocast("cpu", dtype) if dtype is not None else nullcontext()
    with _module_hooks(tracer), tracer, torch.compiler.set_stance("force_eager"):
        with casting:
            value = loss(module(*inputs), *targets)
        if parameters:
            tracer.part = "backward"
            value.backward()
        for p in parameters:
            if p.grad is not None:
                tracer.mark(p.grad, "gradient")
        if optimizer:
            tracer.part = "optimizer"
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    del value
    return tracer


def _finish(tracer: StepTracer, name: str, batch: int, precision: str, on: str, notes: tuple[str, ...]) -> OpGraph:
    count = len(tracer.ops)
    storages = tuple(
        Storage(i, s["bytes"], 0, s["role"], s["birth"], count if s["death"] is None else s["death"])
        for i, s in enumerate(tracer.storages)
    )
    gradients = tuple(sorted(tracer.gradient_ops.items(), key=lambda item: item[1]))
    return OpGraph(
        name, batch, tuple(tracer.ops), tuple(tracer.tensors), storages, gradients, precision, cast(Any, on), notes
    )


def trace(
    module: nn.Module,
    inputs: Sequence[Any],
    targets: Sequence[Any] = (),
    *,
    loss: Callable[..., torch.Tensor] = mean_square,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = adamw,
    precision: str = "fp32",
    name: str = "",
    flops: Mapping[str, Formula] | None = None,
) -> OpGraph:
    """One training step of `module` at one batch size (dim 0 of the first input).

    Nothing is allocated or run: weights are replaced by fake tensors while tracing, and the module is left as it
    was. A model whose control flow depends on data is traced on real tensors instead (`graph.traced_on == "real"`,
    with a note). Use `trace_workload` for a graph that holds at every batch size.

    Raises TraceError (a ValueError) naming the line of the model that cannot be traced, NoFormulaError for a heavy
    op that nobody can count.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    inputs, targets = tuple(inputs), tuple(targets)
    first = next((t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim()), None)
    batch = int(first.shape[0]) if first is not None else 1
    name = name or type(module).__name__
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _fake_weights(module, mode):
            data = _fake_like((inputs, targets), mode)
            with mode:
                tracer = _record(module, *data, loss, optimizer, precision, flops)
            return _finish(tracer, name, batch, precision, "fake", ())
    except torch._subclasses.fake_tensor.DataDependentOutputException as error:
        reason = f"control flow or shapes depend on data ({error.func}) at {_user_line(error)}"
    except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
        reason = f"an output's shape depends on data ({error.func}) at {_user_line(error)}"
    except ValueError:
        raise
    except Exception as error:
        raise TraceError(
            f"{name} cannot be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
            f"at {_user_line(error)}; check that the example inputs fit the model and that it runs in eager torch"
        ) from error
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise TraceError(f"{name}: {reason}; build the module with real weights (not on meta) to trace it on real tensors")
    note = f"traced on real tensors, because {reason}; other data may take another path"
    tracer = _record_real(module, inputs, targets, loss, optimizer, precision, flops)
    return _finish(tracer, name, batch, precision, "real", (note,))


def _record_real(module: nn.Module, *rest: Any) -> StepTracer:
    """Traces on a copy, so that the user's weights keep their values."""
    import copy

    return _record(copy.deepcopy(module), *rest)


def _user_line(error: BaseException) -> str:
    """The innermost frame outside torch and outside this package's tracer."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("opgraph/trace.py")]
    frame = (mine or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
