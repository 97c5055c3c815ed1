"""Plans that keep something in the host's memory: what can be offloaded of the plans that keep all on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

from costmodels.cluster import Cluster
from planner.host_thread import Running
from planner.offload import is_apart
from planner.plan import Offloaded, ParallelPlan
from planner.stage_costs import shares_weights
from planner.step_costs import StepCosts

OffloadMode = Literal["auto", "never", "always"]


def check_mode(mode: str) -> OffloadMode:
    """ValueError for a mode that there is not."""
    for known in get_args(OffloadMode):
        if mode == known:
            found: OffloadMode = known
            return found
    raise ValueError(f"offload is {mode!r}; give auto, never or always")


def no_offload(cluster: Cluster, running: Running) -> str:
    """Why nothing can be offloaded; "" where it can."""
    if not is_apart(cluster):
        return f"{cluster.device.name} shares its memory with the host"
    if not cluster.device.host_bandwidth:
        return f"the device file of {cluster.device.name} states no link to its host"
    return "a step that waits for copies to the host cannot be replayed from CUDA graphs" if running.cuda_graphs else ""


def offloaded_plans(costs: StepCosts, plans: Sequence[ParallelPlan]) -> list[ParallelPlan]:
    """The plans with every kind of offload that they can have. The optimizer of weights that several stages share stays
    on the device, as their gradients are summed there."""
    found = []
    for plan in plans:
        for kinds in _kinds(plan):
            updates = any(kind != "activations" for kind in kinds)
            if not (updates and plan.pp > 1 and shares_weights(costs, plan)):
                found.append(replace(plan, offload=kinds))
    return found


def _kinds(plan: ParallelPlan) -> Iterator[tuple[Offloaded, ...]]:
    kept: list[tuple[Offloaded, ...]] = [("optimizer",), ("parameters",)] if plan.fully_sharded else [("optimizer",)]
    yield from kept
    if plan.recompute:
        yield ("activations",)
        for kinds in kept:
            yield (*kinds, "activations")
