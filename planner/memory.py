"""Peak memory of every rank: the lifetimes of the traced step, replayed in the order in which the rank's schedule runs
its micro-batches, at local sizes, with the buffers that the runtimes hold and what ops take inside themselves.

The dry run's peak (real program, fake tensors) is what this is tested against, and executed steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opgraph.graph import Op
from planner.memory_ledger import Category, Event, Ledger
from planner.memory_lifetimes import Lifetimes, Region, lifetimes, optimizer_storages
from planner.memory_sizes import buffer_bytes, message_bytes, path_of, received, share_bytes, state_bytes
from planner.offload_activations import Crossing, moved
from planner.orders import stage_order
from planner.plan import Offloaded, ParallelPlan
from planner.runtime_data import Unit, zero1_owners
from planner.runtime_fsdp import trained, unit_of, without_gradient_input
from planner.runtime_stage import Stage, is_kept
from planner.stages import LOSS

PINNED = ("parameters", "gradients", "activations")  # what is copied; the optimizer's state stays where it is
GENERATOR_STATE = 5056  # bytes of a CPU random generator, which a checkpoint keeps to draw the same numbers again


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank in a steady step, before any allocator's rounding.

    host: what offload keeps in the host's memory, by category, at its worst moment; pinned: of these, page-locked.
    peak: at the worst moment; at_peak: by category, then. resting: between steps. Activations include the gradients
    of activations; parameters what FSDP has gathered; inputs the batch and the model's buffers.
    """

    peak: int
    at_peak: dict[Category, int]
    resting: int
    host: dict[Category, int] = field(default_factory=dict)
    pinned: int = 0


def peak_bytes(stages: tuple[Stage, ...], plan: ParallelPlan, backend: str = "gloo") -> tuple[int, ...]:
    """Most tensor bytes alive at once on every rank in a steady step, before any allocator's rounding."""
    return tuple(m.peak for m in memory(stages, plan, backend))


def memory(stages: tuple[Stage, ...], plan: ParallelPlan, backend: str = "gloo") -> tuple[RankMemory, ...]:
    """The memory of every rank. What ops take inside themselves is known for CPUs (gloo)."""
    by_role: dict[tuple[int, int], RankMemory] = {}
    found = []
    for rank in range(plan.world_size):
        role = _role(plan, rank)
        if role not in by_role:
            replay = _replay(stages[role[0]], role[1], backend, Ledger())
            host = {c: size for c, size in replay.host.at_peak.items() if size}
            pinned = sum(size for c, size in host.items() if c in PINNED)
            by_role[role] = RankMemory(replay.ledger.peak, replay.ledger.at_peak, replay.resting, host, pinned)
        found.append(by_role[role])
    return tuple(found)


def memory_events(
    stages: tuple[Stage, ...], plan: ParallelPlan, rank: int, backend: str = "gloo"
) -> tuple[Event, ...]:
    """Every block that a rank makes and frees in one steady step, what rests between steps first."""
    stage, dp_index = _role(plan, rank)
    replay = _replay(stages[stage], dp_index, backend, Ledger(recording=True))
    return tuple(replay.ledger.events)


def _role(plan: ParallelPlan, rank: int) -> tuple[int, int]:
    """Ranks of one role hold the same."""
    at = plan.coordinates(rank)
    return at["pp"], at["dp"] if plan.data_parallel != "ddp" else 0


def _replay(stage: Stage, dp_index: int, backend: str, ledger: Ledger) -> _Replay:
    replay = _Replay(stage, dp_index, backend, lifetimes(stage, backend), ledger)
    replay.run()
    return replay


@dataclass(slots=True)
class _Replay:
    stage: Stage
    dp_index: int
    backend: str
    times: Lifetimes
    ledger: Ledger
    host: Ledger = field(default_factory=Ledger)
    resting: int = 0
    owned_bytes: int = 0  # of the shares of parameters that this rank updates
    alive: dict[int, dict[int, None]] = field(default_factory=dict)  # micro-batch -> storages, in order

    def away(self, kind: Offloaded) -> bool:
        """Whether this kind is in the host's memory and that is another one than the device's."""
        plan = self.stage.plan
        return self.backend != "gloo" and (kind in plan.offload or (kind == "optimizer" and plan.offloads_optimizer))

    def run(self) -> None:
        stage, plan = self.stage, self.stage.plan
        self._rest()
        for action in stage_order(plan.schedule, stage.ops.index, plan.pp, plan.micro_batches):
            if action.kind == "F":
                self._forward(action.micro)
            elif action.kind == "B":
                self._backward(action.micro)
        for unit in stage.units if plan.pp > 1 else ():
            self.ledger.drop(("whole", unit.path))
            self._scatter(unit)
        self._optimizer()

    # -- between steps ---------------------------------------------------------------------------------------
    def _rest(self) -> None:
        """What is there between steps."""
        stage, plan, ledger = self.stage, self.stage.plan, self.ledger
        graph = stage.graph
        shares = {n: share_bytes(stage, n) for n in stage.parameters}
        owned = stage.parameters
        if plan.dp > 1 and plan.data_parallel == "zero1":
            owned = {p.name: p for p in zero1_owners(list(owned.values()), plan.dp)[self.dp_index]}
        self.owned_bytes = sum(shares[name] for name in owned)
        for name, size in shares.items():
            (self.host if self.away("parameters") else ledger).hold(("parameter", name), size, "parameters")
        updated = owned.keys() & {name for name, _ in graph.gradient_ops}
        for t in {t.id: t for t in graph.tensors if t.role == "optimizer_state" and t.name in updated}.values():
            whole = t.shape == graph.parameters[t.name].shape
            size = state_bytes(stage, t.name, self.dp_index) if whole else t.bytes
            (self.host if self.away("optimizer") else ledger).hold(("state", t.id), size, "optimizer_state")
        if self.away("optimizer") and not self.away("parameters"):  # the host updates a copy of its own
            self.host.hold("copy", self.owned_bytes, "parameters")
        for i, size in enumerate(buffer_bytes(stage)):
            ledger.hold(("buffer", i), size, "inputs")
        for s in {t.storage for t in graph.tensors if t.role == "input"}:
            ledger.hold(("input", s), plan.micro_batches * graph.storages[s].bytes, "inputs")
        if plan.dp > 1 and not plan.fully_sharded:
            ledger.hold("buckets", sum(stage.parameters[name].bytes for name in stage.ready), "communication")
        for i, size in enumerate(message_bytes(stage) * plan.micro_batches):
            ledger.hold(("message", i), size, "communication")
        self.resting = ledger.live

    # -- forward and backward -------------------------------------------------------------------------------
    def _forward(self, micro: int) -> None:
        stage, ledger = self.stage, self.ledger
        ledger.place = ("forward", micro, "", "")
        if stage.units:
            self._gather(stage.units[0], "forward")
        current: Unit | None = None
        for op in stage.ops.forward:
            unit = unit_of(stage, op)
            if unit is not current:
                self._leave(current)
                if unit is not None:
                    self._gather(unit, "forward")
                current = unit
            if op.module == LOSS:  # the root's forward is over
                ledger.drop("last gather")
            self._run_op(op, micro, "forward")
            if (region := self.times.forgotten.get(op.id)) is not None:
                for s in region.forgotten:
                    self._free(s, micro)
                if self.backend == "gloo":
                    ledger.hold(("generator", region.path, micro), GENERATOR_STATE, "activations")
            self._goes(op, micro)
        self._leave(current)
        ledger.drop("last gather")

    def _goes(self, op: Op, micro: int) -> None:
        """What goes to the host after this op."""
        for m in moved(self.stage).values() if self.away("activations") else ():
            for s in m.leaves.get(op.id, ()):
                self.host.hold((s, micro), self.ledger.size((s, micro)), "activations")
                self.ledger.drop((s, micro))

    def _comes(self, path: str, micro: int) -> None:
        for s, size in moved(self.stage)[path].up.items() if path else ():
            if s in self.alive.get(micro, {}):
                self.ledger.hold((s, micro), size, "activations")
                self.host.drop((s, micro))

    def _run_op(self, op: Op, micro: int, phase: str) -> None:
        ledger = self.ledger
        ledger.place = (phase, micro, op.name, op.module)
        for s in self.times.born.get(op.id, ()):
            self._allocate(s, micro)
        if phase != "recompute" or not is_kept(self.stage.plan, op.name):  # what was kept is not computed again
            ledger.pulse(self.times.inside.get(op.id, 0), "workspace")
        for reduction in self.stage.reductions.get(op.id, ()) if phase != "recompute" else ():
            # the functional all-reduce returns a new tensor; the partial one dies after it
            ledger.pulse(self.times.sizes.get(self.stage.graph.tensors[reduction.tensor].storage, 0), "communication")
        for s in self.times.dies.get(op.id, ()):
            if phase == "forward" and s in self.times.kept:
                continue
            self._free(s, micro)

    def _backward(self, micro: int) -> None:
        stage, plan = self.stage, self.stage.plan
        ready = {op: name for name, op in stage.ready.items()}
        entered: set[str] = set()
        last_of = {path_of(stage, op): i for i, op in enumerate(stage.ops.backward)}
        self.ledger.place = ("backward", micro, "", "")
        crossing = Crossing(stage)
        late = {"", *without_gradient_input(stage)} if stage.units else set()
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
            for path in crossing.enters(op) if self.away("activations") else ():
                self._comes(path, micro)
                self._comes(crossing.following(path), micro)
            for region in self.times.again.get(op.id, ()):
                self._run_again(region, micro)
            self._run_op(op, micro, "backward")
            if (ended := self.times.ends.get(op.id)) is not None:
                self.ledger.drop(("generator", ended.path, micro))
                for s in ended.kept:  # what was kept of ops behind the last one that had to run again
                    self._free(s, micro)
            if op.id in ready and micro > 0:
                for s in self._gradients_of(ready[op.id]):
                    self._free(s, micro)
            if unit is not None and last_of[unit.path] == i and unit.path not in late:
                self._leave_backward(unit, micro)
        for s in [s for s in self.alive.get(micro, ()) if s not in self.times.gradients]:
            self._free(s, micro)
        sent = sum(stage.graph.tensors[t].bytes for t in received(stage)) if plan.schedule == "1f1b" else 0
        self._warm_up_send(micro)
        if sent:  # the schedule keeps the list of its last send, and with it the gradients that the stage before got
            self.ledger.hold("sent", sent, "communication")
        for unit in stage.units:
            if unit.path in late:
                self._leave_backward(unit, micro)

    def _run_again(self, region: Region, micro: int) -> None:
        """A checkpointed region's forward, with the generator's present state put aside."""
        if self.backend == "gloo":
            self.ledger.hold("generator", GENERATOR_STATE, "activations")
        for op in region.again:
            self._run_op(op, micro, "recompute")
        for s in region.unneeded:  # forward ends early, and what left the region was kept
            self._free(s, micro)
        self.ledger.drop("generator")

    def _allocate(self, storage: int, micro: int) -> None:
        alive = self.alive.setdefault(micro, {})
        if storage not in alive:
            alive[storage] = None
            category: Category = "gradients" if storage in self.times.gradients else "activations"
            self.ledger.hold((storage, micro), self.times.sizes[storage], category)

    def _free(self, storage: int, micro: int) -> None:
        self.alive.get(micro, {}).pop(storage, None)
        self.ledger.drop((storage, micro))

    def _warm_up_send(self, micro: int) -> None:
        """1F1B keeps the work handle of its last warm-up send but one until its cool-down starts, and with it, on gloo,
        the tensors that were sent."""
        stage, plan = self.stage, self.stage.plan
        if plan.schedule != "1f1b" or self.backend != "gloo":
            return
        warm = min(plan.micro_batches, plan.pp - stage.ops.index)
        if micro == plan.micro_batches - warm:
            self.ledger.drop("first send")
        elif micro == warm - 2:
            sizes = {s: self.times.sizes.get(s, 0) for s in (stage.graph.tensors[t].storage for t in stage.ops.sends)}
            self.ledger.hold("first send", sum(sizes.values()), "communication")

    def _gradients_of(self, parameter: str) -> list[int]:
        return self.times.by_parameter.get(parameter, [])

    # -- FSDP -----------------------------------------------------------------------------------------------
    def _start(self, unit: Unit) -> None:
        held = self.ledger.held
        self._at("all_gather", unit)
        if unit.parameters and ("whole", unit.path) not in held and ("gather", unit.path) not in held:
            size = unit.gathered_bytes(self.stage.plan.dp)
            self.ledger.hold(("gather", unit.path), size, "communication")
            if self.away("parameters"):  # the shard's copy, from which the gather's buffer is filled
                self.ledger.pulse(size // self.stage.plan.dp, "communication")
            if self.backend == "gloo":  # gloo gathers into a buffer of its own and copies it out
                self.ledger.pulse(size, "communication")

    def _leave(self, unit: Unit | None) -> None:
        """After a unit's forward."""
        if unit is not None and self.stage.plan.data_parallel == "fsdp":
            self.ledger.drop(("whole", unit.path))

    def _leave_backward(self, unit: Unit, micro: int) -> None:
        plan = self.stage.plan
        if plan.pp == 1 and (micro == plan.micro_batches - 1 or plan.data_parallel == "fsdp"):
            self.ledger.drop(("whole", unit.path))
        if plan.pp == 1 and micro == plan.micro_batches - 1:
            self._scatter(unit)

    def _at(self, message: str, unit: Unit) -> None:
        phase, micro, _, _ = self.ledger.place
        self.ledger.place = (phase, micro, f"fsdp.{message}", unit.path)

    def _prefetch(self, index: int) -> None:
        if index - 1 >= 1:
            self._start(self.stage.units[index - 1])

    def _gather(self, unit: Unit, phase: str) -> None:
        ledger = self.ledger
        if not unit.parameters or ("whole", unit.path) in ledger.held:
            return
        self._start(unit)
        size = unit.gathered_bytes(self.stage.plan.dp)
        ledger.hold(("whole", unit.path), size, "parameters")
        ledger.drop(("gather", unit.path))
        if phase == "forward":  # FSDP keeps the last gathered buffer until the next unit's has been copied out
            ledger.hold("last gather", size, "communication")
        else:
            ledger.drop("last gather")

    def _scatter(self, unit: Unit) -> None:
        unit = trained(self.stage, unit)
        if not unit.parameters:
            return
        plan, ledger = self.stage.plan, self.ledger
        whole = unit.gathered_bytes(plan.dp)
        self._at("reduce_scatter", unit)
        ledger.hold("last scatter", whole, "communication")
        for p in unit.parameters[:-1]:
            self._free_gradient(p.name)
        if self.away("optimizer"):
            ledger.pulse(whole // plan.dp, "gradients")
        (self.host if self.away("optimizer") else ledger).hold(("shard", unit.path), whole // plan.dp, "gradients")
        if self.backend == "gloo":  # gloo all-reduces a copy of the whole buffer
            ledger.pulse(whole, "communication")
        self._free_gradient(unit.parameters[-1].name)  # a loop variable of torch's `foreach_reduce` keeps it until here

    def _free_gradient(self, parameter: str) -> None:
        for s in self._gradients_of(parameter):
            self._free(s, 0)
            self._free(s, self.stage.plan.micro_batches - 1)

    # -- optimizer ------------------------------------------------------------------------------------------
    def _optimizer(self) -> None:
        """Storages that the traced optimizer ops make, at the stage's share of the model."""
        graph, ledger = self.stage.graph, self.ledger
        ledger.drop("last scatter")
        ledger.drop("last gather")
        ledger.place = ("optimizer", 0, "", "")
        if self.away("optimizer"):
            ledger = self.host
            if not self.stage.units:
                ledger.hold("gradients", self.owned_bytes, "gradients")
        whole = sum(t.bytes for t in graph.parameters.values())
        share = sum(p.bytes for p in self.stage.parameters.values()) / max(1, whole)
        for at, birth, s in optimizer_storages(graph):
            if birth:
                ledger.place = ("optimizer", 0, graph.ops[int(at)].name, "")
                ledger.hold(("temporary", s), int(graph.storages[s].bytes * share), "workspace")
            else:
                ledger.drop(("temporary", s))
