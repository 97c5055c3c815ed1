"""Loss scaling of an applied plan in fp16: as `torch.amp.GradScaler`, with one decision for all ranks.

Each rank unscales the gradients that it holds. Where ranks hold different ones (shards, tensor-parallel parts, stages),
a message of four bytes along each such axis tells all of them whether any has overflowed, as Megatron's does; torch's
own would skip on one stage alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from opgraph.scaling import FIRST_SCALE, next_scale, scaled, unscale
from planner.apply_mesh import along
from planner.plan import ParallelPlan
from planner.runtime_optimizer import scaling_axes


@dataclass(slots=True)
class LossScaler:
    """groups: process groups that agree, one after the other. steps: that the scale has held."""

    device: torch.device
    groups: tuple[Any, ...]
    scale: float = FIRST_SCALE
    steps: int = 0

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return scaled(loss, self.scale)

    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divides the gradients and says whether the optimizer may step. A collective call."""
        held: list[Any] = [p.grad for p in parameters if p.grad is not None]
        found = unscale([g.to_local() if isinstance(g, DTensor) else g for g in held], self.scale)
        found = torch.zeros((), device=self.device) if found is None else found.to(self.device)
        for group in self.groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        if isinstance(found, FakeTensor):  # a dry run's gradients have no values
            return True
        with _disable_current_modes():  # reading it is no op of the step to a recorder, as it is none in a dry run
            overflowed = bool(found.item())
        self.scale, self.steps = next_scale(self.scale, self.steps, overflowed)
        return not overflowed


def make_scaler(plan: ParallelPlan, device: torch.device, mesh: DeviceMesh | None) -> LossScaler | None:
    """The scaler of a plan in fp16; None for other precisions."""
    if plan.precision != "fp16":
        return None
    return LossScaler(device, tuple(along(mesh, axis).get_group() for axis in scaling_axes(plan)))
