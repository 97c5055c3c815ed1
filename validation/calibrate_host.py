"""`Device.host` of a CPU from a calibration: seconds of Python and of torch's runtimes beside the ops."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from costmodels.features import emptied
from costmodels.variability import highest_of
from planner.runtime_host import WARM

if TYPE_CHECKING:
    from validation.calibrate_record import Overhead

SMALL_OPTIMIZER = 0.002  # seconds of an optimizer step below which its overhead is not drowned by its ops
SMALL_STEP = 0.04  # seconds: host overhead is read off steps below this, where op noise does not drown it
LAD_ROUNDS, LAD_LEAST = 30, 2e-7  # of reweighting towards least absolute deviations; seconds that count as none


def host_of(main: list[dict[str, Any]], results: dict[int, list[dict[str, Any]]], cores: int) -> dict[str, float]:
    """`Device.host`: see docs in `HOST_KEYS`."""
    host: dict[str, float] = {}
    overheads = [o for r in main for o in r["overheads"]]
    for phase in ("forward", "backward"):
        small = [o for o in overheads if sum(p[0] for p in o.parts.values()) < SMALL_STEP] or overheads
        host[f"op_{phase}"], host[f"op_{phase}_swept"] = per_op_of(small, phase)
    light = [o for o in overheads if o.parts["optimizer"][0] < SMALL_OPTIMIZER] or overheads
    rest = np.array([max(o.parts["optimizer"][0] - o.parts["optimizer"][1], 0.0) for o in light])
    (host["optimizer_step"], host["optimizer_param"]), _ = nnls(np.array([[1.0, o.parameters] for o in light]), rest)
    host["anchor_in_rank"] = statistics.median(r["reference"] for r in main)
    for part in main[0]["parts"]:
        host[f"anchor_{part}"] = statistics.median(r["parts"][part] for r in main)
    for key in main[0]["runtime"]:
        host[key] = statistics.median(r["runtime"][key] for r in main if key in r["runtime"])
    host["skew"] = skew_of(main[0].get("collectives", ()), len(main))
    host["loaded"] = max(statistics.median(r["anchor_loaded"] for r in main) / main[0]["anchor_solo"], 1.0)
    if crowded := [w for w in results if w > cores]:
        pairs = [r["pair_seconds"] for r in (main[0], results[min(crowded)][0]) if "pair_seconds" in r]
        host["crowded_message"] = max(pairs[-1] - pairs[0], 0.0) if len(pairs) == 2 else 0.0
    return {k: float(v) for k, v in host.items()}


def per_op_of(overheads: Sequence[Overhead], phase: str) -> tuple[float, float]:
    """Seconds beside an op of a phase, and how many more where the op before has emptied the caches, by least absolute
    deviations from what each step took beyond its ops (a step of many ops says more than one of a few)."""
    rows = [(*o.parts[phase], [s for s in o.shapes if s.phase == phase]) for o in overheads if o.parts[phase][2]]
    if not rows:
        return 0.0, 0.0
    design = np.array([[1.0, sum(emptied(s.swept) for s in shapes) / n] for _, _, n, shapes in rows])
    found, base = (np.array(column) for column in zip(*((max(t - ops, 0.0) / n, n**0.5) for t, ops, n, _ in rows)))
    weights = base
    for _ in range(LAD_ROUNDS):
        coefficients, _ = nnls(design * weights[:, None], found * weights)
        weights = base / np.sqrt(np.maximum(np.abs(design @ coefficients - found), LAD_LEAST))
    return float(coefficients[0]), float(coefficients[1])


def skew_of(rows: Sequence[dict[str, Any]], ranks: int) -> float:
    """By how much cores differ from moment to moment, as a standard deviation relative to the mean."""
    found = [row["skew"] for row in rows if row["ranks"] == ranks]
    return statistics.fmean(found) / highest_of(ranks) if found else 0.0


HOST_KEYS = {
    "op_forward": "per aten op of a forward pass, views included, beyond the op's own price",
    "op_forward_swept": "more of it for an op after one that emptied the caches (costmodels.context.per_op)",
    "op_backward": "the same as op_forward in a backward pass",
    "op_backward_swept": "the same as op_forward_swept in a backward pass",
    "optimizer_step": "per optimizer step (fused AdamW and zero_grad), beyond its ops",
    "optimizer_param": "per parameter tensor of an optimizer step",
    "dtensor_op": "per op on DTensors, beyond the same op on plain tensors",
    "dtensor_linear_forward": "per Linear under ColwiseParallel or RowwiseParallel, forward",
    "dtensor_linear_backward": "the same, backward",
    "dtensor_view_forward": "what an input of more than two dimensions adds to that, forward",
    "dtensor_view_backward": "the same, backward",
    "dtensor_optimizer_param": "per DTensor parameter of an optimizer step, beyond a plain one",
    "fsdp_unit_forward": "per module wrapped by fully_shard, forward (unshard, reshard, hooks)",
    "fsdp_unit_backward": "the same, backward (unshard, reduce-scatter, hooks)",
    "fsdp_param_forward": "per parameter tensor of a fully_shard unit, forward",
    "fsdp_param_backward": "the same, backward",
    "fsdp_optimizer_param": "per fully_shard parameter of an optimizer step, beyond a plain one",
    "ddp_step": "per forward of DistributedDataParallel",
    "ddp_param": "per parameter and backward of DistributedDataParallel",
    "ddp_bucket": "per bucket and backward of DistributedDataParallel",
    "checkpoint_forward": "per checkpointed region, forward",
    "checkpoint_backward": "per checkpointed region, backward, beyond the recomputed ops",
    "checkpoint_saved_forward": "per tensor that ops of a checkpointed region save for backward, forward",
    "checkpoint_saved_backward": "the same, backward",
    "pp_action": "per forward or backward of one micro-batch under a pipeline schedule",
    "anchor_in_rank": "of the anchor inside a rank between its steps, at the pace of all prices",
    "anchor_products": "the same of its matrix products",
    "anchor_convolutions": "the same of its convolutions",
    "anchor_passes": "the same of its passes over memory",
    "anchor_calls": "the same of its ops that compute next to nothing",
    "skew": "ratio: by how much cores differ from moment to moment, a standard deviation over the mean",
    "loaded": "ratio: op time with all cores busy / alone; laws and samples are for all cores busy",
    "crowded_message": "per message of a group that is not the whole world, where more ranks than cores run: its ranks "
    "wait for their turns on the cores",
}
HOST_KEYS |= {
    key + WARM: f"{text}, where next to nothing was moved since the call before"
    for key, text in HOST_KEYS.items()
    if key.startswith(("dtensor_linear", "dtensor_view", "fsdp_unit", "fsdp_param", "checkpoint", "pp_action", "ddp"))
}
