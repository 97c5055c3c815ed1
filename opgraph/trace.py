"""Tracing: one whole training step of any torch module, recorded op by op as eager torch would run it.

Under fake tensors nothing is allocated and nothing runs. The recorder itself is `opgraph.tracer`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from opgraph.flops import Formula
from opgraph.graph import OpGraph, Storage
from opgraph.grouped import GroupedProducts
from opgraph.masks import masks_as_run
from opgraph.recurrent import has_recurrent, one_call, with_accelerated
from opgraph.scaling import FIRST_SCALE, scaled, unscale
from opgraph.tracer import LOSS as LOSS
from opgraph.tracer import StepTracer, module_hooks, plain_path
from opgraph.workload import adamw, mean_square

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HERE = str(Path(__file__).parent)
OWN = ("trace", "tracer", "batch", "recurrent", "grouped", "masks")

Inputs = Sequence[Any] | Mapping[str, Any]
MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


class TraceError(ValueError):
    """The model cannot be traced; the message says which line and what to do."""


# -- preparing a step ---------------------------------------------------------------------------------------


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


def _make_optimizer(make: MakeOptimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer after one step on zero gradients, so that its state exists as in every step but the first."""
    optimizer = make(parameters)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TraceError(
            f"{type(optimizer).__name__} evaluates the model several times in one step (its step() takes a closure), "
            f"so there is no one training step to trace; use an optimizer that takes gradients, such as AdamW"
        )
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _register(tracer: StepTracer, module: nn.Module, data: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Tells the tracer what exists before the step."""
    owner = {id(p): plain_path(name) for name, p in module.named_parameters()}
    for p in module.parameters():
        tracer.register(p, "parameter", owner[id(p)])
    for name, b in module.named_buffers():
        tracer.register(b, "buffer", plain_path(name))
    for i, t in enumerate(t for t in tree_leaves(data) if isinstance(t, torch.Tensor)):
        tracer.register(t, "input", f"<input {i}>")
    for parameter, state in _state_tensors(optimizer) if optimizer else ():
        tracer.register(state, "optimizer_state", owner.get(id(parameter), "") or "?")


def _check_weights(module: nn.Module) -> None:
    """TraceError for parameters that have no shape yet."""
    lazy = next((plain_path(name) for name, t in module.named_parameters() if is_lazy(t)), "")
    if lazy:
        raise TraceError(
            f"{lazy} is a parameter of a lazy module, which has no shape before it ran: run the model once on a batch "
            "before it is traced"
        )


def _check_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TraceError(f"the loss is {what}; it must be a tensor with one element")
    if not value.requires_grad:
        raise TraceError("the loss does not depend on any trainable parameter, so there is no backward to trace")


def _record(
    module: nn.Module,
    inputs: Inputs,
    targets: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    make_optimizer: MakeOptimizer | None,
    precision: str,
    flops: Mapping[str, Formula] | None,
    accelerator: bool,
) -> StepTracer:
    tracer = StepTracer({id(m): plain_path(path) for path, m in module.named_modules()}, flops)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _make_optimizer(make_optimizer, parameters) if make_optimizer and parameters else None
    _register(tracer, module, (inputs, targets), optimizer)
    dtype = PRECISIONS[precision]
    casting = torch.autocast("cpu", dtype) if dtype is not None else nullcontext()
    kernels = one_call() if accelerator else nullcontext()
    with module_hooks(tracer), masks_as_run(), kernels, tracer, torch.compiler.set_stance("force_eager"):
        with casting:  # no name holds the model's output: the executed step frees it with the loss, too
            if isinstance(inputs, Mapping):
                value = loss(module(**inputs), *targets)
            else:
                value = loss(module(*inputs), *targets)
        if parameters:
            _check_loss(value)
            if precision == "fp16":
                value = scaled(value, FIRST_SCALE)
            tracer.part = "backward"
            value.backward()
        for name, p in module.named_parameters() if parameters else ():
            if p.grad is not None:
                tracer.mark(p.grad, "gradient")
            elif p.requires_grad:
                tracer.idle.append(plain_path(name))
        if optimizer:
            tracer.part = "optimizer"
            if precision == "fp16":
                unscale([p.grad for p in parameters if p.grad is not None], FIRST_SCALE)
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
    if tracer.idle:
        others = " and others" if len(tracer.idle) > 1 else ""
        notes += (
            f"no gradient reaches {tracer.idle[0]}{others}: torch's DistributedDataParallel stops at such parameters; "
            f"freeze them with requires_grad_(False)",
        )
    return OpGraph(
        name, batch, tuple(tracer.ops), tuple(tracer.tensors), storages, gradients, precision, cast(Any, on), notes,
        idle=tuple(tracer.idle),
    )


def trace(
    module: nn.Module,
    inputs: Inputs,
    targets: Sequence[Any] = (),
    *,
    loss: Callable[..., torch.Tensor] = mean_square,
    optimizer: MakeOptimizer | None = adamw,
    precision: str = "fp32",
    name: str = "",
    flops: Mapping[str, Formula] | None = None,
    accelerator: bool | None = None,
) -> OpGraph:
    """One training step of `module` at one batch size (dim 0 of the first input).

    `inputs` are the module's positional arguments, or a mapping of its keyword arguments.
    Nothing is allocated or run: weights are replaced by fake tensors while tracing, and the module is left as it
    was. A model whose control flow depends on data is traced on real tensors instead (`graph.traced_on == "real"`,
    with a note). Use `trace_workload` for a graph that holds at every batch size.

    accelerator: as an accelerator runs it (True), as a CPU does (False), or, by default, the latter, with the former
    beside it where the module has recurrent layers (`OpGraph.run_by`).

    Raises TraceError (a ValueError) naming the line of the model that cannot be traced, NoFormulaError for a heavy
    op that nobody can count.
    """
    inputs, targets = _checked(inputs, precision), tuple(targets)
    _check_weights(module)
    recurrent = has_recurrent(module)
    if accelerator is None and recurrent:
        of = partial(
            trace, module, inputs, targets, loss=loss, optimizer=optimizer, precision=precision, name=name, flops=flops
        )
        return with_accelerated(of(accelerator=False), lambda: of(accelerator=True))
    first = next((t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim()), None)
    batch = int(first.shape[0]) if first is not None else 1
    name = name or type(module).__name__
    rest = (loss, optimizer, precision, flops, bool(accelerator) and recurrent)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _naming_lines(name), _fake_weights(module, mode):
            data = _fake_like((inputs, targets), mode)
            with mode, GroupedProducts():
                tracer = _record(module, data[0], data[1], *rest)
            return _finish(tracer, name, batch, precision, "fake", ())
    except DataDependentOutputException as error:
        reason = f"control flow or shapes depend on data ({error.func}) at {_user_line(error)}"
    except DynamicOutputShapeException as error:
        reason = f"an output's shape depends on data ({error.func}) at {_user_line(error)}"
    if accelerator and recurrent:
        raise TraceError(f"{name}: {reason}")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise TraceError(
            f"{name}: {reason}; build the module with real weights (not on meta) to trace it on real tensors"
        )
    note = f"traced on real tensors, because {reason}; other data may take another path"
    with _naming_lines(name):  # on a copy, so that the user's weights keep their values
        tracer = _record(copy.deepcopy(module), inputs, targets, *rest)
    return _finish(tracer, name, batch, precision, "real", (note,))


def _checked(inputs: Inputs, precision: str) -> Inputs:
    """A copy of the inputs. ValueError for what `trace` cannot take."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    if isinstance(inputs, torch.Tensor):
        raise ValueError("inputs is a tensor; give a tuple of the module's arguments: (x,)")
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)


@contextmanager
def _naming_lines(name: str) -> Iterator[None]:
    """Turns what the model raises into a TraceError that names the model's line; our own sentences pass. torch's own
    log of the same error, a page of its frames, stays off."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, TraceError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and traceback.extract_tb(error.__traceback__)[-1].filename.startswith(HERE):
            raise
        what = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TraceError(
            f"{name} cannot be traced: {type(error).__name__}: {what} at {_user_line(error)}; "
            f"check that the example inputs fit the model and that it runs in eager torch"
        ) from error
    finally:
        log.setLevel(level)


def _user_line(error: BaseException) -> str:
    """The innermost frame outside torch and outside the tracer."""
    tracing = tuple(f"{HERE}/{name}.py" for name in OWN)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "/torch/" not in f.filename and f.filename not in tracing]
    mine = [f for f in mine if not f.filename.endswith("contextlib.py")]
    frame = (mine or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
