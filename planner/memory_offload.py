"""CPU offload of a traced step: which bytes leave the device, and what has to cross to the host for it.

Counted on the graph, before any plan divides it: a rank moves its share of parameters and its own activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opgraph.graph import OpGraph
from planner.stages import LOSS, within


@dataclass(frozen=True, slots=True)
class Offload:
    """Bytes of one step. device: no longer on the device at its fullest; host: on the host instead. to_host and
    to_device: copied each way."""

    device: int
    host: int
    to_host: int
    to_device: int

    def seconds(self, bandwidth: float, full_duplex: bool = True) -> float:
        """Time of the copies alone at `bandwidth` bytes/s in one direction; both directions at once where the link is
        full duplex, as PCIe and NVLink-C2C are. What overlaps with compute is for the schedule to say."""
        if bandwidth <= 0:
            raise ValueError(f"a host link of {bandwidth} bytes/s moves nothing; give its bandwidth in one direction")
        moved = max(self.to_host, self.to_device) if full_duplex else self.to_host + self.to_device
        return moved / bandwidth


def offload_optimizer(graph: OpGraph) -> Offload:
    """The optimizer's state lives on the host and is updated there: gradients go down, new parameters come up
    (ZeRO-Offload, Ren et al. 2021, figure 4). The host also keeps the parameters that it updates."""
    parameters = sum(t.bytes for t in graph.parameters.values())
    trained = {name for name, _ in graph.gradient_ops}
    moved = sum(t.bytes for name, t in graph.parameters.items() if name in trained)
    state = {t.storage: t.bytes for t in graph.tensors if t.role == "optimizer_state"}
    device = sum(state.values())
    return Offload(device=device, host=device + parameters, to_host=moved, to_device=moved)


def offload_activations(graph: OpGraph, modules: Iterable[str] = ("",)) -> Offload:
    """What the modules save for backward goes to the host when it is made and comes back before it is used, as
    `torch.autograd.graph.save_on_cpu` does it. device: an upper bound of what it frees, for the tensors of the ops that
    run at the time are back; the loss and what it reads stay."""
    paths = tuple(modules)
    last = max((op.id for op in graph.ops if op.phase == "forward"), default=-1)
    maker = {s.id: graph.ops[s.birth] for s in graph.storages if 0 <= s.birth <= last}
    backward = {graph.tensors[t].storage for op in graph.ops if op.phase == "backward" for t in op.inputs}
    saved = sum(
        s.bytes for s in graph.storages
        if s.id in maker and s.id in backward and s.death > last
        and maker[s.id].module != LOSS and any(within(maker[s.id].module, p) for p in paths)
    )  # fmt: skip
    return Offload(device=saved, host=saved, to_host=saved, to_device=saved)
