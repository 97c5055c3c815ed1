"""One rank of `validation.collective_local`: `python -m validation.collective_local_worker JOB RANK`.

Times every (kind, size) of JOB in two ways: as calibration does (what the call adds to a round of work,
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
    (CPU time of the calling thread), and the machine's load."""
    import torch.distributed as dist

    from validation.anchor import make_anchor
    from validation.calibrate_gloo import call_of, rounds_of

    anchor = make_anchor(time.thread_time)
    anchor()
    rows = []
    for how in job["how"]:
        for kind in job["kinds"]:
            for size in job["sizes"]:
                call = call_of(kind, size)
                for _ in range(WARM_UP):
                    call()
                dist.barrier()
                before = min(anchor() for _ in range(2))
                if how == "plain":
                    seconds = plain(call, job["repeats"])
                else:
                    seconds = [r.added for r in rounds_of(call, job["repeats"])]
                pace = (before + min(anchor() for _ in range(2))) / 2
                rows.append({
                    "kind": kind, "bytes": max(size // 4 // job["ranks"], 1) * job["ranks"] * 4, "how": how,
                    "seconds": seconds, "anchor": pace, "load": os.getloadavg()[0],
                })  # fmt: skip
    return rows


def plain(call: Any, repeats: int) -> list[float]:
    """Seconds of a call, `repeats` times: calls one after the other, and where one is under a millisecond the mean of
    five."""
    from validation.calibrate_worker import together

    start = time.perf_counter()
    call()
    group = 5 if together(time.perf_counter() - start < 1e-3) else 1  # as many calls on every rank
    marks = [time.perf_counter()]
    for _ in range(repeats):
        for _ in range(group):
            call()
        marks.append(time.perf_counter())
    return [float(x) for x in np.diff(marks) / group]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
