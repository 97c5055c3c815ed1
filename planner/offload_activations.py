"""Which activations leave the device between the forward and the backward of recomputed modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from opgraph.graph import Op
from planner.memory_sizes import local_bytes, outputs, received
from planner.runtime_stage import Stage
from planner.script import Copy, Item, Wait
from planner.stages import within


@dataclass(frozen=True, slots=True)
class Moved:
    """Of one recomputed module, bytes on a rank by storage: what goes down when its forward begins, and what comes up
    before it is run again. leaves: by forward op, the storages that the device forgets after it."""

    down: dict[int, int] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    leaves: dict[int, list[int]] = field(default_factory=dict)


def moved(stage: Stage) -> dict[str, Moved]:
    """By recomputed module. An activation that several modules read goes down with the first and comes up for the last
    one; what backward needs outside of them stays, as do the buffers of a pipeline's messages and what runtimes keep.
    """
    if "activations" not in stage.plan.offload:
        return {}
    if not stage.crossing:
        stage.crossing.update({path: Moved() for path in stage.recompute})
        _find(stage)
    return stage.crossing


def _find(stage: Stage) -> None:
    graph, forward = stage.graph, stage.ops.forward
    region = {op.id: next((p for p in stage.recompute if within(op.module, p)), "") for op in forward}
    ends = {region[op.id]: op.id for op in forward}  # the last op of every module
    made = {graph.tensors[t].storage: t for op in reversed(forward) for t in op.outputs}
    births = {s: region.get(graph.storages[s].birth, "") for s in made}
    readers: dict[int, list[int]] = defaultdict(list)
    for op in forward:
        for s in {graph.tensors[t].storage for t in op.inputs}:
            readers[s].append(op.id)
    staying = _staying(stage, region)
    for s, ops in readers.items():
        paths = list(dict.fromkeys(region[op] for op in ops if region[op] and region[op] != births.get(s)))
        if not paths or graph.storages[s].birth not in region or graph.storages[s].death <= forward[-1].id:
            continue
        if s in staying:
            continue
        size = local_bytes(stage.layout, graph.storages[s].bytes, made[s])
        stage.crossing[paths[0]].down[s] = size
        stage.crossing[paths[-1]].up[s] = size
        last = max(ops[-1], *(ends[path] for path in paths))
        stage.crossing[paths[0]].leaves.setdefault(last, []).append(s)


def _staying(stage: Stage, region: dict[int, str]) -> set[int]:
    """Storages that backward needs outside of the recomputed modules, or that the runtimes of a pipeline hold."""
    tensors = stage.graph.tensors
    needed = {
        tensors[t].storage
        for op in stage.ops.backward if not any(within(op.module, p) for p in stage.recompute)
        for t in op.inputs
    }  # fmt: skip
    return needed | {tensors[t].storage for t in (*received(stage), *stage.ops.sends, *outputs(stage))}


class Crossing:
    """The copies of activations in one forward or backward pass."""

    def __init__(self, stage: Stage) -> None:
        self.found: dict[str, Moved] = moved(stage)
        self.order = [path for path in reversed(stage.recompute) if path in self.found]
        self.begun: set[str] = set()
        self.entered: set[str] = set()

    def sends(self, op: Op) -> Iterator[Item]:
        """Before a forward op: what the module that begins here reads goes down."""
        for path in self.enters(op):
            if size := sum(self.found[path].down.values()):
                yield Copy("host", size, "forward", f"send {path}")

    def loads(self, op: Op) -> Iterator[Item]:
        """Before a backward op: its module's inputs are there, and those of the next one are asked for."""
        for path in self.enters(op):
            yield from self._load(path)
            if path in self.begun:
                yield Wait(f"load {path}")
            yield from self._load(self.following(path))

    def following(self, path: str) -> str:
        """The module whose backward comes after that of `path`; "" behind the last one."""
        after = self.order.index(path) + 1
        return self.order[after] if after < len(self.order) else ""

    def _load(self, path: str) -> Iterator[Item]:
        if path and path not in self.begun and (size := sum(self.found[path].up.values())):
            self.begun.add(path)
            yield Copy("device", size, "backward", f"load {path}", f"send {path}")

    def enters(self, op: Op) -> list[str]:
        """The modules that this op is the first one of in this pass."""
        paths = [path for path in self.order if path not in self.entered and within(op.module, path)]
        self.entered.update(paths)
        return paths
