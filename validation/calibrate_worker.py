"""One rank of a calibration: `python -m validation.calibrate_worker JOB RANK`; writes JOB's result for that rank.

JOB is a JSON file (see `validation.calibrate`). The rank dies with its parent, which holds its standard input open.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from validation.anchor import Beat
    from validation.calibrate_record import Step


def die_with_parent() -> None:
    """Ends this process when its standard input closes."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    job_path, rank = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    job = json.loads(job_path.read_text())
    import torch
    import torch.distributed as dist

    from validation.environment import let_gloo_wait, without_denormals

    torch.set_num_threads(1)
    without_denormals()
    torch.manual_seed(rank)
    result: dict[str, Any] = {}
    store: Any = torch._C._distributed_c10d.FileStore(job["store"], job["ranks"])
    runtimes: dict[str, float] = {}
    if job.get("runtime"):
        from validation.anchor import make_anchor
        from validation.calibrate_runtime import measure_runtimes

        runtimes = measure_runtimes(make_anchor(time.thread_time))
    limit = datetime.timedelta(seconds=job["timeout"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"], timeout=limit)
    let_gloo_wait()
    try:
        if job.get("models") is not None:
            result |= measure_ops(job, rank)
            result["runtime"] = {key: anchors * result["reference"] for key, anchors in runtimes.items()}
        if job.get("kinds"):
            from validation.calibrate_gloo import measure_collectives, pair_seconds

            report(job, rank, "collectives", 0.0)
            result["collectives"] = measure_collectives(
                tuple(job["kinds"]), tuple(job["sizes"]), job["seconds_per_point"],
                result.get("reference", job.get("reference", 0.0)), job["collectives_until"],
            )  # fmt: skip
            result["pair_seconds"] = pair_seconds()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    target = job_path.parent / f"result-{job['ranks']}-{rank}"
    target.with_suffix(".part").write_bytes(pickle.dumps(result))
    os.replace(target.with_suffix(".part"), target)


def report(job: dict[str, Any], rank: int, what: str, fraction: float) -> None:
    """One line per step of progress, from rank 0, for the parent."""
    if rank == 0:
        print(json.dumps([what, fraction]), flush=True)


def together(go_on: bool) -> bool:
    """What rank 0 decides: clocks differ, and ranks that part wait for each other for ever."""
    import torch
    import torch.distributed as dist

    decision = torch.tensor([go_on])
    dist.broadcast(decision, 0)
    return bool(decision)


def measure_ops(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """The anchor alone on rank 0, then on every rank; then rounds over all models until the time is used.

    The machine's pace wanders by a third within a minute, so every step's times are divided by the anchor's beside it;
    "anchor" is what the anchor takes in processes of its own at the pace to which all times are brought.
    """
    import torch.distributed as dist

    from validation.anchor import make_beat
    from validation.calibrate_drawn import drawn, drawn_small
    from validation.calibrate_models import SOURCES
    from validation.calibrate_record import at_pace, medians, overhead, prepare, samples, workload_source
    from validation.environment import room_to_grow
    from validation.pace import usual_beat

    once = make_beat(time.thread_time)
    once()
    dist.barrier()
    solo = statistics.median(once().whole for _ in range(job["anchor"])) if rank == 0 else 0.0
    dist.barrier()
    loaded = statistics.median(once().whole for _ in range(job["anchor"]))
    chosen = [s for s in SOURCES if s.name in job["models"] or not (job["models"] or (s.large and not job.get("room")))]
    if job.get("drawn"):
        chosen = [drawn(number) for number in range(*job["drawn"])]
        chosen += [drawn_small(number) for number in range(*job["small"])]
    if job.get("workloads"):
        chosen = [workload_source(spec, batch) for spec, batch in job["workloads"]]
    steps = []
    for i, source in enumerate(chosen):
        report(job, rank, f"model {source.name}", 0.2 * i / len(chosen))
        steps.append(prepare(source))
    room_to_grow(job["ranks"])
    rounds, between = _rounds(job, rank, steps, once)
    reference = usual_beat([p for s in steps for p in s.paces])
    for step in steps:
        at_pace(step, reference)
    good = [s for s in steps if s.times and (any(s.plain) or job.get("drawn"))]
    return {
        "anchor_solo": solo, "anchor_loaded": loaded, "rounds": rounds,
        "anchor": reference.whole * between,
        "reference": reference.whole, "parts": reference._asdict(),
        "samples": samples(good), "overheads": [overhead(s) for s in good if any(s.plain)],
        "unrepeatable": [s.source.name for s in steps if not s.times],
        "steps": {s.source.name: list(zip(s.shapes, medians(s.times))) for s in good} if job.get("workloads") else {},
    }  # fmt: skip


def _rounds(job: dict[str, Any], rank: int, steps: Sequence[Step], once: Callable[[], Beat]) -> tuple[int, float]:
    """Rounds over all models until the time is used, each step with the anchor beside it (`Step.paces`). Whole steps,
    which only host overheads need, run in every second one; of drawn models only ops are asked, and nothing else runs.

    Returns the number of rounds, and on rank 0 the anchor in processes of its own over the anchor in this one (else 0).
    """
    import torch.distributed as dist

    from validation.anchor import Anchors, joined
    from validation.calibrate_record import time_ops, time_parts
    from validation.environment import available_cores

    drawn = bool(job.get("drawn"))
    anchors = Anchors(available_cores(), cpu_clock=True) if rank == 0 and not drawn else None
    shares: list[float] = []

    def quick() -> Beat:
        dist.barrier()  # virtual cores may share a physical one: anchors are alike only beside the others' anchors
        return joined(min, [once() for _ in range(3)])

    def pace() -> None:
        before = quick().whole
        dist.barrier()
        apart = anchors.seconds(job["anchor"]) if anchors is not None else 0.0
        shares.append(2 * apart / (before + quick().whole))

    began, rounds = time.time(), 0
    length = max(job["until"] - began, 1e-3)  # what starting ranks and building models has left of the budget
    while together(rounds < job["least_rounds"] or time.time() + (time.time() - began) / rounds / 2 < job["until"]):
        report(job, rank, f"round {rounds + 1}", 0.2 + 0.8 * min((time.time() - began) / length, 1.0))
        if not drawn:
            pace()
        last = quick()
        for i, step in enumerate(steps):
            time_ops(step)
            if rounds % 2 == 0 and not drawn:
                time_parts(step)
            # Five small steps take no longer than the anchor.
            now = last if step.source.micro > 1 and i % 5 else quick()
            step.paces.append(joined(statistics.fmean, [last, now]))
            last = now
        rounds += 1
    if drawn:
        return rounds, 0.0
    pace()
    if anchors is not None:
        anchors.close()
    return rounds, statistics.median(shares)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without the teardown of torch's threads, which has been seen to crash
