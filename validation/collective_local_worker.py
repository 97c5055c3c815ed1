"""One rank of `validation.collective_local`: `python -m validation.collective_local_worker JOB RANK`.

Times every (kind, size) of JOB in two ways: as calibration does (after a round of work,
`validation.calibrate_gloo`), and as nccl-tests does (calls one after the other). The anchor runs before and after each
point, so that both can be brought to one pace.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 3
POINT_SECONDS, MOST = 0.3, 200  # of measuring a point, and its most repetitions


def main() -> None:
    from validation.calibrate_worker import die_with_parent

    path, rank = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    job = json.loads(path.read_text())
    import torch
    import torch.distributed as dist

    from validation.environment import let_gloo_wait

    torch.set_num_threads(1)
    store: Any = torch._C._distributed_c10d.FileStore(job["store"], job["ranks"])
    limit = datetime.timedelta(seconds=job["timeout"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"], timeout=limit)
    let_gloo_wait()
    try:
        rows = measure(job)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    target = path.parent / f"result-{job['ranks']}-{rank}"
    target.with_suffix(".part").write_bytes(pickle.dumps(rows))
    os.replace(target.with_suffix(".part"), target)


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one rank: kind, bytes, how ("in place" or "plain"), seconds of every repetition, anchor seconds beside it
    (CPU time of the calling thread), and the machine's load. The job's "passes" go over all points."""
    from validation.anchor import make_anchor

    anchor = make_anchor(time.thread_time)
    anchor()
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for _ in range(job.get("passes", 1)):
        for how in job["how"]:
            for kind in job["kinds"]:
                for size in job["sizes"]:
                    before = min(anchor() for _ in range(2))
                    seconds = point(how, kind, size, job["repeats"])
                    pace = (before + min(anchor() for _ in range(2))) / 2
                    sent = max(size // 4 // job["ranks"], 1) * job["ranks"] * 4
                    row = {"kind": kind, "bytes": sent, "how": how, "seconds": [], "anchors": []}
                    row = rows.setdefault((how, kind, size), row)
                    row["seconds"] += seconds
                    row["anchors"].append(pace)
                    row["load"] = os.getloadavg()[0]
    return [row | {"anchor": sum(row["anchors"]) / len(row["anchors"])} for row in rows.values()]


def point(how: str, kind: str, size: int, least: int) -> list[float]:
    """Seconds of every repetition of one collective, `least` or more."""
    import torch.distributed as dist

    from validation.calibrate_gloo import call_of, rounds_of

    call = call_of(kind, size)
    for _ in range(WARM_UP):
        call()
    dist.barrier()
    if how == "in place":
        return [r.seconds for r in rounds_of(call, repeats_of(lambda: rounds_of(call, 1), least))]
    return plain(call, least)


def repeats_of(run: Any, least: int) -> int:
    """How often to repeat `run`: for POINT_SECONDS, at least `least` and at most MOST times. The same on all ranks."""
    import torch
    import torch.distributed as dist

    start = time.perf_counter()
    run()
    count = int(min(max(POINT_SECONDS / max(time.perf_counter() - start, 1e-6), least), MOST))
    agreed = torch.tensor([count])
    dist.broadcast(agreed, 0)
    return int(agreed)


def plain(call: Any, least: int) -> list[float]:
    """Seconds of a call, `least` times or more: calls one after the other."""
    count = repeats_of(call, least)
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        marks.append(time.perf_counter())
    return [float(x) for x in np.diff(marks)]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
