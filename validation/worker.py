"""One rank of executed plans: `python -m validation.worker RANK WORLD_SIZE PARENT_PID`, started by validation.launch.

Reads one JSON task per line from stdin and answers with one JSON line each. It ends with its parent.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib
import io
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from opgraph.workload import Workload
from planner.apply import Step, apply
from planner.plan import ParallelPlan, plan_from_dict
from validation.measure import Measurement, Options, measurement, peak_of_steady_step, time_steps
from validation.verify import prove, share

c10d: Any = dist  # several of its public names are missing in its type stubs


def load(spec: str) -> Workload:
    """The workload of a model spec or of `module:function`."""
    module, _, function = spec.partition(":")
    if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        try:
            workload: Workload = getattr(importlib.import_module(module), function)()
            return workload
        except ModuleNotFoundError:
            pass
    from opgraph.models import load_workload

    return load_workload(spec)


def run_rank(spec: str, plan: ParallelPlan, rank: int, options: Options, store: Any, scratch: str) -> dict[str, Any]:
    """One plan on this rank, in a process group of its own: proof, memory, times."""
    cuda = options.backend == "nccl"
    local = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    workload = load(spec)
    limit = datetime.timedelta(seconds=options.timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=plan.world_size, timeout=limit
    )
    try:
        reply: dict[str, Any] = {}
        if options.prove:
            reply |= prove(plan, workload, spec, rank, device, options.seed, scratch)
            if reply["wrong"]:
                return reply
        return reply | _steps(plan, workload, rank, device, options, cuda)
    finally:
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """Drops what DTensor remembers of ops: it names their meshes, whose groups, with threads and sockets, stayed."""
    from torch.distributed.tensor import _redistribute, debug

    infos = getattr(_redistribute, "_gen_transform_infos", None)
    for clear in (
        getattr(debug, "_clear_sharding_prop_cache", None),
        getattr(infos, "cache_clear", None),
        getattr(_redistribute, "clear_redistribute_planner_cache", None),
    ):
        if clear is not None:  # they are private: another torch may lack them
            clear()
    gc.collect()


def _steps(
    plan: ParallelPlan, workload: Workload, rank: int, device: torch.device, options: Options, cuda: bool
) -> dict[str, Any]:
    reply: dict[str, Any] = {}
    if not (options.memory or options.measure or options.trace):
        return reply
    built: list[Step] = []
    data: list[Any] = []
    losses: list[Any] = []

    def build() -> Callable[[], Any]:
        torch.manual_seed(options.seed)
        step = apply(plan, workload, rank, device)
        inputs, targets = share(plan, workload, rank, device, options.seed)
        built.append(step)
        data.extend((inputs, targets))
        def once() -> None:
            loss = step.run(inputs, targets)
            if options.trace:  # a copy: the mean of some losses lies in a block as large as what it was taken of
                losses.append(None if loss is None else loss.clone())

        return once

    run: Any = None
    if options.measure:  # before the profiler: a step that was built under its dispatch mode stays slower
        run = build()
        reply |= time_steps(run, options, cuda)
    if options.memory:
        run = None
        built.clear()
        data.clear()
        run, reply["peak_bytes"] = peak_of_steady_step(build, cuda)
    run = run or build()
    if options.trace:
        from planner.dryrun import record_step, to_json

        if not (options.memory or options.measure):
            run()
            run()
        reply["trace"] = to_json(record_step(built[0], *data))
        reply["trace"]["losses"] = [None if loss is None else loss.item() for loss in losses]
    return reply


def run_inside(
    spec: str, plans: list[ParallelPlan], options: Options, progress: Callable[[Measurement], None]
) -> list[Measurement]:
    """The plans of torchrun's world size, on the ranks that torchrun started."""
    store, rank, size = next(iter(c10d.rendezvous("env://")))
    results = []
    scratch = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"parplan-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}")
    os.makedirs(scratch, exist_ok=True)
    for i, plan in enumerate(plans):
        if plan.world_size != size:
            reason = f"the plan needs {plan.world_size} ranks, torchrun started {size}"
            results.append(Measurement(plan, "failed", reason))
            continue
        reply = run_rank(spec, plan, rank, options, c10d.PrefixStore(f"parplan/{i}", store), scratch)
        exchange = c10d.PrefixStore(f"parplan/{i}/replies", store)
        exchange.set(str(rank), json.dumps(reply))
        results.append(measurement(plan, [json.loads(exchange.get(str(r))) for r in range(size)]))
        if rank == 0:
            progress(results[-1])
    return results


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    rank, size, parent = (int(a) for a in sys.argv[1:4])
    _die_with_parent(parent)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr; stdout carries only replies
    if isinstance(sys.stdout, io.TextIOWrapper):  # at once, so that what a failed rank printed is there with its error
        sys.stdout.reconfigure(line_buffering=True)
    tasks: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)  # the parent closed our stdin or is gone

    threading.Thread(target=read, daemon=True).start()
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # models of ours return views
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    while True:
        task = json.loads(tasks.get())
        try:
            plan, options = plan_from_dict(task["plan"]), Options(**task["options"])
            store = c10d.FileStore(task["store"], size)
            reply = run_rank(task["spec"], plan, rank, options, store, task["scratch"])
        except Exception as error:
            sentence = " ".join(str(error).split()) or "no message"
            traceback.print_exc()
            replies.write(json.dumps({"error": f"{type(error).__name__}: {sentence[:600]}"}) + "\n")
            replies.flush()
            time.sleep(1e6)  # stay, so that the peers do not fail before the parent has read who was first
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
