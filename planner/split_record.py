"""Records a module's forward at module granularity: which submodules and torch functions the opened modules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for a tensor that a recorded call made (or a model input)."""

    index: int


@dataclass(frozen=True, slots=True)
class Held:
    """Stands for a parameter or buffer, by its first name in the model."""

    name: str


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """What the recording saw of a value. `storage` identifies the memory it shares with other values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int
    made_by: str


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded call: of a module (`target` is its path) or of a torch function.

    outputs: for every leaf of the result the value that it becomes, None for leaves that are no new tensors.
    constant: it depends on no model input and no parameter, so that any stage may repeat it.
    grad: whether autograd was enabled.
    """

    target: str | Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[int | None, ...]
    reads: tuple[int, ...]
    constant: bool
    mutates: bool
    sets_item: bool
    grad: bool

    @property
    def writes(self) -> tuple[int, ...]:
        return tuple(v for v in self.outputs if v is not None)


class Recorder(TorchFunctionMode):
    """Records the calls made directly by `opened` modules of `root`; every other module is one call."""

    def __init__(self, root: nn.Module, opened: set[str], held: dict[str, Any], inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.values: list[ValueInfo] = []
        self.output: Any = None
        self._paths = {id(m): path for path, m in reversed(list(root.named_modules()))}
        self._opened = opened | {""}
        self._held = {id(t): name for name, t in held.items()}
        self._at: dict[int, int] = {}
        self._varying: set[int] = set()  # values that depend on a model input or a parameter
        self._alive: list[Any] = [held, inputs]  # ids stay unique while the recorder lives
        self._inside = 0
        self.inputs = [self._define(t, "a model input") for t in inputs if isinstance(t, torch.Tensor)]
        self._varying.update(self.inputs)

    @contextmanager
    def recording(self) -> Iterator[None]:
        original = nn.Module.__call__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = recorder._paths.get(id(module))
            if recorder._inside or path is None or path in recorder._opened:
                return original(module, *args, **kwargs)
            recorder._inside += 1
            try:
                encoded = recorder.encode((args, kwargs))
                result = original(module, *args, **kwargs)
                learns = any(True for _ in module.parameters())
                recorder._add(path, encoded, result, varying=learns, mutates=False)
            finally:
                recorder._inside -= 1
            return result

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        sets_item = func is torch.Tensor.__setitem__
        encoded = self.encode((args, kwargs))
        self._inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._inside -= 1
        name = getattr(func, "__name__", "")
        if sets_item:
            self._add(func, encoded, args[0], varying=False, mutates=True, sets_item=True)
        elif any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            mutates = (name.endswith("_") and not name.endswith("__")) or (
                name.startswith("__i") and name != "__invert__"
            )
            self._add(func, encoded, result, varying=False, mutates=mutates)
        return result

    def encode(self, tree: Any) -> Any:
        """`tree` with `Value` and `Held` in place of tensors; tensors from outside stay as constants."""
        return tree_map_only(torch.Tensor, self._ref, tree)

    def _ref(self, t: torch.Tensor) -> Any:
        if id(t) in self._held:
            return Held(self._held[id(t)])
        if id(t) in self._at:
            return Value(self._at[id(t)])
        if isinstance(t, FakeTensor):
            raise ValueError(
                "the model's forward makes a tensor in a way that cannot be followed "
                f"(shape {tuple(t.shape)}); make it with a torch function, or inside a submodule that is not cut"
            )
        return t

    def _define(self, t: torch.Tensor, made_by: str) -> int:
        self._alive.append(t)
        storage = t.untyped_storage()._cdata
        self.values.append(ValueInfo(t.shape, tuple(t.stride()), t.dtype, t.requires_grad, storage, made_by))
        self._at[id(t)] = len(self.values) - 1
        return self._at[id(t)]

    def _add(
        self, target: Any, encoded: Any, result: Any, *, varying: bool, mutates: bool, sets_item: bool = False
    ) -> None:
        leaves = tree_leaves(encoded)
        reads = tuple(dict.fromkeys(leaf.index for leaf in leaves if isinstance(leaf, Value)))
        varying = varying or any(v in self._varying for v in reads)
        varying = varying or any(self._is_parameter(leaf) for leaf in leaves)
        made_by = f"the output of {target!r}" if isinstance(target, str) else f"made by {target.__name__}"
        outputs = tuple(
            self._define(t, made_by) if isinstance(t, torch.Tensor) and id(t) not in self._held else None
            for t in tree_leaves(result)
        )
        if varying:
            self._varying.update(v for v in outputs if v is not None)
        args, kwargs = encoded
        grad = torch.is_grad_enabled()
        self.calls.append(Call(target, args, kwargs, outputs, reads, not varying, mutates, sets_item, grad))

    def _is_parameter(self, leaf: Any) -> bool:
        return isinstance(leaf, Held) and leaf.name in self._parameter_names

    @property
    def _parameter_names(self) -> set[str]:
        return {name for name, t in self._alive[0].items() if isinstance(t, nn.Parameter)}
