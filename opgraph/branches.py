"""Whether other data lead a model through other code: ranks of different data would then run different operators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = 6  # batches that are tried beside the first: a coin that falls the same way seven times is rare


def takes_other_paths(module: nn.Module, batch: Callable[[], Sequence[Any]]) -> bool:
    """Whether the forward of real weights enters other modules, or runs other operators, on some of several batches.
    `batch()` draws a module's inputs under the current seed."""
    module = copy.deepcopy(module)
    found = set[tuple[str, ...]]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in range(DRAWS + 1):
            torch.manual_seed(seed)
            inputs = batch()
            found.add(_path(module, inputs))
            if len(found) > 1:
                return True
    return False


def _path(module: nn.Module, inputs: Sequence[Any]) -> tuple[str, ...]:
    """The modules that the forward enters and the operators that it runs, in order."""
    said: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            said.append(str(func))
            return func(*args, **kwargs or {})

    handles = [
        part.register_forward_pre_hook(lambda *_, path=path: said.append(path)) for path, part in module.named_modules()
    ]
    try:
        with Names():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(said)
