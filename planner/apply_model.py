"""What a plan changes inside the module: tensor-parallel Linears and recomputed modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from planner.plan import ParallelPlan
from planner.runtime_stage import is_kept

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPUTING: list[str] = []
"""Paths of the recomputed modules whose forward is running now, innermost last (read by the dry run)."""


def check_paths(model: nn.Module, plan: ParallelPlan) -> None:
    """ValueError for module paths that the whole model does not have, or that a pipeline cut divides."""
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    named = {"sharding": [path for path, _ in plan.shardings], "fsdp unit": plan.fsdp_units}
    for what, paths in {**named, "recompute path": plan.recompute}.items():
        for path in paths:
            if path not in known:
                raise ValueError(f"{what} {path!r} is no module path of the model; paths look like {max(known)!r}")
            divided = [cut for cut in plan.cuts if not path or cut.startswith(f"{path}.")]
            if divided:
                raise ValueError(f"{what} {path!r} is divided by the cut at {divided[0]!r}; name modules inside it")


def shard_tensor_parallel(model: nn.Module, plan: ParallelPlan, tp: DeviceMesh) -> None:
    """`parallelize_module` with torch's default layouts and local outputs for every sharding that `model` has."""
    here = set(present(model, tuple(path for path, _ in plan.shardings)))
    for path, style in plan.shardings:
        if path not in here:
            continue
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"sharding {path!r} is a {type(module).__name__}; only Linear modules can be sharded")
        features = module.out_features if style == "colwise" else module.in_features
        if features % plan.tp:
            raise ValueError(
                f"{style} sharding of {path!r} splits {features} features, which tp = {plan.tp} does not divide; "
                "leave it unsharded or use another tp"
            )
        # every rank has the same full weights, so that nothing has to be scattered
        parallelize_module(
            module, tp, ColwiseParallel() if style == "colwise" else RowwiseParallel(), src_data_rank=None
        )


def local_module(model: nn.Module, tp: DeviceMesh) -> dict[str, Any]:
    """Keeps tensor-parallel parameters as plain local tensors, seen as DTensors only inside their module's forward.

    DDP's reducer and fused optimizers cannot mix DTensor and plain parameters; torch's own way for DDP
    (`_pre_dp_module_transform`) makes new parameters at every forward, which the reducer does not know.
    Returns parameter name -> placements.
    """
    found = {}
    for path, module in model.named_modules():
        specs = {n: p.placements for n, p in module._parameters.items() if isinstance(p, DTensor)}
        if not specs:
            continue
        for name in specs:
            p: Any = module._parameters[name]
            module._parameters[name] = nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad)
            found[f"{path}.{name}" if path else name] = specs[name]
        module.forward = _seeing_dtensors(module, tp, specs)
    return found


def _seeing_dtensors(module: nn.Module, tp: DeviceMesh, specs: dict[str, Any]) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        for name, placements in specs.items():  # an instance attribute hides the parameter of that name
            local: Any = module._parameters[name]
            module.__dict__[name] = DTensor.from_local(local, tp, placements, run_check=False)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in specs:
                del module.__dict__[name]

    return run


def recompute(model: nn.Module, plan: ParallelPlan, stage: int) -> None:
    """Wraps the forward of the modules that the stage recomputes in `checkpoint`; names of parameters stay."""
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, plan)) if plan.recompute_keeps else None
    for path in plan.recomputed(stage, present(model, plan.recompute)):
        module = model.get_submodule(path)
        module.forward = _checkpointed(module.forward, path, contexts)


def _policy(plan: ParallelPlan, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(plan, str(op)) else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], path: str, contexts: Any = None) -> Callable[..., Any]:
    options = {"context_fn": contexts} if contexts else {}

    def inner(*args: Any, **kwargs: Any) -> Any:
        RECOMPUTING.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            RECOMPUTING.pop()

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # a caller may go on filling a list that it passed (DenseNet); the second run must see it as the first one did
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        return checkpoint(inner, *args, use_reentrant=False, **options, **kwargs)

    return run


def present(model: nn.Module, paths: tuple[str, ...]) -> Iterator[str]:
    """Those of `paths` that this rank's part of the model has as real modules."""
    for path in paths:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if type(found) is not nn.Module and path:
            yield path


def casting(plan: ParallelPlan, device: torch.device) -> Any:
    """The autocast region of the plan's precision."""
    dtype = AUTOCAST.get(plan.precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


@contextmanager
def rounding(plan: ParallelPlan, device: torch.device) -> Iterator[None]:
    """float32 products in tf32 where the plan asks for it; only GPUs have it. The switch is the process's, so threads
    of backward see it. torch's older switch: mixing it with the newer ones is an error (torch 2.9 and later)."""
    if plan.precision != "tf32" or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
