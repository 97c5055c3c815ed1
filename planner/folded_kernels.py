"""The kernels and messages of one part of a folded step, in launch order, with what the host pays for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from costmodels.cluster import Cluster
from costmodels.collectives import CollectivePrice, collective_price
from costmodels.families import base_name, family
from costmodels.ops import OpShape, price_many
from opgraph.eight_bits import EIGHT_BIT, weight_storages
from opgraph.graph import Op, Phase
from planner.folded_groups import Groups
from planner.folded_local import Local
from planner.folded_overlap import exposed
from planner.fusion import Fused
from planner.host_queue import Run, run_of
from planner.software import Software
from planner.spelled import SUMS, is_spelled, metrics, spelled, spelled_scores
from planner.stages import within


@dataclass(frozen=True, slots=True)
class Message:
    """A message on the compute stream. beside: where the kernel that it runs beside lies (1: after it, -1: before it,
    0: there is none). pieces: the message and its neighbour run in so many pieces beside each other. weight: shape
    of the rank's part of the weight whose layer the message belongs to, where backward sends it."""

    kind: str
    bytes: int
    axis: str
    beside: int = 0
    pieces: int = 0
    weight: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """host: seconds before the launch. share: of the kernel's time that is counted (what a recompute policy skips)."""

    host: float
    shape: OpShape | None = None
    message: Message | None = None
    share: float = 1.0


@dataclass(slots=True)
class Kernels:
    """Makes launches of ops; `eight`: products of the blocks run in 8 bits."""

    local: Local
    software: Software
    fused: Fused = field(init=False)
    read: dict[str, int] = field(init=False)  # column-split module -> storage that it reads; siblings share one
    weights: set[int] = field(init=False)  # storages of parameters and of what autocast made of them
    summed: set[int] = field(init=False)  # ops after whose reduction all siblings' gradients of their input are summed

    def __post_init__(self) -> None:
        self.fused = Fused(self.local, self.software)
        self.read = _read_by_columns(self.local)
        self.weights = weight_storages(self.local.graph)
        last = {self.read.get(op.module, -op.id): op.id for op in self.local.graph.ops
                if op.phase == "backward" and op.id in self.local.reductions}  # fmt: skip
        self.summed = set(last.values())

    # -- parts ----------------------------------------------------------------------------------------------
    def forward(self, ops: Sequence[Op], phase: Phase = "forward") -> list[Launch]:
        return list(self._launches(ops, phase))

    def backward(self, ops: Sequence[Op], again: Sequence[Op] = (), regions: Sequence[str] = ()) -> list[Launch]:
        """Backward of a part; the forward ops `again` of `regions` run before the first op that is inside one."""
        launches: list[Launch] = []
        begin = next((i for i, op in enumerate(ops) if any(within(op.module, r) for r in regions)), 0)
        launches += self._launches(ops[:begin], "backward")
        if again:
            software = self.software
            for launch in self._launches(again, "recompute"):
                product = launch.shape is not None and family(launch.shape.name) == "gemm"
                share = software.recompute_share * (software.recompute_matmuls if product else 1.0)
                launches.append(replace(launch, host=launch.host * share, share=launch.share * share))
        launches += self._launches(ops[begin:], "backward")
        return launches

    def _launches(self, ops: Sequence[Op], phase: Phase) -> Iterator[Launch]:
        host = self.software.host
        ready: list[Launch] = []
        gathered: set[int] = set()  # storages that are whole
        previous = ""
        for group in self.fused.groups(ops):
            shape = self.fused.shape(group)
            module = next((op.module for op in group if not op.is_view), group[0].module)
            cost = sum(host.view for op in group if op.is_view or family(op.name) == "view")
            if module != previous:
                cost += host.module + self._region(module, phase)
                ready += self._entering(module, phase, gathered)
            if shape is None:
                ready.append(Launch(cost))
            else:
                cost += self._issue(shape, module, phase)
                ready += self._kernel(replace(shape, phase=phase), module, cost, phase, self._finds_casts(group))
            for op in group:
                ready += self._after(op, phase)
            previous = module
        yield from ready

    def _issue(self, shape: OpShape, module: str, phase: Phase) -> float:
        """Host seconds of one kernel's launch."""
        host, kind = self.software.host, family(shape.name)
        if phase == "backward":
            handmade = self.software.fusion == "module" and kind in ("norm_backward", "softmax", "pointwise")
            handmade = handmade and not spelled_scores(self.software, shape, module)  # torch's own backward
            return max(host.backward, host.custom) if handmade else host.backward
        forked = module.endswith("core.drop")
        return host.op + (host.fork if forked else 0.0)

    def _region(self, module: str, phase: Phase) -> float:
        """Host seconds of the function at a border of tensor parallelism; it is called on one rank, too."""
        host = self.software.host
        inside = module.startswith("blocks.") and f"{module}.weight" in self.local.graph.parameters
        if not host.fork or not inside or len(self.local.graph.parameters[f"{module}.weight"].shape) != 2:
            return 0.0
        return host.custom if phase == "backward" else host.op + host.linear

    # -- one kernel -----------------------------------------------------------------------------------------
    def _finds_casts(self, group: Sequence[Op]) -> bool:
        """Whether a product reads no weight: that for a weight's gradient, which finds its factors in 8 bits."""
        tensors = self.local.graph.tensors
        return not any(tensors[t].storage in self.weights for op in group if not op.is_view for t in op.inputs)

    def _kernel(self, shape: OpShape, module: str, host: float, phase: Phase, finds_casts: bool) -> Iterator[Launch]:
        if is_spelled(self.software, shape, module):
            yield from (Launch(*launch) for launch in spelled(self.software, shape, module, host, phase))
            return
        if family(shape.name).startswith("attention"):
            name = shape.name.replace("_flash_attention", f"_{self.software.attention}_attention")
            yield Launch(host, replace(shape, name=name), share=1 / self.software.attention_speed)
            return
        if self.local.plan.precision != "fp8" or family(shape.name) != "gemm" or not self._eight(module):
            yield Launch(host, shape)
            return
        rows = shape.out_shapes[0][-2]
        factor = next((s for s in shape.in_shapes if len(s) >= 2 and s[-2] == rows), None)
        style = self._gathered_as_cast(module)
        if finds_casts:
            if style == "colwise":  # the input was gathered again, as it lies
                weight = self.local.parameter(f"{module}.weight")
                size = shape.flops // (2 * prod(weight)) * weight[-1]
                yield Launch(self.software.host.op, _pass(phase, (size,), size, size))
        elif factor:
            # Activations and gradients become 8 bits, as they are and transposed (for the product for the weight,
            # which finds both); their largest magnitude is found in the same pass.
            size, tp = prod(factor), self.local.tp
            if style != ("rowwise" if phase == "backward" else "colwise"):
                yield Launch(host, _pass(phase, factor, 2 * size, 2 * size))
            else:
                yield Launch(host, _pass(phase, (size // tp,), 2 * size // tp, size // tp))
                if phase == "backward":
                    yield Launch(self.software.host.op, _pass(phase, factor, size, size))
            host = self.software.host.op
        yield Launch(host, replace(shape, dtype=EIGHT_BIT))

    def _gathered_as_cast(self, module: str) -> str:
        """The style of a split layer where each rank casts its own part of what is gathered, and the other layout, of
        all parts, is made of what came (`_all_gather_fp8`, `_create_transpose` of Transformer Engine's
        pytorch/distributed.py); else nothing."""
        plan = self.local.plan
        casts_first = plan.tp > 1 and plan.sequence_parallel and self.software.fp8_inputs
        return str(plan.style.get(module, "")) if casts_first else ""

    def _eight(self, module: str) -> bool:
        """Whether its products run in fp8: those of blocks with weights, but for routers; attention's own do not."""
        weighs = f"{module}.weight" in self.local.graph.parameters
        return weighs and module.startswith("blocks.") and "router" not in module

    # -- messages of tensor parallelism --------------------------------------------------------------------
    def _entering(self, module: str, phase: Phase, gathered: set[int]) -> Iterator[Launch]:
        """Sequence parallelism gathers what a split product reads, once for all products that read it."""
        plan = self.local.plan
        style = plan.style.get(module)
        if plan.tp == 1 or not plan.sequence_parallel or style is None:
            return
        hidden = self._hidden_bytes(module, style)
        if self.software.fp8_inputs and self.local.plan.precision == "fp8" and self._eight(module):
            hidden //= 2  # what is gathered are the 8 bits that the product reads
        if phase == "backward" and style == "rowwise":
            yield self._message("all_gather", hidden, 0)
            return
        known = style == "colwise" and self.read.get(module) in gathered
        if style == "colwise" and module in self.read:
            gathered.add(self.read[module])
        if phase != "backward" and style == "colwise" and not known:
            yield self._message("all_gather", hidden, 0)
        elif phase == "backward" and style == "colwise" and self.software.joined and not known:
            # The input again, beside the product for its gradient.
            yield self._message("all_gather", hidden, 1 if self.software.tp_async else 0, module)

    def _after(self, op: Op, phase: Phase) -> Iterator[Launch]:
        plan, tensors = self.local.plan, self.local.graph.tensors
        for reduction in self.local.reductions.get(op.id, ()):
            if op.phase == "backward" and op.id not in self.summed:
                continue
            size = tensors[reduction.tensor].bytes
            kind = "reduce_scatter" if plan.sequence_parallel else "all_reduce"
            behind = phase == "backward" and self.software.tp_async
            yield self._message(kind, size, -1 if behind else 0, op.module if behind else "")
        if self.local.vocab_parallel and not op.is_view:
            yield from self._vocabulary(op, phase)
        elif self.software.spelled_loss and base_name(op.name) == "_log_softmax":
            yield Launch(SUMS * self.software.host.message)
        if phase == "forward" and base_name(op.name) == "_log_softmax":
            yield from (Launch(*launch) for launch in metrics(self.software, self.local.shape(op)))

    def _vocabulary(self, op: Op, phase: Phase) -> Iterator[Launch]:
        """Split embedding and logits: partial rows are summed; the loss needs the rows' maximum, sum and target. With
        sequence parallelism backward gathers the gradient of the embedding's rows, and where `joined` the logits' input
        again, as other column-split layers do."""
        tensors, plan = self.local.graph.tensors, self.local.plan
        kind, product = "reduce_scatter" if plan.sequence_parallel else "all_reduce", family(op.name) == "gemm"
        if op.module == "embed" and op.name == "aten.embedding.default":
            yield self._message(kind, tensors[op.outputs[0]].bytes, 0)
        elif op.module == "embed" and op.name == "aten.embedding_dense_backward.default" and plan.sequence_parallel:
            yield self._message("all_gather", tensors[op.inputs[0]].bytes, 0)
        elif op.module == "head" and phase != "backward" and product:
            if plan.sequence_parallel:
                yield self._message("all_gather", tensors[op.inputs[-2]].bytes, 0)
        elif op.module == "head" and product and self.local.vocab not in tensors[op.outputs[0]].shape:
            size, behind = tensors[op.outputs[0]].bytes, -1 if self.software.tp_async else 0
            if plan.sequence_parallel and self.software.joined:
                yield self._message("all_gather", size, behind, "head")
            yield self._message(kind, size, behind, "head")
        elif op.name == "aten._log_softmax.default":
            rows = tensors[op.outputs[0]].shape[0]
            for _ in range(SUMS):
                yield self._message("all_reduce", 4 * rows, 0)

    def _hidden_bytes(self, module: str, style: str) -> int:
        """Bytes of the whole activations at the border of a split product, which all its ranks share."""
        weight = self.local.graph.parameters[f"{module}.weight"]
        width = weight.shape[1] if style == "colwise" else weight.shape[0]
        return self.local.graph.batch * self.local.seq * width * (weight.bytes // weight.numel)

    def _message(self, kind: str, size: int, beside: int, module: str = "") -> Launch:
        pieces = self.local.tp if self.software.tp_overlap else 0
        name = f"{module}.weight"
        if module == "head" and name not in self.local.graph.parameters:
            name = "embed.weight"  # tied
        weight = self.local.parameter(name) if name in self.local.graph.parameters else ()
        return Launch(self.software.host.message, None, Message(kind, size, "tp", beside, pieces, weight))


def _pass(phase: Phase, shape: tuple[int, ...], read: int, written: int) -> OpShape:
    """One pass over activations that makes 8 bits."""
    return OpShape("aten._to_copy.default", phase, (shape,), (shape,), "bfloat16", 0, read, written)


def _slowest_of_ring(message: Message, cluster: Cluster, groups: Groups) -> tuple[tuple[int, ...], CollectivePrice]:
    """The pair of neighbours whose send takes longest, and its price: every step of a ring waits for all its links."""
    ranks, likes, found = groups.ranks(message.axis), groups.likes(message.axis), []
    for at, to in zip(ranks, (*ranks[1:], ranks[0])):
        firsts = tuple(first + at - ranks[0] for first in likes)
        found.append(((at, to), collective_price(cluster, "send", message.bytes, (at, to), firsts=firsts)))
    return max(found, key=lambda pair: pair[1].seconds)


def _read_by_columns(local: Local) -> dict[str, int]:
    """Column-split modules and the storage of what their products read in forward."""
    found: dict[str, int] = {}
    weights = {t.storage for t in local.graph.parameters.values()}
    for op in local.graph.ops:
        if op.phase == "forward" and local.plan.style.get(op.module) == "colwise" and family(op.name) == "gemm":
            inputs = {local.graph.tensors[t].storage for t in op.inputs} - weights
            if len(inputs) == 1:
                found[op.module] = inputs.pop()
    return found


@dataclass(frozen=True, slots=True)
class Priced:
    """A part as a run of kernels, and what its seconds consist of and rest on. kernels: each with its seconds."""

    run: Run
    seconds: dict[str, float]
    sources: dict[str, float]
    errors: dict[str, float]
    kernels: tuple[tuple[OpShape, float], ...] = ()


def priced(launches: Sequence[Launch], cluster: Cluster, groups: Groups) -> Priced:
    """Prices the launches of one part on one device of the cluster."""
    prices = iter(price_many(cluster.device, [x.shape for x in launches if x.shape is not None]))
    device = np.zeros(len(launches))
    seconds: dict[str, float] = {}
    sources: dict[str, float] = {}
    errors: dict[str, float] = {}

    def count(what: str, value: float, source: str, error: float) -> None:
        seconds[what] = seconds.get(what, 0.0) + value
        sources[source] = sources.get(source, 0.0) + value
        errors[what] = errors.get(what, 0.0) + value * error

    for i, launch in enumerate(launches):
        if launch.shape is not None:
            price = next(prices)
            device[i] = price.seconds * launch.share
            count(family(launch.shape.name), device[i], price.source, price.error)
    for i, launch in enumerate(launches):
        if launch.message is not None:
            message = launch.message
            if message.kind == "send":
                ranks, cost = _slowest_of_ring(message, cluster, groups)
            else:
                ranks, likes = groups.ranks(message.axis), groups.likes(message.axis)
                cost = collective_price(cluster, message.kind, message.bytes, ranks, firsts=likes)
            device[i] = exposed(launches, i, device, cost.seconds * launch.share, cluster, ranks)
            count(f"{message.axis} {message.kind}", device[i], cost.source, cost.error)
    kernels = tuple((x.shape, float(t)) for x, t in zip(launches, device) if x.shape is not None)
    return Priced(run_of(np.array([x.host for x in launches]), device), seconds, sources, errors, kernels)
