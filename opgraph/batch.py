"""One graph for every batch size: two traces give every dim and every storage as `a + b * batch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from opgraph.flops import Formula
from opgraph.graph import Op, OpGraph, Storage, Tensor
from opgraph.workload import Workload

SMALLEST = 2  # a batch of 1 lets torch specialise shapes (squeezes, broadcasts), so both traces stay above it


class NotAffineError(ValueError):
    """The step does something else at another batch size, so that one graph cannot serve them all."""


def fit_batch(first: OpGraph, second: OpGraph) -> OpGraph:
    """`first` with the batch coefficients that `second` (another batch size) reveals.

    Raises NotAffineError where the two steps do not run the same ops.
    """
    step = second.batch - first.batch
    if step == 0:
        raise ValueError(f"both traces have batch {first.batch}; trace at two different batch sizes")
    for a, b in zip_longest(first.ops, second.ops):
        if a is None or b is None or _signature(a) != _signature(b):
            raise NotAffineError(
                f"{first.name} runs other operators at batch {second.batch} than at batch {first.batch}, from op "
                f"{(a or b).id} ({(a or b).name} in '{(a or b).module}') on; fix the batch size of the plan"
            )
    if len(first.storages) != len(second.storages):
        raise NotAffineError(f"{first.name} allocates other tensors at batch {second.batch} than at {first.batch}")
    tensors = tuple(_fit_tensor(a, b, step) for a, b in zip(first.tensors, second.tensors))
    storages = tuple(_fit_storage(a, b, step) for a, b in zip(first.storages, second.storages))
    return replace(first, tensors=tensors, storages=storages)


def _signature(op: Op) -> tuple[Any, ...]:
    return op.name, op.phase, op.module, op.inputs, op.outputs, op.mutates


def _slope(low: int, high: int, step: int, what: str) -> int:
    slope, rest = divmod(high - low, step)
    if rest:
        raise NotAffineError(f"{what} does not grow by whole numbers with the batch ({low} -> {high} for {step} more)")
    return slope


def _fit_tensor(a: Tensor, b: Tensor, step: int) -> Tensor:
    per_batch = tuple(_slope(m, n, step, f"a dim of tensor {a.id}") for m, n in zip(a.shape, b.shape))
    return replace(a, per_batch=per_batch)


def _fit_storage(a: Storage, b: Storage, step: int) -> Storage:
    return replace(a, bytes_per_batch=_slope(a.bytes, b.bytes, step, f"storage {a.id}"))


def trace_workload(
    workload: Workload, *, precision: str = "fp32", flops: Mapping[str, Formula] | None = None
) -> OpGraph:
    """The workload's step at its own batch size, exact at every other one.

    Built on the meta device (nothing allocated) where the model allows it, else with real weights.
    """
    import torch

    from opgraph.trace import TraceError, trace

    low = max(SMALLEST, workload.batch_size)

    def at(batch: int, device: str) -> OpGraph:
        with torch.random.fork_rng(devices=[]):
            inputs, targets = workload.batch(batch)
            with torch.device(device):
                module = workload.build()
            return trace(
                module, inputs, targets, loss=workload.loss, optimizer=workload.optimizer, precision=precision,
                name=workload.name, flops=flops,
            )  # fmt: skip

    try:
        device, first = "meta", at(low, "meta")
    except (TraceError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, ValueError) and not isinstance(error, TraceError):
            raise
        device, first = "cpu", at(low, "cpu")
    return fit_batch(first, at(low + 1, device)).at_batch(workload.batch_size)
