"""Recurrent layers as accelerators run them: all layers of an `nn.RNN`, `nn.GRU` or `nn.LSTM` in one call.

On a CPU torch runs them step by step, or layer by layer through oneDNN; on a GPU as one `aten._cudnn_rnn`, with one op
for its backward (aten/src/ATen/native/RNN.cpp and cudnn/RNN.cpp). A CPU has no such kernel, so two modes stand in for
it while tracing: one sends torch's recurrent functions to that op, one makes its outputs. Autograd does the rest, so
that what backward keeps, and for how long, is what it is on a GPU. Packed sequences stay as the CPU runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opgraph.graph import OpGraph

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # as cuDNN numbers them (cudnnRNNMode_t)

# Values a step, sample and unit that backward needs beside inputs and outputs: the gates after their functions, and the
# cell state (LSTM) or the state's part of the candidate (GRU). torch's own fused cells keep the same (their workspaces
# hold 4 values and the cell state, or 5 with the old state: aten/src/ATen/native/cuda/RNN.cu). ASSUMPTION for cuDNN,
# whose reserve space only a GPU can be asked for (cudnnGetRNNTempSpaceSizes); it may pad, or keep values twice.
KEPT = {0: 0, 1: 0, 2: 5, 3: 4}

STEP_BY_STEP = (
    "recurrent layers are priced step by step on accelerators, too, because this model could not be traced with their "
    "kernels: {}"
)


def reserve_bytes(
    mode: int, steps: int, batch: int, hidden: int, out: int, layers: int, directions: int, itemsize: int
) -> int:
    """Bytes that a recurrent call keeps for its backward: `KEPT` of every layer and direction, and the outputs (`out`
    wide, which a projection makes narrower than `hidden`) of all layers but the last."""
    kept = layers * directions * KEPT[mode] * hidden + (layers - 1) * directions * out
    return itemsize * steps * batch * kept


def has_recurrent(module: nn.Module) -> bool:
    """Whether accelerators run a layer of this module in one call that a CPU does not."""
    return any(isinstance(m, nn.RNNBase) for m in module.modules())


def with_accelerated(graph: OpGraph, make: Callable[[], OpGraph]) -> OpGraph:
    """The step of a model with recurrent layers, with the same step as accelerators run it (`OpGraph.run_by`)."""
    if graph.traced_on == "real":
        return replace(graph, notes=(*graph.notes, STEP_BY_STEP.format("its control flow depends on data")))
    try:
        return replace(graph, on_accelerators=make())
    except ValueError as error:  # TraceError, NotAffineError: the CPU's trace stands
        return replace(graph, notes=(*graph.notes, STEP_BY_STEP.format(error)))


@contextmanager
def one_call() -> Iterator[None]:
    """While this lasts, recurrent layers run as on an accelerator; results hold no values."""
    with _Calls(), _Kernels():
        yield


class _Calls(TorchFunctionMode):
    """Sends torch's recurrent functions, as modules call them, to the op of the accelerator."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mode = MODES.get(getattr(func, "__name__", ""))
        if mode is None or len(args) != 9 or (isinstance(args[1], torch.Tensor) and args[1].dim() == 1):  # packed
            return func(*args, **(kwargs or {}))
        x, state, weights, _, layers, dropout, train, bidirectional, batch_first = args
        hx, cx = state if mode == MODES["lstm"] else (state, None)
        if torch.is_autocast_enabled("cpu"):  # casts as aten/src/ATen/cudnn/AutocastRNN.cpp does
            dtype = torch.get_autocast_dtype("cpu")
            x, hx, weights = x.to(dtype), hx.to(dtype), [w.to(dtype) for w in weights]
            cx = None if cx is None else cx.to(dtype)
        hidden, projected = hx.shape[2], 0
        if cx is not None and cx.shape[2] != hidden:
            hidden, projected = cx.shape[2], hidden
        kinds = len(weights) // (layers * (2 if bidirectional else 1))
        output, hy, cy, _, _ = torch.ops.aten._cudnn_rnn.default(
            x, weights, kinds, None, hx, cx, mode, hidden, projected, layers, batch_first, dropout, train,
            bidirectional, [], None,
        )  # fmt: skip
        return (output, hy, cy) if mode == MODES["lstm"] else (output, hy)


class _Kernels(TorchDispatchMode):
    """Makes what the accelerator's op and its backward return."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._cudnn_rnn.default:
            return _forward(*args)
        if func is torch.ops.aten._cudnn_rnn_backward.default:
            return _backward(*args)
        return func(*args, **(kwargs or {}))


def _forward(
    x: Any, weights: Any, kinds: int, buffer: Any, hx: Any, cx: Any, mode: int, hidden: int, projected: int,
    layers: int, batch_first: bool, dropout: float, train: bool, bidirectional: bool, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Output, last states, reserve space, and the buffer of all weights, which they already lie in."""
    directions, out = 2 if bidirectional else 1, projected or hidden
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    output = _laid_out(x, (steps, batch, directions * out), batch_first)
    kept = reserve_bytes(mode, steps, batch, hidden, out, layers, directions, x.element_size()) if train else 0
    cy = x.new_empty(0) if cx is None else cx.new_empty(cx.shape)
    return output, hx.new_empty(hx.shape), cy, x.new_empty(kept, dtype=torch.uint8), x.new_empty(0)


def _backward(
    x: Any, weights: Any, kinds: int, buffer: Any, hx: Any, cx: Any, output: Any, d_output: Any, d_hy: Any, d_cy: Any,
    mode: int, hidden: int, projected: int, layers: int, batch_first: bool, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of input, states and weights; that of the input is made whether anybody asks for it or not."""
    wanted = rest[-1]
    width, other, last = x.shape[2], x.shape[0], x.shape[1]
    steps, batch = (last, other) if batch_first else (other, last)
    d_x = _laid_out(x, (steps, batch, width), batch_first)
    d_hx = hx.new_empty(hx.shape) if wanted[1] else None
    d_cx = cx.new_empty(cx.shape) if cx is not None and wanted[2] else None
    return d_x, d_hx, d_cx, [w.new_empty(w.shape) for w in weights] if wanted[3] else []


def _laid_out(like: Any, shape: tuple[int, int, int], batch_first: bool) -> Any:
    """A result: steps lie outermost in memory, whichever dim comes first."""
    made = like.new_empty(shape)
    return made.transpose(0, 1) if batch_first else made
