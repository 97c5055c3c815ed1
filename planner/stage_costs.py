"""Costs of the stages of a plan, from the curves of its micro-batch and shardings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.curves import Curves, curves
from planner.group_prices import quickest_send
from planner.host_thread import host_costs
from planner.plan import ParallelPlan
from planner.runtime_host import calls_seconds, least_seconds
from planner.runtime_stage import is_kept
from planner.stages import is_deep, saved_tensors
from planner.step_costs import StepCosts, crossings, uses_of

Floats = NDArray[np.float64]

@dataclass(frozen=True, slots=True, eq=False)
class StageCosts:
    """Arrays [stages]; seconds of one micro-batch, bytes of one rank.

    forward, backward: ops with their host time, what is recomputed, and tensor-parallel messages, which are `messages`
    of these seconds and keep `message_work` core seconds busy; cold [2, stages]: what of them emptied caches cost;
    moved [2, stages]: bytes that their ops move.
    host_forward, host_backward: of the host thread that issues them; host_least: what every schedule issues. send: of
    the message to the next stage. copies: into and out of DDP's buckets. sums: adding one micro-batch's gradients to
    the others'. params: bytes of parameters; trained: of those that get gradients; tensors: how many these are. saved:
    activations kept for backward. transient: most bytes of short-lived tensors. held: buffers. input_bytes: of the
    model's inputs.
    """

    forward: Floats
    backward: Floats
    cold: Floats
    moved: Floats
    messages: Floats
    message_work: Floats
    host_forward: Floats
    host_backward: Floats
    host_least: Floats
    send: Floats
    copies: Floats
    sums: Floats
    params: Floats
    trained: Floats
    tensors: Floats
    saved: Floats
    transient: Floats
    held: Floats
    input_bytes: float


def stage_costs(costs: StepCosts, plan: ParallelPlan) -> StageCosts:
    """Costs of every stage of the plan; the same object for plans that share them."""
    again = (plan.recompute, plan.recompute_first, plan.recompute_keeps)
    key = (plan.pp, plan.dp * plan.tp, plan.tp, plan.micro_batch, plan.shardings, again, plan.cuts)
    if key not in costs.cache:
        costs.cache[key] = _stage_costs(costs, plan)
    found: StageCosts = costs.cache[key]
    return found


def cut_start(costs: StepCosts, cut: str) -> int:
    """The forward op at which the stage that begins at module `cut` starts."""
    if cut not in costs.spans:
        raise ValueError(f"cut {cut!r} is no module path that the forward of {costs.graph.name} calls")
    return costs.spans[cut][0]


def _stage_costs(costs: StepCosts, plan: ParallelPlan) -> StageCosts:
    c, graph = curves(costs, plan), costs.graph
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts)]
    assert starts == sorted(starts), "cuts come in execution order"

    def per_stage(curve: Floats) -> Floats:
        return np.add.reduceat(curve, starts)

    again, saved, dropped = _kept(costs, plan, c)
    params, trained, held = (per_stage(curve) for curve in (c.params, c.trained, c.held))
    learning = {graph.parameters[name].storage for name, _ in graph.gradient_ops}
    for storage, at in _tied(costs):
        stages = np.unique(np.searchsorted(starts, at, "right") - 1)
        params[stages[1:]] += c.bytes[storage]
        trained[stages[1:]] += c.bytes[storage] * (storage in learning)
    send = np.zeros(plan.pp)
    for s, start in enumerate(starts[1:]):
        crossing = [i for i in crossings(costs, start) if i >= 0]
        send[s] = quickest_send(costs.cluster, plan, s + 1, float(c.reads[crossing].sum()))
    inputs = sum(s.bytes_per_batch * plan.micro_batch for s in graph.storages if s.role == "input")
    messages = per_stage(c.messages.sum(0) + np.where(again > 0, c.messages[0], 0.0))
    moved = np.array([per_stage(c.moved[0]), per_stage(c.moved[1] + np.where(again > 0, c.moved[0], 0.0))])
    around, warm = _runtime_host(costs, plan, moved)
    added, repeated = _runtime_issue(costs, plan), again > 0
    issue, least = c.host + added, (c.least_host + added).sum(0) + np.where(repeated, c.least_host[0], 0.0)
    cold = np.array([c.cold[0], c.cold[1] + np.minimum(again, c.cold[0])]) + around - warm
    return StageCosts(
        forward=per_stage(c.forward + around[0]), backward=per_stage(c.backward + again + around[1]),
        cold=np.array([per_stage(x) for x in cold]), moved=moved, messages=messages,
        message_work=messages * c.demand, host_forward=per_stage(issue[0]),
        host_backward=per_stage(issue[1] + np.where(repeated, c.host[0], 0.0)), host_least=per_stage(least),
        send=send, copies=per_stage(c.copies), sums=per_stage(c.sums), params=params,
        trained=trained, tensors=per_stage(c.tensors),
        saved=per_stage(saved), transient=np.maximum.reduceat(c.transient, starts) + dropped, held=held,
        input_bytes=float(inputs),
    )  # fmt: skip


def _runtime_host(costs: StepCosts, plan: ParallelPlan, moved: Floats) -> tuple[Floats, Floats]:
    """Host seconds of pipelines, checkpoints and sharded Linears, in forward and backward [2], by forward op, and in
    full caches; moved [2, stages]: bytes of a pass."""
    host, (found, warm) = costs.cluster.device.host, np.zeros((2, 2, costs.forward_ops))
    cuts = [0, *(cut_start(costs, cut) for cut in plan.cuts)]
    starts = cuts if plan.pp > 1 else []
    regions = [costs.spans[path] for path in regions_of(costs, plan)]
    saved, deep = _saved_and_deep(costs)
    sharded = [costs.spans[path] for path, _ in plan.shardings] if plan.tp > 1 else []
    places = {
        "pp_action": starts,
        "checkpoint": [first for first, _ in regions],
        "dtensor_linear": [first for first, _ in sharded],
        "dtensor_view": [first for first, last in sharded if deep[first : last + 1].any()],
    }
    for i, phase in enumerate(("forward", "backward")):
        for kind, where in places.items():
            stages = np.searchsorted(cuts, where, "right") - 1
            calls = "dtensor_linear" if kind == "dtensor_view" else kind
            every = np.searchsorted(cuts, places[calls], "right") - 1
            between = moved[i] / np.maximum(np.bincount(every, minlength=plan.pp), 1)
            key = kind if kind == "pp_action" else f"{kind}_{phase}"
            np.add.at(found[i], where, calls_seconds(host, key, between)[stages])
            np.add.at(warm[i], where, least_seconds(host, key))
            if kind == "checkpoint":
                key = f"checkpoint_saved_{phase}"
                each = calls_seconds(host, key, between)
                for (first, last), stage in zip(regions, stages):
                    found[i, first : last + 1] += saved[first : last + 1] * each[stage]
                    warm[i, first : last + 1] += saved[first : last + 1] * least_seconds(host, key)
    return found, warm


def _saved_and_deep(costs: StepCosts) -> tuple[Floats, NDArray[np.bool_]]:
    """Of every forward op: how many tensors it saves for backward, and whether it reads one of more than two dims."""
    if "saved and deep" not in costs.cache:
        saves, ops = saved_tensors(costs.graph), costs.graph.ops[: costs.forward_ops]
        saved, deep = [saves.get(op.id, 0) for op in ops], [is_deep(costs.graph, op) for op in ops]
        costs.cache["saved and deep"] = np.array(saved, float), np.array(deep, bool)
    found: tuple[Floats, NDArray[np.bool_]] = costs.cache["saved and deep"]
    return found


def _runtime_issue(costs: StepCosts, plan: ParallelPlan) -> Floats:
    """Seconds of the host thread for checkpoints and for messages between stages, by forward op [2, n]."""
    thread, found = host_costs(costs.cluster, costs.running), np.zeros((2, costs.forward_ops))
    if thread is not None:
        np.add.at(found[1], [costs.spans[path][0] for path in regions_of(costs, plan)], thread.checkpoint)
        for cut in plan.cuts:  # each side issues its end
            start = cut_start(costs, cut)
            found[:, [max(start - 1, 0), start]] += thread.message
    return found


def _kept(costs: StepCosts, plan: ParallelPlan, c: Curves) -> tuple[Floats, Floats, float]:
    """Per forward op: seconds that recomputation repeats, bytes saved for backward; and the most that one recomputed
    module brings back at a time."""
    again, saved = np.zeros(costs.forward_ops), np.zeros(costs.forward_ops)
    block = np.full(costs.forward_ops, -1)
    regions = regions_of(costs, plan)
    for i, path in enumerate(regions):
        first, last = costs.spans.get(path, (0, -1))
        block[first : last + 1] = i
    born, used, stored = _activations(costs)
    home, size = block[born], c.bytes[stored]
    ends = np.array([costs.spans.get(path, (0, -1))[1] for path in regions] or [0])
    stays = np.array([is_kept(plan, op.name) for op in costs.graph.ops[: costs.forward_ops]])
    again_made = (home >= 0) & (used <= ends[home])
    dropped = again_made & ~stays[born]
    np.add.at(saved, born[~dropped], size[~dropped])
    stops = np.full(len(ends), -1)  # torch stops recomputing as soon as everything that was saved is there
    np.maximum.at(stops, home[again_made], born[again_made])
    repeated = (block >= 0) & (np.arange(costs.forward_ops) <= stops[block])
    again[repeated] = np.where(stays, c.messages[0], c.forward)[repeated]
    back = np.zeros(len(ends))
    np.add.at(back, home[dropped], size[dropped])
    return again, saved, float(back.max())


def regions_of(costs: StepCosts, plan: ParallelPlan) -> list[str]:
    """The paths that the stages recompute."""
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts), costs.forward_ops]
    found: list[str] = []
    for stage, (first, end) in enumerate(pairwise(starts)):
        there = [path for path in plan.recompute if path in costs.spans and first <= costs.spans[path][0] < end]
        found += plan.recomputed(stage, there)
    return found


def _activations(costs: StepCosts) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Birth, last forward use and storage of what forward makes and backward still has."""
    if "activations" not in costs.cache:
        n = costs.forward_ops
        _, used = uses_of(costs)
        rows = [(s.birth, used[s.id], s.id) for s in costs.graph.storages if 0 <= s.birth < n <= s.death]
        costs.cache["activations"] = tuple(np.array([r[k] for r in rows], np.int64) for k in range(3))
    found: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] = costs.cache["activations"]
    return found


def _tied(costs: StepCosts) -> list[tuple[int, list[int]]]:
    """Parameters that several forward ops read, with these ops."""
    uses, _ = uses_of(costs)
    return [(s.id, uses[s.id]) for s in costs.graph.storages if s.role == "parameter" and len(uses.get(s.id, ())) > 1]


def shares_weights(costs: StepCosts, plan: ParallelPlan) -> bool:
    """Whether several stages of the plan read one parameter."""
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts)]
    return any(len(set(np.searchsorted(starts, at, "right"))) > 1 for _, at in _tied(costs))
