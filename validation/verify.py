"""Proves that an applied plan computes the loss and the gradients of the single-device step on the whole batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opgraph.scaling import FIRST_SCALE, scaled
from opgraph.workload import Workload
from planner.apply import Step, apply
from planner.apply_model import casting
from planner.plan import ParallelPlan
from validation.gpu_ops import precision
from validation.settled import settled

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
KINK = 100.0  # times the tolerance: gradients that jumped at kinks differ by less
Reference = tuple[float, dict[str, torch.Tensor]]


def prove(
    plan: ParallelPlan, workload: Workload, spec: str, rank: int, device: torch.device, seed: int, scratch: str
) -> dict[str, Any]:
    """The errors of loss and gradients, `wrong` with a sentence if they are too large, and notes. A collective call.
    What a GPU would round to tf32 runs in full float32: the split is proven, which is the same.

    A plan that nearly meets the step on the whole batch is compared once more, with the unsplit model run on the plan's
    own pieces of the batch: kernels round differently for other batch sizes, and where that moves a value across the
    kink of a ReLU, gradients jump (ResNet-50 in pieces of 1 against 8, on one device: 0.17 % of one gradient).
    """
    plan = replace(plan, precision="fp32") if plan.precision == "tf32" else plan
    with precision("float32", device.type):
        return _prove(plan, workload, spec, rank, device, seed, scratch)


def _prove(
    plan: ParallelPlan, workload: Workload, spec: str, rank: int, device: torch.device, seed: int, scratch: str
) -> dict[str, Any]:
    safe, notes, by_pieces = _comparable(workload)
    in_pieces = plan.dp * plan.micro_batches
    first = _reference_file(plan, safe, spec, in_pieces if by_pieces else 1, rank, device, seed, scratch)
    torch.manual_seed(seed)
    step = apply(plan, safe, rank, device)
    inputs, targets = share(plan, workload, rank, device, seed)
    with settled() as drawn:
        own_loss = step.backward_only(inputs, targets)
    if drawn.draws:
        notes.append("random draws in the model's forward were given one fixed outcome for the proof")
    gradients = step.named_gradients()
    idle = _idle(step, first[1])
    report = _compare(plan, gradients, own_loss, *first)
    if _may_be_rounding(report, _limit(plan, first[1])) and in_pieces > 1 and not by_pieces:
        second = _reference_file(plan, safe, spec, in_pieces, rank, device, seed, scratch)
        again = _compare(plan, gradients, own_loss, *second)
        if not again["wrong"]:
            said = f"the proof's reference runs the plan's own {in_pieces} pieces of the batch"
            notes.append(f"{said}; {report['wrong']}")
            report = again
    if report["wrong"] and idle:
        report["wrong"] = (
            f"no gradient reaches {idle}, and torch's DistributedDataParallel does not average gradients where a "
            f"parameter has none: freeze it with requires_grad_(False), or use fsdp ({report['wrong']})"
        )
    return {**report, "notes": notes}


def _idle(step: Step, expected: dict[str, torch.Tensor]) -> str:
    """A parameter of a DistributedDataParallel for which the step on a single device has no gradient."""
    if not isinstance(step.wrapped, nn.parallel.DistributedDataParallel):
        return ""
    trained = (step.names[name] for name, p in step.model.named_parameters() if p.requires_grad)
    return next((name for name in trained if name not in expected), "")


def _may_be_rounding(report: dict[str, Any], limit: float) -> bool:
    """Whether the loss is right, and gradients miss the limit by less than any wrong plan would."""
    right_loss = report["loss_error"] <= limit
    return bool(report["wrong"]) and right_loss and limit < report["gradient_error"] <= KINK * limit


def _reference_file(
    plan: ParallelPlan, workload: Workload, spec: str, pieces: int, rank: int, device: torch.device, seed: int,
    scratch: str,
) -> Reference:  # fmt: skip
    """The reference, computed once by rank 0 and kept in `scratch` for all plans of the same batch and precision."""
    key = hashlib.sha256(repr((spec, seed, plan.global_batch, pieces, plan.precision)).encode()).hexdigest()[:16]
    path = os.path.join(scratch, f"reference-{key}.pt")
    if rank == 0 and not os.path.exists(path):
        torch.save(reference(plan, workload, pieces, device, seed), path + ".new")
        os.replace(path + ".new", path)
    dist.barrier()
    loss, gradients = torch.load(path, map_location=device, mmap=True)
    return loss, gradients


def share(
    plan: ParallelPlan, workload: Workload, rank: int, device: torch.device, seed: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """This rank's dp share of the global batch (the same batch on every rank for one seed)."""
    part = plan.coordinates(rank)["dp"]

    def own(t: Any) -> Any:
        return t.chunk(plan.dp)[part].clone().to(device) if isinstance(t, torch.Tensor) else t

    inputs, targets = _batch(plan, workload, seed)
    return tuple(own(t) for t in inputs), tuple(own(t) for t in targets)


def _batch(plan: ParallelPlan, workload: Workload, seed: int) -> Any:
    torch.manual_seed(seed + 1)
    return workload.batch(plan.global_batch)


def reference(plan: ParallelPlan, workload: Workload, pieces: int, device: torch.device, seed: int) -> Reference:
    """Loss and gradients of the unsplit model, on the whole batch or averaged over `pieces` of it in order."""
    torch.manual_seed(seed)
    model = workload.build().to(device).train()
    inputs, targets = _batch(plan, workload, seed)
    total, scale = 0.0, FIRST_SCALE if plan.precision == "fp16" else 1.0
    for i in range(pieces):
        part_in, part_out = (
            tuple(t.chunk(pieces)[i].to(device) if isinstance(t, torch.Tensor) else t for t in ts)
            for ts in (inputs, targets)
        )
        with settled():
            with casting(plan, device):
                loss = workload.loss(model(*part_in), *part_out) / pieces
            torch.autograd.backward(scaled(loss, scale) if plan.precision == "fp16" else loss)
        total += loss.item()
    return total, {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def _comparable(workload: Workload) -> tuple[Workload, list[str], bool]:
    """The workload without dropout, what has to be said about it, and whether it uses batch statistics."""
    with torch.device("meta"):
        modules = list(workload.build().modules())
    dropping = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules)
    dropping += sum(isinstance(m, nn.RNNBase) and m.dropout > 0 for m in modules)
    statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    notes = []
    if dropping:
        notes.append(f"dropout of {dropping} module(s) was set to 0 for the proof: ranks draw different numbers")
    if statistics:
        notes.append("the reference of the proof runs the plan's own pieces of the batch (batch statistics)")
    return replace(workload, build=_without_dropout(workload.build)), notes, statistics


def _without_dropout(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = build()
        for m in model.modules():
            if isinstance(m, nn.modules.dropout._DropoutNd):
                m.p = 0.0
            elif isinstance(m, nn.RNNBase):
                m.dropout = 0.0
        return model

    return make


def _limit(plan: ParallelPlan, expected: dict[str, torch.Tensor]) -> float:
    """The error that the format of the step allows: of autocast, or of a model that is in 16 bits itself."""
    half = any(g.dtype in (torch.bfloat16, torch.float16) for g in expected.values())
    return TOLERANCE["bf16" if half else plan.precision]


def _compare(
    plan: ParallelPlan,
    gradients: dict[str, torch.Tensor],
    own_loss: torch.Tensor | None,
    loss: float,
    expected: dict[str, torch.Tensor],
) -> dict[str, Any]:
    norm = float(sum(g.double().square().sum() for g in expected.values()) ** 0.5)
    worst, culprit = 0.0, ""
    for name, gradient in gradients.items():
        if name not in expected:
            worst, culprit = float("inf"), f"{name} (which has no gradient on a single device)"
            break
        right = expected[name].double()
        error = float((gradient.double() - right).norm()) / max(float(right.norm()), 1e-3 * norm, 1e-30)
        if not error <= worst:  # also NaN
            worst, culprit = error, name
    everyone: list[Any] = [None] * dist.get_world_size()
    own = None if own_loss is None else own_loss.item()
    dist.all_gather_object(everyone, (own, worst, culprit, sorted(gradients)))
    losses = [value for value, *_ in everyone if value is not None]
    loss_error = abs(sum(losses) / len(losses) - loss) / max(abs(loss), 1e-30)
    missing = sorted(set(expected) - {name for *_, names in everyone for name in names})
    gradient_error, culprit = max(((e, c) for _, e, c, _ in everyone), key=lambda p: (p[0] != p[0], p[0]))
    limit, wrong = _limit(plan, expected), ""
    if missing:
        wrong = f"parameter {missing[0]} has a gradient on a single device but none in this plan"
    elif not loss_error <= limit:
        wrong = f"the loss differs from the single-device step by {loss_error:.2g} (allowed {limit:g})"
        if plan.dp * plan.micro_batches > 1:
            wrong += "; a loss that is no mean over samples, or a model that sees the whole batch, cannot be shared out"
    elif not gradient_error <= limit:
        size = f"{gradient_error:.2g} (allowed {limit:g})"
        wrong = f"the gradient of {culprit} differs from the single-device step by {size}"
    return {"loss_error": loss_error, "gradient_error": gradient_error, "wrong": wrong}
