"""One stage of a folded step's program: its device, its host thread and its queue of messages."""

from __future__ import annotations

from collections.abc import Sequence

from planner.host_queue import Run
from simulator import ProgramBuilder

LIGHT_HOST = 0.8  # a host that needs less than this share of the device's time runs ahead of it and is left out


class Lane:
    """The tasks of one stage, one after the other."""

    def __init__(self, tasks: ProgramBuilder, stage: int) -> None:
        self.tasks, self.stage = tasks, stage
        self.device = tasks.resource(f"stage {stage} device", rank=stage)
        self.queue = tasks.resource(f"stage {stage} messages", rank=stage, kind="communication")
        self.free = -1  # task after which the device is free
        self.host = -1  # task after which the host thread is free
        # Of messages under way: share of the time that kernels lose, seconds left, task.
        self.beside: list[list[float]] = []

    def run(self, label: str, category: str, run: Run, waits: Sequence[int] = (), synced: bool = False) -> int:
        """A run of kernels, longer by what it loses beside messages under way; `synced`: the host waits for the device
        before it issues the first one."""
        self.free = self._issued(label, category, run, waits, synced)
        if self.beside:
            self.busy("slowed", category, self._lost(run.device))
        return self.free

    def _issued(self, label: str, category: str, run: Run, waits: Sequence[int], synced: bool) -> int:
        deps = [t for t in (self.free, *waits) if t >= 0]
        if synced:
            self.host = self.tasks.task(label, category, max(run.alone, 0.0), self.device, deps)
            return self.host
        kernels = self.tasks.task(label, category, run.device, self.device, deps)
        if run.host < LIGHT_HOST * run.device:
            return kernels
        issued = [self.host] if self.host >= 0 else []
        tail = self.tasks.task(f"{label} issued", "host", max(run.tail, 0.0), -1, issued, 0.0)
        self.host = self.tasks.task(f"{label} host", "host", run.host, -1, issued, 0.0)
        return self.tasks.task(f"{label} done", "host", 0.0, -1, [kernels, tail], 0.0, self.stage)

    def _lost(self, seconds: float) -> float:
        """How much longer kernels of so many seconds take beside the messages under way, which pass meanwhile."""
        more = 0.0
        while seconds > 0 and self.beside:
            share, left, _ = self.beside[0]
            both = min(left, seconds / (1 - share))
            more += share * both
            seconds -= (1 - share) * both
            self.beside[0][1] = left - both
            if both == left:
                self.beside.pop(0)
        return more

    def busy(self, label: str, category: str, seconds: float, waits: Sequence[int] = ()) -> int:
        """Device seconds that no host thread limits."""
        deps = [t for t in (self.free, *waits) if t >= 0]
        self.free = self.tasks.task(label, category, seconds, self.device, deps)
        return self.free

    def message(self, label: str, kind: str, seconds: float, after: Sequence[int] = (), lost: float = 0.0) -> int:
        """A message beside the device's work. lost: share of its time that kernels which run meanwhile lose."""
        task = self.tasks.task(label, kind, seconds, self.queue, [t for t in after if t >= 0])
        if lost > 0:
            self.beside.append([lost, seconds, task])
        return task

    def arrived(self, task: int) -> int:
        """What comes next waits for this message, so neither it nor those before it run beside that."""
        while self.beside and self.beside[0][2] <= task:
            self.beside.pop(0)
        return task
