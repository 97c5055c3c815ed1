"""When the gradients of a data-parallel step are complete, bucket by bucket, and the step around any exchange of them.

The script is that of `planner.runtime` (torch's DDP); prices are those of `planner.lower`, with which an uncompressed
ring agrees to rounding where that slows no ops beside messages (it does on NVLink; here nothing does). One rank stands
for all. On GPUs the host thread that launches eager kernels is counted too
(`planner.software.HOST`), because the ops of a compressor are launched by it as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from costmodels.cluster import Cluster
from costmodels.context import price_with_host
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from opgraph.graph import OpGraph
from planner.lower import prepared_graph
from planner.plan import ParallelPlan
from planner.runtime import stage_segments
from planner.runtime_data import ddp_buckets
from planner.runtime_host import host_seconds
from planner.runtime_stage import prepare
from planner.script import Host, Item, Message, Wait, Work
from planner.software import HostCosts
from simulator import Program, ProgramBuilder, simulate

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class StepWork:
    """Compute of one rank around its buckets, seconds. buckets: shapes of each, in the order in which they are sent;
    before: compute from the bucket before (the start of the step) until each is complete; rest: backward after the
    last; unpack: copies of each bucket's result into the gradients; update: the optimizer; cores: of a node for each of
    its ranks (0: ranks compute on devices of their own)."""

    buckets: tuple[Shapes, ...]
    before: tuple[float, ...]
    rest: float
    unpack: tuple[float, ...]
    update: float
    cores: float

    @property
    def compute(self) -> float:
        return sum(self.before) + self.rest + sum(self.unpack) + self.update


@dataclass(frozen=True, slots=True)
class Load:
    """What exchanging one bucket costs, seconds. encode, between, decode: compute of the rank. first, second: messages
    before and after `between`. duplex: whether the second goes the other way on full-duplex ports (the reply of a
    server machine), so that the next bucket's first may pass it; update: of that server between them. worker_update:
    share of the bucket's parameters that the worker updates itself. demand: host cores busy with a message."""

    encode: float = 0.0
    between: float = 0.0
    decode: float = 0.0
    first: float = 0.0
    second: float = 0.0
    duplex: bool = False
    update: float = 0.0
    worker_update: float = 1.0
    demand: float = 0.0


def step_work(graph: OpGraph, plan: ParallelPlan, cluster: Cluster, host: HostCosts | None = None) -> StepWork:
    """The work of one rank of a plan of pure data parallelism; host: of the thread that launches kernels (None: the
    device's own overheads only, as `planner.lower` has them)."""
    if plan.world_size != plan.dp or plan.dp < 2 or plan.data_parallel != "ddp" or plan.offload:
        raise ValueError(f"gradients of {plan.label} are not exchanged in buckets; give a plan like dp2")
    cluster = synchronous(in_precision(cluster, plan.precision), plan.world_size)
    step, layout, stages = prepared_graph(graph.run_by(cluster.device.kind), plan)
    stage = prepare(step, plan, layout, stages, 0)
    buckets = ddp_buckets(plan, [stage.parameters[name] for name in stage.ready])
    if wrong := next((p for b in buckets for p in b if p.dtype != "float32"), None):
        raise ValueError(f"the gradient of {wrong.name} is {wrong.dtype}; schemes are priced for float32 gradients")
    segments = stage_segments(stage)
    items = [item for segment in segments for item in segment]
    ends = _finished(segments, cluster, host)
    marks = [i for i, item in enumerate(items) if isinstance(item, Message)]
    waits = [i for i, item in enumerate(items) if isinstance(item, Wait)]
    update = next(i for i, item in enumerate(items) if isinstance(item, Host) and item.kind == "optimizer_step")
    at = [0.0, *(ends[i] for i in marks), ends[waits[0]], *(ends[i] for i in waits[1:]), ends[update - 1], ends[-1]]
    gaps = [b - a for a, b in pairwise(at)]
    n = len(buckets)
    assert len(marks) == len(waits) == n
    per_node = max(1, -(-plan.world_size // cluster.nodes))
    return StepWork(
        tuple(tuple(p.shape for p in bucket) for bucket in buckets), tuple(gaps[:n]), gaps[n],
        tuple(gaps[n + 1 : 2 * n + 1]), gaps[-1], cluster.cores / per_node,
    )  # fmt: skip


def _finished(segments: Sequence[Sequence[Item]], cluster: Cluster, host: HostCosts | None) -> list[float]:
    """When the device is through with each item if no message holds it up; passes are priced one by one, as
    `planner.lower` prices them."""
    at, issued, ends = 0.0, 0.0, list[float]()
    for items in segments:
        work = [i for i in items if isinstance(i, Work)]
        prices = iter(zip(*price_with_host(cluster.device, [i.shape for i in work], [i.phase for i in work])))
        calls = iter(host_seconds(items, cluster.device.host))
        for item in items:
            if isinstance(item, Work):
                price, beside = next(prices)
                if host is not None:
                    issued += host.view if item.is_view else host.backward if item.phase == "backward" else host.op
                    at = max(at, issued) + price.seconds if price.seconds else at
                else:
                    at += price.seconds + beside
            elif isinstance(item, Host):
                at += next(calls)
            elif isinstance(item, Message) and host is not None:
                issued += host.message
            ends.append(at)
    return ends


def step_program(work: StepWork, loads: Sequence[Load]) -> Program:
    """The step of one rank; its messages wait for nobody else, as all ranks do the same."""
    tasks = ProgramBuilder()
    pool = tasks.pool("cores", work.cores) if work.cores else -1
    compute = tasks.resource("compute", pool=pool, rank=0)
    away = tasks.resource("messages", pool=pool, rank=0, kind="communication")
    back = tasks.resource("replies", pool=pool, rank=0, kind="communication")
    last, reply, done = -1, -1, list[int]()

    def run(label: str, seconds: float, where: int, *after: int, demand: float = 1.0) -> int:
        before = [t for t in after if t >= 0]
        return tasks.task(label, label, seconds, where, before, demand)

    for seconds, load in zip(work.before, loads, strict=True):
        last = run("backward", seconds, compute, last)
        if load.encode:
            last = run("encode", load.encode, compute, last)
        # a message that needs both directions waits until replies of servers are in
        end = run("message", load.first, away, last, -1 if load.duplex else reply, demand=load.demand)
        if load.duplex:
            end = run("server", load.update, -1, end, demand=0.0)
            end = reply = run("message", load.second, back, end, demand=load.demand)
        elif load.between or load.second:
            end = run("encode", load.between, compute, end)
            end = run("message", load.second, away, end, demand=load.demand)
        done.append(run("decode", load.decode, compute, end) if load.decode else end)
    last = run("backward", work.rest, compute, last)
    for seconds, end in zip(work.unpack, done, strict=True):
        last = run("backward", seconds, compute, last, end)
    sizes = [sum(prod(s) for s in bucket) for bucket in work.buckets]
    own = sum(n * load.worker_update for n, load in zip(sizes, loads)) / max(sum(sizes), 1)
    run("optimizer", work.update * own, compute, last)
    return tasks.build()


def step_seconds(work: StepWork, loads: Sequence[Load]) -> float:
    return simulate(step_program(work, loads)).makespan
