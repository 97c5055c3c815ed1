"""The program of a folded step: one rank stands for all that run the same, so a stage of a pipeline is one rank.

Three resources a stage: the device, the host thread that feeds it, and the queue of data-parallel messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.ops import OpShape, price
from costmodels.overlap import Beside, beside
from planner.folded_groups import Groups
from planner.folded_kernels import Priced
from planner.folded_lane import Lane
from planner.folded_model import Chunk
from planner.folded_orders import Step, order
from planner.folded_overlap import lost
from planner.folded_parts import Part, Parts
from planner.host_queue import EMPTY, Run, joined, repeated
from planner.plan import ParallelPlan
from planner.software import Software, is_autocast
from simulator import Program, ProgramBuilder

SIXTEEN = ("fp16", "bf16", "fp8")
BUCKET = 25 * 2**20  # bytes of gradients that are worth a message: torch's default bucket
POSTED = 2  # messages that a stage whose sends block posts at a time
GROUPS_OF_BLOCKS = 8  # a pass whose gradients are reduced beside it is cut into so many parts


@dataclass(slots=True)
class Tally:
    """Device seconds by what they are, by source of the price, and seconds of error by law; of one stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, value: float, source: str, error: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + value
        self.sources[source] = self.sources.get(source, 0.0) + value
        self.errors[what] = self.errors.get(what, 0.0) + value * error

    def merge(self, part: Priced, times: float) -> None:
        pairs = ((self.seconds, part.seconds), (self.sources, part.sources), (self.errors, part.errors))
        for mine, theirs in pairs:
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0.0) + value * times


@dataclass(slots=True)
class Context:
    """What every part of a step's program is made from. stages: each stage's own of a pipeline, with a tally of its
    own; they may recompute different shares."""

    parts: Parts
    plan: ParallelPlan
    software: Software
    cluster: Cluster
    chunks: Sequence[Chunk]
    tally: Tally = field(default_factory=Tally)
    losses: dict[tuple[Chunk, bool, Beside], float] = field(default_factory=dict)
    stages: tuple[Context, ...] = ()

    def at(self, stage: int) -> Context:
        return self.stages[stage] if self.stages else self

    def message(self, kind: str, size: float, axis: str, stage: int = 0, times: int = 1) -> float:
        """Seconds of a message, which the step sends so many times."""
        groups = Groups(self.plan, stage)
        cost = collective_price(self.cluster, kind, size, groups.ranks(axis), firsts=groups.likes(axis))
        self.tally.add(f"{axis} {kind}", cost.seconds * times, cost.source, cost.error)
        return cost.seconds

    def lost(self, kind: str, size: float, axis: str, seconds: float, chunk: Chunk, backward: bool) -> float:
        """Share of the time of this message of `seconds` that a pass through a chunk loses beside it."""
        other = beside(self.cluster, kind, size, Groups(self.plan).ranks(axis), seconds)
        key = chunk, backward, other
        if key not in self.losses:
            parts = [(self.parts.by_where[where], count) for where, count in chunk.parts]
            chosen = [(part.backward if backward else part.forward, count) for part, count in parts]
            self.losses[key] = lost(self.cluster, chosen, other)
        return self.losses[key]

    def kernel(self, name: str, read: float, written: float, elements: float) -> float:
        flat = ((int(elements),),)
        shape = OpShape(name, "optimizer", flat, flat, "float32", 0, int(read), int(written))
        cost = price(self.cluster.device, shape)
        self.tally.add("optimizer", cost.seconds, cost.source, cost.error)
        return cost.seconds

    def pass_of(self, chunk: Chunk, backward: bool) -> Run:
        """One pass through a chunk."""
        whole = EMPTY if backward else Run(self.software.host.batch, 0.0, float("-inf"))
        for where, count in reversed(chunk.parts) if backward else chunk.parts:
            part = self.parts.by_where[where]
            whole = joined(whole, repeated((part.backward if backward else part.forward).run, count))
        return whole

    def count_pass(self, chunk: Chunk, times: int) -> None:
        for where, count in chunk.parts:
            part = self.parts.by_where[where]
            for p in (part.forward, part.backward):
                self.tally.merge(p, count * times)

    def elements(self, chunk: Chunk) -> tuple[int, int]:
        """Parameters of a chunk on one rank: outside experts, in experts."""
        parts = [(self.parts.by_where[w], n) for w, n in chunk.parts]
        return sum((p.elements - p.experts) * n for p, n in parts), sum(p.experts * n for p, n in parts)


def program_of(context: Context) -> Program:
    """The whole step of all stages."""
    tasks = ProgramBuilder()
    plan = context.plan
    lanes = [Lane(tasks, s) for s in range(plan.pp)]
    if plan.data_parallel == "fsdp" and plan.dp * plan.cp > 1:
        from planner.folded_fsdp import fsdp_step

        fsdp_step(context.at(0), lanes[0])
        return tasks.build()
    for _ in _stages_in_turn(context, lanes):
        pass
    return tasks.build()


def _stages_in_turn(context: Context, lanes: list[Lane]) -> Iterator[None]:
    """Adds the steps of all stages so that each comes after what it needs."""
    plan = context.plan
    orders = [order(s, plan.pp, plan.vpp, plan.micro_batches, plan.schedule == "gpipe") for s in range(plan.pp)]
    at = [0] * plan.pp
    done: dict[tuple[bool, int, int], int] = {}  # (backward, chunk of all, micro) -> task that delivers it
    stages = [_StageRunner(context.at(lane.stage), lane, done) for lane in lanes]
    for runner in stages:
        runner.begin()
    left = sum(len(o) for o in orders)
    while left:
        before = left
        for s, runner in enumerate(stages):
            while at[s] < len(orders[s]) and runner.ready(orders[s][at[s]]):
                runner.step(orders[s][at[s]])
                at[s] += 1
                left -= 1
        assert left < before, "stages wait for each other"
        yield
    for runner in stages:
        runner.end()


class _StageRunner:
    def __init__(self, context: Context, lane: Lane, done: dict[tuple[bool, int, int], int]) -> None:
        self.c, self.lane, self.done = context, lane, done
        plan = context.plan
        self.own = [context.chunks[c * plan.pp + lane.stage] for c in range(plan.vpp)]
        self.runs = {(b, c): context.pass_of(chunk, b) for c, chunk in enumerate(self.own) for b in (False, True)}
        self.gathers: dict[int, int] = {}
        self.groups: list[int] = []  # gathers of the first chunk's groups of blocks
        self.reduces: list[int] = []
        self.replicas = plan.dp * plan.cp
        self.overlapped = self.replicas > 1 and context.software.dp_overlap
        for chunk in self.own:
            context.count_pass(chunk, plan.micro_batches)
        self.send = self._send_seconds()

    def ready(self, step: Step) -> bool:
        need = self._need(step)
        return need is None or need in self.done

    def _index(self, step: Step) -> int:
        return step.chunk * self.c.plan.pp + self.lane.stage

    def _need(self, step: Step) -> tuple[bool, int, int] | None:
        """What the step takes from another chunk: activations of the one before, gradients of the one after."""
        index = self._index(step) + (1 if step.backward else -1)
        if index < 0 or index >= len(self.c.chunks):
            return None
        return step.backward, index, step.micro

    def begin(self) -> None:
        """Optimizer shards are gathered into whole parameters while forward begins: the first chunk's in groups of its
        blocks, those of the others chunk by chunk."""
        plan = self.c.plan
        if not (self.overlapped and plan.data_parallel in ("zero1", "zero2")):
            return
        groups = self._groups(self.own[0], False)
        element = 2 if plan.precision in SIXTEEN else 4
        least, waiting, share = BUCKET / element / (sum(self.c.elements(self.own[0])) or 1), 0, 0.0
        for i, group in enumerate(groups, start=1):
            waiting, share = waiting + 1, share + group[2]
            if share >= least or i == len(groups):
                # The first cannot run before it is whole, so nothing runs beside its message.
                gathered = self._gather(self.own[0], share, lost=bool(self.groups))
                self.groups += [gathered] * waiting
                waiting, share = 0, 0.0
        for c, chunk in enumerate(self.own[1:], start=1):
            self.gathers[c] = self._gather(chunk, 1.0, lost=True)

    def _gather(self, chunk: Chunk, share: float, lost: bool) -> int:
        seconds, slower = self._data("all_gather", chunk, 2, self.own[0], False, share)
        return self.lane.message("gather parameters", "all_gather", seconds, lost=slower if lost else 0.0)

    def _groups(self, chunk: Chunk, backward: bool) -> list[tuple[Part, int, float]]:
        """A pass through a chunk in groups of blocks: part, blocks, and their share of the chunk's parameters."""
        total = sum(self.c.elements(chunk)) or 1
        found = []
        for where, count in reversed(chunk.parts) if backward else chunk.parts:
            part, groups = self.c.parts.by_where[where], min(GROUPS_OF_BLOCKS, count)
            sizes = [count // groups + (g < count % groups) for g in range(groups)]
            found += [(part, n, part.elements * n / total) for n in sizes]
        return found

    def _first_forward(self, waits: list[int], synced: bool) -> None:
        """The forward whose parameters are gathered meanwhile: each group of blocks waits for its own."""
        batch: Run | None = Run(self.c.software.host.batch, 0.0, float("-inf"))
        for gathered, (part, count, _) in zip(self.groups, self._groups(self.own[0], False)):
            run = repeated(part.forward.run, count)
            whole = [*waits, self.lane.arrived(gathered)]
            self.lane.run("F first", "forward", joined(batch, run) if batch else run, whole, synced)
            batch, waits, synced = None, [], False
        self.groups = []

    def _data(
        self, kind: str, chunk: Chunk, element: int, beside: Chunk, backward: bool, share: float = 1.0
    ) -> tuple[float, float]:
        """Seconds of a data-parallel message over a share of a chunk's parameters, and the share of them that a pass
        beside it loses; experts are shared by fewer ranks."""
        dense, experts = self.c.elements(chunk)
        own = (element if self.c.plan.precision in SIXTEEN else 4) * share
        sizes = {"dp": dense * own}
        if experts and self.c.plan.expert_replicas > 1:
            sizes["edp"] = experts * own
        seconds = {axis: self.c.message(kind, size, axis, self.lane.stage) for axis, size in sizes.items()}
        lost = sum(seconds[x] * self.c.lost(kind, sizes[x], x, seconds[x], beside, backward) for x in sizes)
        total = sum(seconds.values())
        return total, lost / total if total else 0.0

    def step(self, step: Step) -> None:
        plan, software = self.c.plan, self.c.software
        need = self._need(step)
        waits = [self.done[need]] if need else []
        if not step.backward and step.micro == 0 and step.chunk in self.gathers:
            waits.append(self.lane.arrived(self.gathers.pop(step.chunk)))
        name = f"{'B' if step.backward else 'F'}{step.micro}.{step.chunk}"
        phase = "backward" if step.backward else "forward"
        last = step.backward and step.micro == plan.micro_batches - 1
        synced = software.timed_passes or (plan.pp > 1 and not software.p2p_overlap)
        # Behind the first stage others reduce in the bubble, when their last backward is over (Megatron-LM
        # core/pipeline_parallel/schedules.py, "Enable async grad reduction in the last backward pass").
        beside = plan.pp == 1 or (self.lane.stage == 0 and plan.vpp == 1)
        if last and self.overlapped and beside:
            self._last_backward(waits, synced and plan.pp > 1)
        elif self.groups and not step.backward and step.chunk == 0:
            self._first_forward(waits, synced)
        else:
            self.lane.run(name, phase, self.runs[step.backward, step.chunk], waits, synced)
            if last and self.overlapped:
                self._reduce(self.own[step.chunk], 1.0)
        if step.backward and not last and plan.data_parallel == "zero2" and self.replicas > 1:
            self._reduce(self.own[step.chunk], 1.0)  # who keeps a share of the gradients hands on those of each pass
            if not self.overlapped:
                self.lane.busy("wait", "wait", 0.0, [self.reduces[-1]])
        self._deliver(step, name)

    def _deliver(self, step: Step, name: str) -> None:
        """Hands the result to the next stage: beside what follows, or before it."""
        index = self._index(step) + (-1 if step.backward else 1)
        result = self.lane.free
        if 0 <= index < len(self.c.chunks) and self.send:
            if self.c.software.p2p_overlap:
                result = self.lane.tasks.task(f"send {name}", "send", self.send, -1, [result], 0.0, self.lane.stage)
            else:
                result = self.lane.busy(f"send {name}", "send", self.send + POSTED * self.c.software.host.message)
        self.done[step.backward, self._index(step), step.micro] = result

    def _send_seconds(self) -> float:
        plan = self.c.plan
        if plan.pp == 1:
            return 0.0
        local = self.c.parts.local
        weight = local.graph.parameters[next(n for n in local.graph.parameters if n.endswith("norm1.weight"))]
        size = local.graph.batch * local.seq * weight.shape[0] * (weight.bytes // weight.numel)
        own, other = Groups(plan, self.lane.stage).neighbours((self.lane.stage + 1) % plan.pp)
        split = plan.tp if plan.sequence_parallel or self.c.software.p2p_split else 1
        likes = Groups(plan, self.lane.stage).likes("pp")
        seconds = collective_price(self.c.cluster, "send", size / split, (own, other), firsts=likes).seconds
        if split > 1 and not plan.sequence_parallel:
            inside = Groups(plan)
            gathered = collective_price(
                self.c.cluster, "all_gather", size, inside.ranks("tp"), firsts=inside.likes("tp")
            )
            seconds += gathered.seconds
        return seconds

    def _last_backward(self, waits: list[int], synced: bool) -> None:
        """The backward whose gradients are complete, in groups of blocks: each is reduced beside the next."""
        chunk = self.own[0]
        total = sum(self.c.elements(chunk)) or 1
        least, ready = BUCKET / (total * self.c.software.reduce_bytes), 0.0
        for part, count, share in self._groups(chunk, True):
            self.lane.run("B last", "backward", repeated(part.backward.run, count), waits, synced)
            waits, synced, ready = [], False, ready + share
            if ready >= least:
                self._reduce(chunk, ready)
                ready = 0.0
        if ready > 1e-9:
            self._reduce(chunk, ready)

    def _reduce(self, chunk: Chunk, share: float) -> None:
        kind = "all_reduce" if self.c.plan.data_parallel == "ddp" else "reduce_scatter"
        seconds, lost = self._data(kind, chunk, self.c.software.reduce_bytes, chunk, True, share)
        lost = lost if self.overlapped else 0.0
        self.reduces.append(self.lane.message("reduce gradients", kind, seconds, [self.lane.free], lost))

    def end(self) -> None:
        """After the backwards: messages that nothing hides, the tied embedding, the optimizer."""
        plan, software = self.c.plan, self.c.software
        if self.replicas > 1 and not self.overlapped:
            for chunk in self.own:
                self._reduce(chunk, 1.0)
        embeds = any(chunk.count("first") or chunk.count("last") for chunk in self.own)
        part = self.c.parts.by_where["first"]
        if plan.pp > 1 and embeds and part.elements and self.c.parts.local.graph.name.endswith("tied"):
            ends = (Groups(plan).first, Groups(plan, plan.pp - 1).first)
            size = part.elements * (software.reduce_bytes if plan.precision in SIXTEEN else 4)
            cost = collective_price(self.c.cluster, "all_reduce", size, ends, firsts=Groups(plan).likes("pp"))
            self.reduces.append(self.lane.message("tied embedding", "all_reduce", cost.seconds, [self.lane.free]))
        dense, experts = (sum(own) for own in zip(*(self.c.elements(c) for c in self.own)))
        optimizer(self.c, self.lane, dense, self.reduces, experts)
        if self.replicas > 1 and not self.overlapped and plan.data_parallel in ("zero1", "zero2"):
            for chunk in self.own:
                seconds, _ = self._data("all_gather", chunk, 2, chunk, False)
                gathered = self.lane.message("gather parameters", "all_gather", seconds, [self.lane.free])
                self.lane.busy("wait", "wait", 0.0, [gathered])


def optimizer(c: Context, lane: Lane, dense: int, waits: Sequence[int], experts: int = 0) -> None:
    """The gradient norm, and one kernel that updates a rank's share of the parameters that it holds: those of experts
    are shared by fewer ranks. Bytes per element of Adam with 16-bit
    parameters: reads gradient, master copy and two moments (4 each), writes all but the gradient, and the parameter.
    Around it: clipping scales the share of the gradients (torch's `clip_grad_norm_` always does, Megatron's where the
    norm exceeds the limit, as in the first steps that benchmarks time), and a buffer of main gradients is set to zero
    for the next step (Megatron-LM core/distributed/param_and_grad_buffer.py, `reset`)."""
    plan, software = c.plan, c.software
    if software.optimizer == "none":
        return
    shared = plan.data_parallel in ("zero1", "zero2", "fsdp")
    elements = dense + experts
    share = dense / (plan.dp * plan.cp) + experts / plan.expert_replicas if shared else elements
    sixteen = plan.precision in SIXTEEN and plan.data_parallel != "fsdp" and not is_autocast(software, plan)
    seconds = 0.0
    if software.norm_clip:
        seconds += c.kernel("aten.norm.default", 4 * share, 0, share)
        seconds += c.kernel("aten.mul_.Tensor", 4 * share, 4 * share, share)
    if software.main_grads and plan.data_parallel != "fsdp":
        seconds += c.kernel("aten.zero_.default", 0, software.main_grads * elements, elements)
    moments = 2 if software.optimizer == "adam" else 1
    read, written = 4 * (2 + moments), 4 * (1 + moments) + (2 if sixteen else 0)
    if software.optimizer == "adam" and software.adam_passes and not sixteen:
        read = 4 * round(0.6 * software.adam_passes)
        written = 4 * software.adam_passes - read
    name = "aten._fused_adam_.default" if software.optimizer == "adam" else "aten._fused_sgd_.default"
    seconds += c.kernel(name, read * share, written * share, share)
    lane.busy("optimizer", "optimizer", seconds, waits)
    lane.busy("host of the step", "host", software.host.step)
