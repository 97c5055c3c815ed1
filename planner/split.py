"""Splits any module into pipeline stages at module paths, without torch.export or fx.

`split` runs the root's forward once under fake tensors and writes down what the root and the ancestors of the cuts do:
which submodules they call and which torch functions they call themselves. A stage replays its part of this program
with the real submodules, at exactly the micro-batch size of the recording (shapes are plain ints in it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from opgraph.grouped import GroupedProducts
from opgraph.masks import masks_as_run
from planner.split_record import Call, Held, Recorder, Value, ValueInfo


@dataclass(frozen=True, slots=True)
class StageProgram:
    """What one stage does with what it receives.

    receives, sends: indices of the values that come from the previous stage (the model's inputs for stage 0) and go
    to the next one. `output` is the model's output with `Value`s in place of tensors (last stage only, else None).
    `modules` are the submodules that it calls, `held` the parameters and buffers that its own calls read,
    `parameters` the first names of all its parameters.
    """

    index: int
    calls: tuple[Call, ...]
    receives: tuple[int, ...]
    sends: tuple[int, ...]
    output: Any
    modules: tuple[str, ...]
    held: tuple[str, ...]
    parameters: frozenset[str]

    @property
    def outputs(self) -> int:
        """Tensors of the model's output, 0 where another stage makes it."""
        return sum(map(_is_tensor_leaf, tree_leaves(self.output)))


@dataclass(frozen=True, slots=True)
class Split:
    """All stages of a model. `shared_parameters`: (parameter name, the stages that use it), for parameters that more
    than one stage uses (tied weights): their gradients must be summed over these stages."""

    stages: tuple[StageProgram, ...]
    values: tuple[ValueInfo, ...]
    shared_parameters: tuple[tuple[str, tuple[int, ...]], ...]


def split(
    module: nn.Module,
    cuts: Iterable[str],
    inputs: tuple[torch.Tensor, ...],
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
) -> Split:
    """Splits `module` (real or meta) before each module path in `cuts`; `inputs` are one micro-batch.

    ValueError if a cut is not called exactly once in the order given, if integers would cross a cut, or if the
    forward cannot be recorded.
    """
    cuts = tuple(cuts)
    recorder = _record(module, cuts, inputs, torch.device(device), autocast)
    starts = _starts(recorder.calls, cuts)
    stage_of = [sum(i >= start for start in starts) for i in range(len(recorder.calls))]
    return _cut(recorder, stage_of, cuts, module)


def _record(
    module: nn.Module, cuts: tuple[str, ...], inputs: tuple[Any, ...], device: torch.device, autocast: Any
) -> Recorder:
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    for cut in cuts:
        if cut not in paths or not cut:
            raise ValueError(f"cut {cut!r} is no module path of the model; paths look like {sorted(paths)[-1]!r}")
    opened = {cut[:i] for cut in cuts for i in range(len(cut)) if i == 0 or cut[i] == "."}
    with _disable_current_modes(), _fake_mode(), _own_tensors(module):
        held = {name: _fake(t, device) for name, t in module.named_parameters()}
        held |= {name: _fake(t, device) for name, t in module.named_buffers()}
        fakes = tuple(_fake(t, device) if isinstance(t, torch.Tensor) else t for t in inputs)
        recorder = Recorder(module, opened, held, fakes)
        casting = torch.autocast(device.type, dtype=autocast) if autocast else nullcontext()
        try:
            with torch.enable_grad(), casting, masks_as_run(), recorder.recording():
                output = torch.func.functional_call(module, held, fakes, tie_weights=True)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"the model's forward cannot be recorded for pipeline stages ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}); move control flow that depends on tensor values "
                "into a submodule that is not cut, or use pp = 1"
            ) from error
        recorder.output = recorder.encode(output)
    return recorder


@contextmanager
def _fake_mode() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), GroupedProducts():
        yield


@contextmanager
def _own_tensors(module: nn.Module) -> Iterator[None]:
    """Gives every module its tensors back: `functional_call` leaves others in one that the model holds twice."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, parameters, buffers in before:
            m._parameters.update(parameters)
            m._buffers.update(buffers)


def _fake(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    if isinstance(t, nn.Parameter):
        return nn.Parameter(fake, requires_grad=t.requires_grad)
    return fake.requires_grad_(t.requires_grad)


def _starts(calls: list[Call], cuts: tuple[str, ...]) -> list[int]:
    """Index of the call at which each cut's stage begins."""
    starts = []
    for cut in cuts:
        found = [i for i, call in enumerate(calls) if call.target == cut]
        if len(found) != 1:
            times = "never called" if not found else f"called {len(found)} times"
            raise ValueError(
                f"cut {cut!r} is {times} in the model's forward; cut at a module that is called exactly once "
                "by modules which are themselves called once"
            )
        starts.append(found[0])
    if starts != sorted(starts) or len(set(starts)) != len(starts):
        raise ValueError(f"cuts {', '.join(cuts)} are not in execution order; sort them as the forward calls them")
    return starts


def _cut(recorder: Recorder, stage_of: list[int], cuts: tuple[str, ...], module: nn.Module) -> Split:
    calls, stages = recorder.calls, len(cuts) + 1
    home: dict[int, int] = dict.fromkeys(recorder.inputs, 0)  # value -> stage that makes it; constants have none
    used: list[set[int]] = [set() for _ in range(stages)]
    for stage, call in zip(stage_of, calls):
        if not call.constant:
            used[stage].update(call.reads)
            home.update(dict.fromkeys(call.writes, stage))
    used[-1].update(leaf.index for leaf in tree_leaves(recorder.output) if isinstance(leaf, Value))
    crossing: list[tuple[int, ...]] = [tuple(recorder.inputs)]
    for k in range(1, stages):
        later = set().union(*used[k:])
        crossing.append(tuple(sorted(v for v in later if v in home and home[v] < k)))
        for v in crossing[k]:
            info = recorder.values[v] = replace(recorder.values[v], stride=_contiguous(recorder.values[v].shape))
            if not (info.dtype.is_floating_point or info.dtype.is_complex):
                raise ValueError(
                    f"cut at {cuts[k - 1]!r} would have to send an integer tensor ({info.made_by}, {info.dtype}, "
                    f"shape {tuple(info.shape)}), which has no gradient; cut elsewhere or compute it in the later stage"
                )
    programs = []
    for k in range(stages):
        own = _with_constants(recorder, stage_of, k, used[k])
        sends = crossing[k + 1] if k + 1 < stages else ()
        output = recorder.output if k + 1 == stages else None
        programs.append(_program(k, own, crossing[k], sends, output, module))
    by_name: dict[str, list[int]] = {}
    for program in programs:
        for name in program.parameters:
            by_name.setdefault(name, []).append(program.index)
    shared = tuple((name, tuple(at)) for name, at in sorted(by_name.items()) if len(at) > 1)
    return Split(tuple(programs), tuple(recorder.values), shared)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _with_constants(recorder: Recorder, stage_of: list[int], stage: int, used: set[int]) -> list[Call]:
    """The stage's calls in order, with a copy of every constant call that they need."""
    needed = set(used)
    storages = {recorder.values[v].storage for v in needed}
    own: list[Call] = []
    for i in reversed(range(len(recorder.calls))):
        call = recorder.calls[i]
        if call.constant:
            touched = {recorder.values[v].storage for v in call.writes}
            if not (needed & set(call.writes) or (call.mutates and touched & storages)):
                continue
            needed.update(call.reads)
            storages.update(recorder.values[v].storage for v in call.reads)
        elif stage_of[i] != stage:
            continue
        own.append(call)
    return own[::-1]


def _program(
    index: int, calls: list[Call], receives: tuple[int, ...], sends: tuple[int, ...], output: Any, module: nn.Module
) -> StageProgram:
    modules = tuple(dict.fromkeys(call.target for call in calls if isinstance(call.target, str)))
    leaves = [leaf for call in calls for leaf in tree_leaves((call.args, call.kwargs))] + tree_leaves(output)
    held = tuple(dict.fromkeys(leaf.name for leaf in leaves if isinstance(leaf, Held)))
    first = {id(p): name for name, p in module.named_parameters()}
    used = [p for path in modules for p in module.get_submodule(path).parameters()]
    used += [t for name in held if isinstance(t := _attribute(module, name), nn.Parameter)]
    return StageProgram(
        index, tuple(calls), receives, sends, output, modules, held, frozenset(first[id(p)] for p in used)
    )


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


class StageModule(nn.Module):
    """One stage: replays its calls on the submodules of `module` that it needs, under their original names.

    `forward(*received)` returns the tuple of values for the next stage; the last stage returns the tensors of the
    model's output as a tuple (or the tensor itself), which `unflatten` makes into the model's output again.
    `original_fqn`: parameter name here -> first name of that parameter in the whole model.
    `expected_shapes`: shapes of what the stage sends.
    """

    def __init__(self, module: nn.Module, whole: Split, index: int, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        program = whole.stages[index]
        self._parplan_program = program
        self._parplan_autocast = autocast
        self._parplan_drops = _drops(program)
        self._parplan_shapes = tuple(whole.values[v].shape for v in program.sends)
        for path in program.modules:
            _place(self, path, module.get_submodule(path))
        for name in program.held:
            _place(self, name, _attribute(module, name))
        first = {id(p): name for name, p in module.named_parameters()}
        self.original_fqn = {name: first[id(p)] for name, p in self.named_parameters()}
        self.train(module.training)

    def forward(self, *received: Any) -> Any:
        program = self._parplan_program
        values = dict(zip(program.receives, received))
        del received
        with self._casting():
            for call, drop in zip(program.calls, self._parplan_drops):
                self._replay(call, values)
                for v in drop:
                    values.pop(v, None)
        if program.output is None:
            sent = tuple(values[v] for v in program.sends)
            for value, shape in zip(sent, self._parplan_shapes):
                if value.shape != shape:
                    raise ValueError(
                        f"stage {program.index} would send a tensor of shape {tuple(value.shape)} where the unsplit "
                        f"model has {tuple(shape)}; do not cut between a colwise and its rowwise module"
                    )
            return tuple(value.contiguous() for value in sent)  # process groups send contiguous tensors only
        tensors = tuple(t for t in tree_leaves(self._resolve(program.output, values)) if isinstance(t, torch.Tensor))
        return tensors[0] if len(tensors) == 1 else tensors

    def unflatten(self, output: Any) -> Any:
        """The model's output from what the last stage's forward returned."""
        tensors = iter(output if isinstance(output, tuple) else (output,))
        tree = self._parplan_program.output
        leaves = [next(tensors) if _is_tensor_leaf(leaf) else leaf for leaf in tree_leaves(tree)]
        return tree_unflatten(leaves, tree_structure(tree))

    def _casting(self) -> Any:
        if self._parplan_autocast is None:
            return nullcontext()
        parameter = next(iter(self.parameters()), None)
        return torch.autocast(parameter.device.type if parameter is not None else "cpu", dtype=self._parplan_autocast)

    def _replay(self, call: Call, values: dict[int, Any]) -> None:
        args, kwargs = self._resolve((call.args, call.kwargs), values)
        run: Callable[..., Any] = self.get_submodule(call.target) if isinstance(call.target, str) else call.target
        with nullcontext() if call.grad else torch.no_grad():
            result = run(*args, **kwargs)
        if call.sets_item:
            result = args[0]
        values.update({v: leaf for v, leaf in zip(call.outputs, tree_leaves(result)) if v is not None})

    def _resolve(self, tree: Any, values: dict[int, Any]) -> Any:
        def real(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.index]
            return _attribute(self, leaf.name) if isinstance(leaf, Held) else leaf

        return tree_map(real, tree)


def _is_tensor_leaf(leaf: Any) -> bool:
    return isinstance(leaf, Value | Held | torch.Tensor)


def _drops(program: StageProgram) -> tuple[tuple[int, ...], ...]:
    """For every call the values that nothing after it needs."""
    kept = set(program.sends) | {leaf.index for leaf in tree_leaves(program.output) if isinstance(leaf, Value)}
    drops: list[tuple[int, ...]] = []
    for call in reversed(program.calls):
        touched = set(call.reads) | set(call.writes)
        drops.append(tuple(touched - kept))
        kept |= set(call.reads)
    return tuple(drops[::-1])


def _place(root: nn.Module, path: str, item: Any) -> None:
    """Puts a module, parameter or buffer below `root` at `path`, with empty modules on the way."""
    *parents, leaf = path.split(".")
    at = root
    for name in parents:
        if name not in at._modules:
            at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    if isinstance(item, nn.Module):
        at.add_module(leaf, item)
    elif isinstance(item, nn.Parameter):
        at.register_parameter(leaf, item)
    else:
        at.register_buffer(leaf, item)
