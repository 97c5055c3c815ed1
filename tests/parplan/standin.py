"""Stands in for the planner in tests of the command line: fixed plans with fixed predictions, at once."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from planner.plan import ParallelPlan

PARTS = {"compute": 0.006, "exposed_communication": 0.003, "bubble": 0.001, "host": 0.0}


def prediction(plan: ParallelPlan, seconds: float = 0.010) -> Any:
    return SimpleNamespace(
        plan=plan, step_seconds=seconds, interval=(0.9 * seconds, 1.2 * seconds), peak_bytes=(2**20,) * plan.world_size,
        fits=True, memory_bytes=2**30, breakdown=PARTS, mfu=0.4, shares={"measured": 0.25, "roofline": 0.75},
        unpriced=("aten.odd",), notes=("a remark",), tasks=12, at_peak={"activations": 2**20}, resting_bytes=0,
        assumed=(), fused={}, host_bytes={}, host_pinned_bytes=0,
    )  # fmt: skip


def predict(graph: Any, plan: ParallelPlan, cluster: Any) -> Any:
    return prediction(plan)


def simulate_plan(graph: Any, plan: ParallelPlan, cluster: Any, running: Any = None) -> Any:
    from simulator import ProgramBuilder, simulate

    builder = ProgramBuilder()
    for rank in range(plan.world_size):
        core = builder.resource(f"core {rank}", rank=rank)
        link = builder.resource(f"link {rank}", rank=rank, kind="communication")
        first = builder.task("layer", "forward", 0.006, core)
        builder.task("gradients", "all_reduce", 0.003, link, deps=[first])
    return prediction(plan), simulate(builder.build())


def search(workload: Any, graph: Any, cluster: Any, batch: int, *, devices: int | None = None, **more: Any) -> Any:
    devices = devices or cluster.size
    rejected = (SimpleNamespace(label="tp", reason="nothing to split", count=3),)
    if "hidden=31" in workload.name:  # the model that fits nowhere
        raise ValueError("no plan of the model fits; use more devices")
    plans = [
        ParallelPlan(batch, dp=devices, data_parallel=kind, fsdp_units=workload.blocks if kind == "fsdp" else ())
        for kind in (("ddp", "zero1", "fsdp") if devices > 1 else ("ddp",))
    ]
    ranked = tuple(
        SimpleNamespace(plan=p, prediction=prediction(p, 0.010 * (i + 1)), bound_seconds=0.008, gap=0.25, tied=i < 2)
        for i, p in enumerate(plans)
    )
    return SimpleNamespace(
        plans=ranked, considered=9, infeasible=6, undecided=1, rejected=rejected, seconds=0.01,
        offload="offload was not tried: a remark",
    )


def diverse(result: Any, count: int) -> Any:
    return result.plans[:count]


def modules() -> dict[str, ModuleType]:
    made = {}
    for name, functions in (("predict", (predict, simulate_plan)), ("search", (search, diverse))):
        made[f"planner.{name}"] = module = ModuleType(f"planner.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
    return made


def main() -> int:
    """The command line with this planner: `python -m tests.parplan.standin ...`."""
    from parplan.cli import main as run

    sys.modules.update(modules())
    return run()


assert np.isclose(sum(PARTS.values()), 0.010)
if __name__ == "__main__":
    sys.exit(main())
