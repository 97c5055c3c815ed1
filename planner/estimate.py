"""Closed forms for many plans at once: an estimate that ranks, a lower bound that certifies, a memory need that prunes.

All three read the same traced graph and the same cost model as the simulation. The local shapes of every op come from
the sharding rules, its price from the device; per micro-batch size and tensor-parallel degree one cumulated curve over
the forward ops remains, from which the costs of every pipeline stage are differences.

The bound leaves out the host overhead of runtimes, all waiting between ranks and every message that may overlap; what
it keeps (compute in its order, the issue of all ops by a rank's host thread, the volume of messages over the best
bandwidth, processor shares) no run of the plan avoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.ops import price_many, shape_of
from costmodels.overlap import beside, slowdowns
from costmodels.variability import synchronous
from opgraph.graph import OpGraph
from planner.estimate_offload import add_offload
from planner.group_prices import groups_along, quickest
from planner.host_thread import host_costs
from planner.op_costs import optimizer_seconds
from planner.plan import ParallelPlan
from planner.runtime_host import calls_seconds, least_seconds
from planner.runtime_optimizer import scaling_axes
from planner.script import copy_work
from planner.stage_costs import StageCosts, stage_costs
from planner.step_costs import StepCosts, step_costs

Floats = NDArray[np.float64]
OVERLAP = 0.9  # share of backward compute behind which gradient messages hide in the estimate: ASSUMPTION


@dataclass(frozen=True, eq=False)
class Estimates:
    """Of n plans and up to s stages (stages that a plan lacks are 0).

    seconds f8[n]: estimated step. bound_seconds f8[n]: no schedule of the plan is faster under the cost model.
    need_bytes f8[n, s]: bytes that a rank of the stage holds at one moment at least. peak_bytes f8[n, s]: estimate.
    """

    seconds: Floats
    bound_seconds: Floats
    need_bytes: Floats
    peak_bytes: Floats


def bound_seconds(graph: OpGraph, plan: ParallelPlan, cluster: Cluster) -> float:
    """A lower bound of the plan's step time under the cost model, seconds."""
    cluster = synchronous(cluster, plan.world_size)
    return float(estimate(step_costs(graph, cluster), [plan]).bound_seconds[0])


def estimate(costs: StepCosts, plans: Sequence[ParallelPlan]) -> Estimates:
    """Estimates of all plans; rows in the order of `plans`. ValueError for offload where no link to the host is known.
    """
    if not plans:
        empty = np.zeros(0)
        return Estimates(empty, empty, np.zeros((0, 1)), np.zeros((0, 1)))
    t = _table(costs, plans)
    compute, bound = _chain(costs, t, least=False), _chain(costs, t, least=True)
    need = _need(t)
    peak = need + t["transient"] + t["extra"]
    return Estimates(np.maximum(compute, bound), bound, need, peak)


def _table(costs: StepCosts, plans: Sequence[ParallelPlan]) -> dict[str, Any]:
    """Columns [n] of the plans and [n, s] of their stages."""
    width, count = max(p.pp for p in plans), len(plans)
    t: dict[str, Any] = {}
    t["pp"] = np.array([p.pp for p in plans])
    t["m"] = np.array([p.micro_batches for p in plans], float)
    t["replicas"] = np.array([p.dp * p.tp for p in plans], float)
    rows: dict[Any, dict[str, Floats]] = {}
    for i, plan in enumerate(plans):
        stages = stage_costs(costs, plan)
        kind = plan.data_parallel if plan.dp > 1 else "ddp"
        key = (id(stages), plan.dp, kind, plan.schedule, plan.micro_batches, plan.bucket_bytes, plan.fsdp_units,
               plan.offload)  # fmt: skip
        if key not in rows:
            rows[key] = _row(costs, plan, stages, kind)
        for name, value in rows[key].items():
            if name not in t:
                t[name] = np.zeros((count, width))
            t[name][i, : plan.pp] = value
    return t


def _row(costs: StepCosts, plan: ParallelPlan, stages: StageCosts, kind: str) -> dict[str, Floats]:
    """The columns of one plan."""
    parts = plan.dp if kind != "ddp" else 1
    shards = plan.dp if plan.fully_sharded else 1
    if plan.pp == 1:
        inflight = np.ones(1)
    elif plan.schedule == "gpipe":
        inflight = np.full(plan.pp, float(plan.micro_batches))
    else:
        inflight = np.minimum(plan.micro_batches, plan.pp - np.arange(plan.pp)).astype(float)
    units = max(len(plan.fsdp_units) / plan.pp, 1) + 1  # FSDP holds two of them whole, and the gradient of one
    whole = {"ddp": 1.0, "zero1": 1.0, "zero2": 1 + 1 / units, "fsdp": 3 / units}  # DDP: its buckets
    at_once = plan.pp == 1 and plan.micro_batches == 1  # FSDP scatters a unit's gradients in the last backward
    copied = (whole[kind] if plan.dp > 1 else 0.0) * (stages.params if plan.fully_sharded else stages.trained)
    shared = ("send", "saved", "transient", "held", "sums", "messages", "message_work",
              "host_forward", "host_backward", "host_least")  # fmt: skip
    row = {name: getattr(stages, name) for name in shared} | _data_messages(costs, plan, stages.params, stages.trained)
    row |= {
        "forward": stages.forward, "backward": stages.backward,
        "forward_least": stages.forward - stages.cold[0], "backward_least": stages.backward - stages.cold[1],
        "copies": np.zeros(plan.pp), "least_copies": np.zeros(plan.pp),
        "overlaps": np.full(plan.pp, float(not plan.fully_sharded or plan.pp == 1)),  # FSDP in a pipeline: at the end
        "optimizer": optimizer_seconds(costs, stages.params / parts),
        "params": stages.params / shards, "grads": stages.trained / (shards if at_once else 1),
        "state": costs.state_ratio * stages.params / parts, "inflight": inflight,
        "extra": stages.input_bytes * plan.micro_batches + copied,
    }  # fmt: skip
    row["after"] = row["after"] + _agreement(costs, plan)
    row |= _issued(costs, plan, stages)
    add_offload(costs, plan, stages, row)
    _add_runtime(costs, plan, stages, kind, row)
    return row


def _agreement(costs: StepCosts, plan: ParallelPlan) -> float:
    """Seconds of the messages by which ranks agree in fp16 whether any gradient has overflowed."""
    groups = [plan.group(0, axis) for axis in scaling_axes(plan)]
    return sum(collective_price(costs.cluster, "all_reduce", 4, ranks).seconds for ranks in groups)


def _issued(costs: StepCosts, plan: ParallelPlan, stages: StageCosts) -> dict[str, Floats]:
    """Seconds of the host thread after the passes: what DDP and the sums of gradients add (every schedule issues it),
    and the optimizer."""
    thread, nothing = host_costs(costs.cluster, costs.running), np.zeros(plan.pp)
    if thread is None:
        return {"host_end": nothing, "host_optimizer": nothing}
    end = (plan.micro_batches - 1) * thread.backward * stages.tensors
    if plan.dp > 1 and not plan.fully_sharded:
        buckets = np.maximum(np.floor(stages.trained / plan.bucket_bytes), 1)
        end = end + 2 * thread.backward * stages.tensors + thread.message * buckets
    ops = sum(op.phase == "optimizer" and not op.is_view for op in costs.graph.ops)
    return {"host_end": end, "host_optimizer": np.full(plan.pp, thread.op * ops)}


def _add_runtime(costs: StepCosts, plan: ParallelPlan, stages: StageCosts, kind: str, row: dict[str, Floats]) -> None:
    """Host seconds and copies of data parallelism and the optimizer."""
    host, n = costs.cluster.device.host, stages.tensors

    def cost(name: str) -> float:
        return host.get(name, 0.0)

    def around(name: str, which: int, calls: Floats) -> Floats:
        return calls_seconds(host, name, stages.moved[which] / np.maximum(calls, 1.0))

    row["optimizer"] = (
        row["optimizer"] + cost("optimizer_step") + cost("optimizer_param") * n / (plan.dp if kind == "zero1" else 1)
    )
    if plan.dp == 1:
        return
    if not plan.fully_sharded:
        buckets = np.maximum(np.floor(stages.trained / plan.bucket_bytes), 1)
        halves = n / 2  # calls, see `planner.runtime_host.CALLS`
        row["forward"] = row["forward"] + around("ddp_step", 0, np.ones(plan.pp))
        row["copies"] = (
            stages.copies + around("ddp_param", 1, halves) * n + around("ddp_bucket", 1, halves) * buckets
        )
        row["least_copies"] = (
            stages.copies + least_seconds(host, "ddp_param") * n + least_seconds(host, "ddp_bucket") * buckets
        )
        return
    units = np.full(plan.pp, len(plan.fsdp_units) / plan.pp + 1)
    copy, cut = (
        np.array([_copy_seconds(costs, v / u) * u for v, u in zip(volume.tolist(), units)])
        for volume in (stages.params, stages.trained)
    )
    row["optimizer"] = row["optimizer"] + cost("fsdp_optimizer_param") * n
    unit, parameter = (around(f"fsdp_{what}_forward", 0, units) for what in ("unit", "param"))
    row["gather"] = row["gather"] + unit * units + parameter * n + copy
    parameter = around("fsdp_param_backward", 1, units)
    if kind == "fsdp":
        row["regather"] = row["regather"] + around("fsdp_unit_backward", 1, units) * units + parameter * n + copy
    fewest, least = (least_seconds(host, f"fsdp_{what}_forward") for what in ("unit", "param"))
    row["gather_least"] = row["gather_least"] + fewest + least * n
    row["copies"] = parameter * n + cut
    row["least_copies"] = least_seconds(host, "fsdp_param_backward") * n
    if kind == "zero2":  # gathered in the first micro-batch only
        row["gather"] = row["gather"] / plan.micro_batches


def _copy_seconds(costs: StepCosts, nbytes: float) -> float:
    shape = copy_work("fsdp.split_with_sizes_copy.default", round(nbytes / 4), "float32", "backward", "").shape
    return price_many(costs.cluster.device, [shape])[0].seconds


def _data_messages(costs: StepCosts, plan: ParallelPlan, volume: Floats, trained: Floats) -> dict[str, Floats]:
    """Seconds of the data-parallel messages of every stage, and the least that their volume takes; `data_work` in core
    seconds of one rank, at least. volume: bytes of parameters; trained: of those that get gradients."""
    names = (
        "gather",
        "regather",
        "reduce",
        "tail",
        "after",
        "gather_least",
        "reduce_least",
        "after_least",
        "data_work",
        "slowed",
    )
    found = {name: np.zeros(plan.pp) for name in names}
    if plan.dp == 1:
        return found
    found["slowed"] = np.full(plan.pp, _slowed(costs, plan, float(trained.max())))

    def moved(what: str) -> Floats:
        return volume if what == "all_gather" else trained

    def sent(what: str, pieces: Floats) -> Floats:
        volume = moved(what)
        pieces = np.maximum(np.round(pieces), 1)
        sizes = (volume / pieces).tolist()
        prices = [quickest(costs.cluster, plan, "dp", what, n).seconds for n in sizes]
        return np.where(volume > 0, pieces * np.array(prices), 0.0)

    def least(what: str) -> tuple[Floats, Floats]:
        seconds, work = _least(costs, plan, what)
        return seconds * moved(what), work * moved(what)

    if plan.fully_sharded:
        units = np.full(plan.pp, len(plan.fsdp_units) / plan.pp + 1)
        found["gather"] = sent("all_gather", units)
        if plan.data_parallel == "fsdp":
            found["regather"] = found["gather"]
        found["reduce"] = sent("reduce_scatter", units)
        found["tail"] = (found["gather"] + found["reduce"]) / units
        found["gather_least"], first = least("all_gather")
        found["reduce_least"], second = least("reduce_scatter")
        found["data_work"] = first + second
        return found
    buckets = trained / plan.bucket_bytes + 1
    found["reduce"] = sent("all_reduce", buckets)
    found["tail"] = found["reduce"] / np.maximum(np.round(buckets), 1)
    found["reduce_least"], found["data_work"] = least("all_reduce")
    if plan.data_parallel == "zero1":
        found["after"] = sent("broadcast", np.full(plan.pp, float(plan.dp)))
        found["after_least"], work = least("broadcast")
        found["data_work"] = found["data_work"] + work
    return found


def _slowed(costs: StepCosts, plan: ParallelPlan, volume: float) -> float:
    """Seconds that backward takes longer for every second of a gradient message beside it: 1 - 1 / slowdown, of all its
    ops at the traced batch together."""
    cluster, ranks = costs.cluster, plan.group(0, "dp")
    sharded = plan.data_parallel in ("zero2", "fsdp")
    kind, most = ("reduce_scatter", volume) if sharded else ("all_reduce", plan.bucket_bytes)
    size = min(volume, most)
    price = collective_price(cluster, kind, size, ranks, firsts=plan.likes(0, "dp"))
    other = beside(cluster, kind, size, ranks, price.seconds)
    key = ("slowed", other.units, round(other.bandwidth / 1e9))
    if key not in costs.cache:
        shapes = [shape_of(costs.graph, op) for op in costs.graph.ops if op.phase == "backward" and not op.is_view]
        seconds = [p.seconds for p in price_many(cluster.device, shapes)]
        longer = sum(s * x for s, x in zip(seconds, slowdowns(cluster.device, shapes, seconds, other)))
        costs.cache[key] = 1 - sum(seconds) / longer if longer else 0.0
    found: float = costs.cache[key]
    return found


def _least(costs: StepCosts, plan: ParallelPlan, kind: str) -> tuple[float, float]:
    """Seconds, and core seconds of a rank, that a byte takes at the very least: prices are affine or log-log linear in
    pieces, so the least ratio lies at a table's point or far out."""
    key = ("least", kind, plan.pp, plan.dp, plan.tp, plan.cp, plan.ep)
    if key not in costs.cache:
        sizes = [float(n) for t in costs.cluster.tables for n in t.bytes] + [4.0**k for k in range(5, 26)]
        alone = groups_along(costs.cluster, plan, "dp")
        prices = [(collective_price(costs.cluster, kind, n, ranks), n) for n in sizes for ranks in alone]
        seconds = min(p.seconds / n for p, n in prices) * (1 - 1e-9)
        costs.cache[key] = seconds, seconds * min(p.demand for p, _ in prices)
    found: tuple[float, float] = costs.cache[key]
    return found


def _chain(costs: StepCosts, t: dict[str, Any], least: bool) -> Floats:
    """Seconds of the longest chain: one micro-batch through the earlier stages, all of them on this one, one back.

    Holds for every schedule in which a stage's optimizer waits for all its backwards, as messages of tensor parallelism
    and the gathers of FSDP's forward block the rank that waits for them.
    """
    m = t["m"][:, None]
    forward, backward, gather = (t[f"{name}_least" if least else name] for name in ("forward", "backward", "gather"))
    copied = t["least_copies"] if least else t["copies"]
    copies = copied + (m - 1) * t["sums"]
    if not least:  # where no stage waits for another, a pass takes what the slower of device and host needs
        alone = t["pp"][:, None] == 1
        forward = np.where(alone, np.maximum(forward, t["host_forward"]), forward)
        backward = np.where(alone, np.maximum(backward, t["host_backward"]), backward)
        forward, backward = _beside_copies(t, forward, backward, gather)
        copies = np.where(alone, np.maximum(copies, t["host_end"]), copies)
    update = t["optimizer"] if least else np.maximum(t["optimizer"], t["host_optimizer"])
    end = update + t["after_least" if least else "after"]
    up = np.cumsum(forward + gather + t["send"], 1) - forward - gather - t["send"]
    down = np.cumsum(backward + t["send"], 1) - backward - t["send"]
    back = np.maximum(m * backward + copies + end, (m - 1) * backward + t["reduce_least"] + end)
    if not least:
        repeats = np.where(t["pp"][:, None] > 1, 1.0, m)
        hides = t["overlaps"] * (0.0 if costs.cluster.cores else OVERLAP)
        hidden = hides * backward
        moved = t["reduce"] + t["regather"] * repeats
        exposed = np.maximum(moved - hidden * repeats, t["tail"])
        slowed = t["slowed"] * np.minimum(moved, hidden * repeats)
        exposed = exposed + np.maximum(t["downs"] - hidden, t["downs"] / np.maximum(t["copies_of_a_pass"], 2.0))
        gather, end = gather * m, end + exposed + slowed
        back = m * backward + copies + end + np.where(m > 1, m * t["send"], 0.0)
    last = np.where(np.arange(down.shape[1]) > 0, copied[:, :1], copies) + end[:, :1]
    own = up + gather + m * forward + np.maximum(back, m * backward + down + last)
    result = np.maximum(own.max(1), t["link_least"].max(1))
    hosts = m * (t["host_least"] if least else t["host_forward"] + t["host_backward"]) + t["host_end"]
    result = np.maximum(result, (hosts + t["update" if least else "host_optimizer"]).max(1))
    cores = costs.cluster.cores * costs.cluster.nodes
    if not cores:
        return result
    local = m * (forward + backward - t["messages"]) + copies + t["optimizer"] + m * t["message_work"] + t["data_work"]
    if not least:  # the ranks of a stage do the same at the same time
        result = result * np.maximum(t["replicas"] / cores, 1.0)
    return np.maximum(result, (t["replicas"][:, None] * local).sum(1) / cores)


def _beside_copies(t: dict[str, Any], forward: Floats, backward: Floats, gather: Floats) -> tuple[Floats, Floats]:
    """Passes last as long as the copies that they wait for, or wait for one of them: parameters come up before each
    gather; activations go down beside the forward and come up beside the backward. In a pipeline those of one
    micro-batch go down while those of another come up, and only the link's own work counts."""
    pieces = np.maximum(t["copies_of_a_pass"], 1.0)
    sends = np.where(t["pp"][:, None] > 1, 0.0, t["sends"])
    forward = np.maximum(forward + (t["fetch"] + sends) / pieces, np.maximum(t["fetch"] - gather, sends))
    loaded = t["refetch"] + t["loads"]
    return forward, np.maximum(backward + loaded / pieces, loaded)


def _need(t: dict[str, Any]) -> Floats:
    """Parameters, optimizer state and buffers, with the saved activations or the gradients, with both where gradients
    of an earlier micro-batch are there while activations are saved."""
    saved = t["saved"] * t["inflight"]
    both = np.where(t["m"][:, None] > t["inflight"], saved + t["grads"], np.maximum(saved, t["grads"]))
    return np.asarray(t["params"] + t["state"] + t["held"] + both)
