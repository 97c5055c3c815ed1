"""The host thread in the op-by-op lowering: what it pays for each item of a script, and when a rank must wait for it.

On GPUs the host issues what the device runs; NCCL messages and the waits for them are issued like kernels, so nothing
in a step stops the host thread, and when it issues what follows from the script alone. A rank waits for it where the
work issued so far could not have kept the device busy until then (`planner.host_queue`). The seconds are those of
`planner.software` (current torch), the same that the folded lowering takes. On CPUs the calibrated ops contain them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from costmodels.cluster import Cluster
from costmodels.device import Device
from costmodels.families import FREE, family
from planner.host_queue import EMPTY, Run, run_of
from planner.script import Copy, Host, Item, Message, Transfer, Work
from planner.software import HOST, HostCosts
from simulator import ProgramBuilder

# Nine in ten of the hosts that `planner.software` assumes lie within 8 to 20 us an op around 14: 43 %, in standard
# deviations of a normal distribution. ASSUMPTION, as the range is.
HOST_ERROR = 0.43 / 1.645
# Seconds of a compiled region's guards and its call: ASSUMPTION (range 10 to 100 us, by the number of inputs).
GUARDS = 30e-6
# Kinds of host work to the keys of `Device.host` under which a calibration of a GPU machine keeps their seconds.
MEASURED = {"op": "launch_op", "backward": "launch_backward", "view": "launch_view", "module": "launch_module"}
WORTH_A_NOTE = 0.02  # share of a step
CLOSE = 1e-12  # s; what two sums of the same seconds in another order may differ by


@dataclass(frozen=True, slots=True)
class Running:
    """How torch runs a step: op by op, or, as an option of a prediction, replayed from CUDA graphs, which take the host
    thread off the step, or compiled (`planner.compiled`). autograd: the forward records what backward needs, which
    inference does not."""

    cuda_graphs: bool = False
    autograd: bool = True
    compiled: bool = False


EAGER = Running()


def eager_costs(device: Device) -> HostCosts:
    """What eager torch pays on the host of this device: as measured there (`MEASURED`), else as assumed."""
    found = {kind: device.host[key] for kind, key in MEASURED.items() if key in device.host}
    return replace(HOST["torch"], **found)


def host_costs(cluster: Cluster, running: Running = EAGER) -> HostCosts | None:
    """What the host thread of a rank pays; None where prices of ops contain it (CPUs and calibrated devices), where
    CUDA graphs are replayed, and for accelerators whose software builds graphs of steps (TPUs) or is unknown."""
    device = cluster.device
    if device.kind != "gpu" or "op_forward" in device.host or running.cuda_graphs:
        return None
    if running.compiled:
        return HOST["static graph"]
    costs = eager_costs(device)
    # An op's autograd node costs about what the op itself does (`planner.software.HOST`).
    return costs if running.autograd else replace(costs, op=costs.op / 2)


def assumptions(running: Running) -> tuple[str, ...]:
    """The options of a prediction, by name."""
    return ("torch.compile",) * running.compiled + ("CUDA graphs",) * running.cuda_graphs


def host_notes(share: float, costs: HostCosts | None) -> tuple[str, ...]:
    """What a report must say where waiting for the host takes this share of a step."""
    if share < WORTH_A_NOTE or costs is None:
        return ()
    return (
        f"{share:.0%} of the time waits for the host thread, whose speed is an assumption: {costs.op * 1e6:g} us an "
        f"op, {costs.backward * 1e6:g} us in backward (range 0.6 to 1.4 times that)",
    )


def item_seconds(costs: HostCosts, item: Item, module: str) -> float:
    """Host seconds of one item of a script, after work of `module`.

    Of what runtimes add in Python, checkpoints have a published count (`software.HOST`); hooks of DDP, FSDP and DTensor
    have none, so that only the kernels and messages that they issue are paid for.
    """
    if isinstance(item, Message | Transfer):
        return costs.message
    if isinstance(item, Copy):
        return costs.op
    if isinstance(item, Host):
        by_kind = {"checkpoint_backward": costs.checkpoint, "compiled_region": GUARDS}
        return by_kind.get(item.kind, 0.0) * item.count
    if not isinstance(item, Work):
        return 0.0
    enters = item.phase != "optimizer" and item.module != module
    return op_seconds(costs, item.shape.name, item.phase, item.is_view) + (costs.module if enters else 0.0)


def op_seconds(costs: HostCosts, name: str, phase: str, is_view: bool) -> float:
    """Host seconds of one op: a view launches nothing, the backward runs without Python."""
    kind = family(name)
    if is_view or kind in FREE:
        return costs.view if is_view or kind == "view" else 0.0
    return costs.backward if phase == "backward" else costs.op


@dataclass(slots=True)
class Issued:
    """The items of a block of work: host seconds before each, and device seconds (0: nothing is launched)."""

    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def run(self, slowed: float = 1.0) -> Run:
        """The run of all items, `slowed` times as long on the device."""
        return run_of(np.array(self.host), slowed * np.array(self.device)) if self.host else EMPTY


@dataclass(slots=True)
class HostThread:
    """The host thread of one rank while its tasks are made.

    issued: host seconds of the script so far. reached: the rank's device is not free before, whatever else happens.
    task: the last task of the thread, which ends at `at`.
    """

    tasks: ProgramBuilder
    rank: int
    resource: int
    issued: float = 0.0
    reached: float = 0.0
    at: float = 0.0
    task: int = -1

    def after(self, kernels: int, run: Run, label: str) -> int:
        """The task after which a block is done: `kernels`, or a join with the host where it may be late. Adds `run` to
        what is issued. No join is made where the rank's own work takes longer than the host in any case."""
        own, late = self.reached + run.device, self.issued + run.tail
        if late <= own + CLOSE:
            self.issued, self.reached = self.issued + run.host, own
            return kernels
        self._catch_up()
        last = self.task
        if run.tail > 0:
            waits = [last] if last >= 0 else []
            last = self.tasks.task(f"host issues {label}", "host", run.tail, -1, waits, 0.0)
        self.issued, self.reached = self.issued + run.host, late
        return self._join(kernels, last, label)

    def message(self, last: int) -> int:
        """The task after which a message that the host has just issued may begin."""
        if self.issued <= self.reached + CLOSE:
            return last
        self._catch_up()
        self.reached = self.issued
        return self._join(last, self.task, "message")

    def _catch_up(self) -> None:
        """Brings the thread's own tasks to what is issued."""
        if self.issued > self.at:
            waits = [self.task] if self.task >= 0 else []
            self.task = self.tasks.task("host", "host", self.issued - self.at, self.resource, waits, 0.0)
            self.at = self.issued

    def _join(self, own: int, host: int, label: str) -> int:
        waits = [t for t in (own, host) if t >= 0]
        return self.tasks.task(f"{label} waits for host", "host", 0.0, -1, waits, 0.0, self.rank)
