"""The space of plans: every legal plan of a model on so many devices, and why the others are not legal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from costmodels.cluster import Cluster
from opgraph.graph import OpGraph
from opgraph.workload import Workload
from planner.curves import curves
from planner.host_thread import EAGER, Running
from planner.layout import propagate
from planner.plan import DataParallel, ParallelPlan, Precision, Schedule, Sharding
from planner.runtime_data import no_fully_shard, no_zero1
from planner.stages import LOSS, OWN_CHECKPOINTS, recomputes, within
from planner.step_costs import StepCosts, crossings, step_costs
from planner.tensor_parallel import explain_no_shardings, tp_shardings
from planner.tp_trial import forward_of, kinds, workable

OTHER_PATHS = (
    "the forward takes another path for other data, so ranks of different data would run different operators and wait "
    "for each other for ever"
)
OVERSUBSCRIPTION = 4  # ranks per host core that a cluster of cores accepts


@dataclass(frozen=True, slots=True)
class Rejection:
    """Plans that are not legal. label: which ("pp8", "dp2 x tp4 fsdp"); reason: one sentence; count: how many."""

    label: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where a pipeline may be cut: before forward op `start`. paths: modules that begin there, best first."""

    start: int
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Space:
    """All legal plans in a fixed order, what was rejected, and the costs that the plans share."""

    plans: tuple[ParallelPlan, ...]
    rejected: tuple[Rejection, ...]
    costs: StepCosts


@dataclass(slots=True)
class _Builder:
    workload: Workload
    costs: StepCosts
    global_batch: int
    precision: Precision
    cuts: tuple[Cut, ...]
    units: tuple[str, ...]
    plans: list[ParallelPlan] = field(default_factory=list)
    rejected: dict[tuple[str, str], int] = field(default_factory=dict)

    def reject(self, label: str, reason: str, count: int = 1) -> None:
        self.rejected[label, reason] = self.rejected.get((label, reason), 0) + count


def enumerate_plans(
    workload: Workload,
    graph: OpGraph,
    cluster: Cluster,
    global_batch: int,
    devices: int | None = None,
    precision: Precision = "fp32",
    running: Running = EAGER,
) -> Space:
    """Every legal plan of `global_batch` samples on exactly `devices` devices (all of the cluster's by default)."""
    devices = check_devices(cluster, devices)
    if global_batch < 1:
        raise ValueError(f"the global batch is {global_batch}; a step needs 1 or more samples")
    if not graph.gradient_ops:
        raise ValueError(f"{graph.name} has no parameter that is trained, so there is no training step to plan")
    costs = step_costs(graph, cluster, running)
    paths = sorted(costs.spans, key=lambda path: costs.spans[path])
    found = workload.blocks or tuple(p for p in paths if "." not in p and _has_parameters(graph, p))
    units = tuple(u for u in found if not _lends(graph, u))
    cuts = cut_candidates(costs, workload.blocks)
    builder = _Builder(workload, costs, global_batch, precision, cuts, tuple(u for u in units if u in costs.spans))
    for pp, dp, tp in _factorizations(devices):
        _enumerate_mesh(builder, pp, dp, tp)
    rejected = tuple(Rejection(label, reason, count) for (label, reason), count in builder.rejected.items())
    return Space(tuple(builder.plans), rejected, costs)


def _lends(graph: OpGraph, path: str) -> bool:
    """Whether a parameter of this module is read outside of it, where `fully_shard` has not gathered it."""
    owned = {t.storage for n, t in graph.parameters.items() if within(n.rpartition(".")[0], path)}
    return any(
        graph.tensors[t].storage in owned
        for op in graph.ops
        if op.phase == "forward" and not within(op.module, path)
        for t in op.inputs
    )


def check_devices(cluster: Cluster, devices: int | None) -> int:
    """The number of devices to plan for. ValueError where the cluster does not have so many."""
    devices = cluster.size if devices is None else devices
    most = OVERSUBSCRIPTION * cluster.cores * cluster.nodes if cluster.cores else cluster.size
    if not 1 <= devices <= most:
        shared = f", {OVERSUBSCRIPTION} ranks for each of its {cluster.cores} cores" if cluster.cores else ""
        raise ValueError(f"{devices} devices are asked for, but {cluster.name} takes 1 to {most}{shared}")
    return devices


def unreached(graph: OpGraph) -> str:
    """Why no plan of this model uses DistributedDataParallel."""
    more = len(graph.idle) - 1
    others = f" and {counted(more, 'other')}" if more else ""
    return (
        f"no gradient reaches {graph.idle[0]}{others}, and torch's DistributedDataParallel, on which ddp and zero1 "
        "rest, stops at such parameters: freeze them with requires_grad_(False), or use fsdp"
    )


def counted(n: int, what: str) -> str:
    """
    >>> counted(1, "cut"), counted(0, "place")
    ('1 cut', '0 places')
    """
    return f"{n} {what}{'' if n == 1 else 's'}"


def _factorizations(n: int) -> Iterator[tuple[int, int, int]]:
    for pp in divisors(n):
        for tp in divisors(n // pp):
            yield pp, n // pp // tp, tp


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _enumerate_mesh(b: _Builder, pp: int, dp: int, tp: int) -> None:
    label = " x ".join(f"{axis}{n}" for axis, n in (("pp", pp), ("dp", dp), ("tp", tp)) if n > 1) or "single"
    kinds: tuple[DataParallel, ...] = ("ddp", "zero1", "fsdp") if dp > 1 else ("ddp",)
    schedules: tuple[Schedule, ...] = ("gpipe", "1f1b") if pp > 1 else ("1f1b",)
    count = len(kinds) * len(schedules) * 2  # what one micro-batch size stands for: with and without recomputation
    if pp > 1 and b.costs.graph.traced_on == "real":
        b.reject(label, "the forward depends on the values of its data, so torch cannot record it for stages", count)
        return
    if pp > 1 and recomputes(b.costs.graph):
        b.reject(label, OWN_CHECKPOINTS, count)
        return
    if dp > 1 and b.costs.graph.varies:
        b.reject(label, OTHER_PATHS, count)
        return
    if b.global_batch % dp:
        b.reject(label, f"the global batch of {b.global_batch} is not divisible by dp = {dp}", count)
        return
    batches = divisors(b.global_batch // dp)
    shardings: tuple[tuple[str, Sharding], ...] = ()
    if tp > 1:
        shardings, reason = _shardings(b, tp)
        if not shardings:
            b.reject(label, reason, count * len(batches))
            return
    if dp > 1 and (why := no_fully_shard({name: t.shape for name, t in b.costs.graph.parameters.items()})):
        kinds = ("ddp", "zero1")
        b.reject("fsdp", why, len(schedules) * 2 * len(batches))
    if dp > 1 and b.costs.graph.idle:
        left_out = (len(kinds) - ("fsdp" in kinds)) * len(schedules) * 2 * len(batches)
        b.reject("ddp or zero1", unreached(b.costs.graph), left_out)
        kinds = tuple(kind for kind in kinds if kind == "fsdp")
        if not kinds:
            return
    dtypes = {name: t.dtype for name, t in b.costs.graph.parameters.items()}
    if "zero1" in kinds and (why := no_zero1(dtypes)):
        kinds = tuple(kind for kind in kinds if kind != "zero1")
        b.reject("zero1", why, len(schedules) * 2 * len(batches))
    for m in batches:
        _enumerate_batch(b, label, (pp, dp, tp), m, shardings, kinds, schedules)


def _enumerate_batch(
    b: _Builder,
    label: str,
    mesh: tuple[int, int, int],
    m: int,
    shardings: tuple[tuple[str, Sharding], ...],
    kinds: Sequence[DataParallel],
    schedules: Sequence[Schedule],
) -> None:
    pp, dp, tp = mesh
    cuts: tuple[str, ...] = ()
    if pp > 1:
        probe = ParallelPlan(b.global_batch, 1, dp, tp, m, shardings=shardings)
        candidates = uncut_by_tp(b.costs, b.cuts, probe)
        found = balanced_cuts(b.costs, probe, candidates, pp)
        if found is None:
            places = counted(len(candidates), "place")
            reason = f"pp = {pp} needs {counted(pp - 1, 'cut')}, but the model has {places} to cut"
            b.reject(f"pp{pp}", reason, len(kinds) * len(schedules) * 2)
            return
        cuts = found
    units = tuple(u for u in b.units if not any(cut.startswith(f"{u}.") for cut in cuts))
    blocks = tuple(u for u in b.workload.blocks if u in units)
    for schedule in schedules:
        if schedule == "1f1b" and m < pp:
            reason = f"1f1b needs as many micro-batches as stages, {pp}, or more: mb{pp}, or gpipe"
            b.reject(f"pp{pp} 1f1b", reason, 2 * len(kinds))
            continue
        for kind in kinds:
            b.plans.extend(
                ParallelPlan(
                    b.global_batch, pp, dp, tp, m, kind, schedule, cuts, shardings, units if kind == "fsdp" else (),
                    recompute, b.precision,
                )
                for recompute in ((), blocks)[: 1 + bool(blocks)]
            )  # fmt: skip


def _shardings(b: _Builder, tp: int) -> tuple[tuple[tuple[str, Sharding], ...], str]:
    """The tensor-parallel pairs of this degree, or the reason why there are none."""
    graph, key = b.costs.graph, ("shardings", tp)
    if key not in b.costs.cache:
        found = tp_shardings(graph, tp)
        reason = ""
        if found:
            if "forward" not in b.costs.cache:
                b.costs.cache["forward"] = forward_of(b.workload)
            found, why = workable(b.workload, b.costs.cache["forward"], found, tp)
            if why and not found:
                reason = f"tp = {tp}: {why}"
            elif why:
                b.reject(f"tp{tp} of all pairs", f"only the pairs of {kinds(found)} are split: {why}", 0)
        else:
            smaller = next((s for d in sorted({2, *divisors(tp)[1:-1]} - {tp}) if (s := tp_shardings(graph, d))), ())
            if smaller:
                reason = f"tp = {tp} does not divide the features or heads of {smaller[0][0]!r} and of the others"
            else:
                reason = f"tp = {tp}: {explain_no_shardings(graph, tp)}"
        b.costs.cache[key] = found, reason
    pairs, reason = b.costs.cache[key]
    return pairs, reason


def uncut_by_tp(costs: StepCosts, cuts: tuple[Cut, ...], plan: ParallelPlan) -> tuple[Cut, ...]:
    """Cuts that no sharded activation crosses: a stage sends whole tensors only."""
    if plan.tp == 1:
        return cuts
    key = ("uncut", plan.tp)
    if key not in costs.cache:
        graph = costs.graph
        placed = propagate(graph, plan).placements
        split = {t.storage for t in graph.tensors if placed[t.id] >= 0}
        costs.cache[key] = tuple(c for c in cuts if not split & set(crossings(costs, c.start)))
    found: tuple[Cut, ...] = costs.cache[key]
    return found


def _has_parameters(graph: OpGraph, path: str) -> bool:
    return any(name.startswith(f"{path}.") for name in graph.parameters)


# -- pipeline cuts --------------------------------------------------------------------------------------------------


def cut_candidates(costs: StepCosts, blocks: Sequence[str] = ()) -> tuple[Cut, ...]:
    """Places to cut, in execution order: where one of `blocks`, a child of the root or a numbered module (a child of
    a Sequential) begins, which the forward calls once, and which one floating-point activation crosses. Where no place
    has only one, those that the fewest cross."""
    by_start: dict[int, list[str]] = {}
    for path, (first, _) in costs.spans.items():
        tail = path.rpartition(".")[2]
        if first and path != LOSS and (path in blocks or tail == path or tail.isdigit()) and _called_once(costs, path):
            by_start.setdefault(first, []).append(path)
    crossed = {start: crossings(costs, start) for start in by_start}
    sendable = {start: len(c) for start, c in crossed.items() if c and -1 not in c}
    least = min(sendable.values(), default=0)
    return tuple(
        Cut(start, tuple(sorted(by_start[start], key=lambda p: (p not in blocks, p.count("."), p))))
        for start in sorted(sendable)
        if sendable[start] == least
    )


def _called_once(costs: StepCosts, path: str) -> bool:
    """Whether the module's forward ops are one run that does not repeat itself."""
    first, last = costs.spans[path]
    run = [(op.module, op.name) for op in costs.graph.ops[first : last + 1]]
    if any(module != path and not module.startswith(f"{path}.") for module, _ in run):
        return False
    halves = [k for k in divisors(len(run))[:-1] if run == run[:k] * (len(run) // k)]
    return not halves


def balanced_cuts(costs: StepCosts, plan: ParallelPlan, candidates: Sequence[Cut], pp: int) -> tuple[str, ...] | None:
    """Module paths of the pp - 1 cuts whose slowest stage (forward and backward seconds of the plan's micro-batch, its
    tensor-parallel messages among them) is fastest; None where there are too few candidates."""
    if len(candidates) < pp - 1:
        return None
    c = curves(costs, plan)
    starts = [cut.start for cut in candidates]
    segments = np.add.reduceat(c.forward + c.backward, [0, *starts])
    chosen = _paths([candidates[i - 1] for i in partition(segments, pp)])
    if chosen is None:  # a module and places inside it were chosen: leave the places inside out
        tops = {p for cut in candidates for p in cut.paths}
        outer = [c for c in candidates if not any(c.paths[0].startswith(f"{p}.") for p in tops)]
        return balanced_cuts(costs, plan, outer, pp) if len(outer) < len(candidates) else None
    return chosen


def partition(segments: NDArray[np.float64], parts: int) -> list[int]:
    """Indices at which parts 1, 2, ... of `segments` begin, so that the largest sum of a part is least.

    >>> partition(np.array([1.0, 1.0, 1.0, 3.0]), 2)
    [3]
    """
    n, total = len(segments), np.concatenate([[0.0], np.cumsum(segments)])
    assert 1 <= parts <= n
    best = total.copy()  # best[j]: least maximum of the first j segments in k parts
    back: list[NDArray[np.int64]] = []
    for k in range(2, parts + 1):
        new, at = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
        for j in range(k, n + 1):
            options = np.maximum(best[k - 1 : j], total[j] - total[k - 1 : j])
            at[j] = k - 1 + int(np.argmin(options))
            new[j] = options[at[j] - k + 1]
        best = new
        back.append(at)
    chosen, j = [], n
    for at in reversed(back):
        j = int(at[j])
        chosen.append(j)
    return chosen[::-1]


def _paths(cuts: Sequence[Cut]) -> tuple[str, ...] | None:
    """One path per cut, none of them above another: a module that is cut inside is no call any more."""
    chosen: list[str] = []
    for cut in cuts:
        others = [p for other in cuts if other is not cut for p in other.paths]
        fine = [p for p in cut.paths if not any(o.startswith(f"{p}.") for o in others)]
        chosen.append(fine[0] if fine else cut.paths[-1])
    if any(b.startswith(f"{a}.") for a in chosen for b in chosen):
        return None
    return tuple(chosen)
