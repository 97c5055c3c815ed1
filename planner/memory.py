"""Peak memory of every rank: the lifetimes of the traced step, replayed in the order in which the rank's schedule runs
its micro-batches, at local sizes, with the buffers that the runtimes hold.

The dry run's peak (real program, fake tensors) is what this is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opgraph.graph import DTYPE_BYTES, Op
from planner.layout import Layout, accumulates
from planner.orders import stage_order
from planner.plan import ParallelPlan
from planner.runtime import recomputed_ops
from planner.runtime_data import Unit, padded, zero1_owners
from planner.runtime_fsdp import unit_of
from planner.runtime_stage import Stage
from planner.stages import LOSS, shared_parameters, within


def peak_bytes(stages: tuple[Stage, ...], plan: ParallelPlan, backend: str = "gloo") -> tuple[int, ...]:
    """Most tensor bytes alive at once on every rank in a steady step, before any allocator's rounding."""
    by_role: dict[tuple[int, int], int] = {}
    peaks = []
    for rank in range(plan.world_size):
        at = plan.coordinates(rank)
        role = (at["pp"], at["dp"] if plan.data_parallel in ("zero1", "fsdp") else 0)
        if role not in by_role:
            by_role[role] = _Replay(stages[role[0]], role[1], backend).run()
        peaks.append(by_role[role])
    return tuple(peaks)


@dataclass(slots=True)
class _Replay:
    stage: Stage
    dp_index: int
    backend: str
    live: int = 0
    peak: int = 0
    held: dict[tuple[int, int], int] = field(default_factory=dict)  # (storage, micro-batch) -> bytes
    buffers: dict[str, int] = field(default_factory=dict)

    # -- bookkeeping ----------------------------------------------------------------------------------------
    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _hold(self, name: str, size: int) -> None:
        self._drop(name)
        self.buffers[name] = size
        self._add(size)

    def _drop(self, name: str) -> None:
        self.live -= self.buffers.pop(name, 0)

    def _allocate(self, storage: int, micro: int) -> None:
        if (storage, micro) not in self.held:
            self.held[storage, micro] = self.sizes[storage]
            self._add(self.sizes[storage])

    def _free(self, storage: int, micro: int) -> None:
        self.live -= self.held.pop((storage, micro), 0)

    # -- the step -------------------------------------------------------------------------------------------
    def run(self) -> int:
        stage, plan = self.stage, self.stage.plan
        self._measure()
        self._resting()
        for action in stage_order(plan.schedule, stage.ops.index, plan.pp, plan.micro_batches):
            if action.kind == "F":
                self._forward(action.micro)
            elif action.kind == "B":
                self._backward(action.micro)
        for unit in stage.units if plan.pp > 1 else ():
            self._scatter(unit)
            self._drop(f"whole {unit.path}")
        self._optimizer()
        return self.peak

    sizes: dict[int, int] = field(default_factory=dict)
    born: dict[int, list[int]] = field(default_factory=dict)  # op -> storages that it makes
    dies: dict[int, list[int]] = field(default_factory=dict)  # op -> storages that nobody needs after it
    gradients: dict[int, str] = field(default_factory=dict)  # storage -> parameter
    by_parameter: dict[str, list[int]] = field(default_factory=dict)
    again: dict[int, list[Op]] = field(default_factory=dict)  # first backward op of a region -> ops that run again
    forgotten: dict[int, set[int]] = field(default_factory=dict)  # last forward op of a region -> storages

    def _measure(self) -> None:
        """Local sizes, births and deaths of the storages that this stage makes."""
        stage = self.stage
        graph, layout = stage.graph, stage.layout
        mine = {op.id for op in (*stage.ops.forward, *stage.ops.backward)}
        last_here = {op.id: i for i, op in enumerate((*stage.ops.forward, *stage.ops.backward))}
        uses: dict[int, int] = {}
        placed: dict[int, int] = {}
        for op in (*stage.ops.forward, *stage.ops.backward):
            for t in (*op.inputs, *op.outputs):
                s = graph.tensors[t].storage
                uses[s] = op.id
                if t in op.outputs:
                    placed.setdefault(s, t)
        received = {graph.tensors[t].storage for t in _received(stage)}
        owner = _gradient_owners(stage)
        end = stage.ops.backward[-1].id if stage.ops.backward else stage.ops.forward[-1].id
        kept = {graph.tensors[t].storage for t in (*stage.ops.sends, *_outputs(stage))}
        for storage in graph.storages:
            s = storage.id
            if storage.birth not in mine or s in received:
                continue
            self.sizes[s] = _local_bytes(layout, storage.bytes, placed.get(s))
            self.born.setdefault(storage.birth, []).append(s)
            if s in owner:
                self.gradients[s] = owner[s]
                continue
            death = storage.death if storage.death in last_here else uses.get(s, storage.birth)
            self.dies.setdefault(end if s in kept else death, []).append(s)
        for path in stage.plan.recompute:
            self._measure_region(path)

    def _measure_region(self, path: str) -> None:
        """Where a checkpointed region ends in forward, what it forgets there, and where backward makes it again."""
        stage = self.stage
        ops = [op for op in stage.ops.forward if within(op.module, path)]
        first = next((op for op in stage.ops.backward if within(op.module, path) and op.module != LOSS), None)
        if not ops or first is None:
            return
        again = recomputed_ops(stage, path)
        self.again[first.id] = again
        made = {s for op in again for s in self.born.get(op.id, ())}
        self.forgotten[ops[-1].id] = made - self._leaving(path)

    def _resting(self) -> None:
        stage, plan = self.stage, self.stage.plan
        graph = stage.graph
        shares = {n: _share_bytes(stage, n, self.dp_index) for n in stage.parameters}
        owned = stage.parameters
        if plan.dp > 1 and plan.data_parallel == "zero1":
            owned = {p.name: p for p in zero1_owners(list(owned.values()), plan.dp)[self.dp_index]}
        state = {t.id: t for t in graph.tensors if t.role == "optimizer_state" and t.name in owned}
        for t in state.values():
            whole = t.shape == graph.parameters[t.name].shape
            self._add(shares[t.name] if whole else t.bytes)
        self._add(sum(shares.values()))
        self._add(sum(_buffer_bytes(stage)))
        inputs = {t.storage for t in graph.tensors if t.role == "input"}
        self._add(plan.micro_batches * sum(graph.storages[s].bytes for s in inputs))
        if plan.dp > 1 and plan.data_parallel != "fsdp":
            self._add(sum(p.bytes for p in stage.parameters.values()))
        self._add(plan.micro_batches * sum(_message_bytes(stage)))

    def _forward(self, micro: int) -> None:
        stage = self.stage
        if stage.units:
            self._gather(stage.units[0], "forward")
        current: Unit | None = None
        for op in stage.ops.forward:
            unit = unit_of(stage, op)
            if unit is not current:
                if current is not None:
                    self._drop(f"whole {current.path}")
                if unit is not None:
                    self._gather(unit, "forward")
                current = unit
            self._run_op(op, micro)
            self._forget(op, micro)
        if current is not None:
            self._drop(f"whole {current.path}")
        self._drop("last gather")

    def _forget(self, op: Op, micro: int) -> None:
        """At the end of a checkpointed region, what its backward will make again is freed."""
        for s in self.forgotten.get(op.id, ()):
            self._free(s, micro)

    def _leaving(self, path: str) -> set[int]:
        graph = self.stage.graph
        return {
            graph.tensors[t].storage
            for op in (*self.stage.ops.forward,) if not within(op.module, path)
            for t in op.inputs
        } | {graph.tensors[t].storage for t in self.stage.ops.sends}  # fmt: skip

    def _run_op(self, op: Op, micro: int) -> None:
        for s in self.born.get(op.id, ()):
            self._allocate(s, micro)
        for reduction in self.stage.reductions.get(op.id, ()):
            # the functional all-reduce returns a new tensor; the partial one dies after it
            size = self.sizes.get(self.stage.graph.tensors[reduction.tensor].storage, 0)
            self._add(size)
            self.live -= size
        for s in self.dies.get(op.id, ()):
            self._free(s, micro)

    def _backward(self, micro: int) -> None:
        stage, plan = self.stage, self.stage.plan
        ready = {op: name for name, op in stage.ready.items()}
        entered: set[str] = set()
        last_of = {_path(stage, op): i for i, op in enumerate(stage.ops.backward)}
        for i, op in enumerate(stage.ops.backward):
            unit = unit_of(stage, op)
            if stage.units and "" not in entered and op.module != LOSS:
                entered.add("")
                self._gather(stage.units[0], "backward")
                self._prefetch(len(stage.units))
            if unit is not None and unit.path not in entered:
                entered.add(unit.path)
                self._gather(unit, "backward")
                self._prefetch(stage.units.index(unit))
            for again in self.again.get(op.id, ()):
                for s in self.born.get(again.id, ()):
                    self._allocate(s, micro)
                for s in self.dies.get(again.id, ()):
                    self._free(s, micro)
            self._run_op(op, micro)
            if op.id in ready and micro > 0:
                for s in self._gradients_of(ready[op.id]):
                    self._free(s, micro)
            if unit is not None and last_of[unit.path] == i and plan.pp == 1:
                self._drop(f"whole {unit.path}")
                if micro == plan.micro_batches - 1:
                    self._scatter(unit)
        for s in [s for (s, m) in self.held if m == micro and s not in self.gradients]:
            self._free(s, micro)
        if stage.units and plan.pp == 1:
            self._drop("whole ")
            if micro == plan.micro_batches - 1:
                self._scatter(stage.units[0])

    def _gradients_of(self, parameter: str) -> list[int]:
        if not self.by_parameter:
            for s, name in self.gradients.items():
                self.by_parameter.setdefault(name, []).append(s)
        return self.by_parameter.get(parameter, [])

    # -- FSDP -----------------------------------------------------------------------------------------------
    def _start(self, unit: Unit) -> None:
        if unit.parameters and f"whole {unit.path}" not in self.buffers and f"gather {unit.path}" not in self.buffers:
            self._hold(f"gather {unit.path}", unit.gathered_bytes(self.stage.plan.dp))

    def _prefetch(self, index: int) -> None:
        if index - 1 >= 1:
            self._start(self.stage.units[index - 1])

    def _gather(self, unit: Unit, phase: str) -> None:
        if not unit.parameters or f"whole {unit.path}" in self.buffers:
            return
        self._start(unit)
        self._hold(f"whole {unit.path}", unit.gathered_bytes(self.stage.plan.dp))
        gathered = self.buffers.pop(f"gather {unit.path}")
        self.live -= gathered
        if phase == "forward":  # FSDP keeps the last gathered buffer until the next unit's has been copied out
            self._hold("last gather", gathered)
        else:
            self._drop("last gather")

    def _scatter(self, unit: Unit) -> None:
        if not unit.parameters:
            return
        plan = self.stage.plan
        whole = unit.gathered_bytes(plan.dp)
        self._drop("last scatter")
        self._hold("last scatter", whole)
        for p in unit.parameters:
            for s in self._gradients_of(p.name):
                self._free(s, 0)
                self._free(s, plan.micro_batches - 1)
        self._hold(f"shard {unit.path}", whole // plan.dp)
        if self.backend == "gloo":  # gloo all-reduces a copy of the whole buffer
            self._add(whole)
            self.live -= whole

    # -- optimizer ------------------------------------------------------------------------------------------
    def _optimizer(self) -> None:
        """Storages that a traced optimizer op makes, at most one op's at a time, at the stage's share of the model."""
        graph = self.stage.graph
        self._drop("last scatter")
        self._drop("last gather")
        whole = sum(t.bytes for t in graph.parameters.values())
        share = sum(p.bytes for p in self.stage.parameters.values()) / max(1, whole)
        live = 0
        events = [
            (s.birth, s.bytes) for s in graph.storages
            if s.birth >= 0 and graph.ops[s.birth].phase == "optimizer" and s.death < len(graph.ops)
        ] + [
            (s.death + 0.5, -s.bytes) for s in graph.storages
            if s.birth >= 0 and graph.ops[s.birth].phase == "optimizer" and s.death < len(graph.ops)
        ]  # fmt: skip
        for _, size in sorted(events):
            live += size
            self.peak = max(self.peak, self.live + int(live * share))


def _received(stage: Stage) -> tuple[int, ...]:
    return stage.stages[stage.ops.index - 1].sends if stage.ops.index else ()


def _outputs(stage: Stage) -> set[int]:
    """The model's outputs, which a pipeline stage keeps until their backward; a plain step keeps only the loss."""
    if stage.plan.pp == 1 or stage.ops.index + 1 < stage.plan.pp:
        return set()
    read = {t for op in stage.ops.forward if op.module == LOSS for t in op.inputs}
    return read & {t for op in stage.ops.forward if op.module != LOSS for t in op.outputs}


def _message_bytes(stage: Stage) -> list[int]:
    """Receive buffers of one micro-batch: activations from the stage before, gradients from the stage after."""
    tensors = stage.graph.tensors
    sends = stage.ops.sends if stage.ops.index + 1 < stage.plan.pp else ()
    return [tensors[t].bytes for t in (*_received(stage), *sends)]


def _local_bytes(layout: Layout, size: int, tensor: int | None) -> int:
    return size // layout.parts if tensor is not None and layout.placements[tensor] >= 0 else size


def _gradient_owners(stage: Stage) -> dict[int, str]:
    """Storage of a parameter's final gradient -> parameter."""
    owners = {}
    where = {op.id: op for op in stage.ops.backward}
    for name, op in stage.ready.items():
        for t in (where[op].outputs or where[op].inputs)[:1]:
            owners[stage.graph.tensors[t].storage] = name
    shared = {name: stage.graph.parameters[name].shape for name, _ in shared_parameters(stage.stages)}
    mine = {t for op in stage.ops.backward for t in op.outputs}
    everywhere = {op.id for s in stage.stages for op in s.backward}
    for summing in stage.graph.ops:  # the sum of a tied weight's gradients is a message; every stage keeps its own term
        if accumulates(summing) and summing.id not in everywhere:
            for t in mine & set(summing.inputs):
                name = next((n for n, shape in shared.items() if shape == stage.graph.tensors[t].shape), "")
                if name:
                    owners[stage.graph.tensors[t].storage] = name
    return owners


def _share_bytes(stage: Stage, name: str, dp_index: int) -> int:
    """Bytes of a parameter that a rank keeps between steps."""
    p = stage.parameters[name]
    if not stage.units:
        return p.bytes
    return padded(p, stage.plan.dp) // stage.plan.dp * DTYPE_BYTES[p.dtype]


def _buffer_bytes(stage: Stage) -> list[int]:
    graph = stage.graph
    read = (graph.tensors[t] for op in stage.ops.forward for t in op.inputs)
    used = {t.storage for t in read if t.role == "buffer"}
    return [graph.storages[s].bytes for s in used]


def _path(stage: Stage, op: Op) -> str:
    unit = unit_of(stage, op)
    return unit.path if unit else ""
