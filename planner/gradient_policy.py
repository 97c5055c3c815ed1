"""How a data-parallel step should exchange its gradients: every scheme with every compression, and a choice per bucket.

Uniform choices (one scheme, compression and bucket size for all) are tried exhaustively; the policy then starts from
the best allowed one of the most promising bucket sizes and changes bucket by bucket whatever makes the simulated step
shorter, so that it is never worse than the best uniform choice. What compression does to convergence is not modelled;
lossy kinds are chosen only where the caller allows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from costmodels.cluster import Cluster, Link
from costmodels.compression import NONE, Compression, buffer_bytes, elements, payload, reply_bytes, state_bytes
from costmodels.compression import wire_bytes as ring_bytes
from costmodels.compression_ops import codec, seconds
from costmodels.context import per_op
from costmodels.features import SWEPT
from costmodels.schemes import SCHEMES, Scheme, fits, scheme_price
from opgraph.graph import OpGraph
from planner.gradient_times import Load, Shapes, StepWork, step_seconds, step_work
from planner.plan import ParallelPlan
from planner.software import HOST

MIB = 2**20
BUCKETS = tuple(n * MIB for n in (1, 5, 25, 100))
REFINED = 2  # bucket sizes from which the policy starts its changes
PASSES = 3  # over all buckets, at most; a pass that changes nothing is the last
LEAST = 1e-4  # share of a step that a change must save: less is noise of the prices
NOTES = (
    "convergence is not modelled: a lossy compression may need more steps, and none of these seconds say so",
    "parameter servers are priced by closed forms; Parplan executes all-reduces and DDP hooks only",
    "fp16 and bf16 count as harmless (mixed precision rounds gradients the same way); --compressions leaves them out",
)


@dataclass(frozen=True, slots=True)
class Choice:
    scheme: Scheme
    compression: Compression

    @property
    def name(self) -> str:
        return f"{self.scheme.name} {self.compression.name}"


@dataclass(frozen=True, slots=True)
class Uniform:
    """One choice for all buckets. Seconds of a step: exposed: what messages add to it; encode, decode: compute of one
    rank (PowerSGD's products between messages count as encoding). wire_bytes: sent by one rank; memory_bytes: kept from
    step to step; buffer_bytes: of the largest bucket while it travels."""

    choice: Choice
    bucket_bytes: int
    step_seconds: float
    exposed_seconds: float
    encode_seconds: float
    decode_seconds: float
    wire_bytes: float
    memory_bytes: int
    buffer_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What one bucket does, and why in one sentence."""

    bucket_bytes: int
    choice: Choice
    message_seconds: float
    saved_seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Advice:
    """uniform: all rows, the quickest first (each at its best bucket size). policy: in the order of the buckets.
    alone_seconds: the step of the policy if messages were free (what it encodes and decodes is still paid). break_even:
    bytes/s of the link between nodes (in a node, where one is all) below which a compression beats the best
    uncompressed choice; None where it never does, inf where always."""

    uniform: tuple[Uniform, ...]
    policy: tuple[Decision, ...]
    policy_bucket_bytes: int
    policy_step_seconds: float
    alone_seconds: float
    break_even: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = NOTES


@dataclass(slots=True)
class Exchange:
    """A graph on a cluster with one data-parallel plan, and what was priced of it so far."""

    graph: OpGraph
    plan: ParallelPlan
    cluster: Cluster
    works: dict[int, StepWork] = field(default_factory=dict)
    loads: dict[tuple[Choice, Shapes], Load] = field(default_factory=dict)

    @property
    def ranks(self) -> range:
        return range(self.plan.dp)

    @property
    def per_op(self) -> float:
        """Seconds of the host for each op of a hook, which Python calls after ops that moved a bucket."""
        device = self.cluster.device
        return per_op(device, "forward", SWEPT) if device.kind == "cpu" else HOST["torch"].op

    def work(self, bucket_bytes: int) -> StepWork:
        if bucket_bytes not in self.works:
            plan = replace(self.plan, bucket_bytes=bucket_bytes)
            host = None if self.cluster.device.kind == "cpu" else HOST["torch"]
            self.works[bucket_bytes] = step_work(self.graph, plan, self.cluster, host)
        return self.works[bucket_bytes]

    def load(self, choice: Choice, shapes: Shapes) -> Load:
        if (choice, shapes) not in self.loads:
            self.loads[choice, shapes] = self._load(choice, shapes)
        return self.loads[choice, shapes]

    def _load(self, choice: Choice, shapes: Shapes) -> Load:
        scheme, compression = choice.scheme, choice.compression
        # Servers decode what cannot be added; a worker that serves 1/P of the elements decodes as much as one code.
        ops = codec(compression, shapes, 1 if scheme.served else self.plan.dp)
        encode, between, decode = (
            seconds(self.cluster.device, part, self.per_op) for part in (ops.encode, ops.between, ops.decode)
        )
        price = scheme_price(self.cluster, scheme, compression, shapes, self.ranks)
        whole = scheme.exchange == "parameters"
        if not ops.between:
            first, second = (price.push, price.pull) if scheme.served else (price.seconds, 0.0)
        else:  # PowerSGD's factors in proportion to their bytes: vectors and P first, then Q
            last = _last_share(compression, shapes)
            first, second = price.seconds * (1 - last), price.seconds * last
        update = price.update
        if scheme.algorithm == "ps-sharded":  # the servers are the workers: both directions are busy, and the device
            between, update = between + update, 0.0
        duplex = scheme.served and scheme.algorithm != "ps-sharded"
        return Load(encode, between, 0.0 if whole else decode, first, second, duplex, update,
                    0.0 if whole else 1.0, price.demand)  # fmt: skip

    def step(self, work: StepWork, choices: Sequence[Choice]) -> float:
        return step_seconds(work, [self.load(c, b) for c, b in zip(choices, work.buckets, strict=True)])


def _last_share(compression: Compression, shapes: Shapes) -> float:
    from costmodels.compression import FLOAT, factors

    return FLOAT * factors(shapes, compression.rank).q / max(payload(compression, shapes), 1)


def sent_bytes(choice: Choice, shapes: Shapes, ranks: int) -> float:
    """Bytes that one worker sends for a bucket (a server's replies are not its own)."""
    if not choice.scheme.served:
        return ring_bytes(choice.compression, shapes, ranks)
    size = payload(choice.compression, shapes)
    if choice.scheme.algorithm != "ps-sharded":
        return size
    reply = 4 * elements(shapes) if choice.scheme.exchange == "parameters" else _reply(choice, shapes, ranks)
    return (ranks - 1) / ranks * (size + reply)


def _reply(choice: Choice, shapes: Shapes, ranks: int) -> float:
    return reply_bytes(choice.compression, shapes, ranks)


def _free(load: Load) -> Load:
    """The same with messages that take no time; what is coded for them still does."""
    return replace(load, first=0.0, second=0.0, update=0.0)


def uniform(exchange: Exchange, choice: Choice, bucket_bytes: int) -> Uniform:
    """Every bucket the same way."""
    work = exchange.work(bucket_bytes)
    loads = [exchange.load(choice, b) for b in work.buckets]
    step = step_seconds(work, loads)
    free = [_free(load) for load in loads]
    ranks = exchange.plan.dp
    return Uniform(
        choice, bucket_bytes, step, max(step - step_seconds(work, free), 0.0),
        sum(x.encode + x.between for x in loads), sum(x.decode for x in loads),
        sum(sent_bytes(choice, b, ranks) for b in work.buckets),
        sum(state_bytes(choice.compression, b) for b in work.buckets),
        max(buffer_bytes(choice.compression, b, ranks) for b in work.buckets),
    )  # fmt: skip


def choices_of(
    cluster: Cluster, ranks: Sequence[int], schemes: Sequence[Scheme], compressions: Sequence[Compression]
) -> list[Choice]:
    found = [Choice(s, c) for s in schemes for c in compressions if fits(s, c, cluster, ranks)]
    if not found:
        raise ValueError(f"none of these schemes and compressions go together on {cluster.name}; try ring with none")
    return found


def advise(
    graph: OpGraph,
    plan: ParallelPlan,
    cluster: Cluster,
    schemes: Sequence[Scheme] = SCHEMES,
    compressions: Sequence[Compression] = (NONE,),
    buckets: Sequence[int] = BUCKETS,
    lossy: bool = False,
) -> Advice:
    """Every uniform exchange of the plan's gradients, and the best choice per bucket. plan: data parallelism alone."""
    if not buckets or min(buckets) < 1:
        raise ValueError("bucket sizes must be 1 byte or more, and one at least must be given")
    exchange = Exchange(graph, plan, cluster)
    choices = choices_of(cluster, exchange.ranks, schemes, compressions)
    allowed = [c for c in choices if lossy or not c.compression.lossy]
    if not allowed:
        raise ValueError("all compressions given are lossy; allow them with --lossy, or add none or fp16")
    rows = [uniform(exchange, c, b) for c in choices for b in buckets]
    best = {c: min((r for r in rows if r.choice == c), key=lambda r: r.step_seconds) for c in choices}
    ranked = sorted(best.values(), key=lambda r: r.step_seconds)
    starts = sorted((r for r in rows if r.choice in allowed), key=lambda r: r.step_seconds)
    sizes = list(dict.fromkeys(r.bucket_bytes for r in starts))[:REFINED]
    refined = []
    for size in sizes:
        start = next(r for r in starts if r.bucket_bytes == size)
        refined.append((*_refined(exchange, start, allowed), size))
    step, picked, size = min(refined, key=lambda r: r[0])
    work = exchange.work(size)
    alone = step_seconds(work, [_free(exchange.load(c, b)) for c, b in zip(picked, work.buckets, strict=True)])
    decisions = tuple(_decisions(exchange, work, picked, step, allowed))
    return Advice(tuple(ranked), decisions, size, step, alone, break_even(exchange, ranked))


def _refined(exchange: Exchange, start: Uniform, allowed: Sequence[Choice]) -> tuple[float, list[Choice]]:
    """Changes one bucket at a time, from the last to the first (the last is what nothing hides)."""
    work = exchange.work(start.bucket_bytes)
    picked, step = [start.choice] * len(work.buckets), start.step_seconds
    for _ in range(PASSES):
        before = step
        for i in reversed(range(len(picked))):
            for choice in _front(exchange, work.buckets[i], allowed):
                trial = [*picked[:i], choice, *picked[i + 1 :]]
                if choice != picked[i] and (found := exchange.step(work, trial)) < step - LEAST * before:
                    picked, step = trial, found
        if step >= before - LEAST * before:
            break
    return _plainer(exchange, work, picked, step, allowed)


def _plainer(
    exchange: Exchange, work: StepWork, picked: list[Choice], step: float, allowed: Sequence[Choice]
) -> tuple[float, list[Choice]]:
    """Leaves buckets uncompressed wherever that makes the step no longer."""
    for i in range(len(picked)):
        if picked[i].compression == NONE:
            continue
        plain = [c for c in allowed if c.compression == NONE]
        for choice in sorted(plain, key=lambda c: c.scheme != picked[i].scheme):
            trial = [*picked[:i], choice, *picked[i + 1 :]]
            if (found := exchange.step(work, trial)) <= step:
                picked, step = trial, found
                break
    return step, picked


def _front(exchange: Exchange, shapes: Shapes, allowed: Sequence[Choice]) -> list[Choice]:
    """The choices of a bucket that no other beats in compute and in messages both; servers' updates count with them."""
    costs = {}
    for choice in allowed:
        x = exchange.load(choice, shapes)
        costs[choice] = x.encode + x.between + x.decode + x.worker_update, x.first + x.second + x.update
    return [
        c for c, (a, b) in costs.items()
        if not any((p <= a and q <= b and (p, q) != (a, b)) for p, q in costs.values())
    ]  # fmt: skip


def _decisions(
    exchange: Exchange, work: StepWork, picked: list[Choice], step: float, allowed: Sequence[Choice]
) -> Iterator[Decision]:
    for i, (choice, shapes) in enumerate(zip(picked, work.buckets, strict=True)):
        load = exchange.load(choice, shapes)
        others = [[*picked[:i], c, *picked[i + 1 :]] for c in allowed if c.compression == NONE]
        plain = min((exchange.step(work, o) for o in others), default=step)
        size, saved = 4 * elements(shapes), plain - step
        message = load.first + load.second
        yield Decision(size, choice, message, saved, _reason(exchange, work, picked, i, step, saved, allowed))


def _reason(
    exchange: Exchange, work: StepWork, picked: list[Choice], at: int, step: float, saved: float,
    allowed: Sequence[Choice],
) -> str:  # fmt: skip
    choice, shapes = picked[at], work.buckets[at]
    load = exchange.load(choice, shapes)
    what = f"{4 * elements(shapes) / 1e6:.3g} MB by {choice.scheme.name}"
    loads = [exchange.load(c, b) for c, b in zip(picked, work.buckets)]
    loads[at] = _free(load)
    exposed = step - step_seconds(work, loads)
    coded = load.encode + load.between + load.decode
    if choice.compression != NONE:
        return (f"{what} as {choice.compression.name}: saves {saved * 1e3:.3g} ms of the step, with "
                f"{coded * 1e3:.3g} ms of encoding and decoding paid")  # fmt: skip
    if exposed < 0.01 * step:
        return f"{what} uncompressed: hidden behind backward and other messages ({exposed * 1e3:.3g} ms exposed)"
    if all(c.compression == NONE for c in allowed):
        return f"{what} uncompressed: {exposed * 1e3:.3g} ms exposed, and no compression is allowed"
    rivals = [(exchange.step(work, [*picked[:at], c, *picked[at + 1 :]]), c.compression.name)
              for c in allowed if c.compression != NONE]  # fmt: skip
    least, name = min(rivals)
    return f"{what} uncompressed: {exposed * 1e3:.3g} ms exposed, but {name} would add {(least - step) * 1e3:.3g} ms"


def break_even(exchange: Exchange, ranked: Sequence[Uniform]) -> dict[str, float | None]:
    """For each compression the link rate below which the best of its rows beats the best uncompressed one."""
    rows: dict[str, list[Uniform]] = {}
    for row in ranked:
        rows.setdefault(row.choice.compression.name, []).append(row)
    plain = rows.pop(NONE.name, [])
    known: dict[tuple[str, float], float] = {}

    def best(name: str, factor: float) -> float:
        if (name, factor) not in known:
            other = _scaled(exchange, factor)
            steps = (other.step(w := other.work(r.bucket_bytes), [r.choice] * len(w.buckets))
                     for r in (rows[name] if name != NONE.name else plain))  # fmt: skip
            known[name, factor] = min(steps)
        return known[name, factor]

    def wins(name: str) -> Callable[[float], bool]:
        return lambda factor: best(name, factor) < best(NONE.name, factor)

    rate, crossings = _links(exchange)[0].bandwidth, {name: _crossing(wins(name)) for name in rows if plain}
    return {name: None if at is None else rate * at for name, at in crossings.items()}


def _links(exchange: Exchange) -> tuple[Link, bool, bool]:
    """The link that a group's messages are bound by, and whether links in a node and between nodes are scaled with it:
    a torus has one kind, and parameter servers of a group on one node may be reached by the network."""
    cluster = exchange.cluster
    many = len({cluster.node_of(r) for r in exchange.ranks}) > 1
    if cluster.fabric == "torus":
        return cluster.intra, True, False
    return (cluster.inter, False, True) if many else (cluster.intra, True, True)


def _scaled(exchange: Exchange, factor: float) -> Exchange:
    """The same on links that are so many times as fast."""
    cluster, (_, inside, between) = exchange.cluster, _links(exchange)

    def scaled(link: Link, change: bool) -> Link:
        by = factor if change else 1.0
        return replace(link, bandwidth=link.bandwidth * by, flow_cap=link.flow_cap * by)

    links = scaled(cluster.intra, inside), scaled(cluster.inter, between)
    other = replace(cluster, tables=(), cache={}, intra=links[0], inter=links[1])
    return Exchange(exchange.graph, exchange.plan, other, exchange.works)


def _crossing(wins: Callable[[float], bool]) -> float | None:
    """Bisects a factor in logarithm, between a thousandth and a thousand."""
    low, high = 1e-3, 1e3
    if not wins(low):
        return None
    if wins(high):
        return float("inf")
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return (low * high) ** 0.5
