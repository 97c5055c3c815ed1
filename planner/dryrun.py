"""Dry run: the applied program of one rank under fake tensors and a fake process group, everything recorded.

It runs the same `apply` as execution does; no weights are allocated and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from opgraph.workload import Workload
from planner.apply import Step, apply
from planner.apply_record import Collective, LocalOp, StepRecorder, following_fsdp
from planner.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class DryRun:
    """What one rank does in one steady training step, in program order.

    peak_bytes: most bytes of tensors alive at once in the step, parameters and optimizer state included.
    resting_bytes: bytes alive between steps.
    """

    rank: int
    records: tuple[LocalOp | Collective, ...]
    peak_bytes: int
    resting_bytes: int

    @property
    def ops(self) -> tuple[LocalOp, ...]:
        return tuple(r for r in self.records if isinstance(r, LocalOp))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(r for r in self.records if isinstance(r, Collective))


def dry_run(plan: ParallelPlan, workload: Workload, rank: int, backend: Literal["gloo", "nccl"] = "gloo") -> DryRun:
    """Records rank `rank`'s third step (DDP has its final buckets, optimizer states exist).

    `backend` is the one whose scratch memory `peak_bytes` counts; the records do not depend on it.

    ValueError if a default process group exists: the dry run makes its own and destroys it.
    """
    if dist.is_available() and dist.is_initialized():
        raise ValueError("a process group exists in this process; run the dry run in a process of its own")
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"rank {rank} is not in the plan's world of {plan.world_size} ranks")
    with torch.random.fork_rng(devices=[]):
        batch = workload.batch(plan.global_batch // plan.dp)
    with _fake_world(plan, rank), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        recorder = StepRecorder(backend)
        with recorder.watching(), following_fsdp(recorder), _real_meshes():
            step = apply(plan, workload, rank, materialize=False)
            inputs, targets = (
                tuple(fake.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in tensors) for tensors in batch
            )
            for t in (*inputs, *targets):
                if isinstance(t, torch.Tensor):
                    recorder.follow(t)
            recorder.hooked_reducer = isinstance(step.wrapped, DistributedDataParallel)
            _without_data(step)
            step.run(inputs, targets)
            if isinstance(step.wrapped, DistributedDataParallel):
                with _RealIndices():  # as DDP's next forward would do
                    step.wrapped.reducer._rebuild_buckets()
            step.run(inputs, targets)
            return _record(recorder, step, inputs, targets)


def record_step(step: Step, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> DryRun:
    """Records one more step of an applied plan on real tensors (its peak bytes count only what the step touches)."""
    recorder = StepRecorder()
    with recorder.watching():
        return _record(recorder, step, inputs, targets)


def to_json(run: DryRun) -> dict[str, Any]:
    """Plain data: the records as dicts with a `kind` for collectives."""
    return {"rank": run.rank, "peak_bytes": run.peak_bytes, "records": [asdict(r) for r in run.records]}


def _record(recorder: StepRecorder, step: Step, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> DryRun:
    recorder.know(step.model)
    resting = recorder.live_bytes
    recorder.peak_bytes, recorder.records, recorder.recording = resting, [], True
    with _marking_pipeline(recorder, step):
        step.backward_only(inputs, targets)
    recorder.part = "optimizer"
    step.update()
    recorder.recording = False
    return DryRun(step.rank, tuple(recorder.records), recorder.peak_bytes, resting)


@contextmanager
def _marking_pipeline(recorder: StepRecorder, step: Step) -> Iterator[None]:
    """Tells the recorder which messages carry gradients and which ops reduce them after the last backward."""
    if step.schedule is None:
        yield
        return
    stage = step.schedule._stage
    reduce = stage.perform_reduce_grad

    def noting(name: str) -> None:
        original = getattr(stage, name)

        def get(chunk: int) -> Any:
            ops = original(chunk)
            recorder.backward_messages.update(op.tensor.untyped_storage()._cdata for op in ops)
            return ops

        setattr(stage, name, get)

    def reducing(scale: int) -> None:
        recorder.part = "backward"
        reduce(scale)
        recorder.part = "forward"

    noting("get_bwd_recv_ops")
    noting("get_bwd_send_ops")
    stage.perform_reduce_grad = reducing
    try:
        yield
    finally:
        for name in ("get_bwd_recv_ops", "get_bwd_send_ops", "perform_reduce_grad"):
            delattr(stage, name)


@contextmanager
def _fake_world(plan: ParallelPlan, rank: int) -> Iterator[None]:
    if plan.world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Keeps the rank tables of device meshes real: FSDP joins the meshes of dp and tp while it wraps."""
    names = [name for name in ("__init__", "_concatenate") if hasattr(DeviceMesh, name)]
    originals = {name: DeviceMesh.__dict__[name] for name in names}

    def without_modes(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return original(*args, **kwargs)

        return run

    for name, original in originals.items():
        plain = original.__func__ if isinstance(original, staticmethod | classmethod) else original
        wrapped = without_modes(plain)
        setattr(DeviceMesh, name, type(original)(wrapped) if plain is not original else wrapped)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(DeviceMesh, name, original)


def _without_data(step: Step) -> None:
    """Replaces the two places where torch's runtimes read tensor data, which fake tensors do not have."""
    if isinstance(step.wrapped, DistributedDataParallel):
        step.wrapped.register_comm_hook(step.wrapped.process_group, _all_reduce_bucket)
    if step.schedule is not None and hasattr(step.schedule, "_warmup_p2p"):
        from torch.distributed.pipelining._utils import InferenceMode

        def static(stages: Any, *_: Any) -> None:
            for stage in stages:
                stage._inference_mode = InferenceMode.STATIC

        step.schedule._warmup_p2p = static


class _RealIndices(TorchDispatchMode):
    """Keeps the integer tensors real in which DDP's reducer agrees on the order of parameters with the other ranks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        real = tensors and not any(isinstance(t, FakeTensor) for t in tensors)
        if real or (not tensors and kwargs.get("dtype") == torch.int32):
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _all_reduce_bucket(group: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """What DDP's reducer does natively: it divides while it copies gradients in, then all-reduces the bucket."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer, group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


# DDP compares the annotations themselves, which `from __future__ import annotations` makes strings
_c10d: Any = dist
_all_reduce_bucket.__annotations__ |= {"bucket": _c10d.GradBucket, "return": torch.futures.Future[torch.Tensor]}
