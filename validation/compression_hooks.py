"""DDP communication hooks that torch does not have: 8-bit, 1-bit and top-k with error feedback, over all_gather; and
what watches any hook: a record of its collectives, and one that sends nothing.

The ops are those of `costmodels.compression_ops`, one by one. Averages are taken over the ranks, as DDP does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
import torch.distributed as dist

from costmodels.compression import BLOCK, Compression, Message, kept

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(slots=True)
class Feedback:
    """What was not sent yet, by bucket, and how to compress."""

    compression: Compression
    errors: dict[int, torch.Tensor] = field(default_factory=dict)

    def corrected(self, bucket: Any) -> torch.Tensor:
        """The bucket's gradient with what is left of the gradients before."""
        gradient: torch.Tensor = bucket.buffer()
        error = self.errors.get(bucket.index())
        if error is None or error.numel() != gradient.numel():  # DDP makes its buckets anew after the first step
            error = self.errors[bucket.index()] = torch.zeros_like(gradient)
        return gradient.add_(error)

    @property
    def bytes(self) -> int:
        return sum(e.nbytes for e in self.errors.values())


def hook_of(compression: Compression) -> tuple[Any, Hook]:
    """State and hook: torch's own where it has one (it has none for dgc, and neither have we)."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    plain: dict[str, Any] = {
        "none": default_hooks.allreduce_hook, "fp16": default_hooks.fp16_compress_hook,
        "bf16": default_hooks.bf16_compress_hook,
    }  # fmt: skip
    own = {"sign": sign_hook, "topk": topk_hook, "int8": int8_hook}
    if compression.kind in plain:
        return None, plain[compression.kind]
    if compression.kind in own:
        return Feedback(compression), own[compression.kind]
    if compression.kind == "powersgd":  # torch asks for two plain steps before error feedback
        make: Any = PowerSGDState
        return make(None, matrix_approximation_rank=compression.rank, start_powerSGD_iter=2), _in_turn(powerSGD_hook)
    raise ValueError(f"no hook is written for {compression.name}; use none, fp16, bf16, int8, sign, topk or powersgd")


def _in_turn(hook: Any) -> Hook:
    """PowerSGD's later messages are issued by callbacks. With NCCL these run in the thread that calls the hook; gloo
    runs them in its own two threads, in an order that differs between ranks, and where two buckets wait there for
    their next message, nothing moves any more (seen within a few steps). So every message is waited for at once: the
    numbers are the same, and nothing overlaps."""

    def run(state: Any, bucket: Any) -> Any:
        issue = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            work: Any = issue(tensor, *args, **kwargs)
            work.wait()
            return _Done([tensor])

        with _patched(all_reduce, dist.all_gather):
            return hook(state, bucket)

    return run


def kept_bytes(state: Any) -> int:
    """Bytes of tensors that a hook keeps from step to step."""
    if state is None:
        return 0
    if isinstance(state, Feedback):
        return state.bytes
    stores = (state.error_dict, state.p_memory_dict, state.q_memory_dict)
    return sum(t.nbytes for store in stores for t in store.values())


def sign_hook(state: Feedback, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """One bit an element and the mean of the absolute values (EF-signSGD)."""
    whole, error = state.corrected(bucket), state.errors[bucket.index()]
    n = whole.numel()
    scale = torch.linalg.vector_norm(whole, ord=1).div_(n)
    positive = whole >= 0
    padded = torch.nn.functional.pad(positive, (0, -n % 8)) if n % 8 else positive
    bits = (padded.view(torch.uint8).view(-1, 8) * _BITS).sum(1, dtype=torch.uint8)
    torch.sub(whole, torch.where(positive, scale, -scale), out=error)

    def decode(code: torch.Tensor, total: torch.Tensor) -> None:
        factor = code[:4].view(torch.float32)  # first, where it is aligned
        ones = (code[4:].unsqueeze(1) & _BITS).ne(0).view(-1)[:n]
        total.add_(torch.where(ones, factor, -factor))

    return _gathered(torch.cat((scale.view(1).view(torch.uint8), bits)), whole, decode)


def int8_hook(state: Feedback, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """8-bit integers with a scale for every BLOCK elements; what rounding loses is lost."""
    whole = bucket.buffer()
    n = whole.numel()
    padded = torch.nn.functional.pad(whole, (0, -n % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1, keepdim=True).clamp_min(1e-30)
    codes = torch.div(padded, scales / 127).round_().to(torch.int8).view(-1)[:n]

    def decode(code: torch.Tensor, total: torch.Tensor) -> None:
        # the scales stand first, where they are aligned
        steps, values = code[: 4 * ceil(n / BLOCK)].view(torch.float32), code[4 * ceil(n / BLOCK) :].view(torch.int8)
        each = steps.repeat_interleave(BLOCK)[:n]
        total.add_(values.to(torch.float32).mul_(each))

    return _gathered(torch.cat(((scales / 127).view(-1).view(torch.uint8), codes.view(torch.uint8))), whole, decode)


def topk_hook(state: Feedback, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """The largest elements, each with its 32-bit index; the others wait for their turn."""
    whole, error = state.corrected(bucket), state.errors[bucket.index()]
    k = kept(state.compression, whole.numel())
    places = torch.topk(whole.abs(), k, sorted=False).indices
    values = whole[places]
    error.copy_(whole).index_fill_(0, places, 0.0)

    def decode(code: torch.Tensor, total: torch.Tensor) -> None:
        total.index_add_(0, code[4 * k :].view(torch.int32).to(torch.int64), code[: 4 * k].view(torch.float32))

    return _gathered(torch.cat((values.view(torch.uint8), places.to(torch.int32).view(torch.uint8))), whole, decode)


def _gathered(
    code: torch.Tensor, whole: torch.Tensor, decode: Callable[[torch.Tensor, torch.Tensor], None]
) -> torch.futures.Future[torch.Tensor]:
    """All ranks' codes, decoded into the mean, in the place of the gradient."""
    ranks = dist.get_world_size()
    codes = [torch.empty_like(code) for _ in range(ranks)]
    work: Any = dist.all_gather(codes, code, async_op=True)

    def finish(done: Any) -> torch.Tensor:
        done.value()
        whole.zero_()
        for one in codes:
            decode(one, whole)
        return whole.div_(ranks)

    found: torch.futures.Future[torch.Tensor] = work.get_future().then(finish)
    return found


# DDP compares the annotations themselves, which `from __future__ import annotations` makes strings
_c10d: Any = dist
for _hook in (sign_hook, int8_hook, topk_hook):
    _hook.__annotations__ |= {"bucket": _c10d.GradBucket, "return": torch.futures.Future[torch.Tensor]}


@contextmanager
def recorded(messages: list[Message]) -> Iterator[None]:
    """Adds every all_reduce and all_gather that is issued meanwhile, whichever thread issues it; empty ones carry
    nothing and are left out. Bytes as nccl-tests counts them."""
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.nbytes:
            messages.append(Message("all_reduce", tensor.nbytes))
        return reduce(tensor, *args, **kwargs)

    def all_gather(out: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        messages.append(Message("all_gather", sum(t.nbytes for t in out)))
        return gather(out, tensor, *args, **kwargs)

    with _patched(all_reduce, all_gather):
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Collectives return at once: a hook then takes its encoding and decoding, nothing else."""

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Done([tensor])

    def all_gather(out: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for one in out:
            one.copy_(tensor)
        return _Done(out)

    with _patched(all_reduce, all_gather):
        yield


@dataclass(slots=True)
class _Done:
    """A collective that has finished."""

    result: list[torch.Tensor]

    def wait(self) -> bool:
        return True

    def get_future(self) -> Any:
        done: Any = torch.futures.Future()
        done.set_result(self.result)
        return done


@contextmanager
def _patched(all_reduce: Any, all_gather: Any) -> Iterator[None]:
    originals = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield
    finally:
        dist.all_reduce, dist.all_gather = originals
