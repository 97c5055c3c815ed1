"""A workload: what one training step of a model needs, buildable on any device, at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from opgraph.flops import Formula

Batch = tuple[tuple["torch.Tensor", ...], tuple["torch.Tensor", ...]]


@dataclass(frozen=True, slots=True)
class Workload:
    """One model and one training step of it.

    `build()` makes the module on torch's current default device: under `torch.device("meta")` it allocates
    nothing, after `torch.manual_seed(s)` it makes the same weights on every rank.
    `batch(n)` makes real CPU tensors `(inputs, targets)` whose dim 0 is n, random under the current seed.
    `loss(output, *targets)` is a scalar that is a mean over the batch, so that the mean of the losses of equal
    parts is the loss of the whole. `optimizer(params)` makes the optimizer.
    `blocks` are the module paths of the repeated blocks in execution order ("" where there are none): the
    default units of FSDP, recomputation and pipeline cuts.
    `flops` are formulas of the model's own ops, by op name (`mylib.op.default`): formula(input_shapes, output_shapes,
    args) gives the FLOP of one call.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]
    batch_size: int
    blocks: tuple[str, ...] = ()
    flops: Mapping[str, Formula] = field(default_factory=dict, hash=False)


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """The default optimizer: AdamW in torch's fused form (one op per step, no temporaries), but a loop over complex
    parameters, which have no fused form."""
    import torch

    made = list(params)
    if not any(p.is_complex() for p in made):
        return torch.optim.AdamW(made, lr=1e-3, fused=True)
    groups = {fused: [p for p in made if p.is_complex() is not fused] for fused in (True, False)}
    some = [{"params": group, "fused": fused} for fused, group in groups.items() if group]
    return torch.optim.AdamW(some, lr=1e-3, foreach=False)


def mean_square(output: Any, *targets: Any) -> torch.Tensor:
    """The loss where the user gives none: the mean square of every floating output (a scalar output is the loss)."""
    import torch
    from torch.utils._pytree import tree_leaves

    del targets
    if is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, f.name) for f in fields(output)]
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not tensors:
        raise ValueError("the model returns no floating-point tensor, so there is nothing to train: give a loss")
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    return torch.stack([t.float().square().mean() for t in tensors]).sum()
