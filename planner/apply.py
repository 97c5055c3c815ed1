"""Turns a `ParallelPlan` into an executable training step with torch's own runtimes.

The same code runs for real (gloo, NCCL) and in the dry run (fake tensors, fake process group).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from opgraph.workload import Workload
from planner.apply_data import data_parallel
from planner.apply_mesh import along, make_mesh
from planner.apply_model import AUTOCAST, casting, check_paths, local_module, recompute, rounding, shard_tensor_parallel
from planner.apply_pipeline import make_schedule, tied_parameters
from planner.apply_scaling import LossScaler, make_scaler
from planner.plan import ParallelPlan, check_executable
from planner.split import Split, StageModule, split


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's executable training step.

    model: this rank's module (the whole model, or its `StageModule`); wrapped: the same inside DDP, if any.
    schedule: torch's pipeline schedule (None where pp == 1). tied: process groups with the parameters whose
    gradients are summed over them (weights that several pipeline stages share). names: parameter name in `model` ->
    its first name in the whole model. placements: of the tensor-parallel parameters that are kept as local tensors.
    scaler: of the loss, in fp16.
    """

    plan: ParallelPlan
    workload: Workload
    rank: int
    device: torch.device
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    tied: tuple[tuple[Any, tuple[nn.Parameter, ...]], ...]
    mesh: DeviceMesh | None
    names: dict[str, str]
    placements: dict[str, Any]
    scaler: LossScaler | None = None

    def run(self, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> torch.Tensor | None:
        """Forward, backward, optimizer step and gradients set to None, on this dp rank's share of the global batch.

        Returns the mean loss over the share (on the last pipeline stage; None on the others).
        """
        loss = self.backward_only(inputs, targets)
        self.update()
        return loss

    def update(self) -> None:
        """Optimizer step (none where loss scaling has overflowed on any rank), then gradients to None."""
        if self.scaler is None or self.scaler.unscale(self.model.parameters()):
            self.optimizer.step()
        self.wrapped.zero_grad(set_to_none=True)

    def backward_only(self, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> torch.Tensor | None:
        """Forward and backward with every gradient reduction, no optimizer step."""
        pieces = list(zip(_pieces(inputs, self.plan.micro_batches), _pieces(targets, self.plan.micro_batches)))
        with rounding(self.plan, self.device):
            if self.schedule is not None:
                loss = self._pipelined([p[0] for p in pieces], [p[1] for p in pieces])
            else:
                loss = self._accumulated(pieces)
        for group, parameters in self.tied:
            for p in parameters:
                if p.grad is not None:
                    dist.all_reduce(_local(p.grad), group=group)
        return loss

    def named_gradients(self) -> dict[str, torch.Tensor]:
        """First name in the whole model -> full gradient: gathered over tp and fsdp shards, averaged over dp, unscaled.

        A collective call: every rank of the plan must make it.
        """
        full = {}
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            grad = p.grad.detach()
            if name in self.placements:
                grad = DTensor.from_local(grad, along(self.mesh, "tp"), self.placements[name], run_check=False)
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            full[self.names[name]] = grad / self.scaler.scale if self.scaler else grad
        return full

    def _accumulated(self, pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> torch.Tensor:
        total: Any = None
        for i, (inputs, targets) in enumerate(pieces):
            with self._synchronising(i == len(pieces) - 1):
                with casting(self.plan, self.device):
                    loss = self.workload.loss(self.wrapped(*inputs), *targets)
                    loss = loss / len(pieces) if len(pieces) > 1 else loss
                (self.scaler.scaled(loss) if self.scaler else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
        return total

    def _synchronising(self, last: bool) -> Any:
        if self.plan.micro_batches == 1 or self.plan.dp == 1:
            return nullcontext()
        if self.plan.fully_sharded:
            model: Any = self.model
            model.set_requires_gradient_sync(last)
            if self.plan.data_parallel == "zero2":
                model.set_reshard_after_backward(last)
            return nullcontext()
        return nullcontext() if last else self.wrapped.no_sync()  # type: ignore[operator]

    def _pipelined(self, inputs: list[Any], targets: list[Any]) -> torch.Tensor | None:
        stage = self.schedule._stage
        stage.has_backward = True
        stage.clear_runtime_states()
        losses: list[torch.Tensor] = []
        # step() would take whole batches and a single target tensor only; this is what it does with them
        self.schedule._step_microbatches(
            inputs if stage.is_first else [()] * len(inputs), None, targets, losses, return_outputs=False
        )
        if not stage.is_last:
            return None
        total = torch.stack([loss.detach() for loss in losses]).sum()
        return total / self.scaler.scale if self.scaler else total


def apply(
    plan: ParallelPlan,
    workload: Workload,
    rank: int,
    device: str | torch.device = "cpu",
    materialize: bool = True,
) -> Step:
    """Builds rank `rank`'s part of the plan; the default process group must exist where world_size > 1.

    Weights are what `workload.build()` makes under the caller's seed, which must be the same on all ranks.
    `materialize=False` allocates no weights: the module is built on meta and its tensors are made empty under
    whatever mode is active (the dry run's FakeTensorMode). A collective call.
    """
    check_executable(plan)
    device = torch.device(device)
    check(plan)
    # fully_shard takes a model from the host unit by unit, so that it need never fit on the device
    home = torch.device("cpu") if "parameters" in plan.offload and plan.tp == 1 else device
    model, whole = _module(plan, workload, rank, home, materialize)
    with _disable_current_modes():
        mesh = make_mesh(plan, device)
    names = dict(model.original_fqn) if isinstance(model, StageModule) else {n: n for n, _ in model.named_parameters()}
    placements: dict[str, Any] = {}
    if plan.tp > 1:
        shard_tensor_parallel(model, plan, along(mesh, "tp"))
        if not plan.fully_sharded:
            placements = local_module(model, along(mesh, "tp"))
    recompute(model, plan, plan.coordinates(rank)["pp"])
    wrapped, optimizer = data_parallel(plan, workload, model, mesh)
    scaler = make_scaler(plan, device, mesh)
    schedule = make_schedule(plan, workload, wrapped, whole, rank, device, mesh, scaler) if plan.pp > 1 else None
    tied = tied_parameters(plan, whole, model, rank, mesh) if whole is not None else ()
    return Step(
        plan, workload, rank, device, model, wrapped, optimizer, schedule, tied, mesh, names, placements, scaler
    )  # fmt: skip


def check(plan: ParallelPlan) -> None:
    """ValueError for what torch's runtimes cannot execute."""
    if unknown := [kind for kind in plan.offload if kind != "parameters"]:
        raise ValueError(
            f"torch has no runtime that keeps {' and '.join(unknown)} alone on the host beside compute: such a plan is "
            "simulated only; execute offload of parameters (fsdp, with the optimizer), or none"
        )
    if plan.pp > 1 and plan.schedule == "1f1b" and plan.micro_batches < plan.pp:
        raise ValueError(
            f"the 1f1b schedule needs at least as many micro-batches as stages, but the plan has {plan.micro_batches} "
            f"for pp = {plan.pp}; use micro_batches = {plan.pp} or the gpipe schedule"
        )


def _pieces(tensors: tuple[Any, ...], parts: int) -> list[tuple[Any, ...]]:
    if parts == 1:
        return [tensors]
    split_tensors = [t.chunk(parts) if isinstance(t, torch.Tensor) else [t] * parts for t in tensors]
    return [tuple(s[i] for s in split_tensors) for i in range(parts)]


def _module(
    plan: ParallelPlan, workload: Workload, rank: int, device: torch.device, materialize: bool
) -> tuple[nn.Module, Split | None]:
    with _disable_current_modes(), torch.device("cpu" if materialize else "meta"):
        model = workload.build()
    model.train()
    check_paths(model, plan)
    whole = None
    if plan.pp > 1:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]):
            inputs, _ = workload.batch(plan.micro_batch)
        autocast = AUTOCAST.get(plan.precision)
        whole = split(model, plan.cuts, inputs, device, autocast)
        model = StageModule(model, whole, plan.coordinates(rank)["pp"], autocast)
    return (model.to(device) if materialize else _emptied(model, device)), whole


def _emptied(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces meta tensors by empty ones on `device`; tied tensors stay tied (`to_empty` would untie them)."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in made:
                    empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                    made[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
                tensors[name] = made[id(t)]
    return model


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
