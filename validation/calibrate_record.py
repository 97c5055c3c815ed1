"""Timing every aten op of running training steps, in place: an op in a step is slower than in a hot loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from costmodels.context import in_context, is_stream, runs_of
from costmodels.families import FREE, PARTS, family
from costmodels.features import MIB, touched
from costmodels.ops import OpShape, signature, variant_of
from costmodels.signature import Signature
from opgraph.flops import flops_of
from opgraph.graph import DTYPE_BYTES
from opgraph.tracer import written
from opgraph.workload import adamw
from validation.anchor import Beat, over
from validation.calibrate_models import Source

SKIPPED = ("prim", "profiler")  # bookkeeping, as in opgraph.trace
PHASES = ("forward", "backward", "optimizer")
# CPU time of the calling thread: one-threaded ops never wait, so on a free core it is the wall time, and another
# process that takes the core does not count. Backward of a CPU graph runs on the calling thread too.
CLOCK = time.thread_time
AGAIN = 3  # steps before a timed one, where what ran before it stays in the caches
WAITING = 1.1  # wall time / CPU time above which a step was disturbed (caches too)


class OpTimer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Seconds of every op, in call order, and nothing else between two ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.times: list[float] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = CLOCK()
        out = func(*args, **kwargs) if kwargs else func(*args)
        end = CLOCK()
        if func.namespace not in SKIPPED:
            self.times.append(end - start)
            self.names.append(func)
        return out


class OpDescriber(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The OpShape of every op, in call order; counts bytes as `opgraph.graph.OpGraph` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[OpShape] = []
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in SKIPPED:
            return func(*args, **kwargs)
        ins = tensors_in((args, kwargs))
        out = func(*args, **kwargs)
        mutated = list(written(func, args, kwargs))
        self.shapes.append(described(func, ins, mutated, tensors_in(out), args, kwargs, self.phase))
        return out


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def described(
    func: Any, ins: list[torch.Tensor], mutated: list[torch.Tensor], outs: list[torch.Tensor], args: Any,
    kwargs: dict[str, Any], phase: str,
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
    operands = [str(t.dtype).removeprefix("torch.") for t in ins if t.dim()]
    sides = ([t for t in side if t.layout == torch.strided] for side in (fresh, ins))
    layouts = [[(tuple(t.shape), tuple(t.stride())) for t in side] for side in sides]
    variant = variant_of(name, args, kwargs.items(), operands, layouts[1])
    runs = runs_of(*layouts) if is_stream(name) else 1
    return OpShape(
        name, phase, tuple(tuple(t.shape) for t in ins), tuple(tuple(t.shape) for t in fresh), dtype, flops,
        0 if view else moved(ins), 0 if view else moved([*fresh, *mutated]), False, variant, runs,
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


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of the ops (or parts) of one step; `waiting` is wall time / CPU time of the step, 1 when undisturbed."""

    seconds: tuple[float, ...]
    waiting: float


def undisturbed(runs: list[Run]) -> list[Run]:
    """The runs during which no other process took the core; at least the best third."""
    calm = [r for r in runs if r.waiting < WAITING]
    return calm if len(calm) * 3 >= len(runs) else sorted(runs, key=lambda r: r.waiting)[: -(-len(runs) // 3)]


@dataclass(slots=True)
class Step:
    """A calibration model made ready: running all `parts`, each of one of `PHASES`, is one training step. By round:
    times of its ops; plain, of its parts without timing ops (none in some rounds); paces, the anchor beside them."""

    source: Source
    parts: tuple[Callable[[], Any], ...]
    shapes: list[OpShape] = field(default_factory=list)
    times: list[Run] = field(default_factory=list)
    plain: list[Run | None] = field(default_factory=list)
    paces: list[Beat] = field(default_factory=list)
    phases: tuple[str, ...] = PHASES


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

    again = source.micro
    step = Step(source, (*(forward, backward) * again, optimize), phases=(*PHASES[:2] * again, PHASES[2]))
    for part in step.parts:
        part()
    with OpDescriber() as describer:
        for name, part in zip(step.phases, step.parts):
            describer.phase = name
            part()
    step.shapes = in_context(describer.shapes)
    return step


def workload_source(spec: str, batch: int) -> Source:
    """A workload of `opgraph.models.load_workload` as a step to measure."""
    from opgraph.models import load_workload

    workload = load_workload(spec)

    def make() -> tuple[Any, Any, Any, Any]:
        inputs, targets = workload.batch(batch)
        return workload.build(), inputs, targets, workload.loss

    return Source(spec, make)


def time_ops(step: Step) -> None:
    """One step with every op timed; a step whose ops differ from the described ones does not count. A step that leaves
    the caches full (`Source.micro`) runs a few times before, as in training it follows its like, not another model."""
    for _ in range(AGAIN if step.source.micro > 1 else 0):
        for part in step.parts:
            part()
    wall, cpu = time.perf_counter(), time.process_time()
    with OpTimer() as timer:
        for part in step.parts:
            part()
    waiting = (time.perf_counter() - wall) / max(time.process_time() - cpu, 1e-9)
    good = [str(f) for f in timer.names] == [s.name for s in step.shapes]
    step.times.append(Run(tuple(timer.times) if good else (), waiting))
    step.plain.append(None)


def time_parts(step: Step) -> None:
    """One step without the mode, beside the one that `time_ops` just ran: seconds of its parts."""
    cpu = time.process_time()
    wall = time.perf_counter()
    marks = [CLOCK()]
    for part in step.parts:
        part()
        marks.append(CLOCK())
    waiting = (time.perf_counter() - wall) / max(time.process_time() - cpu, 1e-9)
    step.plain[-1] = Run(tuple(b - a for a, b in pairwise(marks)), waiting)


def at_pace(step: Step, reference: Beat) -> None:
    """Brings all runs to the pace at which the anchor takes `reference`, and drops those whose ops differed. Operators
    go by the part of the anchor that is like them, whole steps by all of it."""
    runs = [run for run in zip(step.times, step.plain, step.paces) if run[0].seconds]
    parts = np.array([Beat._fields.index(part_of(s)) for s in step.shapes], int)
    step.times = [_scaled(timed, np.array(over(reference, pace))[parts]) for timed, _, pace in runs]
    step.plain = [_scaled(plain, reference.whole / pace.whole) if plain else None for _, plain, pace in runs]


def part_of(shape: OpShape) -> str:
    """The part of the anchor that an op goes by: one that moves less than a MiB is mostly its call."""
    return PARTS.get(family(shape.name)) or ("passes" if touched(shape) >= MIB else "calls")


def _scaled(run: Run, factors: NDArray[np.float64] | float) -> Run:
    return Run(tuple((np.array(run.seconds) * factors).tolist()), run.waiting)


def medians(runs: list[Run]) -> list[float]:
    """Median seconds of every op (or part) over the undisturbed runs; of two middle ones the lower, as what disturbs an
    op makes it longer."""
    return [statistics.median_low(column) for column in zip(*(r.seconds for r in undisturbed(runs)))]


@dataclass(frozen=True, slots=True)
class Sample:
    """One distinct op (in one context, see `costmodels.context`) with its median seconds over all its calls."""

    shape: OpShape
    seconds: float


Placed = tuple[Signature, int, int, int]


def placed(shape: OpShape) -> Placed:
    """What equal ops in equal contexts share."""
    return signature(shape), shape.runs, shape.swept, shape.since


def samples(steps: list[Step]) -> list[Sample]:
    """Every distinct op of the steps, in every context."""
    calls: dict[Placed, tuple[OpShape, list[float]]] = {}
    for step in steps:
        if step.times:
            for shape, seconds in zip(step.shapes, medians(step.times)):
                calls.setdefault(placed(shape), (shape, []))[1].append(seconds)
    return [Sample(shape, statistics.median(seconds)) for shape, seconds in calls.values()]


@dataclass(frozen=True, slots=True)
class Overhead:
    """What one step took beyond its ops: by phase, the step's seconds, its ops' seconds, and the number of ops."""

    name: str
    parts: dict[str, tuple[float, float, int]]
    parameters: int
    shapes: tuple[OpShape, ...]


def overhead(step: Step) -> Overhead:
    """The step's parts beside the sum of its ops' medians (views and the like count as ops of no time).

    A part's seconds are that sum plus the median difference between a step without the mode and the step with it that
    ran just before: the machine drifts less between the two than between rounds.
    """
    at = [PHASES.index(s.phase) for s in step.shapes]
    counted = [family(s.name) not in FREE for s in step.shapes]

    def by_phase(seconds: Sequence[float]) -> list[float]:
        sums = [0.0] * len(PHASES)
        for phase, counts, value in zip(at, counted, seconds):
            sums[phase] += value if counts else 0.0
        return sums

    ops = by_phase(medians(step.times))
    pairs = [(timed, plain, max(timed.waiting, plain.waiting)) for timed, plain in zip(step.times, step.plain) if plain]
    pairs = sorted(pairs, key=lambda pair: pair[2])[: max(len(pairs) // 2, 1)]
    of_parts = [[i for i, name in enumerate(step.phases) if name == phase] for phase in PHASES]
    runs = [
        (by_phase(timed.seconds), [sum(plain.seconds[i] for i in own) for own in of_parts]) for timed, plain, _ in pairs
    ]
    parts = {}
    for i, phase in enumerate(PHASES):
        extra = statistics.median(plain[i] - timed[i] for timed, plain in runs)
        middle = statistics.median(timed[i] for timed, _ in runs)
        parts[phase] = (extra + middle, ops[i], at.count(i))
    fused = [s for s in step.shapes if family(s.name) == "optimizer"]
    tensors = max((len(s.in_shapes) for s in fused), default=0) // 5  # parameter, gradient, two moments, step count
    return Overhead(step.source.name, parts, tensors, tuple(step.shapes))
