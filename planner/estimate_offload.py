"""What offload adds to the closed forms of `planner.estimate`: copies over every rank's link to its host, updates in
the memory that the ranks of a node share, and the bytes that leave the device.

The copies are those that `planner.offload` and `planner.offload_activations` write into the script, counted on the
traced graph: shards for every gather, gradients once, and once a micro-batch the activations that recomputed modules
read. Nothing is added where host and device share one memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodels.ops import shape_of
from planner.curves import curves
from planner.host_thread import host_costs
from planner.memory_sizes import outputs_of
from planner.offload import HOST_BANDWIDTH, is_apart, link_bandwidth
from planner.plan import ParallelPlan
from planner.stage_costs import StageCosts, cut_start, regions_of
from planner.stages import within
from planner.step_costs import StepCosts, crossings, uses_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """Arrays [stages], bytes on one rank. whole: activations of one micro-batch that leave. largest: what one module
    brings back at most. modules: how many recomputed modules there are."""

    whole: Floats
    largest: Floats
    modules: Floats


def add_offload(costs: StepCosts, plan: ParallelPlan, stages: StageCosts, row: dict[str, Floats]) -> None:
    """Adds the columns of a plan's copies, and changes those of its optimizer and memory. Seconds [stages]:

    fetch, refetch: parameters that come up in one forward and one backward pass. sends, loads: activations of one
    micro-batch, each way. downs: gradients that go down while the backward runs. copies_of_a_pass: how many there are.
    update: the optimizer with what goes down before and comes up after it, at least. link_least: a link's own work
    from the first copy to the end of the step, at least.
    """
    names = ("fetch", "refetch", "sends", "loads", "downs", "copies_of_a_pass", "update", "link_least")
    row |= {name: np.zeros(plan.pp) for name in names}
    if not plan.offload or not is_apart(costs.cluster):
        return
    bandwidth, m = link_bandwidth(costs.cluster), plan.micro_batches
    shards = stages.params / (plan.dp if plan.dp > 1 and plan.data_parallel != "ddp" else 1)
    up_before = down_before = np.zeros(plan.pp)
    if "parameters" in plan.offload:
        again, units = _in_units(costs, plan, stages) / plan.dp, len(plan.fsdp_units) / plan.pp + 1
        turns = 1 if plan.data_parallel == "zero2" or plan.pp > 1 else m  # units may stay whole in a pipeline
        up_before = shards * turns + (again * m if plan.data_parallel == "fsdp" and plan.pp == 1 else 0.0)
        first: float | Floats = 1 / m  # of all forwards, those that find no whole units: in a pipeline, the warm-up's
        if plan.data_parallel == "fsdp":
            first = row["inflight"] / m if plan.pp > 1 else 1.0
            row["refetch"] = again / bandwidth
            if plan.pp > 1 and plan.schedule == "gpipe":  # what the first backward gathers stays for the others
                row["refetch"] = row["refetch"] / m
        row["fetch"] = shards / bandwidth * first
        row["copies_of_a_pass"] = row["copies_of_a_pass"] + units
        row["params"] = np.zeros(plan.pp)
    if "activations" in plan.offload:
        moved = moved_activations(costs, plan)
        row["sends"] = row["loads"] = moved.whole / bandwidth
        row["copies_of_a_pass"] = row["copies_of_a_pass"] + moved.modules
        row["saved"] = np.maximum(row["saved"] - moved.whole, 0.0)
        row["extra"] = row["extra"] + 2 * moved.largest  # a module's own, and those of the next one
        up_before, down_before = up_before + m * moved.whole, m * moved.whole
    if plan.offloads_optimizer:
        _add_update(costs, plan, shards, bandwidth, row)
        down_before = down_before + shards
    _add_issue(costs, plan, row)
    row["link_least"] = np.maximum(up_before, down_before) / bandwidth + _after_copies(costs, plan, shards, bandwidth)


def _add_update(costs: StepCosts, plan: ParallelPlan, shards: Floats, bandwidth: float, row: dict[str, Floats]) -> None:
    """Whole gradients go down when all are reduced, shards of them one by one; parameters that rest on the device come
    up again."""
    way = shards / bandwidth
    if plan.fully_sharded:
        row["downs"], before = way, np.zeros(plan.pp)
        row["reduce_least"] = np.maximum(row["reduce_least"], way)
        row["grads"] = np.zeros(plan.pp)
    else:
        before = way
    after = np.zeros(plan.pp) if "parameters" in plan.offload else way
    together, alone = _updates(costs, plan, shards)
    row["host_optimizer"] = before + together + after
    uneven = plan.dp > 1 and plan.data_parallel == "zero1"  # owners differ: the largest one has its own way at least
    row["optimizer"] = np.maximum(before + alone + after, together) if uneven else row["host_optimizer"]
    row["update"] = row["optimizer"]
    row["state"] = np.zeros(plan.pp)


def _after_copies(costs: StepCosts, plan: ParallelPlan, shards: Floats, bandwidth: float) -> Floats:
    """Seconds between the last copy before the update and the end of the step, at least."""
    if not plan.offloads_optimizer:
        return np.zeros(plan.pp)
    up = 0.0 if "parameters" in plan.offload else 1.0
    return _updates(costs, plan, shards)[1] + up * shards / bandwidth


def _updates(costs: StepCosts, plan: ParallelPlan, shards: Floats) -> tuple[Floats, Floats]:
    """Seconds of the updates of a stage's ranks on its fullest node, which share its memory's bandwidth, at least; and
    those of one rank alone. Bytes are those of the traced optimizer, by the share of the trained parameters."""
    graph, cluster = costs.graph, costs.cluster
    if "update bytes" not in costs.cache:
        shapes = [shape_of(graph, op) for op in graph.ops if op.phase == "optimizer" and not op.is_view]
        trained = {name for name, _ in graph.gradient_ops}
        whole = sum(t.bytes for name, t in graph.parameters.items() if name in trained)
        moved = sum(s.bytes_read + s.bytes_written for s in shapes)
        costs.cache["update bytes"] = moved / whole if whole else 0.0, whole
    per_byte, trained_bytes = costs.cache["update bytes"]
    every = sum(t.bytes for t in graph.parameters.values())
    shares = shards if trained_bytes == every else np.maximum(shards - (every - trained_bytes), 0.0)  # frozen: anywhere
    alone = shares * per_byte / HOST_BANDWIDTH
    stride = plan.dp * plan.tp
    nodes = [len({cluster.node_of(r) for r in range(s * stride, (s + 1) * stride)}) for s in range(plan.pp)]
    return alone * stride / np.array(nodes), alone


def _add_issue(costs: StepCosts, plan: ParallelPlan, row: dict[str, Floats]) -> None:
    """The host thread launches every copy."""
    thread = host_costs(costs.cluster, costs.running)
    if thread is not None:
        row["host_forward"] = row["host_forward"] + thread.op * row["copies_of_a_pass"]
        row["host_backward"] = row["host_backward"] + thread.op * row["copies_of_a_pass"]


def _in_units(costs: StepCosts, plan: ParallelPlan, stages: StageCosts) -> Floats:
    """Bytes of a stage's parameters in `fsdp_units`: of the root's, only those of one pass are gathered. In a pipeline
    the stages' share of all."""
    key = ("in units", plan.tp, plan.shardings, plan.fsdp_units)
    if key not in costs.cache:
        c, units = curves(costs, plan), set(plan.fsdp_units)
        sizes = [(name, float(c.bytes[t.storage])) for name, t in costs.graph.parameters.items()]
        inside = sum(size for name, size in sizes if _parents(name) & units)
        costs.cache[key] = inside / (sum(size for _, size in sizes) or 1.0)
    share: float = costs.cache[key]
    return stages.params * share


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def moved_activations(costs: StepCosts, plan: ParallelPlan) -> Moved:
    """What `planner.offload_activations` moves: storages that a recomputed module reads and another one made, which
    only recomputed modules need in backward. Neither what stages send each other nor the model's outputs."""
    c, regions = curves(costs, plan), regions_of(costs, plan)
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts)]
    key = ("moved", id(c), tuple(regions), tuple(starts))
    if key not in costs.cache:
        whole, largest, modules = np.zeros((3, plan.pp))
        arriving: dict[tuple[int, int], float] = defaultdict(float)
        for storage, birth, last_module in _leaving(costs, plan, regions, starts):
            stage = int(np.searchsorted(starts, birth, "right")) - 1
            whole[stage] += c.bytes[storage]
            arriving[stage, last_module] += c.bytes[storage]
        for (stage, _), size in arriving.items():
            largest[stage], modules[stage] = max(largest[stage], size), modules[stage] + 1
        costs.cache[key] = Moved(whole, largest, modules)
    found: Moved = costs.cache[key]
    return found


def _leaving(
    costs: StepCosts, plan: ParallelPlan, regions: list[str], starts: list[int]
) -> list[tuple[int, int, int]]:
    """Storages that leave the device: storage, the forward op that makes it, the last recomputed module that reads it.
    """
    graph, n = costs.graph, costs.forward_ops
    number = {path: i for i, path in enumerate(regions)}
    known: dict[str, int] = {}

    def region(module: str) -> int:
        if module not in known:
            known[module] = next((i for path, i in number.items() if within(module, path)), -1)
        return known[module]

    home = [region(op.module) for op in graph.ops[:n]]
    staying = {s for start in starts[1:] for s in crossings(costs, start)}
    staying |= {graph.tensors[t].storage for t in (outputs_of(graph.ops[:n]) if plan.pp > 1 else ())}
    for op in graph.ops[n:]:
        if op.phase == "backward" and region(op.module) < 0:
            staying.update(graph.tensors[t].storage for t in op.inputs)
    uses, found = uses_of(costs)[0], list[tuple[int, int, int]]()
    for s in graph.storages:
        if 0 <= s.birth < n <= s.death and s.id not in staying:
            readers = [home[op] for op in uses.get(s.id, ()) if home[op] >= 0 and home[op] != home[s.birth]]
            if readers:
                found.append((s.id, s.birth, readers[-1]))
    return found
