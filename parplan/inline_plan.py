"""Plans from what people type: a plan file, or degrees such as `dp2,tp2,mb4` or a label as the tables print it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from costmodels.cluster import Cluster
    from opgraph.graph import OpGraph
    from opgraph.workload import Workload
    from planner.plan import ParallelPlan

WORDS = {
    "ddp": {"data_parallel": "ddp"}, "zero1": {"data_parallel": "zero1"}, "fsdp": {"data_parallel": "fsdp"},
    "gpipe": {"schedule": "gpipe"}, "1f1b": {"schedule": "1f1b"}, "bf16": {"precision": "bf16"},
    "recompute": {"recompute": True}, "single": {}, "x": {},
}  # fmt: skip
NUMBERS = {"dp": "dp", "tp": "tp", "pp": "pp", "mb": "micro_batches"}


def read_plan(
    text: str, workload: Workload, graph: OpGraph, cluster: Cluster, global_batch: int | None
) -> ParallelPlan:
    """The plan of a file, or the one that typed degrees mean for this model; `global_batch` overrides a file's."""
    from planner.plan import load_plan

    if text.endswith(".json") or Path(text).is_file():
        plan = load_plan(text)
        return replace(plan, global_batch=global_batch) if global_batch else plan
    wanted = parse(text)
    if global_batch is None:
        raise ValueError(f"the plan '{text}' says nothing of the batch; give --global-batch")
    return complete(wanted, text, workload, graph, cluster, global_batch)


def parse(text: str) -> dict[str, Any]:
    """The fields that typed degrees set: `dp2 fsdp x tp2 mb4` or `dp2,fsdp,tp2,mb4`."""
    fields: dict[str, Any] = {}
    for word in re.split(r"[\s,]+", text.strip()):
        match = re.fullmatch(r"(dp|tp|pp|mb)(\d+)", word)
        if match:
            fields[NUMBERS[match[1]]] = int(match[2])
        elif word in WORDS:
            fields |= WORDS[word]
        else:
            raise ValueError(
                f"'{word}' in plan '{text}' is no degree and there is no such file; write for example dp2,tp2,mb4 with "
                "any of dpN tpN ppN mbN ddp zero1 fsdp gpipe 1f1b recompute bf16, or give a plan file"
            )
    return fields


def complete(
    wanted: dict[str, Any], text: str, workload: Workload, graph: OpGraph, cluster: Cluster, global_batch: int
) -> ParallelPlan:
    """The plan with the shardings, cuts and units that the search would give it."""
    from planner.plan import ParallelPlan

    if wanted.get("pp", 1) > 1:
        return _searched(wanted, text, workload, graph, cluster, global_batch)
    fields = dict(wanted)
    if fields.get("tp", 1) > 1:
        from planner.tensor_parallel import explain_no_shardings, tp_shardings

        fields["shardings"] = tp_shardings(graph, fields["tp"])
        if not fields["shardings"]:
            raise ValueError(f"plan '{text}': {explain_no_shardings(graph, fields['tp'])}")
    if fields.get("data_parallel") == "fsdp":
        fields["fsdp_units"] = workload.blocks
    fields["recompute"] = workload.blocks if fields.get("recompute") else ()
    return ParallelPlan(global_batch=global_batch, **fields)


def _searched(
    wanted: dict[str, Any], text: str, workload: Workload, graph: OpGraph, cluster: Cluster, global_batch: int
) -> ParallelPlan:
    """The best plan of these degrees that the search finds: it chooses the cuts."""
    from planner.search import search

    degrees = {"dp": 1, "tp": 1, "pp": 1, **{k: v for k, v in wanted.items() if k != "recompute"}}
    world = degrees["dp"] * degrees["tp"] * degrees["pp"]
    if global_batch % (degrees["dp"] * degrees.get("micro_batches", 1)):
        raise ValueError(
            f"global batch {global_batch} is not divisible by dp x micro-batches of plan '{text}'; "
            f"use a multiple of {degrees['dp'] * degrees.get('micro_batches', 1)}"
        )
    result = search(workload, graph, cluster, global_batch, devices=world)
    for ranked in result.plans:
        plan = ranked.plan
        same = all(getattr(plan, key) == value for key, value in degrees.items())
        if same and bool(plan.recompute) == wanted.get("recompute", False):
            return cast("ParallelPlan", plan)
    raise ValueError(
        f"the search finds no legal plan '{text}' for {workload.name} with global batch {global_batch}; "
        "`parplan search` shows what there is and why the rest was left out"
    )
