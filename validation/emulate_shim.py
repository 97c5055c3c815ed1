"""A torch.distributed backend over gloo that makes every message late, and keeps a log: latency where the kernel has no
netem. It delays a collective by the latencies on its longest chain of messages, so it shows that runs and predictions
agree on latency; how gloo itself would behave under a true delay of each packet it does not show.
"""

from __future__ import annotations

# torch's stubs leave out most of what Python backends need.
# mypy: disable-error-code="misc, name-defined, call-arg, override, attr-defined, assignment"
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from validation.emulate_predict import hops

NAME = "parplan_late_gloo"


@dataclass(frozen=True, slots=True)
class Message:
    """One collective as the backend saw it: bytes of the largest buffer, seconds of `time.perf_counter`."""

    kind: str
    bytes: int
    issued: float


class LateWork(dist._Work):
    """Done `delay` seconds after the work that it wraps; waiting for it waits for both."""

    def __init__(self, inner: Any, delay: float) -> None:
        super().__init__()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._inner = inner
        threading.Thread(target=self._follow, args=(delay,), daemon=True).start()

    def _follow(self, delay: float) -> None:
        try:
            self._inner.wait()
            time.sleep(delay)
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._done.wait(timeout.total_seconds() or None):
            raise RuntimeError(f"a late message was not there after {timeout}")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def get_future(self) -> Any:
        return self._inner.get_future()


@dataclass(slots=True)
class Log:
    """What this process sent, in order."""

    messages: list[Message] = field(default_factory=list)


LOG = Log()


class LateGloo(dist.ProcessGroup):
    """gloo, each message late by `latency` seconds. A receive is late, a send is not: its bytes leave at once."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, latency: float) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._latency = latency
        self._name = ""

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _late(self, kind: str, work: Any, tensors: Any) -> LateWork:
        LOG.messages.append(Message(kind, _largest(tensors), time.perf_counter()))
        return LateWork(work, 0.0 if kind == "send" else hops(kind, self.size()) * self._latency)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._late("all_reduce", self._gloo.allreduce(tensors, opts or dist.AllreduceOptions()), tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._late("broadcast", self._gloo.broadcast(tensors, opts or dist.BroadcastOptions()), tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        work = self._gloo.allgather(outputs, inputs, opts or dist.AllgatherOptions())
        return self._late("all_gather", work, outputs)

    def _allgather_base(self, output: Any, source: Any, opts: Any = None) -> Any:
        work = self._gloo._allgather_base(output, source, opts or dist.AllgatherOptions())
        return self._late("all_gather", work, output)

    def _reduce_scatter_base(self, output: Any, source: Any, opts: Any = None) -> Any:
        work = self._gloo._reduce_scatter_base(output, source, opts or dist.ReduceScatterOptions())
        return self._late("reduce_scatter", work, source)

    def alltoall_base(self, output: Any, source: Any, out_sizes: Any, in_sizes: Any, opts: Any = None) -> Any:
        work = self._gloo.alltoall_base(output, source, out_sizes, in_sizes, opts or dist.AllToAllOptions())
        return self._late("all_to_all", work, output)

    def barrier(self, opts: Any = None) -> Any:
        return self._late("barrier", self._gloo.barrier(opts or dist.BarrierOptions()), ())

    def send(self, tensors: Any, peer: int, tag: int = 0) -> Any:
        return self._late("send", self._gloo.send(tensors, peer, tag), tensors)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> Any:
        return self._late("recv", self._gloo.recv(tensors, peer, tag), tensors)

    # Names of torch 2.13.
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base


def _largest(tensors: Any) -> int:
    if hasattr(tensors, "numel"):
        return int(tensors.numel() * tensors.element_size())
    return max((_largest(t) for t in tensors), default=0)


def register(latency: float) -> str:
    """Registers the backend for this process; returns the name to give to `init_process_group`."""

    def make(store: Any, rank: int, size: int, timeout: timedelta) -> LateGloo:
        return LateGloo(store, rank, size, timeout, latency)

    dist.Backend.register_backend(NAME, make, devices=["cpu"])
    return NAME
