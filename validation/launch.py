"""Runs plans on real process groups: one process per rank, kept alive over all plans of one world size."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planner.plan import ParallelPlan
from validation.environment import RANK_ENV
from validation.measure import Measurement, Options, failed, measurement

LOOK = 15.0  # seconds between two looks at ranks that have not answered
STUCK = 60.0  # seconds without any computing after which ranks are given up: they wait for each other
LINES = 40  # of what a failed rank wrote
ROOT = Path(__file__).resolve().parent.parent


def run_plans(
    spec: str,
    plans: Iterable[ParallelPlan],
    options: Options | None = None,
    progress: Callable[[Measurement], None] = lambda _: None,
    waiting: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Proves, then measures every plan with one process per rank; results in the order of `plans`.

    `spec` is a model spec of `opgraph.models.load_workload`, or `module:function` of an importable function that
    returns a Workload. A plan whose ranks die, raise, hang or disagree with the single-device step is reported as
    failed, and the next one runs in fresh processes. `waiting` is told of a plan that takes long. Under torchrun every
    rank calls this and the plans of its world size run inside; all ranks get the results.
    """
    options = options or Options()
    plans = list(plans)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from validation.worker import run_inside

        return run_inside(spec, plans, options, progress)
    results: dict[int, Measurement] = {}
    with tempfile.TemporaryDirectory(prefix="parplan-") as scratch:
        world: World | None = None
        try:
            for i in sorted(range(len(plans)), key=lambda i: plans[i].world_size):
                if world is not None and world.size != plans[i].world_size:
                    world.stop()
                    world = None
                if world is None:
                    world = World(plans[i].world_size, spec, options, scratch, waiting)
                results[i] = world.run(plans[i])
                progress(results[i])
                if not world.usable:
                    world.stop()
                    world = None
        finally:
            if world is not None:
                world.stop()
    return [results[i] for i in range(len(plans))]


@dataclass(slots=True)
class Idle:
    """How long processes have computed nothing, as asked from time to time."""

    pids: tuple[int, ...]
    since: float
    spent: float = 0.0

    def seconds(self, now: float) -> float:
        import psutil

        spent = 0.0
        for pid in self.pids:
            with contextlib.suppress(psutil.Error):
                spent += sum(psutil.Process(pid).cpu_times()[:2])
        if spent > self.spent + 0.01 * (now - self.since) * len(self.pids):
            self.since, self.spent = now, spent
        return now - self.since


@dataclass(slots=True)
class World:
    """The processes of one world size. `usable` is False once a rank failed: its peers may hang in a collective."""

    size: int
    spec: str
    options: Options
    scratch: str
    waiting: Callable[[str], None] = lambda _: None
    usable: bool = True
    _ranks: list[subprocess.Popen[str]] = field(default_factory=list)
    _replies: queue.Queue[tuple[int, dict[str, Any] | None]] = field(default_factory=queue.Queue)
    _runs: int = 0
    _written: list[int] = field(default_factory=list)  # bytes of each rank's log before the present plan

    def __post_init__(self) -> None:
        environment = {**os.environ, **RANK_ENV}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH")))
        )
        for rank in range(self.size):
            with open(self._log(rank), "wb") as log:  # libraries log pages in every rank; a failed one's are shown
                process = subprocess.Popen(
                    [sys.executable, "-m", "validation.worker", str(rank), str(self.size), str(os.getpid())],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            self._ranks.append(process)
            threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def run(self, plan: ParallelPlan) -> Measurement:
        """One plan on all ranks."""
        self._runs += 1
        store = os.path.join(self.scratch, f"store-{self.size}-{self._runs}-{time.monotonic_ns()}")
        task = {"spec": self.spec, "plan": plan.to_dict(), "options": asdict(self.options), "store": store}
        task["scratch"] = self.scratch
        self._written = [os.path.getsize(self._log(rank)) for rank in range(self.size)]
        for process in self._ranks:
            with contextlib.suppress(OSError):  # the rank is dead; _collect hears it from the reader thread
                assert process.stdin is not None
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
        replies, reason = self._collect(plan)
        if reason:
            self.usable = False
            return failed(plan, reason)
        return measurement(plan, [replies[rank] for rank in range(self.size)])

    def _collect(self, plan: ParallelPlan) -> tuple[dict[int, dict[str, Any]], str]:
        began = time.monotonic()
        deadline = began + self.options.timeout_seconds
        replies: dict[int, dict[str, Any]] = {}
        idle = Idle(tuple(p.pid for p in self._ranks), began)
        while len(replies) < self.size:
            now = time.monotonic()
            try:
                rank, reply = self._replies.get(timeout=max(0.0, min(LOOK, deadline - now)))
            except queue.Empty:
                now = time.monotonic()
                silent = ", ".join(str(r) for r in range(self.size) if r not in replies)
                if now >= deadline:
                    return {}, f"rank(s) {silent} did not finish within {self.options.timeout_seconds:g} s"
                if (still := idle.seconds(now)) > STUCK:
                    return {}, (
                        f"rank(s) {silent} computed nothing for {still:.0f} s: they wait for each other, as ranks do "
                        "that run different operators"
                    )
                where = f"{plan.label} on {plan.world_size}"
                self.waiting(
                    f"waiting for rank(s) {silent} of {where} for {now - began:.0f} s (killed after "
                    f"{self.options.timeout_seconds:g} s)"
                )
                continue
            if reply is None:
                return {}, self._said(rank, self._obituary(rank))
            if "error" in reply:
                time.sleep(0.5)  # a lost connection is what the peers of a dead rank raise: look for the dead one
                dead = [r for r, process in enumerate(self._ranks) if process.poll() is not None]
                if dead:
                    return {}, self._said(dead[0], self._obituary(dead[0]))
                return {}, self._said(rank, f"rank {rank} raised {reply['error']}")
            replies[rank] = reply
        return replies, ""

    def _log(self, rank: int) -> str:
        return os.path.join(self.scratch, f"rank-{self.size}-{rank}.log")

    def _said(self, rank: int, reason: str) -> str:
        """Shows on stderr what a rank wrote there during the plan that failed; returns the reason."""
        with open(self._log(rank), errors="replace") as log:
            log.seek(self._written[rank])
            sys.stderr.write("".join(log.readlines()[-LINES:]))
        return reason

    def _obituary(self, rank: int) -> str:
        code = self._ranks[rank].wait()
        return f"rank {rank} died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def _listen(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._replies.put((rank, json.loads(line)))
        self._replies.put((rank, None))

    def stop(self) -> None:
        """Kills every rank and waits for it."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
