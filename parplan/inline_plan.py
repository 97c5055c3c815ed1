"""Plans from what people type: a plan file, or degrees such as `dp2,tp2,mb4` or a label as the tables print it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from costmodels.cluster import Cluster
    from opgraph.graph import OpGraph
    from opgraph.workload import Workload
    from planner.plan import ParallelPlan

WORDS: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel": "ddp"}, "zero1": {"data_parallel": "zero1"}, "zero2": {"data_parallel": "zero2"},
    "fsdp": {"data_parallel": "fsdp"}, "zero3": {"data_parallel": "fsdp"},
    "gpipe": {"schedule": "gpipe"}, "1f1b": {"schedule": "1f1b"}, "bf16": {"precision": "bf16"},
    "tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}, "fp8": {"precision": "fp8"},
    "recompute": {"recompute": True}, "keep-products": {"recompute_keeps": ("products",)},
    "keep-attention": {"recompute_keeps": ("attention",)}, "offload": {"offload": ("parameters",)},
    "offload-optimizer": {"offload": ("optimizer",)}, "offload-activations": {"offload": ("activations",)},
    "single": {}, "x": {},
}  # fmt: skip
LISTS = ("recompute_keeps", "offload")  # words of these add up
SHARED_OUT = ("zero1", "zero2", "zero3", "fsdp")
ALTERNATIVES = (("ddp", *SHARED_OUT), ("gpipe", "1f1b"), ("tf32", "bf16", "fp16", "fp8"))  # a plan is of one of each
NUMBERS = {"dp": "dp", "tp": "tp", "pp": "pp", "mb": "micro_batches"}
Finish = Callable[["Workload", "OpGraph", "Cluster"], "ParallelPlan"]


def read_plan(text: str, global_batch: int | None) -> tuple[int, str, Finish]:
    """World size, precision, and a function that makes the plan once the model is traced.

    `text` is a plan file, whose batch `global_batch` overrides, or degrees, which need it; ppN without mbN has N
    micro-batches.
    """
    from planner.plan import load_plan

    if text.endswith(".json") or Path(text).is_file():
        plan = load_plan(text)
        plan = replace(plan, global_batch=global_batch) if global_batch else plan
        return plan.world_size, plan.precision, lambda workload, graph, cluster: plan
    wanted = parse(text)
    if wanted["pp"] > 1 and wanted["schedule"] == "1f1b" and not re.search(r"\bmb\d", text):
        wanted["micro_batches"] = wanted["pp"]  # the fewest that 1f1b takes
    if global_batch is None:
        raise ValueError(f"the plan '{text}' says nothing of the batch; give --global-batch")
    _check_batch(wanted, text, global_batch)
    world = wanted["dp"] * wanted["tp"] * wanted["pp"]
    return world, wanted["precision"], lambda w, g, c: complete(wanted, text, w, g, c, global_batch)


def parse(text: str) -> dict[str, Any]:
    """What typed degrees mean: `dp2 fsdp x tp2 mb4` or `dp2,fsdp,tp2,mb4`."""
    fields: dict[str, Any] = {
        "dp": 1, "tp": 1, "pp": 1, "micro_batches": 1, "data_parallel": "ddp", "schedule": "1f1b", "precision": "fp32",
        "recompute": False, "recompute_first": (), "recompute_keeps": (), "offload": (),
    }  # fmt: skip
    seen: set[str] = set()
    words = re.split(r"[\s,]+", text.strip())
    for word in words:
        match = re.fullmatch(r"(dp|tp|pp|mb)([1-9]\d*)", word)
        if match:
            if match[1] in seen:
                raise ValueError(f"plan '{text}' gives {match[1]} twice; write each degree once")
            seen.add(match[1])
            fields[NUMBERS[match[1]]] = int(match[2])
        elif first := re.fullmatch(r"recompute(\d+(?:/\d+)*)", word):
            fields |= {"recompute": True, "recompute_first": tuple(int(n) for n in first[1].split("/"))}
        elif word in WORDS:
            before = {name: fields[name] for name in LISTS}
            fields |= WORDS[word]
            fields |= {name: tuple(dict.fromkeys((*before[name], *fields[name]))) for name in LISTS}
        else:
            raise ValueError(
                f"'{word}' in plan '{text}' is no degree, and there is no such file; write for example dp2,tp2,mb4 "
                "with any of dpN tpN ppN mbN ddp zero1 zero2 zero3 fsdp gpipe 1f1b recompute recomputeN keep-products "
                "keep-attention offload offload-optimizer offload-activations tf32 bf16 fp16 fp8, or give a plan "
                "file"
            )
    _check_words(words, text, fields)
    return fields


def _check_words(words: Sequence[str], text: str, wanted: dict[str, Any]) -> None:
    """ValueError for words that would change nothing or contradict each other: who wrote them means another plan."""
    _check_pairs(words, text)
    for word in words:
        if word in ALTERNATIVES[0] and wanted["dp"] == 1:
            raise ValueError(f"plan '{text}' has {word} but no data-parallel ranks to share out over; add dp2 or more")
        if word in ALTERNATIVES[1] and wanted["pp"] == 1:
            raise ValueError(f"plan '{text}' has {word} but no pipeline; add pp2 or more, or leave {word} out")
        if word.startswith("keep-") and not wanted["recompute"]:
            raise ValueError(f"plan '{text}' has {word} but recomputes nothing; add recompute, or leave {word} out")
    if "single" in words and max(wanted[axis] for axis in ("dp", "tp", "pp")) > 1:
        raise ValueError(f"plan '{text}' is single and splits the step; leave single or the degrees out")


def _check_pairs(words: Sequence[str], text: str) -> None:
    """ValueError where two words say the same thing in two ways."""
    for group in ALTERNATIVES:
        meant = {word: WORDS[word] for word in words if word in group}
        if len({str(fields) for fields in meant.values()}) > 1:
            raise ValueError(f"plan '{text}' says {' and '.join(meant)}; a plan is one of them")
    amounts = {word for word in words if word.startswith("recompute")}
    if len(amounts) > 1:
        raise ValueError(f"plan '{text}' says {' and '.join(sorted(amounts))}; write one of them")
    if "offload" in words and "offload-optimizer" in words:
        raise ValueError(
            f"plan '{text}' says offload and offload-optimizer; offload takes the optimizer along with the parameters, "
            "write one of them"
        )


def _check_batch(wanted: dict[str, Any], text: str, global_batch: int) -> None:
    parts = wanted["dp"] * wanted["micro_batches"]
    if global_batch % parts:
        raise ValueError(
            f"global batch {global_batch} is not divisible by dp x micro-batches of plan '{text}' ({wanted['dp']} x "
            f"{wanted['micro_batches']}); use a multiple of {parts}"
        )


def complete(
    wanted: dict[str, Any], text: str, workload: Workload, graph: OpGraph, cluster: Cluster, global_batch: int
) -> ParallelPlan:
    """The plan of these degrees in the space that the search looks through, with its shardings, cuts and units; what
    the search does not look through (zero2, recomputation of a part, offload) is the plan next to it, changed."""
    from planner.space import enumerate_plans

    world = wanted["dp"] * wanted["tp"] * wanted["pp"]
    space = enumerate_plans(workload, graph, cluster, global_batch, world, wanted["precision"])
    keys = ["dp", "tp", "pp", "micro_batches"]
    keys += ["data_parallel"] * (wanted["dp"] > 1) + ["schedule"] * (wanted["pp"] > 1)
    near = {**wanted, "data_parallel": "fsdp" if wanted["data_parallel"] == "zero2" else wanted["data_parallel"]}
    for plan in space.plans:
        if all(getattr(plan, k) == near[k] for k in keys) and bool(plan.recompute) == wanted["recompute"]:
            kind = wanted["data_parallel"] if plan.dp > 1 else plan.data_parallel
            changed = {k: wanted[k] for k in ("recompute_first", "recompute_keeps", "offload")}
            return replace(plan, data_parallel=kind, **changed)
    mesh = {f"{axis}{wanted[axis]}" for axis in ("pp", "dp", "tp") if wanted[axis] > 1}
    kind = {wanted["data_parallel"]} if wanted["dp"] > 1 else set()
    reasons = [r.reason for r in space.rejected if set(re.split(r"[ ,]+", r.label)) & (mesh | kind)]
    if wanted["recompute"] and not workload.blocks:
        reasons.append("no repeated blocks were found in the model, and blocks are what is recomputed")
    reason = "; ".join(dict.fromkeys(reasons)) or "it is not in the space that the search knows"
    raise ValueError(f"plan '{text}' is not legal for {workload.name}: {reason}")
