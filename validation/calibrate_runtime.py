"""Seconds that torch's parallel runtimes add on the host, beside the ops and the messages.

Everything is measured on stacks of tiny Linears under the fake process group, whose collectives do nothing: what is
left is Python and C++ overhead, with caches as cold as between the layers of a real model. No plan is executed here.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from validation.calibrate_record import CLOCK

WIDTH, ROWS, LAYERS, MICRO = 32, 4, 12, 8
REPEATS = 24

Parts = tuple[float, float, float]


class _Sweep(torch.autograd.Function):
    """Streams through more memory than the core's own caches hold, forward and backward."""

    memory = torch.ones(2**20)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        _Sweep.memory.mul_(1.0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        _Sweep.memory.mul_(1.0)
        return gradient


class Between(nn.Module):
    """What other layers of a real model do to the caches between two calls into a runtime: without it overheads come
    out two to three times too small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swept: torch.Tensor = _Sweep.apply(x)  # type: ignore[no-untyped-call]
        return swept


def stack(layers: int = LAYERS) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), Between())))


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def timed(module: nn.Module, repeats: int = REPEATS, params: Any = None) -> Parts:
    """Median seconds of forward, backward and AdamW step of one tiny step."""
    x = torch.randn(ROWS, WIDTH)
    optimizer: Any = torch.optim.AdamW(params or module.parameters(), lr=1e-3, fused=True)
    rows = []
    for _ in range(repeats + 2):
        start = CLOCK()
        loss = module(x).sum()
        forward = CLOCK()
        loss.backward()
        backward = CLOCK()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append((forward - start, backward - forward, CLOCK() - backward))
    f, b, o = (statistics.median(column) for column in zip(*rows[2:]))
    return f, b, o


def extra(with_it: Parts, without: Parts, count: int) -> Parts:
    """Seconds per unit that a runtime adds, never negative."""
    f, b, o = (max(a - z, 0.0) / count for a, z in zip(with_it, without))
    return f, b, o


def measure_runtimes() -> dict[str, float]:
    """All host overheads of this module, by the keys of `Device.host`. The caller has no process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plain = timed(stack())
    found: dict[str, float] = {}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for part in (tensor_parallel, fully_sharded, checkpointed, pipelined):
            found |= _measured(part, plain)
    finally:
        dist.destroy_process_group()
    # DDP's reducer wants real results: a gloo group of this rank alone.
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        return found | _measured(data_parallel, plain)
    finally:
        dist.destroy_process_group()


def _measured(part: Callable[[Parts], dict[str, float]], plain: Parts) -> dict[str, float]:
    """These runtimes move between torch versions; one that fails is left out, not guessed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return part(plain)
    except (ImportError, AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        print(f"calibrate: {part.__name__} could not be measured: {error}", file=sys.stderr, flush=True)
        return {}


def tensor_parallel(plain: Parts) -> dict[str, float]:
    """Linears sharded by ColwiseParallel and RowwiseParallel in turn, and a single dispatch of a DTensor op."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    module = stack()
    for i, layer in enumerate(linears(module)):
        parallelize_module(layer, mesh, RowwiseParallel() if i % 2 else ColwiseParallel(), src_data_rank=None)
    forward, backward, optimizer = extra(timed(module), plain, LAYERS)
    local = torch.randn(ROWS, WIDTH)
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    op = per_call(lambda: sharded + sharded) - per_call(lambda: local + local)
    return {
        "dtensor_linear_forward": forward, "dtensor_linear_backward": backward,
        "dtensor_optimizer_param": optimizer / 2, "dtensor_op": max(op, 0.0),
    }  # fmt: skip


def per_call(call: Callable[[], Any], calls: int = 50) -> float:
    """Median over ten rounds of the mean seconds of a call."""
    rounds = []
    for _ in range(11):
        start = CLOCK()
        for _ in range(calls):
            call()
        rounds.append((CLOCK() - start) / calls)
    return statistics.median(rounds[1:])


def fully_sharded(plain: Parts) -> dict[str, float]:
    """fully_shard around every Linear (2 parameters), and around groups of four, to tell unit from parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    single = stack()
    for layer in linears(single):
        fully_shard(layer, mesh=mesh)
    fully_shard(single, mesh=mesh)
    grouped = nn.Sequential(*(stack(4) for _ in range(LAYERS // 4)))
    for group in grouped:
        fully_shard(group, mesh=mesh)
    fully_shard(grouped, mesh=mesh)
    ones, fours = timed(single), timed(grouped)
    result = {}
    for i, phase in enumerate(("forward", "backward")):
        # units * u + parameters * p for both: the same 24 parameters in 12 and in 3 units
        unit = max(ones[i] - fours[i], 0.0) / (LAYERS - LAYERS // 4)
        result[f"fsdp_unit_{phase}"] = unit
        result[f"fsdp_param_{phase}"] = max(ones[i] - plain[i] - LAYERS * unit, 0.0) / (2 * LAYERS)
    result["fsdp_optimizer_param"] = max(ones[2] - plain[2], 0.0) / (2 * LAYERS)
    return result


def data_parallel(plain: Parts) -> dict[str, float]:
    """DistributedDataParallel: per step, per parameter, and per bucket (buckets of one parameter against one)."""
    build = nn.parallel.DistributedDataParallel
    one = timed(build(stack(), broadcast_buffers=False, init_sync=False, bucket_cap_mb=25))
    many = timed(build(stack(), broadcast_buffers=False, init_sync=False, bucket_cap_mb=1e-6))
    bucket = max(many[1] - one[1], 0.0) / (2 * LAYERS - 1)
    return {
        "ddp_step": max(one[0] - plain[0], 0.0),
        "ddp_param": max(one[1] - plain[1] - bucket, 0.0) / (2 * LAYERS),
        "ddp_bucket": bucket,
    }


def checkpointed(plain: Parts) -> dict[str, float]:
    """torch.utils.checkpoint (use_reentrant=False) around every Linear, beyond the second forward itself."""
    from torch.utils.checkpoint import checkpoint

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = stack()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, nn.Linear) else layer(x)
            return x

    forward, backward, _ = timed(Regions())
    return {
        "checkpoint_forward": max(forward - plain[0], 0.0) / LAYERS,
        "checkpoint_backward": max(backward - plain[1] - plain[0], 0.0) / LAYERS,
    }


def pipelined(plain: Parts) -> dict[str, float]:
    """ScheduleGPipe on a pipeline of one stage against a loop over the micro-batches; an action is one forward or one
    backward of one micro-batch."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    module, other = stack(2), copy.deepcopy(stack(2))
    x, y = torch.randn(ROWS * MICRO, WIDTH), torch.randn(ROWS * MICRO, WIDTH)
    loss: Any = nn.functional.mse_loss
    stage = PipelineStage(module, 0, 1, torch.device("cpu"), group=dist.new_group([0]))
    schedule = ScheduleGPipe(stage, MICRO, loss_fn=loss)

    def looped() -> None:
        for a, b in zip(x.chunk(MICRO), y.chunk(MICRO)):
            loss(other(a), b).backward()

    pipeline, plain_loop = (per_call(call, calls=1) for call in (lambda: schedule.step(x, target=y), looped))
    return {"pp_action": max(pipeline - plain_loop, 0.0) / (2 * MICRO)}
