"""Every part of a folded step priced once: forward, backward with what is recomputed, and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from costmodels.accumulation import exposed_share
from costmodels.cluster import Cluster
from costmodels.device import Device
from costmodels.ops import OpShape
from opgraph.graph import Op
from planner.early_stop import until_saved
from planner.folded_groups import Groups
from planner.folded_kernels import Kernels, Launch, Message, Priced, priced
from planner.folded_local import Local, element_bytes
from planner.folded_pieces import WHERES, Pieces, Where
from planner.plan import ParallelPlan
from planner.software import Software, is_autocast
from planner.stages import within


@dataclass(frozen=True, slots=True)
class Part:
    """elements: parameters on one rank (before data parallelism divides them). experts: of these, in experts.
    dtype_bytes: of one parameter element."""

    forward: Priced
    backward: Priced
    elements: int
    experts: int
    dtype_bytes: int


@dataclass(frozen=True, slots=True)
class Parts:
    local: Local
    pieces: Pieces
    kernels: Kernels
    by_where: dict[Where, Part]


def parts_of(local: Local, pieces: Pieces, software: Software, cluster: Cluster) -> Parts:
    """Prices all parts. The forward of a part is priced before its backward, which makes some of it again."""
    kernels = Kernels(local, software)
    groups = Groups(local.plan)
    found: dict[Where, Part] = {}
    host = software.host.message
    for where in WHERES:
        forward, backward = list(pieces.forward[where]), pieces.backward[where]
        again, regions = recomputed(local.plan, where, forward)
        if software.early_stop:
            again = _until_saved(local, again, forward, backward, regions, software)
        exchange = _experts(local, forward, host)
        whole = regions == (_block(where),)
        f = [*kernels.forward(forward), *exchange]
        b = [*kernels.backward(backward, again, regions), *exchange, *(_part_of(software, exchange) if whole else ())]
        if regions:
            b.insert(0, Launch(software.recompute_share * software.host.checkpoint))
        names = pieces.parameters[where]
        if is_autocast(software, local.plan) and where != "first":
            casts = _weight_casts(local, names, software)
            f, b = [*casts, *f], [*b, *(replace(x, host=software.host.backward) for x in casts)]
        if where == "last" and local.plan.pp == 1:  # tied weights are one parameter of one stage
            names = tuple(n for n in names if n not in pieces.parameters["first"])
        b += _accumulation(local, names, software, cluster.device)
        first = local.graph.parameters[names[0]] if names else None
        experts = tuple(n for n in names if len(local.graph.parameters[n].shape) == 3)
        found[where] = Part(
            priced(_per_ring(local, f, host), cluster, groups), priced(_per_ring(local, b, host), cluster, groups),
            local.parameter_elements(names), local.parameter_elements(experts),
            first.bytes // first.numel if first else 4,
        )  # fmt: skip
    return Parts(local, pieces, kernels, found)


def _part_of(software: Software, launches: Sequence[Launch]) -> list[Launch]:
    """Of launches that recomputation repeats, the share that it does."""
    return [replace(x, host=x.host * software.recompute_share, share=software.recompute_share) for x in launches]


def _block(where: Where) -> str:
    return "blocks.0" if where == "block0" else "blocks.1"


def recomputed(plan: ParallelPlan, where: Where, forward: Sequence[Op]) -> tuple[list[Op], tuple[str, ...]]:
    """Forward ops that backward runs again, and the module paths that they belong to."""
    if where not in ("block", "block0"):
        return [], ()
    block = _block(where)
    regions = tuple(p for p in plan.recompute if within(p, block))
    return [op for op in forward if any(within(op.module, r) for r in regions)], regions


def _until_saved(
    local: Local, again: list[Op], forward: Sequence[Op], backward: Sequence[Op], regions: Sequence[str],
    software: Software,
) -> list[Op]:  # fmt: skip
    """Of what is recomputed, what runs where checkpoints stop early. A policy by operators keeps some results of one
    region, the whole block, though the plan names what is left."""
    if software.recompute_matmuls < 1:
        run = {op.id for op in until_saved(local.graph, forward, forward, backward)}
    else:
        parts = ([op for op in forward if within(op.module, region)] for region in regions)
        run = {op.id for part in parts for op in until_saved(local.graph, part, forward, backward)}
    return [op for op in again if op.id in run]


def _weight_casts(local: Local, names: Sequence[str], software: Software) -> list[Launch]:
    """autocast's copies of a part's weights in 16 bits, once a forward; backward casts their gradients, which moves as
    many bytes. Vectors stay as they are, but for biases, which are few; so do tables that are looked up."""
    found = []
    for shape in (local.parameter(name) for name in names):
        if len(shape) > 1:
            size = prod(shape)
            cast = OpShape("aten._to_copy.default", "forward", (shape,), (shape,), "float32", 0, 4 * size, 2 * size)
            found.append(Launch(software.host.op, cast))
    return found


def _accumulation(local: Local, names: Sequence[str], software: Software, device: Device) -> list[Launch]:
    """Summing gradients over micro-batches: into a buffer of `main_grads` bytes, or into .grad after the first."""
    elements = local.parameter_elements(tuple(names))
    sixteen = local.plan.precision in ("fp16", "bf16", "fp8") and not is_autocast(software, local.plan)
    own = 2 if sixteen else 4
    if not elements or local.plan.data_parallel == "fsdp":
        return []
    if software.main_grads:
        read, written = (own + software.main_grads) * elements, software.main_grads * elements
        if software.fused_accumulation:  # the product writes main_grads bytes instead of its own, and reads them
            read, written = software.main_grads * elements, max(0, software.main_grads - own) * elements
    elif local.plan.micro_batches > 1:
        read, written = 2 * own * elements, own * elements
    else:
        return []
    shape = OpShape("aten.add_.Tensor", "backward", ((elements,),), ((elements,),), "float32", 0, read, written)
    if software.main_grads and software.fused_accumulation:
        return [Launch(0.0, shape, share=exposed_share(device))]
    return [Launch(len(names) * software.host.backward, shape)]


def _per_ring(local: Local, launches: list[Launch], host: float) -> list[Launch]:
    """Context parallelism: as many attentions as ranks in the ring, each of one part of the queries with one of keys.

    Causal parts are dealt so that every rank has the same work (zigzag): cp attentions of this rank's own length. While
    one runs, the keys and values of the next come from the neighbour (in backward their gradients, too).
    """
    cp = local.plan.cp
    found = []
    for launch in launches:
        if cp == 1 or launch.shape is None or "scaled_dot_product" not in launch.shape.name:
            found.append(launch)
            continue
        backward = "backward" in launch.shape.name
        keys, values = launch.shape.in_shapes[1 + backward : 3 + backward]
        size = (prod(keys) + prod(values)) * element_bytes(launch.shape.dtype) * (2 if backward else 1)
        send = Launch(host, None, Message("send", size, "cp", -1))
        found += [launch, *(x for _ in range(cp - 1) for x in (launch, send))]
    return found


def _experts(local: Local, forward: Sequence[Op], host: float) -> list[Launch]:
    """Tokens to the ranks that have their experts and back: one all-to-all each way, in forward and in backward. Ranks
    that split an expert gather what came to each of them and reduce-scatter what they made, and the other way around in
    backward; so does a split expert of all tokens (shared_experts.py). What comes from several ranks lies by rank: a
    rank with several experts sorts it by expert, and back before it is sent (`sort_chunks_by_idxs` of
    `MoEAlltoAllTokenDispatcher`, megatron/core/transformer/moe/token_dispatcher.py); the first of these copies is in
    the trace where experts are split (`opgraph.zoo.routing.Gather`)."""
    given = next((op for op in forward if op.module.endswith("mlp.dispatch") and "index_select" in op.name), None)
    if given is None:
        return []
    tokens, plan = local.graph.tensors[given.outputs[0]], local.plan
    found = [Message("all_to_all", tokens.bytes, "ep") for _ in range(2)] if plan.ep > 1 else []
    if plan.etp > 1:
        found += [Message(kind, tokens.bytes * plan.etp, "tp") for kind in ("all_gather", "reduce_scatter")]
    shared = next((op for op in forward if op.module.endswith("mlp.shared_gather") and not op.is_view), None)
    if shared is not None:
        whole = local.graph.tensors[shared.outputs[0]].bytes
        found += [Message(kind, whole, "tp") for kind in ("all_gather", "reduce_scatter")]
    launches = [Launch(host, None, message) for message in found]
    up = local.graph.parameters.get(given.module.removesuffix("dispatch") + "up.weight")
    if up is not None and up.shape[0] > 1 and plan.ep > 1:
        shape, size = (plan.etp * tokens.shape[0], *tokens.shape[1:]), plan.etp * tokens.bytes
        sort = OpShape("aten.copy_.default", "forward", (shape,), (shape,), tokens.dtype, 0, size, size)
        launches += [Launch(host, sort) for _ in range(1 if plan.etp > 1 else 2)]
    return launches
