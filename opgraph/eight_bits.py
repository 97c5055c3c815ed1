"""Which products of a step in bfloat16 run in 8 bits ("fp8"), and weights that are kept in them.

Marked are products with the weights of repeated blocks whose dims are multiples of 16, which `torch._scaled_mm` asks
for; embeddings, routers and heads stay in 16 bits, as Transformer Engine's layers in Megatron, torchao's filters and
vLLM leave them (ASSUMPTION: so does everyone). Factors are cast in a pass that finds the largest magnitude, too; the
product for a weight finds both of its factors cast already. What is kept for backward stays in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

from opgraph.flops import base_name
from opgraph.graph import DTYPE_BYTES, Op, OpGraph

MARK = "eight_bits"  # the kwarg of a marked op: "cast" where it casts its activations first, else "found"
EIGHT_BIT = "float8_e4m3fn"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ALIGNED = 16


def in_eight_bits(graph: OpGraph, weights: bool = False) -> OpGraph:
    """The graph with its products marked. weights: their weights are kept in 8 bits, too, which inference does."""
    weights_of = weight_storages(graph)
    ops = tuple(_marked(graph, op, weights_of) for op in graph.ops)
    other = graph.on_accelerators and in_eight_bits(graph.on_accelerators, weights)
    found = replace(graph, ops=ops, precision="fp8", on_accelerators=other)
    return _kept(found) if weights else found


def mark_of(op: Op) -> str:
    """The mark of an op; empty for those that run in another format."""
    return str(dict(op.kwargs).get(MARK, ""))


def weight_storages(graph: OpGraph) -> set[int]:
    """Storages of parameters and of what autocast made of them."""
    found = {t.storage for t in graph.parameters.values()}
    cast = [op for op in graph.ops if base_name(op.name) == "_to_copy" and graph.tensors[op.inputs[0]].storage in found]
    return found | {graph.tensors[op.outputs[0]].storage for op in cast}


def _marked(graph: OpGraph, op: Op, weights: set[int]) -> Op:
    weight = graph.parameters.get(f"{op.module}.weight")
    if base_name(op.name) not in PRODUCTS or weight is None or len(weight.shape) < 2:
        return op
    path = op.module.split(".")
    factors = [graph.tensors[t] for t in op.inputs if len(graph.tensors[t].shape) >= 2]
    aligned = not any(n % ALIGNED for n in weight.shape[-2:])
    repeated = any(part.isdigit() for part in path) and "router" not in path
    if not (aligned and repeated) or any(DTYPE_BYTES[t.dtype] != 2 for t in factors):
        return op
    for_weight = not any(t.storage in weights for t in factors)
    return replace(op, kwargs=(*op.kwargs, (MARK, "found" if for_weight else "cast")))


def _kept(graph: OpGraph) -> OpGraph:
    """The weights of marked products at one byte an element."""
    names = {f"{op.module}.weight" for op in graph.ops if mark_of(op)}
    stored = {graph.parameters[name].storage for name in names if DTYPE_BYTES[graph.parameters[name].dtype] == 2}
    tensors = tuple(replace(t, dtype=EIGHT_BIT) if t.storage in stored else t for t in graph.tensors)
    storages = tuple(replace(s, bytes=s.bytes // 2) if s.id in stored else s for s in graph.storages)
    return replace(graph, tensors=tensors, storages=storages)
