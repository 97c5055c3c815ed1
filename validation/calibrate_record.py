"""Timing every aten op of running training steps, in place: an op in a step is slower than in a hot loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from costmodels.ops import OpShape, signature
from opgraph.flops import flops_of
from opgraph.graph import DTYPE_BYTES
from opgraph.workload import adamw
from validation.calibrate_models import Source

SKIPPED = ("prim", "profiler")


class OpTimer(TorchDispatchMode):
    """Seconds of every op, in call order, and nothing else between two ops."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **kwargs) if kwargs else func(*args)
        self.times.append(time.perf_counter() - start)
        self.names.append(func)
        return out


class OpDescriber(TorchDispatchMode):
    """The OpShape of every op, in call order; counts bytes as `opgraph.graph.OpGraph` does."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[OpShape] = []
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ins = tensors_in((args, kwargs))
        out = func(*args, **kwargs)
        self.shapes.append(described(func, ins, written(func, args, kwargs), tensors_in(out), args, self.phase))
        return out


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op's schema says it writes."""
    names = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return [t for i, name in names for t in tensors_in(args[i] if i < len(args) else kwargs.get(name))]


def described(
    func: Any, ins: list[torch.Tensor], mutated: list[torch.Tensor], outs: list[torch.Tensor], args: Any, phase: str
) -> OpShape:
    """The OpShape of one executed op."""
    name = str(func)
    known = {t.untyped_storage()._cdata for t in ins}
    fresh = [t for t in outs if not any(t is m for m in mutated)]
    view = bool(outs) and not mutated and all(t.untyped_storage()._cdata in known for t in outs)
    shapes = [SimpleNamespace(shape=tuple(t.shape)) for t in ins]
    produced = [SimpleNamespace(shape=tuple(t.shape)) for t in outs]
    flops = 0 if view else flops_of(name, shapes, produced or shapes, SimpleNamespace(args=args))
    kinds = [str(t.dtype).removeprefix("torch.") for t in (*fresh, *ins)]
    dtype = next((k for k in kinds if "float" in k), kinds[0] if kinds else "float32")
    return OpShape(
        name, phase, tuple(tuple(t.shape) for t in ins), tuple(tuple(t.shape) for t in fresh), dtype, flops,
        0 if view else moved(ins), 0 if view else moved([*fresh, *mutated]),
    )  # fmt: skip


def moved(tensors: list[torch.Tensor]) -> int:
    """Bytes of distinct tensors; expanded dims count once."""
    distinct = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in tensors if t.layout == torch.strided}
    total = 0
    for t in distinct.values():
        count = 1
        for n, s in zip(t.shape, t.stride()):
            count *= n if s else 1
        total += count * DTYPE_BYTES[str(t.dtype).removeprefix("torch.")]
    return total


@dataclass(slots=True)
class Step:
    """A calibration model made ready: one call of `run` is one training step."""

    source: Source
    parts: tuple[Callable[[], Any], ...]
    shapes: list[OpShape] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    plain: list[tuple[float, ...]] = field(default_factory=list)


def prepare(source: Source) -> Step:
    """Builds the model, runs one step, and describes the ops of a second one."""
    module, inputs, targets, loss = source.make()
    optimizer: Any = adamw(module.parameters())
    state: dict[str, Any] = {}

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16) if source.bf16 else nullcontext():
            state["loss"] = loss(module(*inputs), *targets)

    def backward() -> None:
        state.pop("loss").backward()

    def optimize() -> None:
        optimizer.step()
        optimizer.zero_grad()

    step = Step(source, (forward, backward, optimize))
    for part in step.parts:
        part()
    with OpDescriber() as describer:
        for name, part in zip(("forward", "backward", "optimizer"), step.parts):
            describer.phase = name
            part()
    step.shapes = describer.shapes
    return step


def time_ops(step: Step) -> None:
    """One step with every op timed; a step whose ops differ from the described ones does not count."""
    with OpTimer() as timer:
        for part in step.parts:
            part()
    if [str(f) for f in timer.names] == [s.name for s in step.shapes]:
        step.times.append(timer.times)


def time_parts(step: Step) -> None:
    """One step without the mode: seconds of forward, backward, optimizer."""
    marks = [time.perf_counter()]
    for part in step.parts:
        part()
        marks.append(time.perf_counter())
    step.plain.append(tuple(b - a for a, b in zip(marks, marks[1:])))


def medians(step: Step) -> list[float]:
    """Median seconds of every op over the steps."""
    return [statistics.median(column) for column in zip(*step.times)]


def samples(steps: list[Step]) -> dict[str, tuple[OpShape, float]]:
    """Every distinct op with its median seconds over all its calls."""
    calls: dict[str, tuple[OpShape, list[float]]] = {}
    for step in steps:
        if step.times:
            for shape, seconds in zip(step.shapes, medians(step)):
                calls.setdefault(signature(shape), (shape, []))[1].append(seconds)
    return {key: (shape, statistics.median(seconds)) for key, (shape, seconds) in calls.items()}
