"""Data parallelism of an applied plan: DDP, ZeroRedundancyOptimizer or fully_shard, with the optimizer to it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from opgraph.workload import Workload
from planner.apply_mesh import along
from planner.apply_model import present
from planner.plan import ParallelPlan

TORCH_BUCKET_BYTES = 25 * 2**20


def data_parallel(
    plan: ParallelPlan, workload: Workload, model: nn.Module, mesh: DeviceMesh | None
) -> tuple[nn.Module, optim.Optimizer]:
    """The module that runs forward, and the optimizer."""
    if plan.dp == 1:
        return model, workload.optimizer(model.parameters())
    if plan.fully_sharded:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        frees = plan.data_parallel == "fsdp"
        pinned = torch.cuda.is_available() and along(mesh, "dp").device_type == "cuda"
        away = CPUOffloadPolicy(pin_memory=pinned) if "parameters" in plan.offload else OffloadPolicy()
        for path in present(model, plan.fsdp_units):
            fully_shard(
                model.get_submodule(path), mesh=along(mesh, "dp"), reshard_after_forward=frees, offload_policy=away
            )
        # torch frees no root after its forward
        fully_shard(model, mesh=along(mesh, "dp"), reshard_after_forward=False, offload_policy=away)
        return model, _by_mesh(workload.optimizer(model.parameters()))
    group = along(mesh, "dp").get_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            process_group=group,
            # torch closes the first bucket at 1 MiB only where no size is given, not where its default is given
            bucket_cap_mb=None if plan.bucket_bytes == TORCH_BUCKET_BYTES else plan.bucket_bytes / 2**20,
            broadcast_buffers=False,  # batch statistics do not read them; each rank keeps its own running averages
            init_sync=False,  # every rank built the same weights from the same seed
        )
    if plan.data_parallel == "ddp":
        return wrapped, workload.optimizer(model.parameters())
    return wrapped, _zero1(workload, list(model.parameters()), group)


def _zero1(workload: Workload, parameters: list[nn.Parameter], group: Any) -> optim.Optimizer:
    """ZeroRedundancyOptimizer around the workload's optimizer, which gets the rank's own part of the parameters as it
    expects them; one that makes several groups gives them, and is made of them again."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    whole = workload.optimizer(parameters)
    known = inspect.signature(type(whole).__init__).parameters
    defaults = {k: v for k, v in whole.defaults.items() if k in known}
    alone = len(whole.param_groups) == 1

    def own(groups: list[dict[str, Any]]) -> optim.Optimizer:
        if alone:
            return workload.optimizer([p for each in groups for p in each["params"]])
        made: optim.Optimizer = type(whole)(groups, **defaults)
        return made

    zero: Any = ZeroRedundancyOptimizer
    found: optim.Optimizer = zero(
        parameters if alone else whole.param_groups, optimizer_class=own, process_group=group,
        parameters_as_bucket_view=True,
    )  # fmt: skip
    return found


def _by_mesh(optimizer: optim.Optimizer) -> optim.Optimizer:
    """The optimizer with a group of its own for the parameters of each device mesh: fused ones cannot mix meshes in one
    call."""
    made = []
    for group in optimizer.param_groups:
        meshes: dict[int, list[nn.Parameter]] = {}
        for p in group["params"]:
            meshes.setdefault(p.device_mesh.ndim if isinstance(p, DTensor) else 0, []).append(p)
        made += [{**group, "params": params} for params in meshes.values()]
    optimizer.param_groups[:] = made
    return optimizer
