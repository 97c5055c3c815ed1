"""What the ranks run in: gloo's polling threads give way, the others do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from validation.environment import RANK_ENV

RANK = """
import json, os, sys
import torch.distributed as dist
from validation.environment import let_gloo_wait
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
let_gloo_wait()
threads = [int(t) for t in os.listdir("/proc/self/task")]
names = {t: open(f"/proc/self/task/{t}/comm").read().strip() for t in threads}
print(json.dumps([[names[t], os.sched_getscheduler(t)] for t in threads]), flush=True)
os._exit(0)
"""


@pytest.mark.executed
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux lets a thread run when nothing else wants to")
def test_only_the_polling_threads_of_gloo_give_way(tmp_path):
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **RANK_ENV})
    found = json.loads(done.stdout)
    polling = [policy for name, policy in found if name.startswith("gloo_tcp_loop")]
    assert polling and set(polling) == {os.SCHED_IDLE}
    assert {policy for name, policy in found if not name.startswith("gloo_tcp_loop")} == {os.SCHED_OTHER}
