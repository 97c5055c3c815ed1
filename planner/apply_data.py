"""Data parallelism of an applied plan: DDP, ZeroRedundancyOptimizer or fully_shard, with the optimizer to it."""

from __future__ import annotations

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
        return model, workload.optimizer(_by_mesh(model))
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
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero: Any = ZeroRedundancyOptimizer
    return wrapped, zero(
        model.parameters(), optimizer_class=workload.optimizer, process_group=group, parameters_as_bucket_view=True
    )


def _by_mesh(model: nn.Module) -> list[Any]:
    """Parameters in one optimizer group per device mesh: fused optimizers cannot mix meshes in one call."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault(p.device_mesh.ndim if isinstance(p, DTensor) else 0, []).append(p)
    return next(iter(groups.values())) if len(groups) == 1 else [{"params": group} for group in groups.values()]
