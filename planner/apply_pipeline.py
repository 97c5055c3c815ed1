"""Pipeline parallelism of an applied plan: torch's stage and schedule, and weights that several stages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from opgraph.workload import Workload
from planner.apply_mesh import along
from planner.apply_model import casting
from planner.apply_scaling import LossScaler
from planner.plan import ParallelPlan
from planner.split import Split, StageModule


def make_schedule(
    plan: ParallelPlan,
    workload: Workload,
    wrapped: nn.Module,
    whole: Split | None,
    rank: int,
    device: torch.device,
    mesh: DeviceMesh | None,
    scaler: LossScaler | None = None,
) -> Any:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    assert whole is not None
    index = plan.coordinates(rank)["pp"]
    program = whole.stages[index]
    last = index == plan.pp - 1
    made = [torch.empty(1, device="meta") for _ in range(program.outputs)]  # nobody receives them: their number counts
    stage = PipelineStage(
        wrapped,
        index,
        plan.pp,
        device,
        input_args=tuple(_meta(whole, v) for v in program.receives),
        output_args=tuple(made) if last else tuple(_meta(whole, v) for v in program.sends),
        group=along(mesh, "pp").get_group(),
    )
    model: Any = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped

    def loss(output: Any, targets: tuple[Any, ...]) -> torch.Tensor:
        with casting(plan, device):
            value = workload.loss(model.unflatten(output), *targets)
            value = value / plan.micro_batches if plan.micro_batches > 1 else value
        return scaler.scaled(value) if scaler else value

    make: Callable[..., Any] = ScheduleGPipe if plan.schedule == "gpipe" else Schedule1F1B
    return make(stage, plan.micro_batches, loss_fn=loss, scale_grads=False)


def _meta(whole: Split, value: int) -> torch.Tensor:
    info = whole.values[value]
    with _disable_current_modes():
        meta = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device="meta")
    return meta.requires_grad_(info.requires_grad)


def tied_parameters(
    plan: ParallelPlan, whole: Split, model: nn.Module, rank: int, mesh: DeviceMesh | None
) -> tuple[tuple[Any, tuple[nn.Parameter, ...]], ...]:
    """Process groups of the stages that share parameters, with this rank's copies of these parameters."""
    assert isinstance(model, StageModule)
    by_name = {first: model.get_parameter(name) for name, first in model.original_fqn.items()}
    at = plan.coordinates(rank)
    found = []
    with _disable_current_modes():
        for stages in sorted({stages for _, stages in whole.shared_parameters}):
            group = None
            if len(stages) == plan.pp:
                group = along(mesh, "pp").get_group()
            else:
                for first in range(plan.dp * plan.tp):  # new_group is collective: every rank makes every group
                    ranks = [first + stage * plan.dp * plan.tp for stage in stages]
                    made = dist.new_group(ranks)
                    group = made if rank in ranks else group
            names = [name for name, used in whole.shared_parameters if used == stages]
            if at["pp"] in stages:
                found.append((group, tuple(by_name[name] for name in names)))
    return tuple(found)
