"""Workloads that misbehave on rank 1, chosen by the global batch (a dp share of 3, 5 or 6 samples)."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from opgraph.workload import Workload
from tests.planner.models import mlp, norm_net

RAISES, DIES, HANGS = 6, 10, 12


def moody() -> Workload:
    good = mlp()

    def batch(n: int):
        if dist.is_initialized() and dist.get_rank() == 1:
            if n == RAISES:
                raise RuntimeError("no data\nfor rank 1")
            if n == DIES:
                os._exit(7)
            if n == HANGS:
                time.sleep(1000)
        return good.batch(n)

    return replace(good, batch=batch)


def chatty() -> Workload:
    """What libraries log whenever a model is made, here once for each plan."""
    print("a page")
    return moody()


def disagreeing() -> Workload:
    """Rank 1 has other weights."""

    def build():
        model = mlp().build()
        if dist.is_initialized() and dist.get_rank() == 1:
            with torch.no_grad():
                model[0].weight.mul_(1.5)
        return model

    return replace(mlp(), build=build)


def wrong_mean() -> Workload:
    """A loss that sums over the batch, so that parts do not average to the whole."""
    return replace(mlp(), loss=lambda y, target: (y - target).square().sum())


def batch_statistics() -> Workload:
    return norm_net()


def kinked(by: float) -> Workload:
    """Gradients grow by the fraction `by` where a batch is a single sample, as if kernels rounded otherwise there."""
    good = mlp()

    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if y.requires_grad and len(y) == 1:
            y.register_hook(lambda g: g * (1 + by))
        return good.loss(y, target)

    return replace(good, loss=loss)


def slightly_kinked() -> Workload:
    return kinked(1e-3)


def badly_kinked() -> Workload:
    return kinked(0.05)
