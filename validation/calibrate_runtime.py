"""Seconds that torch's parallel runtimes add on the host, beside the ops and the messages.

Everything is measured on stacks of tiny Linears under the fake process group, whose collectives do nothing: what is
left is Python and C++ overhead, once with caches as cold as between the layers of a real model, and once as they are in
a pass that moves next to nothing (keys that end in "_warm"; `planner.runtime_host`). No plan is executed here.

What runs beside a rank on a shared core changes how long everything takes within milliseconds, so all stacks run in
turn, each between two runs of the anchor benchmark, and overheads are differences of times in anchors.
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

from planner.runtime_host import WARM
from validation.calibrate_record import CLOCK

WIDTH, ROWS, LAYERS, MICRO = 32, 4, 8, 4
GROUP = 4  # Linears in a larger unit of FSDP, or checkpointed region
ROUNDS = 6
BEFORE_WARM = 2  # runs before the one that is timed in full caches

# Of optimizers by tensor, which a step runs once, and of single ops no second number is kept.
NO_WARM = ("dtensor_optimizer", "dtensor_op", "fsdp_optimizer")

Parts = tuple[float, ...]
Anchor = Callable[[], float]
Case = Callable[[], Parts]


class _Sweep(torch.autograd.Function):
    """Streams through more memory than the core's own caches and its share of the others' hold, forward and backward;
    `spent` sums up the seconds, which are no overhead. On a Xeon of 2 MiB a core a Linear under DTensor cost 2.4
    to 2.9 ms between sweeps of 4 MiB, 2.5 to 3.3 of 8 and 3.4 to 3.7 of 16 MiB; in a small GPT-2 about 3.5 ms."""

    memory = torch.ones(2**22)
    spent = 0.0
    on = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        _Sweep.run()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        _Sweep.run()
        return gradient

    @staticmethod
    def run() -> None:
        start = CLOCK()
        if _Sweep.on:
            _Sweep.memory.mul_(1.0)
        _Sweep.spent += CLOCK() - start


class Between(nn.Module):
    """What other layers of a real model do to the caches between two calls into a runtime: without it overheads come
    out two to three times too small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swept: torch.Tensor = _Sweep.apply(x)  # type: ignore[no-untyped-call]
        return swept


def stack(layers: int = LAYERS) -> nn.Sequential:
    # The sweeps stand first: a checkpointed region is run again up to the last thing that it saves, its Linear.
    return nn.Sequential(*(nn.Sequential(Between(), nn.Linear(WIDTH, WIDTH)) for _ in range(layers)))


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def steps_of(module: nn.Module, shape: tuple[int, ...] = (ROWS, WIDTH)) -> Case:
    """A function that runs one tiny step on an input of this shape and returns the seconds of its forward, its backward
    and its AdamW step, without the sweeps."""
    x = torch.randn(shape)
    optimizer: Any = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def step() -> Parts:
        start = _now()
        loss = module(x).sum()
        forward = _now()
        loss.backward()
        backward = _now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return forward - start, backward - forward, _now() - backward

    return step


def alone(call: Callable[[], Any], calls: int = 1) -> Case:
    """A function that returns the mean seconds of a call, without the sweeps."""

    def run() -> Parts:
        start = _now()
        for _ in range(calls):
            call()
        return ((_now() - start) / calls,)

    return run


def _now() -> float:
    return CLOCK() - _Sweep.spent


def in_turn(cases: dict[str, Case], anchor: Anchor) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """The median of every part of every case, over the seconds of the anchor before and after it: between sweeps, and
    without them, where a case has run before."""
    rows: dict[str, list[Parts]] = {name: [] for name in cases}
    warm: dict[str, list[Parts]] = {name: [] for name in cases}
    before = anchor()
    for _ in range(ROUNDS + 2):
        for name, case in cases.items():
            _Sweep.on = True
            parts = case()
            _Sweep.on = False
            own = [case() for _ in range(BEFORE_WARM + 1)][-1]
            after = anchor()
            rows[name].append(tuple(2 * part / (before + after) for part in parts))
            warm[name].append(tuple(2 * part / (before + after) for part in own))
            before = after
    _Sweep.on = True
    cold, full = (
        {name: tuple(statistics.median(column) for column in zip(*found[2:])) for name, found in timed.items()}
        for timed in (rows, warm)
    )
    return cold, full


def measure_runtimes(anchor: Anchor) -> dict[str, float]:
    """All host overheads of this module, by the keys of `Device.host`, in seconds of `anchor`, the anchor benchmark.
    The caller has no process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        found = _measured((tensor_parallel, fully_sharded, checkpointed, pipelined), anchor)
    finally:
        dist.destroy_process_group()
    # DDP's reducer wants real results: a gloo group of this rank alone.
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        return found | _measured((data_parallel,), anchor)
    finally:
        dist.destroy_process_group()


Results = dict[str, Parts]
Runtime = tuple[dict[str, Case], Callable[[Results], dict[str, float]]]


def _measured(runtimes: tuple[Callable[[], Runtime], ...], anchor: Anchor) -> dict[str, float]:
    """What some runtimes add. They move between torch versions; one that fails is left out, not guessed."""
    plain = steps_of(stack())
    cases: dict[str, Case] = {"plain": plain}
    evaluate = []
    for runtime in runtimes:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own, result = runtime()
                for case in own.values():
                    case()
        except (ImportError, AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
            print(f"calibrate: {runtime.__name__} could not be measured: {error}", file=sys.stderr, flush=True)
            continue
        cases |= own
        evaluate.append(result)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cold, full = in_turn(cases, anchor)
    found = {key: max(value, 0.0) for result in evaluate for key, value in result(cold).items()}
    in_full = {key: max(value, 0.0) for result in evaluate for key, value in result(full).items()}
    return found | {key + WARM: min(in_full[key], found[key]) for key in found if not key.startswith(NO_WARM)}


def tensor_parallel() -> Runtime:
    """Linears sharded by ColwiseParallel and RowwiseParallel in turn, on inputs of two and of three dimensions (which
    are viewed as two, and back), and a single dispatch of a DTensor op."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, deep = init_device_mesh("cpu", (2,)), (ROWS // 2, 2, WIDTH)

    def sharded() -> nn.Module:
        module = stack()
        for i, layer in enumerate(linears(module)):
            parallelize_module(layer, mesh, RowwiseParallel() if i % 2 else ColwiseParallel(), src_data_rank=None)
        return module

    local = torch.randn(ROWS, WIDTH)
    tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    cases = {
        "tp": steps_of(sharded()), "tp deep": steps_of(sharded(), deep), "deep": steps_of(stack(), deep),
        "dtensor op": alone(lambda: tensor + tensor, 50), "op": alone(lambda: local + local, 50),
    }  # fmt: skip

    def result(found: Results) -> dict[str, float]:
        forward, backward, optimizer = ((a - b) / LAYERS for a, b in zip(found["tp"], found["plain"]))
        views = [(a - b) / LAYERS for a, b in zip(found["tp deep"], found["deep"])]
        return {
            "dtensor_linear_forward": forward, "dtensor_linear_backward": backward,
            "dtensor_view_forward": views[0] - forward, "dtensor_view_backward": views[1] - backward,
            "dtensor_optimizer_param": optimizer / 2, "dtensor_op": found["dtensor op"][0] - found["op"][0],
        }  # fmt: skip

    return cases, result


def fully_sharded() -> Runtime:
    """fully_shard around every Linear (2 parameters), and around groups of them, to tell unit from parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    single = stack()
    for layer in linears(single):
        fully_shard(layer, mesh=mesh)
    fully_shard(single, mesh=mesh)
    grouped = nn.Sequential(*(stack(GROUP) for _ in range(LAYERS // GROUP)))
    for group in grouped:
        fully_shard(group, mesh=mesh)
    fully_shard(grouped, mesh=mesh)

    def result(found: Results) -> dict[str, float]:
        ones, fours, plain = found["fsdp"], found["fsdp groups"], found["plain"]
        made = {}
        for i, phase in enumerate(("forward", "backward")):
            # units * u + parameters * p for both: the same parameters in more and in fewer units
            unit = max(ones[i] - fours[i], 0.0) / (LAYERS - LAYERS // GROUP)
            made[f"fsdp_unit_{phase}"] = unit
            made[f"fsdp_param_{phase}"] = (ones[i] - plain[i] - LAYERS * unit) / (2 * LAYERS)
        return made | {"fsdp_optimizer_param": (ones[2] - plain[2]) / (2 * LAYERS)}

    return {"fsdp": steps_of(single), "fsdp groups": steps_of(grouped)}, result


def data_parallel() -> Runtime:
    """DistributedDataParallel: per step, per parameter, and per bucket (buckets of one parameter against one)."""
    build = nn.parallel.DistributedDataParallel
    cases = {
        "ddp": steps_of(build(stack(), broadcast_buffers=False, init_sync=False, bucket_cap_mb=25)),
        "ddp buckets": steps_of(build(stack(), broadcast_buffers=False, init_sync=False, bucket_cap_mb=1e-6)),
    }

    def result(found: Results) -> dict[str, float]:
        one, many, plain = found["ddp"], found["ddp buckets"], found["plain"]
        bucket = max(many[1] - one[1], 0.0) / (2 * LAYERS - 1)
        return {
            "ddp_step": one[0] - plain[0], "ddp_param": (one[1] - plain[1] - bucket) / (2 * LAYERS),
            "ddp_bucket": bucket,
        }  # fmt: skip

    return cases, result


def checkpointed() -> Runtime:
    """torch.utils.checkpoint (use_reentrant=False), beyond the second forward itself: around every Linear, and around
    groups of them, to tell the region from the tensors that it saves for backward, two a Linear."""
    from torch.utils.checkpoint import checkpoint

    class Regions(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.regions = nn.ModuleList(stack(size) for _ in range(LAYERS // size))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for region in self.regions:
                x = checkpoint(region, x, use_reentrant=False)
            return x

    def result(found: Results) -> dict[str, float]:
        ones, fours, plain = found["regions"], found["large regions"], found["plain"]
        made = {}
        for i, (phase, own) in enumerate((("forward", plain[0]), ("backward", plain[1] + plain[0]))):
            region = max(ones[i] - fours[i], 0.0) / (LAYERS - LAYERS // GROUP)
            made[f"checkpoint_{phase}"] = region
            made[f"checkpoint_saved_{phase}"] = (ones[i] - own - LAYERS * region) / (2 * LAYERS)
        return made

    return {"regions": steps_of(Regions(1)), "large regions": steps_of(Regions(GROUP))}, result


def pipelined() -> Runtime:
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

    def result(found: Results) -> dict[str, float]:
        return {"pp_action": (found["pipeline"][0] - found["loop"][0]) / (2 * MICRO)}

    return {"pipeline": alone(lambda: schedule.step(x, target=y)), "loop": alone(looped)}, result
