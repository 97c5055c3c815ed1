"""A priced graph: what estimates of one graph on one cluster share, and which storages could cross a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.cluster import Cluster
from costmodels.rounding import in_precision
from opgraph.graph import OpGraph
from planner.host_thread import EAGER, Running
from planner.stages import LOSS


@dataclass(frozen=True, eq=False)
class StepCosts:
    """A graph and a cluster, and what of them does not depend on the plan.

    forward_ops: how many ops the forward has; they come first. place i8[ops]: the forward op in whose stage an op runs.
    spans: first and last forward op of every module path.
    state_ratio: bytes of optimizer state per byte of parameters. running: how steps are run. cache: what plans
    needed so far.
    """

    graph: OpGraph
    cluster: Cluster
    forward_ops: int
    place: NDArray[np.int64]
    spans: dict[str, tuple[int, int]]
    state_ratio: float
    running: Running = EAGER
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)


def step_costs(graph: OpGraph, cluster: Cluster, running: Running = EAGER) -> StepCosts:
    """What estimates of this graph on this cluster share; keep it, it fills with every plan."""
    graph, cluster = graph.run_by(cluster.device.kind), in_precision(cluster, graph.precision)
    count = sum(op.phase == "forward" for op in graph.ops)
    assert all(op.phase == "forward" for op in graph.ops[:count]), "the forward comes first"
    if any(op.forward >= count for op in graph.ops[count:]):
        raise ValueError(
            f"{graph.name} goes backward through a checkpoint that starts a backward pass of its own; give its "
            f"checkpoints use_reentrant=False"
        )
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
    return StepCosts(graph, cluster, count, place, spans, state / total if total else 0.0, running)


def uses_of(costs: StepCosts) -> tuple[dict[int, list[int]], list[int]]:
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


def varying_storages(costs: StepCosts) -> set[int]:
    """Storages that depend on an input or a parameter; stages make the others again where they need them."""
    graph = costs.graph
    varying = {s.id for s in graph.storages if s.role in ("input", "parameter")}
    for op in graph.ops[: costs.forward_ops]:
        if varying & {graph.tensors[t].storage for t in op.inputs}:
            varying.update(graph.tensors[t].storage for t in (*op.outputs, *op.mutates))
    return varying


def crossings(costs: StepCosts, start: int) -> list[int]:
    """Storages that a stage starting at forward op `start` receives. -1 stands for one that no pipeline can send: an
    integer one, or one that the stage would change in place (autograd refuses that for what a stage receives). What
    depends on no input and no parameter is made again where it is needed."""
    if "crossings" not in costs.cache:
        costs.cache["crossings"] = _travellers(costs)
    born, last, unfit, ids = costs.cache["crossings"]
    over = (born < start) & (last >= start)
    return [-1 if until >= start else int(i) for i, until in zip(ids[over], unfit[over])]


def _travellers(costs: StepCosts) -> tuple[NDArray[Any], ...]:
    """Birth, last forward use, last forward op before which they cannot be sent, and id of the storages that could
    cross a cut."""
    graph = costs.graph
    _, last = uses_of(costs)
    varying = varying_storages(costs)
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
