"""Random draws with one fixed outcome, so that a plan whose ranks draw for themselves can be compared with one device.

Dropout by function, attention with dropout, sampled codes and dropped paths draw inside the model's forward: in another
order and number on every rank. Inside `settled()` each draw gives the same value for every element and every piece of
the batch: nothing is dropped, and normal and uniform numbers are what lies half a deviation above the mean or half way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SUBCLASSES = ("DTensor", "AsyncCollectiveTensor")  # they come back as their local ops


class Settled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the draws that it settled in `draws`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ in SUBCLASSES for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        settle = _SETTLED.get(func.name().partition("::")[2].partition(".")[0])
        if settle is None:
            return func(*args, **kwargs)
        self.draws += 1
        return settle(func, args, kwargs)


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    x, p = args[0], args[1]
    return x / (1 - p) if p < 1 else x * 0, torch.ones_like(x, dtype=torch.bool)


def _filled(value: Callable[..., float]) -> Callable[[Any, Any, Any], Any]:
    """Draws in place: the tensor filled with a value of the other arguments."""
    return lambda func, args, kwargs: args[0].fill_(value(*args[1:], **_plain(kwargs)))


def _made(value: float) -> Callable[[Any, Any, Any], Any]:
    """Draws that make a tensor."""
    return lambda func, args, kwargs: func(*args, **kwargs).fill_(value)


def _plain(kwargs: Any) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "generator"}


def _certain(func: Any, args: Any, kwargs: Any) -> Any:
    """`bernoulli`, of a tensor of probabilities."""
    return (args[0] >= 0.5).to(args[0].dtype)


def _likely(func: Any, args: Any, kwargs: Any) -> Any:
    """`bernoulli_`, of a number or of a tensor of probabilities."""
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return args[0].copy_(p >= 0.5) if isinstance(p, torch.Tensor) else args[0].fill_(float(p >= 0.5))


def _whole(func: Any, args: Any, kwargs: Any) -> Any:
    """`randint`, `randint_like`: whole numbers below a high end, or between two."""
    ends = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    named = [kwargs[name] for name in ("low", "high") if name in kwargs]
    low, high = ([0, *ends, *named])[-2:]
    return func(*args, **kwargs).fill_((low + high) // 2)


def _in_order(func: Any, args: Any, kwargs: Any) -> Any:
    """`randperm`: nothing changes places."""
    found = func(*args, **kwargs)
    return found.copy_(torch.arange(len(found), dtype=found.dtype, device=found.device))


_SETTLED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "native_dropout": _dropout,
    "bernoulli": _certain,
    "bernoulli_": _likely,
    "normal_": _filled(lambda mean=0.0, std=1.0: mean + std / 2),
    "uniform_": _filled(lambda low=0.0, high=1.0, **ends: (low + high) / 2),
    "exponential_": _filled(lambda rate=1.0, **named: 1 / named.get("lambd", rate)),
    "random_": _filled(lambda low=0, high=None: 0 if high is None else (low + high) // 2),
    "randperm": _in_order,
    **dict.fromkeys(("randint", "randint_like"), _whole),
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like"), _made(0.5)),
}


def settled() -> Settled:
    """A context in which random draws have one outcome; `draws` says how many there were."""
    return Settled()
