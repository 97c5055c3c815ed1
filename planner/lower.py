"""Lowering: plan, graph and cluster become a Program of tasks on compute and communication resources.

Ops between two messages are merged into one task; ranks of one stage run the same script, so it is priced once. On GPUs
a host thread issues them (`planner.host_thread`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.overlap import contended
from costmodels.sharing import Layer, fullest
from opgraph.graph import OpGraph
from planner.host_link import HostLinks
from planner.host_thread import EAGER, HostThread, Running, host_costs
from planner.layout import Layout, propagate
from planner.lower_blocks import Block, Entry, Tally, largest_beside, price_script
from planner.offload import check_offload, is_apart, on_the_host
from planner.plan import ParallelPlan, check_lowerable
from planner.runtime import stage_segments
from planner.runtime_stage import Stage, prepare
from planner.script import Copy, HostUpdate, Item, Message, Transfer, Wait, transfer_key
from planner.stages import StageOps, shared_parameters, stage_ops
from simulator import Program, ProgramBuilder


@dataclass(frozen=True, slots=True)
class Lowered:
    """A plan as a program.

    stages: what each pipeline stage runs. flops: of all ranks in one step (recomputation included). seconds_by_source:
    how much of the work and of the messages rests on which kind of price, summed over ranks. deviation: of the sum,
    in seconds (errors of one law or table add up, those of different ones add in squares). unpriced: ops that no
    model covers, priced by their bytes. fused: chains of ops that a compiled step runs as one kernel, and how often in
    one rank of every stage.
    """

    plan: ParallelPlan
    program: Program
    stages: tuple[Stage, ...]
    flops: int
    seconds_by_source: dict[str, float]
    deviation: float
    unpriced: tuple[str, ...]
    fused: dict[str, int] = field(default_factory=dict)


def lower(graph: OpGraph, plan: ParallelPlan, cluster: Cluster, running: Running = EAGER) -> Lowered:
    """The program of one step. ValueError where the plan does not fit the model (a shape that does not divide, a cut
    that is not reached, an op that cannot be sharded)."""
    check_lowerable(plan)
    graph, layout, stages = prepared_graph(graph.run_by(cluster.device.kind), plan)
    prepared = tuple(prepare(graph, plan, layout, stages, i) for i in range(plan.pp))
    most = max(len(stage.recompute) for stage in prepared)
    if len(plan.recompute_first) == 1 and most < plan.recompute_first[0]:
        raise ValueError(
            f"recompute_first is {plan.recompute_first[0]} for every stage, but no stage has so many of the "
            f"modules that recompute names: the most is {most}; give at most so many, or leave it out to recompute all"
        )
    own = range(plan.dp) if plan.data_parallel == "zero1" else (0,)
    return lower_scripts([[stage_segments(s, dp) for dp in own] for s in prepared], prepared, plan, cluster, running)


def lower_scripts(
    scripts: Sequence[Sequence[Iterable[tuple[Item, ...]]]], prepared: tuple[Stage, ...], plan: ParallelPlan,
    cluster: Cluster, running: Running = EAGER,
) -> Lowered:  # fmt: skip
    """The program of scripts in segments: of every stage one that all its ranks run, or one for each dp rank."""
    check_offload(prepared, running.cuda_graphs)
    costs = host_costs(cluster, running)
    builder = _Builder(plan, cluster, shared_parameters(prepared[0].stages), costs is not None)
    tally = Tally()
    for stage, own in zip(prepared, scripts):
        segments = [on_the_host(script, plan, cluster) for script in own]
        compiled = stage.graph if running.compiled else None
        other = largest_beside(segments[0], stage.ops.index, plan, cluster)
        priced = [price_script(script, cluster, tally, other, costs, compiled) for script in segments]
        builder.stage(stage.ops.index, priced)
    program = builder.tasks.build()
    ranks_per_script = plan.tp * (1 if plan.data_parallel == "zero1" else plan.dp)
    by_source: dict[str, float] = defaultdict(float)
    for found in (tally.by_source, builder.by_source):
        for source, seconds in found.items():
            by_source[source] += seconds * ranks_per_script
    laws = (*tally.by_law.values(), *builder.by_law.values())
    squares = sum((seconds * ranks_per_script) ** 2 for seconds in laws)
    if builder.links is not None:
        by_source["roofline"] += builder.links.seconds
        squares += builder.links.deviation**2
    return Lowered(
        plan,
        program,
        prepared,
        tally.flops * ranks_per_script,
        dict(by_source),
        squares**0.5,
        tuple(sorted(tally.unpriced)),
        dict(tally.fused.most_common()),
    )


def prepared_graph(graph: OpGraph, plan: ParallelPlan) -> tuple[OpGraph, Layout, tuple[StageOps, ...]]:
    """The step at the plan's micro-batch, with placements and stages; kept with the graph, as many plans share them."""
    batches: dict[Any, Any] = graph.memo.setdefault("at_batch", {})
    if plan.micro_batch not in batches:
        batches[plan.micro_batch] = graph.at_batch(plan.micro_batch)
    step: OpGraph = batches[plan.micro_batch]
    layouts = step.memo.setdefault("layouts", {})
    if (plan.tp, plan.shardings) not in layouts:
        layouts[plan.tp, plan.shardings] = propagate(step, plan)
    stages = step.memo.setdefault("stages", {})
    if plan.cuts not in stages:
        stages[plan.cuts] = stage_ops(step, plan.cuts)
    return step, layouts[plan.tp, plan.shardings], stages[plan.cuts]


def _shared_layer(plan: ParallelPlan, cluster: Cluster) -> Layer | None:
    """The ports or uplinks on which messages of different axes of the plan can meet; None where none do."""
    if cluster.backend != "nccl" or plan.world_size > cluster.size:
        return None
    stride = plan.dp * plan.tp
    firsts = range(0, plan.world_size, stride)
    traffic = [[(plan.group(r, axis), plan.likes(r, axis)) for r in firsts] for axis in ("dp", "tp")]
    traffic.append([((r, r + stride), range(r, r + stride)) for r in firsts[:-1]])
    return fullest(cluster, traffic)


class _Builder:
    """Makes tasks rank by rank; `last[r]` is what rank r must finish before it goes on."""

    def __init__(
        self, plan: ParallelPlan, cluster: Cluster, shared: tuple[tuple[str, tuple[int, ...]], ...], hosts: bool
    ) -> None:
        self.plan, self.cluster, self.shared = plan, cluster, dict(shared)
        self.tasks = ProgramBuilder()
        self.by_source: dict[str, float] = defaultdict(float)
        self.by_law: dict[str, float] = defaultdict(float)
        nodes = sorted({cluster.node_of(r) for r in range(plan.world_size)})
        pools = {n: self.tasks.pool(f"node {n} cores", float(cluster.cores)) if cluster.cores else -1 for n in nodes}
        # NCCL moves the messages of every axis on a stream of its own, and those between stages in both directions at
        # once: torch posts an activation and the gradient that comes back as one group (batch_isend_irecv), and what
        # it posts alone has a stream for each neighbour (torch/distributed/pipelining/schedules.py, `_batch_p2p`). The
        # link is full duplex: ASSUMPTION, as NVLink, InfiniBand and PCIe are. Gloo's threads take turns.
        self.streams: tuple[str, ...] = ("",)
        if cluster.backend == "nccl" and not cluster.cores:
            self.streams = ("pp", "dp", "tp", *(("pp out", "pp in") if plan.pp > 1 else ()))
        self.layer = None if cluster.cores else _shared_layer(plan, cluster)
        wires: dict[tuple[int, int], int] = {}
        self.compute: list[int] = []
        self.comm: dict[tuple[int, str], int] = {}
        for r in range(plan.world_size):
            pool = pools[cluster.node_of(r)]
            self.compute.append(self.tasks.resource(f"rank {r} compute", pool=pool, rank=r))
            if self.layer is not None:
                place = self.layer.pool_of(cluster, r)
                if place not in wires:
                    wires[place] = self.tasks.pool(f"{self.layer.name} {place[0]}.{place[1]}", 1.0)
                pool = wires[place]
            for axis in self.streams:
                name = f"rank {r} {axis} communication".replace("  ", " ")
                self.comm[r, axis] = self.tasks.resource(name, pool=pool, rank=r, kind="communication")
        threads = range(plan.world_size) if hosts else ()
        self.hosts = [
            HostThread(self.tasks, r, self.tasks.resource(f"rank {r} host", rank=r, kind="host")) for r in threads
        ]
        apart = plan.offload and is_apart(cluster)
        self.links = HostLinks(self.tasks, plan.world_size, cluster) if apart else None
        self.last: list[int] = [-1] * plan.world_size
        self.last_message: dict[tuple[int, str], int] = {}
        self.queued: list[list[list[Any]]] = [[] for _ in range(plan.world_size)]  # [key, seconds] under way
        self.done: dict[tuple[str, int], int] = {}  # (key, rank) -> the task that a Wait waits for
        self.away: dict[tuple[str, int], list[int]] = defaultdict(list)  # activations on the host, by micro-batch
        self.joins: dict[str, int] = {}  # transfers and tied reductions whose other end is another stage
        self.posted: list[list[int]] = [[] for _ in range(plan.world_size)]  # joins of a group that is not whole yet

    def stage(self, index: int, blocks: list[list[Entry]]) -> None:
        """Adds all ranks of one stage in step: they all run the same items."""
        stride = self.plan.dp * self.plan.tp
        ranks = range(index * stride, (index + 1) * stride)
        of_rank = {r: blocks[self.plan.coordinates(r)["dp"] % len(blocks)] for r in ranks}
        at = dict.fromkeys(ranks, 0)
        while True:
            for r in ranks:
                at[r] = self._work(r, of_rank[r], at[r])
            if at[ranks[0]] >= len(of_rank[ranks[0]]):
                return
            items = {r: of_rank[r][at[r]] for r in ranks}
            for r in ranks:
                at[r] += 1
            self._communicate(items)

    def _work(self, rank: int, items: list[Entry], at: int) -> int:
        while at < len(items) and isinstance(block := items[at], Block):
            seconds = contended(block.seconds, block.slowed, self.queued[rank])
            if block.seconds:
                self.last[rank] = self.tasks.task(
                    block.phase, block.phase, seconds, self.compute[rank], self._after(self.last[rank])
                )
            if self.hosts:
                run = block.run if seconds == block.seconds else block.issued.run(seconds / block.seconds)
                self.last[rank] = self.hosts[rank].after(self.last[rank], run, block.phase)
            at += 1
        return at

    def _communicate(self, items: dict[int, Entry]) -> None:
        joins: dict[tuple[int, ...], int] = {}
        for r, item in items.items():
            if self.hosts and not isinstance(item, Wait):
                self.last[r] = self.hosts[r].message(self.last[r])
            if isinstance(item, Wait):
                self._wait(r, item.key)
            elif isinstance(item, Copy | HostUpdate):
                self._cross(r, item)
            elif isinstance(item, Transfer):
                self._transfer(r, item)
            elif isinstance(item, Message):
                self._message(r, item, joins)

    def _cross(self, rank: int, item: Copy | HostUpdate) -> None:
        assert self.links is not None
        if isinstance(item, HostUpdate):
            self.last[rank] = self.links.update(rank, item, self._after(self.last[rank]))
        else:
            sent = self.away[item.after, rank]  # backwards come in the order of the forwards
            after = sent.pop(0) if sent else self.done.get((item.after, rank), -1)
            task = self.links.copy(rank, item, self._after(self.last[rank], after))
            if item.to == "host" and item.phase == "forward":
                self.away[item.key, rank].append(task)
            else:
                self.done[item.key, rank] = task

    def _message(self, rank: int, item: Message, joins: dict[tuple[int, ...], int]) -> None:
        ranks = self.plan.group(rank, item.axis)
        across = item.axis == "pp"  # stages are added one after the other, and meet by name
        if across:
            stride, tied = self.plan.dp * self.plan.tp, self.shared.get(item.key.removeprefix("tied "))
            ranks = tuple(rank % stride + s * stride for s in tied) if tied else ranks
            name = f"{item.key or item.kind}@{rank % stride}"
            if name not in self.joins:
                self.joins[name] = self.tasks.task(name, item.kind, 0.0)
            join = self.joins[name]
        else:
            if ranks not in joins:
                joins[ranks] = self.tasks.task(f"{item.kind} {item.axis} enter", item.kind, 0.0)
            join = joins[ranks]
        stream = self._stream(item.axis)
        copied = self.done.pop((item.after, rank), -1)
        for before in (self.last[rank], self.last_message.get((rank, stream), -1), copied):
            if before >= 0:
                self.tasks.edge(before, join)
        likes = range(ranks[0], ranks[0] + 1) if across else self.plan.likes(rank, item.axis)
        cost = collective_price(self.cluster, item.kind, item.bytes, ranks, firsts=likes)
        seconds = cost.seconds + self._crowded(ranks)
        self._count(seconds, cost.source, cost.error, item.kind)
        label, demand = f"{item.kind} {item.axis} {item.bytes} B", cost.demand * cost.seconds / max(seconds, 1e-12)
        demand = self._wire_share(item.kind, item.bytes, ranks, rank, seconds) or demand
        task = self.tasks.task(label, item.kind, seconds, self.comm[rank, stream], (join,), demand)
        self.last_message[rank, stream] = task
        # with gloo FSDP's collectives block the thread that calls them; DDP's buckets do not
        blocks = self.cluster.backend == "gloo" and item.kind in ("all_gather", "reduce_scatter")
        if item.key and not blocks:
            self.done[item.key, rank] = task
            self.queued[rank].append([item.key, seconds])
        else:
            self.last[rank] = task
            self.done.pop((item.key, rank), None)

    def _transfer(self, rank: int, item: Transfer) -> None:
        stride = self.plan.dp * self.plan.tp
        name = f"{transfer_key(item)}@{rank % stride}"
        if name not in self.joins:
            self.joins[name] = self.tasks.task(f"{name} enter", "send", 0.0)
        self._post(rank, item, self.joins[name])
        ends = (item.source * stride + rank % stride, item.target * stride + rank % stride)
        seconds = demand = 0.0
        for size in item.bytes:
            base = item.source * stride
            cost = collective_price(self.cluster, "send", size, ends, firsts=range(base, base + stride))
            self._count(cost.seconds, cost.source, cost.error, "send")
            seconds, demand = seconds + cost.seconds, max(demand, cost.demand)
        crowded = self._crowded(ends)
        seconds, demand = seconds + crowded, demand * seconds / max(seconds + crowded, 1e-12)
        kind = "send" if ends[0] == rank else "recv"
        demand = self._wire_share("send", sum(item.bytes), ends, rank, seconds) or demand
        stream = self.comm[rank, self._stream("pp out" if kind == "send" else "pp in")]
        task = self.tasks.task(f"{kind} {transfer_key(item)}", kind, seconds, stream, (self.joins[name],), demand)
        self.done[transfer_key(item), rank] = task
        if self.layer is not None:  # what arrives has left: the receiver waits for the sender's port
            if kind == "send":
                self.tasks.edge(task, self._arrival(name))
            else:
                self.tasks.edge(task, self._arrival(name))
                self.done[transfer_key(item), rank] = self._arrival(name)

    def _post(self, rank: int, item: Transfer, join: int) -> None:
        """A message enters when both its ends have posted it; those of one group when the last of them is."""
        self.posted[rank].append(join)
        if item.more and len(self.streams) > 1:
            return
        for waiting in self.posted[rank] if self.last[rank] >= 0 else ():
            self.tasks.edge(self.last[rank], waiting)
        self.posted[rank].clear()

    def _arrival(self, name: str) -> int:
        """The task that ends when both ends of a transfer have."""
        key = f"{name} arrived"
        if key not in self.joins:
            self.joins[key] = self.tasks.task(key, "recv", 0.0)
        return self.joins[key]

    def _stream(self, axis: str) -> str:
        return axis if len(self.streams) > 1 else ""

    def _wire_share(self, kind: str, size: float, ranks: tuple[int, ...], rank: int, seconds: float) -> float:
        """Which share of its pool of wires a message keeps busy, at most all of it; 0 where wires are no pool."""
        if self.layer is None or seconds <= 0:
            return 0.0
        return min(self.layer.busy(self.cluster, kind, size, ranks, rank) / seconds, 1.0)

    def _crowded(self, ranks: tuple[int, ...]) -> float:
        """Where more ranks than cores run, the ranks of a smaller group wait for their turns on the cores. Tables of
        the whole world were measured that way already.

        The calibrated wait is that of a world whose ranks all run at once. Stages of a pipeline do not: of a stage's m
        micro-batches, m - d run while the stage d further does. The wait shrinks with the ranks beyond the cores.
        """
        plan, cores = self.plan, self.cluster.cores
        if not 0 < cores < plan.world_size or len(ranks) == plan.world_size:
            return 0.0
        m, own = plan.micro_batches, ranks[0] // (plan.dp * plan.tp)
        beside = sum(max(m - abs(stage - own), 0) / m for stage in range(plan.pp))
        share = (beside * plan.dp * plan.tp - cores) / (plan.world_size - cores)
        return self.cluster.device.host.get("crowded_message", 0.0) * max(share, 0.0)

    def _count(self, seconds: float, source: str, error: float, kind: str) -> None:
        share = 1.0 / (self.plan.tp * (1 if self.plan.data_parallel == "zero1" else self.plan.dp))
        self.by_source[source] += seconds * share
        self.by_law[f"message {kind}"] += seconds * error * share

    def _wait(self, rank: int, key: str) -> None:
        queue = self.queued[rank]
        at = next((i for i, (name, _) in enumerate(queue) if name == key), -1)
        del queue[: at + 1]
        task = self.done.pop((key, rank), -1)
        if task < 0 or task == self.last[rank]:
            return
        before = self._after(self.last[rank], task)
        joined = len(before) == 1
        self.last[rank] = task if joined else self.tasks.task(f"wait {key}", "wait", 0.0, -1, before, 0.0, rank)

    @staticmethod
    def _after(*tasks: int) -> tuple[int, ...]:
        return tuple(t for t in tasks if t >= 0)
