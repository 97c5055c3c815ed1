"""What the ranks run in: gloo's polling threads give way, the others do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from validation.environment import RANK_ENV

LATE = """
import json, os, threading, time
from validation import environment

def begin():  # as a thread of gloo does on a busy machine: it takes its name late
    time.sleep(0.2)
    open(f"/proc/self/task/{threading.get_native_id()}/comm", "w").write("gloo_tcp_loop")
    time.sleep(5)

late = threading.Thread(target=begin, daemon=True)
late.start()
environment.let_gloo_wait()
print(json.dumps([os.sched_getscheduler(late.native_id), os.sched_getscheduler(0)]), flush=True)
os._exit(0)
"""
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


@pytest.mark.executed
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux lets a thread run when nothing else wants to")
def test_a_polling_thread_that_bears_no_name_yet_is_waited_for():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [os.SCHED_IDLE, os.SCHED_OTHER]
