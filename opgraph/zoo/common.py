"""Workloads of the two kinds of data that the zoo's models take: token sequences and images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from opgraph.workload import Batch, Workload, adamw
from opgraph.zoo.layers import class_loss, token_loss


def token_workload(
    name: str, build: Callable[[], nn.Module], vocab: int, seq: int, batch_size: int, layers: int
) -> Workload:
    """Predict one token per position: the targets are a tensor of their own, of the shape of the inputs."""

    def batch(n: int) -> Batch:
        ids = torch.randint(vocab, (n, seq), device="cpu")
        targets = torch.randint(vocab, (n, seq), device="cpu")
        return (ids,), (targets,)

    return Workload(name, build, batch, token_loss, adamw, batch_size, block_paths(layers))


def image_workload(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, batch_size: int, blocks: int
) -> Workload:
    """Classify samples of `shape` (without the batch)."""

    def batch(n: int) -> Batch:
        samples = torch.randn(n, *shape, device="cpu")
        return (samples,), (torch.randint(classes, (n,), device="cpu"),)

    return Workload(name, build, batch, class_loss, adamw, batch_size, block_paths(blocks))


def block_paths(n: int) -> tuple[str, ...]:
    return tuple(f"blocks.{i}" for i in range(n))
