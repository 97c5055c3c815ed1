"""Search: every legal plan is estimated and bounded, the promising ones are simulated, the best come first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from costmodels.cluster import Cluster
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from opgraph.graph import OpGraph
from opgraph.workload import Workload
from planner.estimate import Estimates, estimate
from planner.host_thread import Running
from planner.plan import AXES, ParallelPlan, Precision
from planner.predict import Prediction, memory_per_rank, predict
from planner.space import Rejection, Space, enumerate_plans
from planner.space_offload import OffloadMode, check_mode, no_offload, offloaded_plans

DEFAULT_LIMIT = 48  # plans that are simulated; half as many of a graph of many ops
MANY_OPS = 2000
MISSES = 2  # simulated plans of a family that did not fit, after which the others have no precedence any more
FEW = 3  # families that a sentence names
MODES: dict[OffloadMode, str] = {
    "auto": "", "never": "offload was not allowed", "always": "every plan was tried with offload to the host, too"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ranked:
    """A simulated plan. bound_seconds: its own lower bound. gap: step / least bound of all legal plans that may fit,
    minus 1; no plan of the space is better by more. tied: the predictions' intervals do not tell it from the best."""

    plan: ParallelPlan
    prediction: Prediction
    bound_seconds: float
    gap: float
    tied: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """plans: simulated plans that fit, by predicted step. considered: legal plans, all of them estimated. infeasible:
    those that do not fit. undecided: plans that were not simulated and whose bound is below the best step (0: the best
    is proved the best of the space under the cost model). seconds: what the search took. offload: whether plans that
    keep something on the host were tried, and why."""

    plans: tuple[Ranked, ...]
    considered: int
    infeasible: int
    rejected: tuple[Rejection, ...]
    seconds: float
    undecided: int = 0
    offload: str = ""


@dataclass(slots=True)
class _State:
    """What is known of every plan of the space: simulated, or out (does not fit, or cannot be predicted)."""

    space: Space
    estimates: Estimates
    out: NDArray[np.bool_]
    found: dict[int, Prediction] = field(default_factory=dict)
    short: dict[str, tuple[float, int, int]] = field(default_factory=dict)  # family -> least shortage, rank, count
    refused: dict[tuple[str, str], int] = field(default_factory=dict)
    misses: dict[tuple[str, ...], int] = field(default_factory=dict)  # family -> simulated plans that did not fit

    def lacks(self, index: int, nbytes: float, rank: int) -> None:
        self.out[index] = True
        name = " ".join(family(self.space.plans[index]))
        before = self.short.get(name, (nbytes, rank, 0))
        least = min(before[:2], (nbytes, rank))
        self.short[name] = (*least, before[2] + 1)


def search(
    workload: Workload,
    graph: OpGraph,
    cluster: Cluster,
    global_batch: int,
    *,
    devices: int | None = None,
    limit: int | None = None,
    precision: Precision = "fp32",
    compiled: bool = False,
    cuda_graphs: bool = False,
    offload: OffloadMode = "auto",
    progress: Callable[[str, float], None] | None = None,
) -> SearchResult:
    """Ranks the plans of `global_batch` samples on `devices` devices (default: all of the cluster's).

    All legal plans are estimated, bounded and checked for memory; the best `limit` of them, the best of every family
    among them, are simulated. compiled, cuda_graphs: what steps are assumed to run with (`planner.predict`). `progress`
    gets a text and the done fraction. offload: whether plans may keep something in the host's memory: "never", "always"
    (every plan with it and without), or "auto": those of families of which none is found to fit without it. Whether the
    host has that much memory is not known. ValueError if no plan is legal or none fits.
    """
    began = perf_counter()
    if limit is not None and limit < 1:
        raise ValueError(f"a search that simulates {limit} plans finds none; give 1 or more")
    if graph.precision != precision:
        raise ValueError(f"the graph was traced in {graph.precision}; trace it in {precision} to plan in {precision}")
    running = Running(cuda_graphs, compiled=compiled)
    why_not = no_offload(cluster, running)
    if check_mode(offload) == "always" and why_not:
        raise ValueError(f"plans cannot always offload: {why_not}; use auto or never")
    cluster = synchronous(in_precision(cluster, precision), devices or cluster.size)
    space = enumerate_plans(workload, graph, cluster, global_batch, devices, precision, running)
    if not space.plans:
        why = "; ".join(dict.fromkeys(f"{r.label}: {r.reason}" for r in space.rejected))
        raise ValueError(f"no plan of {workload.name} is legal on these devices ({why})")
    state = _State(replace(space, plans=()), estimate(space.costs, ()), np.zeros(0, bool))
    also = offloaded_plans(space.costs, space.plans) if offload == "always" else []
    _add(state, (*space.plans, *also), cluster)
    if limit is None:  # there are at most 23 families without offload, so that each has its best among them
        limit = DEFAULT_LIMIT // (2 if len(space.costs.graph.ops) > MANY_OPS else 1)
    tries = offload == "auto" and not why_not
    _simulate(state, space.costs.graph, cluster, limit, progress, certain=not tries)
    said = f"offload was not tried: {why_not}" if why_not else MODES[offload]
    if tries:
        said = _offload_what_lacks(state, space.costs.graph, cluster, limit, progress)
    infeasible = sum(count for _, _, count in state.short.values())
    rejected = (*space.rejected, *_memory_rejections(state), *_refusals(state))
    if not state.found:
        raise ValueError(_nothing(state, workload, cluster))
    plans, undecided = _ranked(state)
    seconds = perf_counter() - began
    return SearchResult(plans, len(state.space.plans), infeasible, rejected, seconds, undecided, said)


def _add(state: _State, plans: Sequence[ParallelPlan], cluster: Cluster) -> None:
    """Estimates plans, puts them behind those that are there, and drops what cannot fit."""
    first, before, more = len(state.space.plans), state.estimates, estimate(state.space.costs, plans)
    width = max(before.need_bytes.shape[1], more.need_bytes.shape[1])
    need, peak = (
        np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in pair])
        for pair in ((before.need_bytes, more.need_bytes), (before.peak_bytes, more.peak_bytes))
    )
    seconds = np.concatenate([before.seconds, more.seconds])
    state.estimates = Estimates(seconds, np.concatenate([before.bound_seconds, more.bound_seconds]), need, peak)
    state.space = replace(state.space, plans=(*state.space.plans, *plans))
    state.out = np.concatenate([state.out, np.zeros(len(plans), bool)])
    for i, plan in enumerate(plans, start=first):
        lacking, rank = shortage(plan, cluster, np.repeat(need[i, : plan.pp], plan.dp * plan.tp))
        if lacking > 0:
            state.lacks(i, lacking, rank)


def _offload_what_lacks(
    state: _State, graph: OpGraph, cluster: Cluster, limit: int, progress: Callable[[str, float], None] | None
) -> str:
    """Tries with offload the families of which nothing was found to fit, and says so: those plans whose bounds are
    below the best step. Where still nothing fits, all that is left is simulated, until something does."""
    plans = state.space.plans
    fitting = {family(plans[i]) for i in state.found}
    lacking = [p for p in plans if family(p) not in fitting]
    names = list(dict.fromkeys(" ".join(family(p)) for p in lacking))
    if not names:
        return "offload was not tried: every family of plans has one that fits without it"
    _add(state, offloaded_plans(state.space.costs, lacking), cluster)
    best = min((p.step_seconds for p in state.found.values()), default=np.inf)
    hopeful = [i for i in range(len(plans), len(state.out)) if state.estimates.bound_seconds[i] < best]
    _simulate(state, graph, cluster, len(names) if fitting else limit, progress, hopeful, certain=False)
    if not state.found:
        _simulate(state, graph, cluster, limit, progress)
    which = f"{len(names)} families of plans" if len(names) > FEW else f"plans of {', '.join(names)}"
    return f"offload to the host was tried for {which}, of which none was found to fit without it"


def shortage(plan: ParallelPlan, cluster: Cluster, by_rank: Sequence[float] | NDArray[np.float64]) -> tuple[float, int]:
    """Bytes that are missing on the rank where most are (0 or less: it fits), and that rank."""
    held = np.asarray(by_rank, float)
    rank = int(np.argmax(held))
    return float(held[rank]) - memory_per_rank(cluster, plan), rank


def _simulate(
    state: _State, graph: OpGraph, cluster: Cluster, limit: int, progress: Callable[[str, float], None] | None,
    among: Sequence[int] | None = None, certain: bool = True,
) -> None:  # fmt: skip
    """Simulates the best of every family, then the best of all (or of those `among` them), by estimate, until `limit`
    more are found; what does not fit makes room for more. certain: goes on as long as nothing fits."""
    plans, peaks = state.space.plans, state.estimates.peak_bytes
    chosen = np.arange(len(plans)) if among is None else np.array(among, np.int64)
    tight = np.array([shortage(plans[i], cluster, peaks[i, : plans[i].pp])[0] > 0 for i in chosen], bool)
    by_estimate = np.lexsort((state.estimates.seconds[chosen], tight))  # what may not fit after all comes last
    order = [int(chosen[i]) for i in by_estimate]
    found, missed = len(state.found), sum(state.misses.values())
    while len(state.found) < found + limit:
        if sum(state.misses.values()) - missed >= limit and (state.found or not certain):
            return
        index = _next(state, order)
        if index is None:
            return
        plan = plans[index]
        if progress:
            progress(f"simulating {plan.label}", (len(state.found) - found) / limit)
        try:
            running = state.space.costs.running
            prediction = predict(graph, plan, cluster, compiled=running.compiled, cuda_graphs=running.cuda_graphs)
        except ValueError as error:
            state.out[index] = True
            key = plan.label, str(error)
            state.refused[key] = state.refused.get(key, 0) + 1
            continue
        if prediction.fits:
            state.found[index] = prediction
        else:
            lacking, rank = shortage(plan, cluster, prediction.peak_bytes)
            state.lacks(index, max(lacking, 0.0), rank)
            state.misses[family(plan)] = state.misses.get(family(plan), 0) + 1


def _next(state: _State, order: list[int]) -> int | None:
    """The best plan by estimate of a family that has none yet, else the best of all; dropped from `order`."""
    plans = state.space.plans
    seen = {family(plans[i]) for i in state.found} | {f for f, n in state.misses.items() if n >= MISSES}
    left = [i for i in order if not state.out[i]]
    index = next((i for i in left if family(plans[i]) not in seen), left[0] if left else None)
    if index is not None:
        left.remove(index)
    order[:] = left
    return index


def _ranked(state: _State) -> tuple[tuple[Ranked, ...], int]:
    bounds = state.estimates.bound_seconds
    least = float(bounds[~state.out].min())
    order = sorted(state.found, key=lambda i: (state.found[i].step_seconds, i))
    best = state.found[order[0]]
    ranked = tuple(
        Ranked(
            state.space.plans[i], state.found[i], float(bounds[i]), state.found[i].step_seconds / least - 1,
            _tied(state.found[i], best),
        )
        for i in order
    )  # fmt: skip
    open_ = [i for i in np.flatnonzero(~state.out) if i not in state.found and bounds[i] < best.step_seconds]
    return ranked, len(open_)


def _tied(one: Prediction, best: Prediction) -> bool:
    return one is best or one.interval[0] <= best.step_seconds or one.step_seconds <= best.interval[1]


def _memory_rejections(state: _State) -> tuple[Rejection, ...]:
    text = "out of memory on rank {}: the plan that lacks least lacks {}"
    return tuple(
        Rejection(name, text.format(rank, _amount(nbytes)), count)
        for name, (nbytes, rank, count) in state.short.items()
    )


def _amount(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.4g} MiB"


def _refusals(state: _State) -> tuple[Rejection, ...]:
    return tuple(Rejection(label, reason, count) for (label, reason), count in state.refused.items())


def _nothing(state: _State, workload: Workload, cluster: Cluster) -> str:
    if not state.short:
        (_, reason), _ = next(iter(state.refused.items()))
        return f"no plan of {workload.name} can be predicted: {reason}"
    capacity = memory_per_rank(cluster, state.space.plans[0])
    name = min(state.short, key=lambda n: state.short[n])
    lacking, rank, _ = state.short[name]
    gib, needed = 2**30, capacity + lacking
    even = ", even with offload to the host" if any(p.offload for p in state.space.plans) else ""
    return (
        f"no plan of {workload.name} fits {cluster.name}{even}: the smallest ({name}) needs {needed / gib:.4g} GiB "
        f"or more on rank {rank}, which has {capacity / gib:.4g}; use more devices, a smaller batch or larger memories"
    )


# -- families and variety -------------------------------------------------------------------------------------------


def family(plan: ParallelPlan) -> tuple[str, ...]:
    """Axes that the plan splits, how it keeps the model, its schedule, and whether it offloads."""
    axes = " x ".join(axis for axis in AXES if getattr(plan, axis) > 1) or "single"
    kind = (plan.data_parallel,) if plan.dp > 1 else ()
    schedule = (plan.schedule,) if plan.pp > 1 else ()
    away = ("offload",) if plan.offload else ()
    return (axes, *kind, *schedule, *away)


def _group(plan: ParallelPlan) -> str:
    """The coarse families that a validation has to cover."""
    axes = family(plan)[0]
    if axes == "dp":
        return plan.data_parallel
    return f"pp {plan.schedule}" if axes == "pp" else axes


GROUPS = ("ddp", "zero1", "fsdp", "tp", "pp gpipe", "pp 1f1b", "dp x tp", "pp x dp", "pp x tp", "pp x dp x tp")


def diverse(result: SearchResult, count: int) -> tuple[Ranked, ...]:
    """Up to `count` plans to execute: the best of each group, best first, then those whose predicted steps lie
    farthest from all picked ones (by ratio), so that fast and slow plans are among them."""
    best: dict[str, Ranked] = {}
    for ranked in result.plans:
        best.setdefault(_group(ranked.plan), ranked)
    picked = sorted((best[g] for g in GROUPS if g in best), key=lambda r: r.prediction.step_seconds)[:count]
    picked = picked or list(result.plans[:count])
    left = [r for r in result.plans if r not in picked]
    while left and len(picked) < count:
        times = np.array([log(r.prediction.step_seconds) for r in picked])
        far = [float(np.abs(times - log(r.prediction.step_seconds)).min()) for r in left]
        picked.append(left.pop(int(np.argmax(far))))
    return tuple(picked)
