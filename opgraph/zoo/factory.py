"""Workloads from a Python file: `file.py:factory`.

`factory()` returns a Workload, or (module, example_inputs), or (module, example_inputs, loss), or a dict with the keys
module, inputs and, where wanted, targets, loss, optimizer, batch, flops. Dim 0 of every example is the batch. The loss
is called as loss(output, *targets) and defaults to the mean square of the outputs; the optimizer, called with the
parameters, defaults to AdamW; batch defaults to that of the examples; flops are formulas of custom ops by name
(`opgraph.workload.Workload.flops`).

The factory is first called under torch.device("meta"), so that a huge module costs nothing, with integers on the CPU,
whose range `batch(n)` keeps. A factory that cannot run so is called for real. `build()` calls it again on the current
default device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from opgraph.flops import Formula
from opgraph.workload import Batch, Workload, adamw, mean_square
from opgraph.zoo.pyfile import call, load_function, quiet

KEYS = ("module", "inputs", "targets", "loss", "optimizer", "batch", "flops")
# What makes integers from integers where no dtype says otherwise, and what does so only where one does.
INTEGER_MAKERS = (torch.randint, torch.randperm, torch.arange, torch.tensor, torch.full)
OTHER_MAKERS = (torch.zeros, torch.ones, torch.empty)
UNIFORM = (torch.rand, torch.rand_like)
KEEPING = frozenset("float double half to type view reshape flatten unsqueeze squeeze clone detach contiguous".split())  # noqa: SIM905
# Of the parameters of the largest list of blocks: smaller lists are details. The first stage of a ResNet has 0.014 to
# 0.018 of what the last has, and most of the activations.
LEAST_SHARE = 0.01
WITHIN_ONE = "_parplan_within_one"
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """What one call of a factory gave."""

    module: nn.Module
    inputs: Tensors
    targets: Tensors
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch: int
    flops: Mapping[str, Formula]


def factory_workload(path: Path, name: str, overrides: Mapping[str, str]) -> Workload:
    """The workload that the function `name` in the file `path` makes; `overrides` may hold batch."""
    spec = f"{path}:{name}"
    batch_size = _batch_override(overrides, spec)
    factory = load_function(path, name)
    made = _first_call(factory, path, spec)
    if isinstance(made, Workload):
        return made if batch_size is None else replace(made, batch_size=batch_size)

    def build() -> nn.Module:
        with quiet():
            again = read_result(call(factory, path), spec)
        assert isinstance(again, Made), "the factory returned a Workload only the second time"
        return with_shapes(again.module, again.inputs, spec)

    @cache
    def examples() -> tuple[Tensors, Tensors]:
        """The examples with values where values are needed: the range of integers."""
        if not any(t.is_meta and not t.is_floating_point() for t in (*made.inputs, *made.targets)):
            return made.inputs, made.targets
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)  # every process must find the same range
            with quiet():
                real = read_result(call(factory, path), spec)
        assert isinstance(real, Made)
        return real.inputs, real.targets

    def batch(n: int) -> Batch:
        inputs, targets = examples()
        return tuple(rows_like(t, n, spec) for t in inputs), tuple(rows_like(t, n, spec) for t in targets)

    blocks = find_blocks(made.module)
    return Workload(spec, build, batch, made.loss, made.optimizer, batch_size or made.batch, blocks, made.flops)


def read_result(result: Any, spec: str) -> Made | Workload:
    """What a factory returned, in one form."""
    if isinstance(result, Workload):
        return result
    if isinstance(result, tuple) and len(result) in (2, 3):
        result = dict(zip(("module", "inputs", "loss"), result))
    if not isinstance(result, dict):
        raise ValueError(
            f"{spec} returned a {type(result).__name__}: return a Workload, (module, inputs), (module, inputs, loss) "
            "or a dict with module and inputs"
        )
    unknown = [str(key) for key in result if key not in KEYS]
    if unknown:
        raise ValueError(f"{spec} returned a dict with {', '.join(unknown)}: its keys can be {', '.join(KEYS)}")
    if not isinstance(result.get("module"), nn.Module):
        raise ValueError(f"{spec} returned a {type(result.get('module')).__name__} as module: return an nn.Module")
    inputs = _tensors(result.get("inputs"), "inputs", spec)
    targets = _tensors(result.get("targets", ()), "targets", spec)
    if not inputs:
        raise ValueError(f"{spec} returned no example inputs: return at least one tensor with the batch in dim 0")
    rows = {t.shape[0] for t in (*inputs, *targets)}
    if len(rows) > 1 or 0 in rows:
        raise ValueError(f"{spec} returned examples with {sorted(rows)} rows: dim 0 must be one batch size above 0")
    batch = result.get("batch") or rows.pop()
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{spec} returned batch={batch!r}: return a whole number above 0")
    loss, optimizer = result.get("loss") or mean_square, result.get("optimizer") or adamw
    for what, value in (("loss", loss), ("optimizer", optimizer)):
        if not callable(value):
            raise ValueError(f"{spec} returned a {type(value).__name__} as {what}: return a function")
    return Made(result["module"], inputs, targets, loss, optimizer, batch, _formulas(result.get("flops"), spec))


def with_shapes(module: nn.Module, inputs: Tensors, spec: str) -> nn.Module:
    """The module; where it has lazy parameters, after they took their shapes from one run on the examples."""
    lazy = next((name for name, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)), "")
    if not lazy:
        return module
    mode, device = module.training, torch.get_default_device()
    try:
        with torch.no_grad():
            module.eval()(*(t.to(device) for t in inputs))
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        raise RuntimeError(
            f"{spec} returned a module with lazy parameters ({lazy}), and its run on the example inputs, from which "
            f"they take their shapes, failed: {type(error).__name__}: {said}"
        ) from error
    return module.train(mode)


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """The module paths in the lists (ModuleList or Sequential) of one class of children that have parameters: of all
    such lists that hold a hundredth or more of what the largest does, as stages of a CNN, or an encoder and a decoder.

    Lists inside of such a list are parts of its blocks, however long they are.
    """
    found: dict[str, tuple[tuple[str, ...], int]] = {}  # prefix of the paths in a list: paths, numbers in parameters
    for path, child in module.named_modules():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f) for f in found):
            continue
        parts = list(child.named_children())
        same = len({type(part) for _, part in parts}) == 1
        if len(parts) < 2 or not same or not all(any(True for _ in part.parameters()) for _, part in parts):
            continue
        prefix = f"{path}." if path else ""
        found[prefix] = tuple(prefix + name for name, _ in parts), sum(p.numel() for p in child.parameters())
    heaviest = max((size for _, size in found.values()), default=0)
    return tuple(path for paths, size in found.values() if size >= LEAST_SHARE * heaviest for path in paths)


def rows_like(example: torch.Tensor, rows: int, spec: str) -> torch.Tensor:
    """`rows` random rows on the CPU: normal where `example` is floating, else uniform between its extremes.

    Floating examples between 0 and 1 (probabilities, pictures) stay there; whole ones (labels) are 0 or 1.
    """
    shape = (rows, *example.shape[1:])
    if example.is_floating_point() and (known := within_one(example)):
        found = torch.rand(shape, dtype=example.dtype, device="cpu")
        return found.round() if known == "whole" else found
    if example.is_floating_point() or example.is_complex():
        return torch.randn(shape, dtype=example.dtype, device="cpu")
    if example.is_meta:
        raise ValueError(f"{spec} returned integer examples without values: make them on the CPU, not on meta")
    if example.dtype == torch.bool:
        return torch.randint(2, shape, device="cpu").bool()
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, shape, device="cpu").to(example.dtype)


def within_one(example: torch.Tensor) -> str:
    """"whole" where all values are 0 or 1, "any" where they lie between, "" elsewhere and where nobody knows. Zeros
    alone say nothing. Of tensors on meta it is known how they were made."""
    if example.is_meta or not example.numel():
        return getattr(example, WITHIN_ONE, "")
    low, high = example.aminmax()
    if not 0 <= low < high <= 1:
        return ""
    return "whole" if bool((example == example.round()).all()) else "any"


class IntegersOnCpu(TorchFunctionMode):
    """Makes integer tensors on the CPU, with their values, where the default device is meta, and marks floating ones
    on meta that `torch.rand` or a truth value made, and what their shape alone is changed of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (*INTEGER_MAKERS, *OTHER_MAKERS) and kwargs.get("device") is None:
            dtype = kwargs.get("dtype")
            by_default = func in INTEGER_MAKERS and all(isinstance(v, int) for v in tree_leaves((args, kwargs)))
            if by_default if dtype is None else not (dtype.is_floating_point or dtype.is_complex):
                kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **kwargs)
        known = "any" if func in UNIFORM else _kept(func, args)
        if known and isinstance(result, torch.Tensor) and result.is_meta and result.is_floating_point():
            setattr(result, WITHIN_ONE, known)
        return result


def _kept(func: Any, args: tuple[Any, ...]) -> str:
    """What is known of the first argument, where `func` changes no value."""
    if not args or not isinstance(args[0], torch.Tensor) or getattr(func, "__name__", "") not in KEEPING:
        return ""
    return "whole" if args[0].dtype == torch.bool else getattr(args[0], WITHIN_ONE, "")


def _first_call(factory: Callable[[], Any], path: Path, spec: str) -> Made | Workload:
    with torch.random.fork_rng(devices=[]):
        for modes in ((torch.device("meta"), IntegersOnCpu()), (torch.device("meta"),)):
            try:
                torch.manual_seed(0)  # every process must find the same examples
                with ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode)
                    result = factory()
            except Exception:  # no factory needs to work on meta; what is wrong with it shows in the real call
                continue
            made = read_result(result, spec)
            if isinstance(made, Made):
                try:
                    with torch.device("meta"):
                        return replace(made, module=with_shapes(made.module, made.inputs, spec))
                except RuntimeError:  # its run needs values
                    break
            break  # a Workload may hold tensors of its own, which meta would have emptied
        torch.manual_seed(0)
        made = read_result(call(factory, path), spec)
        return replace(made, module=with_shapes(made.module, made.inputs, spec)) if isinstance(made, Made) else made


def _tensors(value: Any, what: str, spec: str) -> Tensors:
    values = (value,) if isinstance(value, torch.Tensor) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, torch.Tensor) and v.dim() for v in values):
        raise ValueError(f"{spec} returned {what} that are not tensors with a batch dim: return a tensor or a tuple")
    return tuple(values)


def _formulas(value: Any, spec: str) -> Mapping[str, Formula]:
    made = {} if value is None else value
    if not isinstance(made, Mapping) or not all(isinstance(k, str) and callable(f) for k, f in made.items()):
        raise ValueError(f"{spec} returned flops that are no dict of op names and functions: {{'mylib.op.default': f}}")
    return dict(made)


def _batch_override(overrides: Mapping[str, str], spec: str) -> int | None:
    for key in overrides:
        if key != "batch":
            raise ValueError(f"{spec} has no dimension {key!r}: a model from a file has only batch")
    text = overrides.get("batch")
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise ValueError(f"batch={text} is not a whole number above 0")
    return None if text is None else int(text)
