"""Work between messages: the items of a script priced, joined into blocks, with what they rest on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.context import price_with_host
from costmodels.families import is_known
from costmodels.overlap import Beside, beside, slowdowns
from opgraph.graph import OpGraph
from planner.compiled import fused_script
from planner.host_queue import EMPTY, Run
from planner.host_thread import Issued, item_seconds
from planner.plan import ParallelPlan
from planner.runtime_host import host_seconds
from planner.script import Copy, Host, HostUpdate, Item, Message, Transfer, Wait, Work
from planner.software import HostCosts


@dataclass(slots=True)
class Block:
    """Seconds of work of one phase between two messages, and how the host thread issues it; `slowed`: the same while
    gradients or parameters move beside it all along."""

    seconds: float
    phase: str
    slowed: float
    issued: Issued = field(default_factory=Issued)
    run: Run = EMPTY


Entry = Block | Message | Transfer | Copy | HostUpdate | Wait


@dataclass(slots=True)
class Tally:
    """What the prices of one rank rest on."""

    by_source: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_law: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    unpriced: set[str] = field(default_factory=set)
    flops: int = 0
    fused: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        for mine, theirs in ((self.by_source, other.by_source), (self.by_law, other.by_law)):
            for key, value in theirs.items():
                mine[key] += value
        self.unpriced |= other.unpriced
        self.flops += other.flops
        self.fused += other.fused


def largest_beside(segments: Iterable[tuple[Item, ...]], stage: int, plan: ParallelPlan, cluster: Cluster) -> Beside:
    """What a stage's largest message that is not waited for at once takes from the ops beside it."""
    ranks, likes = plan.group(stage * plan.dp * plan.tp, "dp"), plan.likes(stage * plan.dp * plan.tp, "dp")
    found = [i for s in segments for i in s if isinstance(i, Message) and i.key and i.axis == "dp"]
    if not found or cluster.cores:
        return Beside(0, 0.0)
    largest = max(found, key=lambda message: message.bytes)
    seconds = collective_price(cluster, largest.kind, largest.bytes, ranks, firsts=likes).seconds
    return beside(cluster, largest.kind, largest.bytes, ranks, seconds)


def price_script(
    segments: Iterable[tuple[Item, ...]], cluster: Cluster, tally: Tally, other: Beside,
    costs: HostCosts | None, compiled: OpGraph | None = None,
) -> list[Entry]:  # fmt: skip
    """Prices a script; segments that come again are priced once. `compiled`: the graph, where its ops are fused."""
    known: dict[int, tuple[list[Entry], Tally]] = {}
    merged: list[Entry] = []
    for segment in segments:
        if id(segment) not in known:
            own = Tally()
            items = segment
            if compiled is not None:
                items, own.fused = fused_script(segment, compiled)
            known[id(segment)] = (_merge(items, cluster, own, other, costs), own)
        entries, own = known[id(segment)]
        tally.add(own)
        merged += entries
    return merged


def _merge(
    script: tuple[Item, ...], cluster: Cluster, tally: Tally, other: Beside, costs: HostCosts | None
) -> list[Entry]:
    """Prices the work and joins what runs without a message in between; `costs` of a host thread that issues it."""
    work = [i for i in script if isinstance(i, Work)]
    shapes = [i.shape for i in work]
    known, beside = price_with_host(cluster.device, shapes, [i.phase for i in work])
    prices = iter(zip(known, beside, slowdowns(cluster.device, shapes, [p.seconds for p in known], other)))
    beside_ops = iter(host_seconds(script, cluster.device.host))
    merged: list[Entry] = []
    module = ""
    for item in script:
        issue = item_seconds(costs, item, module) if costs else 0.0
        if isinstance(item, Work):
            module = item.module
            found, per_op, slowdown = next(prices)
            issue *= item.share
            own = found.seconds * item.share
            seconds = own + per_op * item.share
            slowed = seconds + own * (slowdown - 1)
            tally.by_source[found.source] += own
            tally.by_source["measured"] += seconds - own
            tally.by_law[item.shape.name] += own * found.error
            tally.flops += round(item.shape.flops * item.share)
            if found.seconds > 0 and (not is_known(item.shape.name) or found.source == "roofline"):
                tally.unpriced.add(item.shape.name)
        elif isinstance(item, Host):
            seconds = slowed = next(beside_ops)
            tally.by_source["measured"] += seconds
        else:
            if issue and not isinstance(item, Wait):
                _extend(merged, item.phase, 0.0, issue)
            merged.append(item)
            continue
        _extend(merged, item.phase, seconds, issue, slowed)
    for entry in merged:
        if costs and isinstance(entry, Block):
            entry.run = entry.issued.run()
    return merged


def _extend(merged: list[Entry], phase: str, seconds: float, issue: float, slowed: float = 0.0) -> None:
    """Adds work to the block that is being made, or begins one."""
    last = merged[-1] if merged else None
    if not isinstance(last, Block) or last.phase != phase:
        if not seconds and not issue:
            return
        last = Block(0.0, phase, 0.0)
        merged.append(last)
    last.seconds += seconds
    last.slowed += slowed
    last.issued.host.append(issue)
    last.issued.device.append(seconds)
