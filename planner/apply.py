"""Turns a `ParallelPlan` into an executable training step with torch's own runtimes.

The same code runs for real (gloo, NCCL) and in the dry run (fake tensors, fake process group).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from opgraph.workload import Workload
from planner.apply_model import local_module, recompute, shard_tensor_parallel
from planner.plan import AXES, ParallelPlan
from planner.split import Split, StageModule, split

_MESHES = count()


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's executable training step.

    model: this rank's module (the whole model, or its `StageModule`); wrapped: the same inside DDP, if any.
    schedule: torch's pipeline schedule (None where pp == 1). tied: process groups with the parameters whose
    gradients are summed over them (weights that several pipeline stages share). names: parameter name in `model` ->
    its first name in the whole model. placements: of the tensor-parallel parameters that are kept as local tensors.
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

    def run(self, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> torch.Tensor | None:
        """Forward, backward, optimizer step and gradients set to None, on this dp rank's share of the global batch.

        Returns the mean loss over the share (on the last pipeline stage; None on the others).
        """
        loss = self.backward_only(inputs, targets)
        self.update()
        return loss

    def update(self) -> None:
        """Optimizer step, then gradients to None."""
        self.optimizer.step()
        self.wrapped.zero_grad(set_to_none=True)

    def backward_only(self, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> torch.Tensor | None:
        """Forward and backward with every gradient reduction, no optimizer step."""
        pieces = list(zip(_pieces(inputs, self.plan.micro_batches), _pieces(targets, self.plan.micro_batches)))
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
        """First name in the whole model -> full gradient: gathered over tp and fsdp shards, averaged over dp.

        A collective call: every rank of the plan must make it.
        """
        full = {}
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            grad = p.grad.detach()
            if name in self.placements:
                grad = DTensor.from_local(grad, _along(self.mesh, "tp"), self.placements[name], run_check=False)
            full[self.names[name]] = grad.full_tensor() if isinstance(grad, DTensor) else grad
        return full

    def _accumulated(self, pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> torch.Tensor:
        total: Any = None
        for i, (inputs, targets) in enumerate(pieces):
            with self._synchronising(i == len(pieces) - 1):
                with casting(self.plan, self.device):
                    loss = self.workload.loss(self.wrapped(*inputs), *targets)
                    loss = loss / len(pieces) if len(pieces) > 1 else loss
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
        return total

    def _synchronising(self, last: bool) -> Any:
        if self.plan.micro_batches == 1 or self.plan.dp == 1:
            return nullcontext()
        if self.plan.data_parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
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
        return torch.stack([loss.detach() for loss in losses]).sum() if stage.is_last else None


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
    device = torch.device(device)
    check(plan)
    model, whole = _module(plan, workload, rank, device, materialize)
    with _disable_current_modes():
        mesh = _mesh(plan, device)
    names = dict(model.original_fqn) if isinstance(model, StageModule) else {n: n for n, _ in model.named_parameters()}
    placements: dict[str, Any] = {}
    if plan.tp > 1:
        shard_tensor_parallel(model, plan, _along(mesh, "tp"))
        if plan.dp == 1 or plan.data_parallel != "fsdp":
            placements = local_module(model, _along(mesh, "tp"))
    recompute(model, plan.recompute)
    wrapped, optimizer = _data_parallel(plan, workload, model, mesh)
    schedule = _schedule(plan, workload, wrapped, whole, rank, device, mesh) if plan.pp > 1 else None
    tied = _tied(plan, whole, model, rank, mesh) if whole is not None else ()
    return Step(
        plan, workload, rank, device, model, wrapped, optimizer, schedule, tied, mesh, names, placements
    )  # fmt: skip


def check(plan: ParallelPlan) -> None:
    """ValueError for what torch's runtimes cannot execute."""
    if plan.pp > 1 and plan.schedule == "1f1b" and plan.micro_batches < plan.pp:
        raise ValueError(
            f"the 1f1b schedule needs at least as many micro-batches as stages, but the plan has {plan.micro_batches} "
            f"for pp = {plan.pp}; use micro_batches = {plan.pp} or the gpipe schedule"
        )


def casting(plan: ParallelPlan, device: torch.device) -> Any:
    """The autocast region of the plan's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if plan.precision == "bf16" else nullcontext()


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
    whole = None
    if plan.pp > 1:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]):
            inputs, _ = workload.batch(plan.micro_batch)
        autocast = torch.bfloat16 if plan.precision == "bf16" else None
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


def _mesh(plan: ParallelPlan, device: torch.device) -> DeviceMesh | None:
    axes = [axis for axis in AXES if getattr(plan, axis) > 1]
    if not axes:
        return None
    # DTensor caches what it derives from a mesh, and takes meshes of equal ranks and names for the same one, even
    # after their process groups are gone: so every mesh gets names of its own
    number = next(_MESHES)
    names = tuple(f"{axis}_{number}" for axis in axes)
    return init_device_mesh(device.type, tuple(getattr(plan, a) for a in axes), mesh_dim_names=names)


def _along(mesh: DeviceMesh | None, axis: str) -> DeviceMesh:
    """The sub-mesh of one axis."""
    assert mesh is not None and mesh.mesh_dim_names is not None
    return mesh[next(name for name in mesh.mesh_dim_names if name.startswith(axis))]


def _data_parallel(
    plan: ParallelPlan, workload: Workload, model: nn.Module, mesh: DeviceMesh | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    if plan.dp == 1:
        return model, workload.optimizer(model.parameters())
    if plan.data_parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for path in _present(model, plan.fsdp_units):
            fully_shard(model.get_submodule(path), mesh=_along(mesh, "dp"))
        fully_shard(model, mesh=_along(mesh, "dp"))
        return model, workload.optimizer(_by_mesh(model))
    group = _along(mesh, "dp").get_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            process_group=group,
            bucket_cap_mb=plan.bucket_bytes / 2**20,
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


def _present(model: nn.Module, paths: tuple[str, ...]) -> Iterator[str]:
    """Those of `paths` that this rank's part of the model has as real modules."""
    for path in paths:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if type(found) is not nn.Module and path:
            yield path


def _schedule(
    plan: ParallelPlan,
    workload: Workload,
    wrapped: nn.Module,
    whole: Split | None,
    rank: int,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> Any:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    assert whole is not None
    index = plan.coordinates(rank)["pp"]
    program = whole.stages[index]
    last = index == plan.pp - 1
    leaves = program.sends if not last else ()
    stage = PipelineStage(
        wrapped,
        index,
        plan.pp,
        device,
        input_args=tuple(_meta(whole, v) for v in program.receives),
        output_args=tuple(_meta(whole, v) for v in leaves) if not last else torch.empty(1, device="meta"),
        group=_along(mesh, "pp").get_group(),
    )
    model: Any = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped

    def loss(output: Any, targets: tuple[Any, ...]) -> torch.Tensor:
        with casting(plan, device):
            value = workload.loss(model.unflatten(output), *targets)
            return value / plan.micro_batches if plan.micro_batches > 1 else value

    make: Callable[..., Any] = ScheduleGPipe if plan.schedule == "gpipe" else Schedule1F1B
    return make(stage, plan.micro_batches, loss_fn=loss, scale_grads=False)


def _meta(whole: Split, value: int) -> torch.Tensor:
    info = whole.values[value]
    with _disable_current_modes():
        meta = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device="meta")
    return meta.requires_grad_(info.requires_grad)


def _tied(
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
                group = _along(mesh, "pp").get_group()
            else:
                for first in range(plan.dp * plan.tp):  # new_group is collective: every rank makes every group
                    ranks = [first + stage * plan.dp * plan.tp for stage in stages]
                    made = dist.new_group(ranks)
                    group = made if rank in ranks else group
            names = [name for name, used in whole.shared_parameters if used == stages]
            if at["pp"] in stages:
                found.append((group, tuple(by_name[name] for name in names)))
    return tuple(found)


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
