"""Parplan: how should this torch model be split over these devices, how long does a step take, does it fit?

>>> import parplan
>>> workload = parplan.load_workload("mlp:layers=2,hidden=64,ffn=256")
>>> graph = parplan.trace_workload(workload)
>>> cluster = parplan.load_cluster("dgx-h100")
>>> result = parplan.search(workload, graph, cluster, global_batch=64, devices=2)
>>> best = result.plans[0]
>>> best.plan.world_size, best.prediction.fits
(2, True)

The names below are imported when they are first used, so that `import parplan` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from costmodels.cluster import Cluster, load_cluster
    from opgraph.batch import trace_workload
    from opgraph.models import load_workload
    from opgraph.trace import trace
    from opgraph.workload import Workload
    from planner.plan import ParallelPlan, load_plan
    from planner.predict import predict
    from planner.predict import simulate_plan as simulate
    from planner.search import search
    from validation.study import validate

WHERE = {
    "Cluster": "costmodels.cluster:Cluster",
    "ParallelPlan": "planner.plan:ParallelPlan",
    "Workload": "opgraph.workload:Workload",
    "load_cluster": "costmodels.cluster:load_cluster",
    "load_plan": "planner.plan:load_plan",
    "load_workload": "opgraph.models:load_workload",
    "predict": "planner.predict:predict",
    "search": "planner.search:search",
    "simulate": "planner.predict:simulate_plan",
    "trace": "opgraph.trace:trace",
    "trace_workload": "opgraph.batch:trace_workload",
    "validate": "validation.study:validate",
}

__all__ = [
    "Cluster",
    "ParallelPlan",
    "Workload",
    "load_cluster",
    "load_plan",
    "load_workload",
    "predict",
    "search",
    "simulate",
    "trace",
    "trace_workload",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'parplan' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = WHERE[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
