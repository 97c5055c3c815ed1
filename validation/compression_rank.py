"""One rank of `validation.compression_runs`: `python -m validation.compression_rank RANK SIZE STORE`, one JSON task on
stdin, one JSON reply for each compression on stdout."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from costmodels.compression import Compression, Message, compression_from
from planner.apply import Step, apply
from planner.plan import ParallelPlan, plan_from_dict
from validation.compression_hooks import hook_of, kept_bytes, recorded, silent
from validation.measure import Options, time_steps
from validation.verify import share
from validation.worker import load

CODEC_STEPS = 9  # steps whose hooks send nothing, to time encoding and decoding
SEED = 0


def run(spec: str, plan: ParallelPlan, compression: Compression, rank: int, timed: bool) -> dict[str, Any]:
    """Messages of one step and memory of its hook; with `timed` also seconds of steps and of silent hooks."""
    workload = load(spec)
    torch.manual_seed(SEED)
    step = apply(plan, workload, rank, torch.device("cpu"))
    wrapped: Any = step.wrapped
    state, hook = hook_of(compression)
    spent: list[float] = []

    def watched(state: Any, bucket: Any) -> Any:
        start = time.perf_counter()
        found = hook(state, bucket)
        spent.append(time.perf_counter() - start)
        return found

    watched.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}  # type: ignore[attr-defined]
    wrapped.register_comm_hook(state, watched)
    inputs, targets = share(plan, workload, rank, torch.device("cpu"), SEED)
    losses = [float(step.run(inputs, targets)) for _ in range(4)]  # type: ignore[arg-type]
    messages: list[Message] = []
    with recorded(messages):
        losses.append(float(step.run(inputs, targets)))  # type: ignore[arg-type]
    reply: dict[str, Any] = {
        "compression": compression.name, "messages": [asdict(m) for m in messages], "kept_bytes": kept_bytes(state),
        "losses": losses,
    }  # fmt: skip
    if timed:
        reply |= time_steps(lambda: step.run(inputs, targets), Options(min_steps=20, max_seconds=8.0), cuda=False)
        reply["codec"] = _codec(step, inputs, targets, spent)
    return reply


def _codec(step: Step, inputs: Any, targets: Any, spent: list[float]) -> float:
    """Median seconds a step of its hooks when nothing is sent, on the slowest rank."""
    steps: list[float] = []
    with silent():
        for _ in range(CODEC_STEPS):
            spent.clear()
            step.run(inputs, targets)
            steps.append(sum(spent))
    mine = torch.tensor([statistics.median(steps)], dtype=torch.float64)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return float(mine)


def main() -> None:
    rank, size, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    store = dist.FileStore(where, size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    plan = plan_from_dict(task["plan"])
    try:
        for name in task["compressions"]:
            reply = run(task["spec"], plan, compression_from(name), rank, task["timed"])
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    except BaseException:  # the other ranks would wait for this one for ever
        traceback.print_exc()
        os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of hooks that gloo called may still be alive, and an orderly exit would abort on them
