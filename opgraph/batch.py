"""One graph for every batch size: two traces give every dim, every stride and every storage as `a + b * batch`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from opgraph.flops import FORMULAS, Formula, base_name, flops_of
from opgraph.graph import Op, OpGraph, Ref, Storage, Tensor
from opgraph.workload import Workload

if TYPE_CHECKING:
    from torch import nn

SMALLEST = 2  # a batch of 1 lets torch specialise shapes (squeezes, broadcasts), so both traces stay above it


class NotAffineError(ValueError):
    """The step does something else at another batch size, so that one graph cannot serve them all."""


# -- fitting ------------------------------------------------------------------------------------------------


def fit_batch(first: OpGraph, second: OpGraph) -> OpGraph:
    """`first` with the batch coefficients that `second` (another batch size) reveals.

    Sizes that depend on data (traces on real tensors) grow by the rounded mean of these two batches, and never shrink.
    Raises NotAffineError where the two steps do not run the same ops.
    """
    step = second.batch - first.batch
    loose = first.traced_on == "real"
    if step == 0:
        raise ValueError(f"both traces have batch {first.batch}; trace at two different batch sizes")
    for a, b in zip_longest(first.ops, second.ops):
        if a is None or b is None or _signature(a) != _signature(b):
            if loose:
                raise NotAffineError(
                    f"{first.name} runs other operators on one batch than on another, from op {(a or b).id} "
                    f"({(a or b).name} in '{(a or b).module}') on, as its control flow depends on the values of its "
                    "data: no one graph is its step"
                )
            raise NotAffineError(
                f"{first.name} runs other operators at batch {second.batch} than at batch {first.batch}, from op "
                f"{(a or b).id} ({(a or b).name} in '{(a or b).module}') on; fix the batch size of the plan"
            )
    if [_lifetime(s) for s in first.storages] != [_lifetime(s) for s in second.storages]:
        raise NotAffineError(
            f"{first.name} keeps other tensors at batch {second.batch} than at {first.batch}; fix the plan's batch size"
        )
    tensors = tuple(_fit_tensor(a, b, step, loose) for a, b in zip(first.tensors, second.tensors))
    square = next((t for t in tensors if _is_square(t)), None)
    note = "" if square is None else (
        f"tensors such as {square.shape} at batch {first.batch} grow with the square of the batch; other batch sizes "
        f"are exact for these tensors, not for what is made of them in other shapes. Samples meet each other there, so "
        f"data parallelism and micro-batches, which part them, may compute something else"
    )
    return replace(
        first,
        ops=tuple(_fit_op(a, b, step) for a, b in zip(first.ops, second.ops)),
        tensors=tensors,
        notes=(*first.notes, note) if note else first.notes,
        storages=tuple(_fit_storage(a, b, step, loose) for a, b in zip(first.storages, second.storages)),
    )


def _signature(op: Op) -> tuple[Any, ...]:
    return op.name, op.phase, op.module, op.inputs, op.outputs, op.mutates


def _lifetime(storage: Storage) -> tuple[Any, ...]:
    return storage.role, storage.birth, storage.death


def _slope(low: int, high: int, step: int, what: str, loose: bool) -> int:
    if loose:
        return max(0, round((high - low) / step))
    slope, rest = divmod(high - low, step)
    if rest:
        raise NotAffineError(f"{what} does not grow by whole numbers with the batch ({low} -> {high} for {step} more)")
    return slope


def _fit_op(a: Op, b: Op, step: int) -> Op:
    args = _arg_slopes(a.args, b.args, step) if a.args != b.args else ()
    flops = (b.flops - a.flops) // step
    return replace(a, flops_per_batch=flops, args_per_batch=args) if flops or args else a


def _arg_slopes(low: Any, high: Any, step: int) -> Any:
    """Slopes of the numbers among arguments; what is not a number, or not affine (1 / batch), keeps slope 0."""
    if isinstance(low, tuple) and isinstance(high, tuple) and len(low) == len(high):
        return tuple(_arg_slopes(m, n, step) for m, n in zip(low, high))
    if type(low) is int and type(high) is int:
        slope, rest = divmod(high - low, step)
        return 0 if rest else slope
    return 0


def _fit_tensor(a: Tensor, b: Tensor, step: int, loose: bool) -> Tensor:
    if a.shape == b.shape and a.strides == b.strides:
        return a
    per_batch = tuple(_slope(m, n, step, f"a dim of tensor {a.id}", loose) for m, n in zip(a.shape, b.shape))
    strides = tuple(_slope(m, n, step, f"a stride of tensor {a.id}", loose) for m, n in zip(a.strides, b.strides))
    return replace(a, per_batch=per_batch, strides_per_batch=strides if any(strides) else ())


def _is_square(t: Tensor) -> bool:
    """Whether several dims grow with the batch."""
    return sum(map(bool, t.per_batch)) > 1


def _fit_storage(a: Storage, b: Storage, step: int, loose: bool) -> Storage:
    slope = _slope(a.bytes, b.bytes, step, f"storage {a.id}", loose)
    return replace(a, bytes_per_batch=slope) if slope else a


# -- evaluating ---------------------------------------------------------------------------------------------


def rescaled(graph: OpGraph, batch: int) -> OpGraph:
    """`graph` at another batch size."""
    step = batch - graph.batch
    tensors = tuple(_rescaled_tensor(t, step) for t in graph.tensors)
    square = {  # a graph that was made for prices alone has no storages
        t.storage: t
        for t, before in zip(tensors, graph.tensors)
        if graph.storages and _is_square(t) and before.bytes == graph.storages[t.storage].bytes
    }
    storages = tuple(
        replace(s, bytes=square[s.id].bytes if s.id in square else max(0, s.bytes + step * s.bytes_per_batch))
        if s.bytes_per_batch
        else s
        for s in graph.storages
    )
    ops = tuple(
        _rescaled_op(op, graph, tensors, step) if op.flops or op.args_per_batch else op for op in graph.ops
    )
    other = graph.on_accelerators and graph.on_accelerators.at_batch(batch)
    return replace(graph, batch=batch, tensors=tensors, storages=storages, ops=ops, on_accelerators=other)


def _rescaled_op(op: Op, graph: OpGraph, tensors: tuple[Tensor, ...], step: int) -> Op:
    args = _shifted(op.args, op.args_per_batch, step) if op.args_per_batch else op.args
    flops = op.flops
    if flops and base_name(op.name) in FORMULAS and flops == _formula(op, graph.tensors):
        flops = _formula(replace(op, args=args), tensors)
    elif flops:  # the user's formula, which the graph does not hold
        flops = max(0, flops + step * op.flops_per_batch)
    return replace(op, flops=flops, args=args)


def _formula(op: Op, tensors: tuple[Tensor, ...]) -> int:
    outputs = op.outputs or op.mutates or op.inputs
    return flops_of(op.name, [tensors[i] for i in op.inputs], [tensors[i] for i in outputs], op)


def _shifted(value: Any, slope: Any, step: int) -> Any:
    if isinstance(slope, tuple):
        return tuple(_shifted(v, s, step) for v, s in zip(value, slope))
    return value + step * slope if slope and not isinstance(value, Ref) else value


def _rescaled_tensor(t: Tensor, step: int) -> Tensor:
    if not any(t.per_batch) and not t.strides_per_batch:
        return t
    shape = tuple(max(0, n + k * step) for n, k in zip(t.shape, t.per_batch))  # data may leave a small batch nothing
    strides = tuple(n + k * step for n, k in zip(t.strides, t.strides_per_batch)) if t.strides_per_batch else t.strides
    return replace(t, shape=shape, strides=strides)


# -- tracing ------------------------------------------------------------------------------------------------


def trace_workload(
    workload: Workload, *, precision: str = "fp32", flops: Mapping[str, Formula] | None = None, fold: bool = True,
    accelerator: bool | None = None,
) -> OpGraph:  # fmt: skip
    """The workload's step at its own batch size, exact at every other one.

    Built on the meta device (nothing allocated) where the model allows it, else with real weights. With `fold`, a
    list of at least `opgraph.fold.LEAST` identical blocks is traced with four of them and unfolded (`graph.repeats`
    says so); the graph is the one that the whole model's trace gives, and models without such a list are traced whole.
    A model with recurrent layers is traced twice: as a CPU runs it, and as accelerators do (`OpGraph.run_by`);
    `accelerator` says that only the one (False) or the other (True) is wanted, as tracing many steps takes long.
    precision: as of `trace`, or "fp8" (`opgraph.eight_bits`).
    """
    from opgraph.recurrent import has_recurrent, with_accelerated

    if precision == "fp8":
        from opgraph.eight_bits import in_eight_bits

        traced = trace_workload(workload, precision="bf16", flops=flops, fold=fold, accelerator=accelerator)
        return in_eight_bits(traced)
    recurrent = list[bool]()
    flops = {**workload.flops, **(flops or {})}
    made = partial(_traced, workload, precision, flops, fold, lambda module: recurrent.append(has_recurrent(module)))
    if accelerator:
        try:
            return made(True)
        except ValueError:
            if not recurrent[-1]:
                raise
    graph = made(False)
    return with_accelerated(graph, lambda: made(True)) if recurrent[-1] and accelerator is not False else graph


def _traced(
    workload: Workload, precision: str, flops: Mapping[str, Formula] | None, fold: bool,
    see: Callable[[nn.Module], None], accelerator: bool,
) -> OpGraph:  # fmt: skip
    """One of the two; `see` gets the module."""
    import torch

    from opgraph.branches import takes_other_paths
    from opgraph.fold import Fold, find_fold, shortened
    from opgraph.trace import TraceError, trace
    from opgraph.tracer import WithoutMetaInit
    from opgraph.unfold import UnfoldError, unfold

    low = max(SMALLEST, workload.batch_size)

    def build(device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device(device), WithoutMetaInit():
            torch.manual_seed(0)  # sizes that depend on data are the same at every trace
            module = workload.build()
        see(module)
        return module

    def at(batch: int, module: nn.Module) -> OpGraph:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs, targets = workload.batch(batch)
            return trace(
                module, inputs, targets, loss=workload.loss, optimizer=workload.optimizer, precision=precision,
                name=workload.name, flops=flops, accelerator=accelerator,
            )  # fmt: skip

    def fitted(module: nn.Module) -> OpGraph:
        first = at(low, module)
        real = first.traced_on == "real"
        second = at(2 * low if real else low + 1, module)  # twice as many: what depends on data evens out
        graph = fit_batch(first, second).at_batch(workload.batch_size)
        return replace(graph, varies=takes_other_paths(module, lambda: workload.batch(low)[0])) if real else graph

    def folded(module: nn.Module, repeat: Fold) -> OpGraph | None:
        try:
            with shortened(module, repeat):
                short = fitted(module)
            with _no_collection():
                return unfold(short, repeat)
        except (UnfoldError, ValueError):  # a model that does not fold, or does not trace: the whole trace will tell
            return None

    try:
        module = build("meta")
    except (NotImplementedError, RuntimeError, TraceError):
        return fitted(build("cpu"))
    try:
        repeat = find_fold(module, workload.blocks) if fold else None
        graph = folded(module, repeat) if repeat else None
        return graph if graph is not None else fitted(module)
    except TraceError as error:
        if too_many := _too_many(module):
            raise TraceError(f"{error} ({too_many})") from error
        del module
    return fitted(build("cpu"))


def _too_many(module: nn.Module) -> str:
    """Why this module's weights are not made real; empty where they may be."""
    weights = _weight_bytes(module)
    return f"its {weights / 1e9:.1f} GB of weights are too many to try real ones" if weights > _free_bytes() / 4 else ""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from searching 100,000 fresh objects for cycles again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
