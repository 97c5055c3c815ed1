"""A training step of any traced model on GPUs whose ranks all do the same: data parallelism by all-reduce or by
parameter servers, a classification layer divided over the ranks, or a pipeline of micro-batches.

For models without repeated blocks (CNNs). Prices, host model and event engine are those of `planner.folded`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import hypot, sqrt
from typing import Literal

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.ops import OpShape, price, price_many
from costmodels.overlap import beside
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from opgraph.graph import Op, OpGraph
from planner.folded import FoldedPrediction
from planner.folded_groups import Groups
from planner.folded_kernels import Kernels, Priced, priced
from planner.folded_lane import Lane
from planner.folded_local import local_step
from planner.folded_orders import order
from planner.folded_overlap import lost
from planner.folded_step import Tally
from planner.plan import ParallelPlan
from planner.predict import NINE_IN_TEN, STEP_ERROR
from planner.software import Software
from planner.stages import StageOps, stage_ops, within
from planner.whole_around import NOTHING, Around, image_kernels, laid_out, of_rank, passes
from planner.whole_memory import is_divided, whole_memory
from simulator import ProgramBuilder, breakdown, overall, simulate

Exchange = Literal["all_reduce", "server", "copies"]
PARTS = 8  # a pass is cut into so many parts, each of which hands over its gradients
UPDATE_PASSES = 3  # over the variables: SGD reads them and the sums, and writes them (the default of tf_cnn_benchmarks)
HOST_MEMORY = 40e9  # bytes/s at which a host adds gradients up: ASSUMPTION (two sockets of 2014 to 2017, 20 to 60)


@dataclass(frozen=True, slots=True)
class Sharing:
    """exchange: how replicas agree. barrier: variables are fetched by all at once before forward begins, not as
    forward needs them. divided: modules whose parameters are divided over the ranks by
    output; every rank sees all samples there. sampled: share of its classes that take part in a step."""

    exchange: Exchange = "all_reduce"
    divided: tuple[str, ...] = ()
    sampled: float = 1.0
    barrier: bool = False


@dataclass(slots=True)
class _Whole:
    graph: OpGraph
    plan: ParallelPlan
    cluster: Cluster
    software: Software
    sharing: Sharing
    kernels: Kernels
    around: Around
    tally: Tally = field(default_factory=Tally)

    def runs(self, ops: Sequence[Op], backward: bool, times: int = 1) -> Priced:
        launches = self.kernels.backward(ops) if backward else self.kernels.forward(ops)
        if self.sharing.divided:
            weights = [t.shape for n, t in self.graph.parameters.items() if self._divided(n) and len(t.shape) > 1]
            launches = [of_rank(x, weights, self.plan.dp, self.sharing.sampled) for x in launches]
        if self.around.channels_first:
            launches = list(laid_out(launches, self.cluster.device))
        found = priced(launches, self.cluster, Groups(self.plan))
        self.tally.merge(found, times)
        return found

    def bytes_of(self, ops: Sequence[Op]) -> int:
        """Gradients that these backward ops finish and that replicas exchange."""
        ends = {op: name for name, op in self.graph.gradient_ops}
        names = (ends[op.id] for op in ops if op.id in ends)
        return sum(self.graph.parameters[n].bytes for n in names if not self._divided(n))

    def _divided(self, name: str) -> bool:
        return is_divided(name, self.sharing.divided)

    def update_seconds(self, names: Iterable[str], ranks: int, times: int = 1) -> float:
        """The optimizer on these parameters of a rank, and what else passes over their gradients once a step."""
        sizes = []
        for name in names:
            size = self.graph.parameters[name].bytes
            sizes.append(size / ranks * self.sharing.sampled if self._divided(name) else size)
        around = self.around
        counts = (0 if self.sharing.exchange == "server" else around.update_passes, around.gradient_passes)
        shapes = [shape for count in counts for shape in passes(sizes, count, around.apart)]
        return self.kernel_seconds(shapes, "optimizer", times)

    def kernel_seconds(self, shapes: Sequence[OpShape], what: str, times: int = 1) -> float:
        """Seconds of kernels, which the step runs so many times."""
        total = 0.0
        for cost in price_many(self.cluster.device, shapes):
            self.tally.add(what, cost.seconds * times, cost.source, cost.error)
            total += cost.seconds
        return total

    def accumulation_seconds(self, names: Iterable[str], times: int) -> float:
        """Adding a micro-batch's gradients of these parameters to those of the ones before it."""
        size = sum(self.graph.parameters[n].bytes // (self.plan.dp if self._divided(n) else 1) for n in names)
        flat = ((size // 4,),)
        shape = OpShape("aten.add_.Tensor", "backward", flat, flat, "float32", 0, 2 * size, size)
        cost = price(self.cluster.device, shape)
        self.tally.add("pointwise", cost.seconds * times, cost.source, cost.error)
        return cost.seconds

    def message(self, kind: str, size: float, stage: int = 0, times: int = 1) -> float:
        """Seconds of one of `times` messages between the replicas of a stage."""
        if self.plan.dp == 1 and self.sharing.exchange != "server":
            return 0.0
        if self.sharing.exchange == "all_reduce" or kind != "all_reduce":
            cost = collective_price(self.cluster, kind, size, Groups(self.plan, stage).ranks("dp"))
            self.tally.add(f"dp {kind}", cost.seconds * times, cost.source, cost.error)
            return cost.seconds
        seconds = self._served(size)
        self.tally.add(f"dp {self.sharing.exchange}", seconds * times, "roofline", 0.3)
        return seconds

    def _served(self, size: float) -> float:
        """Gradients to where the variables live, in one direction.

        The node's ranks copy theirs at once; the host adds them up. Between nodes, every node holds an equal part of
        the variables: it sends the rest of its sums away and receives as much, in both directions at once."""
        cluster = self.cluster
        inside = min(self.plan.dp, cluster.devices_per_node)
        copying = size / cluster.intra.bandwidth
        adding = inside * size / HOST_MEMORY if self.sharing.exchange == "server" else 0.0
        nodes = -(-self.plan.dp // cluster.devices_per_node)
        rate = cluster.inter.bandwidth * cluster.devices_per_node
        return max(copying, adding) + (size * (nodes - 1) / nodes / rate if nodes > 1 else 0.0)


def predict_whole(
    graph: OpGraph, plan: ParallelPlan, cluster: Cluster, software: Software, sharing: Sharing = Sharing(),
    around: Around = NOTHING,
) -> FoldedPrediction:  # fmt: skip
    """Predicts one step of `graph`, which is at the plan's micro-batch; `device` is of the first stage."""
    kernels = Kernels(local_step(graph, plan, 1, 0, False), software)
    cluster = synchronous(in_precision(cluster, plan.precision), plan.world_size)
    whole = _Whole(graph, plan, cluster, software, sharing, kernels, around)
    tasks = ProgramBuilder()
    if plan.pp > 1 or plan.recompute:
        _pipeline(whole, tasks)
    else:
        _replicas(whole, tasks)
    timeline = simulate(tasks.build())
    tally, step = whole.tally, timeline.makespan
    memory = whole_memory(graph, plan, sharing.divided)
    total = sum(tally.sources.values()) or 1.0
    spread = NINE_IN_TEN * hypot(sqrt(sum(e * e for e in tally.errors.values())) / total, STEP_ERROR)
    return FoldedPrediction(
        step, (step * max(0.0, 1 - spread), step * (1 + spread)), memory,
        asdict(overall(breakdown(timeline))), dict(sorted(tally.seconds.items(), key=lambda item: -item[1])),
        {k: v / total for k, v in sorted(tally.sources.items())}, len(timeline.program), memory.allocated,
    )  # fmt: skip


def _cut(ops: Sequence[Op], parts: int) -> list[Sequence[Op]]:
    size = -(-len(ops) // parts)
    return [ops[i : i + size] for i in range(0, len(ops), size)]


def _replicas(w: _Whole, tasks: ProgramBuilder) -> None:
    """Micro-batches one after the other, update. Parameters that a server keeps are fetched part by part before the
    first forward; the last backward hands over the gradients, which are summed until then."""
    lane, count = Lane(tasks, 0), w.plan.micro_batches
    forward = [op for op in w.graph.ops if op.phase == "forward"]
    backward = [op for op in w.graph.ops if op.phase == "backward"]
    served = w.sharing.exchange == "server"
    total = sum(w.bytes_of(part) for part in _cut(backward, PARTS))
    ahead = [w.runs(part, False, count).run for part in _cut(forward, PARTS)]
    parts = [(w.runs(part, True, count), w.bytes_of(part)) for part in _cut(backward, PARTS)]
    between = [step for path in w.sharing.divided for step in _divided_layer(w, path)]
    adding = w.accumulation_seconds(w.graph.parameters, count - 1) if count > 1 else 0.0
    if served and w.sharing.barrier:
        lane.busy("fetch", "server", w.message("all_reduce", total))
    images = w.kernel_seconds(image_kernels(w.graph, w.around.image_passes), "pointwise", count)
    handed = []
    for micro in range(count):
        lane.busy("images", "forward", images)
        for run in ahead:
            early = served and not w.sharing.barrier and micro == 0
            waits = [lane.message("fetch", "server", w.message("all_reduce", total / PARTS))] if early else []
            lane.run("F", "forward", run, waits)
        for kind, seconds in between:
            lane.busy(kind, kind, seconds)
        if micro:  # before what hands the sums over
            lane.busy("accumulate", "backward", adding)
        for i, (part_run, size) in enumerate(parts):
            lane.run("B", "backward", part_run.run)
            if size and micro == count - 1:
                handed.append(_hand_over(w, lane, size, [part for part, _ in parts[i + 1 :]]))
    update = w.update_seconds(w.graph.parameters, w.plan.dp)
    lane.busy("optimizer", "optimizer", update, handed)
    lane.busy("host of the step", "host", w.software.host.step)


def _hand_over(w: _Whole, lane: Lane, size: int, rest: Sequence[Priced]) -> int:
    """The message of gradients that are finished, and what the rest of backward loses beside it."""
    seconds, share = w.message("all_reduce", size), 0.0
    if w.sharing.exchange == "server":  # each node's host updates the variables that it holds
        seconds += UPDATE_PASSES * size / -(-w.plan.dp // w.cluster.devices_per_node) / HOST_MEMORY
    if w.sharing.exchange == "all_reduce":
        other = beside(w.cluster, "all_reduce", size, Groups(w.plan).ranks("dp"), seconds)
        share = lost(w.cluster, [(part, 1.0) for part in rest], other)
    return lane.message("gradients", "all_reduce", seconds, [lane.free], share)


def _divided_layer(w: _Whole, path: str) -> list[tuple[str, float]]:
    """Messages of a micro-batch: every rank gets all that the layer reads for its outputs, and gives back their
    gradients; a loss needs two numbers of every sample from all ranks."""
    weight = next(t for n, t in w.graph.parameters.items() if within(n.rpartition(".")[0], path))
    size = w.graph.batch * w.plan.dp * weight.shape[-1] * 4
    kinds = (("all_gather", size), ("all_reduce", 8 * w.graph.batch * w.plan.dp), ("reduce_scatter", size))
    return [(kind, w.message(kind, amount, times=w.plan.micro_batches)) for kind, amount in kinds]


def _pipeline(w: _Whole, tasks: ProgramBuilder) -> None:
    """GPipe, where the plan says so with the activations of every micro-batch but the last made again in backward;
    gradients are summed over micro-batches, and replicas exchange a stage's after all of its backwards. What the
    devices do is told of the first stage."""
    plan = w.plan
    stages = stage_ops(w.graph, plan.cuts)
    adding = [w.accumulation_seconds(s.parameters, 0 if s.index else plan.micro_batches - 1) for s in stages]
    holding = set[int]()  # stages that have gradients of a micro-batch
    lanes = [Lane(tasks, s) for s in range(plan.pp)]
    passes = [(w.runs(s.forward, False, plan.micro_batches if s.index == 0 else 0).run,
               w.runs(s.backward, True, plan.micro_batches if s.index == 0 else 0).run) for s in stages]  # fmt: skip
    send = [_send(w, s) for s in stages[:-1]]
    done: dict[tuple[bool, int, int], int] = {}
    for backward in (False, True):
        for s in range(plan.pp) if not backward else reversed(range(plan.pp)):
            for step in order(s, plan.pp, 1, plan.micro_batches, True):
                if step.backward != backward:
                    continue
                before = s + 1 if backward else s - 1
                waits = [done[backward, before, step.micro]] if 0 <= before < plan.pp else []
                lane, (f, b) = lanes[s], passes[s]
                if backward and plan.recompute and step.micro < plan.micro_batches - 1:
                    lane.run("R", "recompute", f)
                lane.run("B" if backward else "F", "backward" if backward else "forward", b if backward else f, waits)
                if backward and s in holding:
                    lane.busy("accumulate", "backward", adding[s])
                elif backward:
                    holding.add(s)
                edge = s - 1 if backward else s
                sent = lane.free
                if 0 <= edge < plan.pp - 1:
                    sent = tasks.task("send", "send", send[edge], -1, [lane.free], 0.0, s)
                done[backward, s, step.micro] = sent
    for lane, stage in zip(lanes, stages):
        handed = []
        if plan.dp > 1:  # told of the first stage, as its kernels are
            seconds = w.message("all_reduce", w.bytes_of(stage.backward), stage.index, 0 if stage.index else 1)
            handed.append(lane.message("gradients", "all_reduce", seconds, [lane.free]))
        update = w.update_seconds(stage.parameters, 1, 0 if stage.index else 1)
        lane.busy("optimizer", "optimizer", update, handed)
        lane.busy("host of the step", "host", w.software.host.step)


def _send(w: _Whole, stage: StageOps) -> float:
    ends = Groups(w.plan, stage.index).neighbours(stage.index + 1)
    size = sum(w.graph.tensors[t].bytes for t in stage.sends)
    cost = collective_price(w.cluster, "send", size, ends)
    w.tally.add("send", cost.seconds * w.plan.micro_batches, cost.source, cost.error)
    return cost.seconds
