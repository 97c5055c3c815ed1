"""Closed forms for many plans at once: an estimate that ranks, a lower bound that certifies, a memory need that prunes.

All three read the same traced graph and the same cost model as the simulation. The local shapes of every op come from
the sharding rules, its price from the device; per micro-batch size and tensor-parallel degree one cumulated curve over
the forward ops remains, from which the costs of every pipeline stage are differences.

The bound leaves out all host overhead, all waiting between ranks and every message that may overlap; what it keeps
(compute in its order, the volume of messages over the best bandwidth, processor shares) no run of the plan avoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.features import FORMS, features
from costmodels.ops import OpShape, law_of, price_many, roofline_seconds, shape_of
from opgraph.flops import flops_of
from opgraph.graph import Op, OpGraph, Ref, Tensor
from planner.layout import Layout, accumulates, propagate
from planner.plan import ParallelPlan
from planner.script import copies_nothing, copy_work
from planner.stages import LOSS

Floats = NDArray[np.float64]
VIEW, LEFT_OUT = -1, -2
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
    return float(estimate(step_costs(graph, cluster), [plan]).bound_seconds[0])


def estimate(costs: StepCosts, plans: Sequence[ParallelPlan]) -> Estimates:
    """Estimates of all plans; rows in the order of `plans`."""
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
        key = (id(stages), plan.dp, kind, plan.schedule, plan.micro_batches, plan.bucket_bytes)
        if key not in rows:
            rows[key] = _row(costs, plan, stages, kind)
        for name, value in rows[key].items():
            if name not in t:
                t[name] = np.zeros((count, width))
            t[name][i, : plan.pp] = value
    return t


def _row(costs: StepCosts, plan: ParallelPlan, stages: StageCosts, kind: str) -> dict[str, Floats]:
    """The columns of one plan."""
    parts = plan.dp if kind in ("zero1", "fsdp") else 1
    shards = plan.dp if kind == "fsdp" else 1
    if plan.pp == 1:
        inflight = np.ones(1)
    elif plan.schedule == "gpipe":
        inflight = np.full(plan.pp, float(plan.micro_batches))
    else:
        inflight = np.minimum(plan.micro_batches, plan.pp - np.arange(plan.pp)).astype(float)
    units = max(len(plan.fsdp_units) / plan.pp, 1) + 1  # FSDP holds two of them whole, and the gradient of one
    copied = {"ddp": 1.0, "zero1": 1.0, "fsdp": 3 / units}[kind] if plan.dp > 1 else 0.0  # DDP: its buckets
    shared = ("send", "saved", "transient", "held", "sums", "messages", "message_work")
    row = {name: getattr(stages, name) for name in shared} | _data_messages(costs, plan, stages.params)
    row |= {
        "forward": stages.forward, "backward": stages.backward,
        "copies": np.zeros(plan.pp), "least_copies": np.zeros(plan.pp),
        "overlaps": np.full(plan.pp, float(kind != "fsdp" or plan.pp == 1)),  # FSDP in a pipeline: at the end
        "optimizer": optimizer_seconds(costs, stages.params / parts),
        "params": stages.params / shards, "grads": stages.params / shards,
        "state": costs.state_ratio * stages.params / parts, "inflight": inflight,
        "extra": stages.input_bytes * plan.micro_batches + copied * stages.params,
    }  # fmt: skip
    _add_runtime(costs, plan, stages, kind, row)
    return row


def _add_runtime(costs: StepCosts, plan: ParallelPlan, stages: StageCosts, kind: str, row: dict[str, Floats]) -> None:
    """Host seconds and copies of data parallelism and the optimizer."""
    host, n = costs.cluster.device.host, stages.tensors

    def cost(name: str) -> float:
        return host.get(name, 0.0)

    row["optimizer"] = (
        row["optimizer"] + cost("optimizer_step") + cost("optimizer_param") * n / (plan.dp if kind == "zero1" else 1)
    )
    if plan.dp == 1:
        return
    if kind != "fsdp":
        buckets = np.maximum(np.floor(stages.params / plan.bucket_bytes), 1)
        row["forward"] = row["forward"] + cost("ddp_step")
        row["copies"] = stages.copies + cost("ddp_param") * n + cost("ddp_bucket") * buckets
        row["least_copies"] = row["copies"]
        return
    units = np.full(plan.pp, len(plan.fsdp_units) / plan.pp + 1)
    copy = np.array([_copy_seconds(costs, v / u) * u for v, u in zip(stages.params.tolist(), units)])
    row["optimizer"] = row["optimizer"] + cost("fsdp_optimizer_param") * n
    row["gather"] = row["gather"] + cost("fsdp_unit_forward") * units + cost("fsdp_param_forward") * n + copy
    row["regather"] = row["regather"] + cost("fsdp_unit_backward") * units + cost("fsdp_param_backward") * n + copy
    row["gather_least"] = row["gather_least"] + cost("fsdp_unit_forward") + cost("fsdp_param_forward") * n
    row["copies"] = cost("fsdp_param_backward") * n + copy
    row["least_copies"] = cost("fsdp_param_backward") * n


def _copy_seconds(costs: StepCosts, nbytes: float) -> float:
    shape = copy_work("fsdp.split_with_sizes_copy.default", round(nbytes / 4), "float32", "backward", "").shape
    return price_many(costs.cluster.device, [shape])[0].seconds


def _data_messages(costs: StepCosts, plan: ParallelPlan, volume: Floats) -> dict[str, Floats]:
    """Seconds of the data-parallel messages of every stage, and the least that their volume takes; `data_work` in core
    seconds of one rank, at least."""
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
    )
    found = {name: np.zeros(plan.pp) for name in names}
    if plan.dp == 1:
        return found
    cluster, ranks = costs.cluster, plan.group(0, "dp")

    def sent(what: str, pieces: Floats) -> Floats:
        pieces = np.maximum(np.round(pieces), 1)
        prices = [collective_price(cluster, what, n, ranks).seconds for n in (volume / pieces).tolist()]
        return np.where(volume > 0, pieces * np.array(prices), 0.0)

    def least(what: str) -> tuple[Floats, Floats]:
        seconds, work = _least(costs, what, ranks)
        return seconds * volume, work * volume

    if plan.data_parallel == "fsdp":
        units = np.full(plan.pp, len(plan.fsdp_units) / plan.pp + 1)
        found["gather"] = found["regather"] = sent("all_gather", units)
        found["reduce"] = sent("reduce_scatter", units)
        found["tail"] = (found["gather"] + found["reduce"]) / units
        found["gather_least"], first = least("all_gather")
        found["reduce_least"], second = least("reduce_scatter")
        found["data_work"] = first + second
        return found
    buckets = volume / plan.bucket_bytes + 1
    found["reduce"] = sent("all_reduce", buckets)
    found["tail"] = found["reduce"] / np.maximum(np.round(buckets), 1)
    found["reduce_least"], found["data_work"] = least("all_reduce")
    if plan.data_parallel == "zero1":
        found["after"] = sent("broadcast", np.full(plan.pp, float(plan.dp)))
        found["after_least"], work = least("broadcast")
        found["data_work"] = found["data_work"] + work
    return found


def _least(costs: StepCosts, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
    """Seconds, and core seconds of a rank, that a byte takes at the very least: prices are affine or log-log linear in
    pieces, so the least ratio lies at a table's point or far out."""
    key = ("least", kind, ranks)
    if key not in costs.cache:
        sizes = [float(n) for t in costs.cluster.tables for n in t.bytes] + [4.0**k for k in range(5, 26)]
        prices = [(collective_price(costs.cluster, kind, n, ranks), n) for n in sizes]
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
    forward, backward, gather = t["forward"], t["backward"], t["gather_least" if least else "gather"]
    copied = t["least_copies"] if least else t["copies"]
    copies = copied + (m - 1) * t["sums"]
    end = t["optimizer"] + t["after_least" if least else "after"]
    up = np.cumsum(forward + gather + t["send"], 1) - forward - gather - t["send"]
    down = np.cumsum(backward + t["send"], 1) - backward - t["send"]
    back = np.maximum(m * backward + copies + end, (m - 1) * backward + t["reduce_least"] + end)
    if not least:
        repeats = np.where(t["pp"][:, None] > 1, 1.0, m)
        hides = t["overlaps"] * (0.0 if costs.cluster.cores else OVERLAP)
        hidden = hides * backward
        exposed = np.maximum(t["reduce"] + t["regather"] * repeats - hidden * repeats, t["tail"])
        gather, end = gather * m, end + exposed
        back = m * backward + copies + end + np.where(m > 1, m * t["send"], 0.0)
    last = np.where(np.arange(down.shape[1]) > 0, copied[:, :1], copies) + end[:, :1]
    own = up + gather + m * forward + np.maximum(back, m * backward + down + last)
    result = np.asarray(own.max(1))
    cores = costs.cluster.cores * costs.cluster.nodes
    if not cores:
        return result
    local = m * (forward + backward - t["messages"]) + copies + t["optimizer"] + m * t["message_work"] + t["data_work"]
    if not least:  # the ranks of a stage do the same at the same time
        result = result * np.maximum(t["replicas"] / cores, 1.0)
    return np.maximum(result, (t["replicas"][:, None] * local).sum(1) / cores)


def _need(t: dict[str, Any]) -> Floats:
    """Parameters, optimizer state and buffers, with the saved activations or the gradients, with both where gradients
    of an earlier micro-batch are there while activations are saved."""
    saved = t["saved"] * t["inflight"]
    both = np.where(t["m"][:, None] > t["inflight"], saved + t["grads"], np.maximum(saved, t["grads"]))
    return np.asarray(t["params"] + t["state"] + t["held"] + both)


# -- the priced graph -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StepCosts:
    """A graph and a cluster, and what of them does not depend on the plan.

    forward_ops: how many ops the forward has; they come first. place i8[ops]: the forward op in whose stage an op runs.
    spans: first and last forward op of every module path.
    state_ratio: bytes of optimizer state per byte of parameters. cache: what was computed for plans so far.
    """

    graph: OpGraph
    cluster: Cluster
    forward_ops: int
    place: NDArray[np.int64]
    spans: dict[str, tuple[int, int]]
    state_ratio: float
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class StageCosts:
    """Arrays [stages]; seconds of one micro-batch, bytes of one rank.

    forward, backward: ops with their host time, what is recomputed, and tensor-parallel messages, which are `messages`
    of these seconds and keep `message_work` core seconds busy. send: of the message to the next stage. copies: into and
    out of DDP's buckets. sums: adding one micro-batch's gradients to the others'. params: bytes of parameters; tensors:
    how many there are. saved: activations kept for backward. transient: most bytes of short-lived tensors. held:
    buffers. input_bytes: of the model's inputs.
    """

    forward: Floats
    backward: Floats
    messages: Floats
    message_work: Floats
    send: Floats
    copies: Floats
    sums: Floats
    params: Floats
    tensors: Floats
    saved: Floats
    transient: Floats
    held: Floats
    input_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Per forward op: what runs or lives with it, at one micro-batch size and one tensor-parallel layout.

    forward, backward: seconds, host time and tensor-parallel messages among them; messages f8[2, n]: these of forward
    and backward. bytes: of every storage. reads: bytes of the smallest view of a storage that forward reads.
    """

    forward: Floats
    backward: Floats
    messages: Floats
    demand: float
    copies: Floats
    sums: Floats
    transient: Floats
    params: Floats
    tensors: Floats
    held: Floats
    bytes: Floats
    reads: Floats


def step_costs(graph: OpGraph, cluster: Cluster) -> StepCosts:
    """What estimates of this graph on this cluster share; keep it, it fills with every plan."""
    count = sum(op.phase == "forward" for op in graph.ops)
    assert all(op.phase == "forward" for op in graph.ops[:count]), "the forward comes first"
    spans: dict[str, tuple[int, int]] = {}
    for op in graph.ops[:count]:
        path = op.module
        while path and path != LOSS:
            spans[path] = (spans.get(path, (op.id, 0))[0], op.id)
            path = path.rpartition(".")[0]
    place = np.arange(len(graph.ops))
    made_at: dict[int, int] = {}
    last = count - 1
    for op in graph.ops[count:]:
        if op.forward >= 0:
            last = op.forward
        else:
            last = max((made_at[t] for t in op.inputs if t in made_at), default=last)
        place[op.id] = last
        made_at.update(dict.fromkeys(op.outputs, last))
    total = sum(s.bytes for s in graph.storages if s.role == "parameter")
    state = sum(s.bytes for s in graph.storages if s.role == "optimizer_state")
    return StepCosts(graph, cluster, count, place, spans, state / total if total else 0.0)


def stage_costs(costs: StepCosts, plan: ParallelPlan) -> StageCosts:
    """Costs of every stage of the plan; the same object for plans that share them."""
    key = (plan.pp, plan.dp * plan.tp, plan.tp, plan.micro_batch, plan.shardings, plan.recompute, plan.cuts)
    if key not in costs.cache:
        costs.cache[key] = _stage_costs(costs, plan)
    found: StageCosts = costs.cache[key]
    return found


def cut_start(costs: StepCosts, cut: str) -> int:
    """The forward op at which the stage that begins at module `cut` starts."""
    if cut not in costs.spans:
        raise ValueError(f"cut {cut!r} is no module path that the forward of {costs.graph.name} calls")
    return costs.spans[cut][0]


def curves(costs: StepCosts, plan: ParallelPlan) -> Curves:
    """Curves of the plan's micro-batch and shardings; the same object for plans that share them."""
    key = ("curves", plan.micro_batch, plan.tp, plan.shardings)
    if key not in costs.cache:
        costs.cache[key] = _curves(costs, plan)
    found: Curves = costs.cache[key]
    return found


def _stage_costs(costs: StepCosts, plan: ParallelPlan) -> StageCosts:
    c, graph = curves(costs, plan), costs.graph
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts)]
    assert starts == sorted(starts), "cuts come in execution order"

    def per_stage(curve: Floats) -> Floats:
        return np.add.reduceat(curve, starts)

    again, saved, dropped = _kept(costs, plan, c)
    params, held = per_stage(c.params), per_stage(c.held)
    for storage, at in _tied(costs):
        stages = np.unique(np.searchsorted(starts, at, "right") - 1)
        params[stages[1:]] += c.bytes[storage]
    send = np.zeros(plan.pp)
    for s, start in enumerate(starts[1:]):
        crossing = [i for i in crossings(costs, start) if i >= 0]
        ranks = (s * plan.dp * plan.tp, (s + 1) * plan.dp * plan.tp)
        send[s] = collective_price(costs.cluster, "send", float(c.reads[crossing].sum()), ranks).seconds
    inputs = sum(s.bytes_per_batch * plan.micro_batch for s in graph.storages if s.role == "input")
    messages = per_stage(c.messages.sum(0) + np.where(again > 0, c.messages[0], 0.0))
    around = _runtime_host(costs, plan)
    return StageCosts(
        forward=per_stage(c.forward + around[0]), backward=per_stage(c.backward + again + around[1]), messages=messages,
        message_work=messages * c.demand, send=send, copies=per_stage(c.copies), sums=per_stage(c.sums), params=params,
        tensors=per_stage(c.tensors),
        saved=per_stage(saved), transient=np.maximum.reduceat(c.transient, starts) + dropped, held=held,
        input_bytes=float(inputs),
    )  # fmt: skip


def _runtime_host(costs: StepCosts, plan: ParallelPlan) -> Floats:
    """Host seconds of pipelines, checkpoints and sharded Linears, in forward and backward [2], by forward op."""
    host, found = costs.cluster.device.host, np.zeros((2, costs.forward_ops))
    starts = [0, *(cut_start(costs, cut) for cut in plan.cuts)] if plan.pp > 1 else []
    places = {
        "pp_action": starts,
        "checkpoint": [costs.spans[path][0] for path in plan.recompute if path in costs.spans],
        "dtensor_linear": [costs.spans[path][0] for path, _ in plan.shardings] if plan.tp > 1 else [],
    }
    for kind, where in places.items():
        for i, phase in enumerate(("forward", "backward")):
            np.add.at(found[i], where, host.get(kind if kind == "pp_action" else f"{kind}_{phase}", 0.0))
    return found


def _kept(costs: StepCosts, plan: ParallelPlan, c: Curves) -> tuple[Floats, Floats, float]:
    """Per forward op: seconds that recomputation repeats, bytes saved for backward; and the most that one recomputed
    module brings back at a time."""
    again, saved = np.zeros(costs.forward_ops), np.zeros(costs.forward_ops)
    block = np.full(costs.forward_ops, -1)
    for i, path in enumerate(plan.recompute):
        first, last = costs.spans.get(path, (0, -1))
        block[first : last + 1] = i
    born, used, stored = _activations(costs)
    home, size = block[born], c.bytes[stored]
    ends = np.array([costs.spans.get(path, (0, -1))[1] for path in plan.recompute] or [0])
    dropped = (home >= 0) & (used <= ends[home])
    np.add.at(saved, born[~dropped], size[~dropped])
    stops = np.full(len(ends), -1)  # torch stops recomputing as soon as everything that was saved is there
    np.maximum.at(stops, home[dropped], born[dropped])
    repeated = (block >= 0) & (np.arange(costs.forward_ops) <= stops[block])
    again[repeated] = c.forward[repeated]
    back = np.zeros(len(ends))
    np.add.at(back, home[dropped], size[dropped])
    return again, saved, float(back.max())


def _activations(costs: StepCosts) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Birth, last forward use and storage of what forward makes and backward still has."""
    if "activations" not in costs.cache:
        n = costs.forward_ops
        _, used = _uses(costs)
        rows = [(s.birth, used[s.id], s.id) for s in costs.graph.storages if 0 <= s.birth < n <= s.death]
        costs.cache["activations"] = tuple(np.array([r[k] for r in rows], np.int64) for k in range(3))
    found: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] = costs.cache["activations"]
    return found


def _uses(costs: StepCosts) -> tuple[dict[int, list[int]], list[int]]:
    """Forward ops that read each storage (inputs and parameters: outside the loss), and the last of them (-1: none)."""
    if "uses" not in costs.cache:
        graph, uses = costs.graph, dict[int, list[int]]()
        for op in graph.ops[: costs.forward_ops]:
            for storage in dict.fromkeys(graph.tensors[t].storage for t in op.inputs):
                if op.module != LOSS or graph.storages[storage].role != "input":
                    uses.setdefault(storage, []).append(op.id)
        costs.cache["uses"] = uses, [uses.get(s.id, [-1])[-1] for s in graph.storages]
    found: tuple[dict[int, list[int]], list[int]] = costs.cache["uses"]
    return found


def _tied(costs: StepCosts) -> list[tuple[int, list[int]]]:
    """Parameters that several forward ops read, with these ops."""
    uses, _ = _uses(costs)
    return [(s.id, uses[s.id]) for s in costs.graph.storages if s.role == "parameter" and len(uses.get(s.id, ())) > 1]


def crossings(costs: StepCosts, start: int) -> list[int]:
    """Storages that a stage starting at forward op `start` receives. -1 stands for one that no pipeline can send: an
    integer one, or one that the stage would change in place (autograd refuses that for what a stage receives). What
    depends on no input and no parameter is made again where it is needed."""
    if "crossings" not in costs.cache:
        costs.cache["crossings"] = _travellers(costs)
    born, last, unfit, ids = costs.cache["crossings"]
    over = (born < start) & (last >= start)
    return [-1 if until >= start else int(i) for i, until in zip(ids[over], unfit[over])]


def _varying(costs: StepCosts) -> set[int]:
    """Storages that depend on an input or a parameter; stages make the others again where they need them."""
    graph = costs.graph
    varying = {s.id for s in graph.storages if s.role in ("input", "parameter")}
    for op in graph.ops[: costs.forward_ops]:
        if varying & {graph.tensors[t].storage for t in op.inputs}:
            varying.update(graph.tensors[t].storage for t in (*op.outputs, *op.mutates))
    return varying


def _travellers(costs: StepCosts) -> tuple[NDArray[Any], ...]:
    """Birth, last forward use, last forward op before which they cannot be sent, and id of the storages that could
    cross a cut."""
    graph = costs.graph
    _, last = _uses(costs)
    varying = _varying(costs)
    dtypes = {t.storage: t.dtype for t in graph.tensors}
    changed: dict[int, int] = {}
    for op in graph.ops[: costs.forward_ops]:
        changed.update({graph.tensors[t].storage: op.id for t in op.mutates})
    rows = [
        (s.birth, last[s.id], changed.get(s.id, -1) if "float" in dtypes[s.id] else costs.forward_ops, s.id)
        for s in graph.storages
        if s.id in varying and s.birth < costs.forward_ops and (s.role == "input" or s.birth >= 0) and last[s.id] >= 0
    ]
    return tuple(np.array([r[k] for r in rows]) for k in range(4))


def _curves(costs: StepCosts, plan: ParallelPlan) -> Curves:
    graph, n, place = costs.graph, costs.forward_ops, costs.place
    layout = propagate(graph, plan)
    seconds = _op_seconds(costs, layout, plan.micro_batch)
    after = np.array([op.phase not in ("forward", "optimizer") for op in graph.ops])
    before = np.arange(len(graph.ops)) < n
    messages, demand = np.zeros((2, n)), 1.0
    step, ranks = plan.micro_batch - graph.batch, plan.group(0, "tp")
    for reduction in layout.reductions:
        nbytes = float(_at(graph.tensors[reduction.tensor], step).bytes)
        price = collective_price(costs.cluster, "all_reduce", nbytes, ranks)
        messages[int(reduction.after >= n), place[reduction.after]] += price.seconds
        demand = min(demand, price.demand)
    whole = {graph.tensors[i].storage for i, p in enumerate(layout.placements) if p >= 0}
    sizes = [(s.bytes + step * s.bytes_per_batch) / (plan.tp if s.id in whole else 1) for s in graph.storages]
    nbytes_of = np.array(sizes, float)
    params, tensors, held, copies, sums = np.zeros((5, n))
    uses, _ = _uses(costs)
    for s in graph.storages:
        if s.role in ("parameter", "buffer") and s.id in uses:
            at = uses[s.id][0]
            (params if s.role == "parameter" else held)[at] += nbytes_of[s.id]
            if s.role == "parameter":
                moved, added = _runtime_copies(costs, nbytes_of[s.id])
                copies[at], sums[at], tensors[at] = copies[at] + moved, sums[at] + added, tensors[at] + 1
    reads = nbytes_of.copy()
    for t in {i for op in graph.ops[:n] for i in op.inputs}:
        tensor = _at(graph.tensors[t], step)
        reads[tensor.storage] = min(reads[tensor.storage], tensor.bytes)

    def along(which: NDArray[np.bool_]) -> Floats:
        return np.bincount(place[which], weights=seconds[which], minlength=n)[:n].astype(np.float64)

    return Curves(
        along(before) + messages[0], along(after) + messages[1], messages, demand, copies, sums,
        _transient(costs, nbytes_of), params, tensors, held, nbytes_of, reads,
    )  # fmt: skip


def _runtime_copies(costs: StepCosts, nbytes: float) -> tuple[float, float]:
    """Seconds of copying a float32 gradient of `nbytes` into and out of a bucket, and of adding it to another."""
    elements, host = round(nbytes / 4), costs.cluster.device.host
    names = ("aten.mul.out", "aten.copy_.default", "aten.add_.Tensor")
    shapes = [copy_work(name, elements, "float32", "backward", "").shape for name in names]
    mul, copy, add = (p.seconds + host.get("op_backward", 0.0) for p in price_many(costs.cluster.device, shapes))
    return mul + copy, add


def _transient(costs: StepCosts, nbytes: Floats) -> Floats:
    """Per forward op: most bytes of tensors that neither backward nor the optimizer waits for, while it or its backward
    runs."""
    graph, n = costs.graph, costs.forward_ops
    if "short" not in costs.cache:
        end = next((op.id for op in graph.ops if op.phase == "optimizer"), len(graph.ops))
        rows = [s for s in graph.storages if s.birth >= 0 and s.death < (n if s.birth < n else end)]
        costs.cache["short"] = tuple(np.array([getattr(s, f) for s in rows], int) for f in ("id", "birth", "death"))
    ids, born, death = costs.cache["short"]
    live = np.zeros(len(graph.ops) + 1)
    np.add.at(live, born, nbytes[ids])
    np.add.at(live, np.maximum(death, born) + 1, -nbytes[ids])
    most = np.zeros(n)
    np.maximum.at(most, costs.place, np.cumsum(live)[:-1])
    return most


def _at(t: Tensor, step: int) -> Tensor:
    """The tensor with `step` more samples; only its bytes are right."""
    return replace(t, shape=tuple(a + b * step for a, b in zip(t.shape, t.per_batch))) if any(t.per_batch) else t


def _op_seconds(costs: StepCosts, layout: Layout, batch: int) -> Floats:
    """Seconds of every op but the optimizer's at the local shapes of one rank. Views cost their host time only."""
    compact, placed, kind = _classes(costs, layout)
    at = compact.at_batch(batch)
    tensors = tuple(_local(t, p, layout.parts) for t, p in zip(at.tensors, placed))
    ops = at.ops
    if layout.parts > 1:
        ops = tuple(_with_flops(op, tensors) for op in at.ops)
    at = replace(at, tensors=tensors, ops=ops)
    prices = price_many(costs.cluster.device, [shape_of(at, op) for op in at.ops])
    host = costs.cluster.device.host
    own = np.array([host.get("op_backward" if op.phase == "backward" else "op_forward", 0.0) for op in costs.graph.ops])
    seconds = np.array([p.seconds for p in prices] + [0.0, 0.0])[kind]
    return np.where(kind == LEFT_OUT, 0.0, seconds + own)


def _with_flops(op: Op, tensors: tuple[Tensor, ...]) -> Op:
    if not op.flops:
        return op
    ins, outs = ([tensors[i] for i in side] for side in (op.inputs, op.outputs))
    return replace(op, flops=flops_of(op.name, ins, outs or ins, op))


def _local(t: Tensor, placement: int, parts: int) -> Tensor:
    if placement < 0 or parts == 1:
        return t
    return replace(t, shape=tuple(n // parts if d == placement else n for d, n in enumerate(t.shape)))


def _classes(costs: StepCosts, layout: Layout) -> tuple[OpGraph, tuple[int, ...], NDArray[np.int64]]:
    """A graph of one op per class of equal ops, placements of its tensors, and the class of every op: VIEW costs its
    host time only, LEFT_OUT nothing."""
    key = ("classes", layout)
    if key in costs.cache:
        found: tuple[OpGraph, tuple[int, ...], NDArray[np.int64]] = costs.cache[key]
        return found
    graph = costs.graph
    looks: dict[Any, int] = {}
    look = [
        looks.setdefault((t.shape, t.per_batch, tuple(s == 0 for s in t.strides), t.dtype, p), len(looks))
        for t, p in zip(graph.tensors, layout.placements)
    ]
    numbers: dict[Any, int] = {}
    kind = np.full(len(graph.ops), LEFT_OUT, np.int64)
    ops, tensors, placed = list[Op](), list[Tensor](), list[int]()
    free = _uncertain(costs)
    for op in graph.ops:
        if op.phase == "optimizer" or op.id in free or copies_nothing(graph, layout, op):
            continue
        if op.is_view:
            kind[op.id] = VIEW
            continue
        ids = (*op.inputs, *op.outputs, *op.mutates)
        like = (
            op.name, op.phase, len(op.inputs), len(op.outputs), tuple(look[i] for i in ids),
            tuple(ids.index(i) for i in ids), _plain(op.args) if op.flops else (),
        )  # fmt: skip
        kind[op.id] = numbers.setdefault(like, len(numbers))
        if kind[op.id] == len(ops):
            new = {i: len(tensors) + k for k, i in enumerate(dict.fromkeys(ids))}
            tensors += [replace(graph.tensors[i], id=j) for i, j in new.items()]
            placed += [layout.placements[i] for i in new]
            sides = ([new[i] for i in side] for side in (op.inputs, op.outputs, op.mutates))
            ins, outs, mutated = map(tuple, sides)
            ops.append(replace(op, id=len(ops), inputs=ins, outputs=outs, mutates=mutated))
    compact = replace(graph, ops=tuple(ops), tensors=tuple(tensors), storages=(), gradient_ops=())
    costs.cache[key] = compact, tuple(placed), kind
    return costs.cache[key][0], costs.cache[key][1], costs.cache[key][2]


def _uncertain(costs: StepCosts) -> set[int]:
    """Ops that a stage may not run: forward ops on constants (other stages repeat them), and sums of a parameter's
    gradients (messages where the uses lie in different stages)."""
    graph, varying = costs.graph, _varying(costs)
    shapes = {t.shape for t in graph.parameters.values()}
    constant = {
        op.id
        for op in graph.ops[: costs.forward_ops]
        if not varying & {graph.tensors[t].storage for t in (*op.inputs, *op.outputs)}
    }
    sums = {op.id for op in graph.ops if accumulates(op) and graph.tensors[op.outputs[0]].shape in shapes}
    return constant | sums


def _plain(value: Any) -> Any:
    """Arguments without the tensors among them."""
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return None if isinstance(value, Ref) else value


def optimizer_seconds(costs: StepCosts, nbytes: Floats) -> Floats:
    """The least seconds of an optimizer step on `nbytes` of parameters: its ops at that share of their bytes."""
    return np.array([_optimizer(costs, float(n)) for n in nbytes])


def _optimizer(costs: StepCosts, nbytes: float) -> float:
    key = ("optimizer", nbytes)
    if key not in costs.cache:
        graph = costs.graph
        whole = sum(s.bytes for s in graph.storages if s.role == "parameter")
        shapes = [shape_of(graph, op) for op in graph.ops if op.phase == "optimizer" and not op.is_view]
        share = nbytes / whole if whole else 0.0
        if share >= 1:
            costs.cache[key] = sum(p.seconds for p in price_many(costs.cluster.device, shapes))
        else:
            costs.cache[key] = sum(_scaled(costs, s, share) for s in shapes) if share else 0.0
    return float(costs.cache[key])


def _scaled(costs: StepCosts, shape: OpShape, share: float) -> float:
    """Seconds of an op on a share of its tensors, however many of them that are: bytes only."""
    device = costs.cluster.device
    part = replace(shape, bytes_read=int(share * shape.bytes_read), bytes_written=int(share * shape.bytes_written))
    law = law_of(device, shape)
    if law is None:
        return roofline_seconds(device, part)
    return sum(
        c * f
        for name, c, f in zip(FORMS[law.form], law.coefficients, features(part, law.form))
        if name == "one" or name.endswith(("_1M", "_8M", "_more"))
    )
