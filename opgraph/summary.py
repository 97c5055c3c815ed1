"""A step in numbers: parameters, FLOP, activation bytes, peak memory, work and depth."""

from __future__ import annotations

from math import ceil, log2, prod
from typing import Any

from opgraph.flops import FORMULAS, attention_again, base_name
from opgraph.graph import PHASES, Op, OpGraph
from opgraph.memory import replay_memory
from opgraph.work import rnn_cell

# Ops that reduce along a dim although their output is as large as their input: position of the dim, or "row" for the
# last dims that the op normalises, "channel" for everything but dim 1.
SAME_SIZE = {
    "_softmax": "dim", "_log_softmax": "dim", "_softmax_backward_data": "dim", "_log_softmax_backward_data": "dim",
    "cumsum": "dim", "cumprod": "dim", "logcumsumexp": "dim", "sort": "dim", "topk": "dim",
    "native_layer_norm": "row", "native_layer_norm_backward": "row", "_fused_rms_norm": "row",
    "_fused_rms_norm_backward": "row", "native_group_norm": "channel", "native_group_norm_backward": "channel",
    "native_batch_norm": "channel", "native_batch_norm_backward": "channel", "_batch_norm_with_update": "channel",
    "batch_norm_backward": "channel",
}  # fmt: skip

# Ops that pick elements: a large table among their inputs is not summed up.
PICKS = ("embedding", "index", "gather", "take", "select", "slice", "where", "copy", "nll_loss", "_to_copy", "repeat")


def summary(graph: OpGraph) -> dict[str, Any]:
    """What `parplan trace --json` prints, but for the time that tracing took.

    `flops` by phase and in total (one FMA is two). `activation_bytes`: made in forward and still there when it ends,
    because backward needs them. `peak_bytes` of the whole step, everything included. `work`: FLOP, plus one operation
    per element of every op that has none. `depth`: ops of the longest chain in which each waits for the one before,
    counted as in a machine without limits: a sum over n terms takes ceil(log2 n) steps, a matrix product or
    convolution one step more, pointwise ops one, views none. `parallelism`: work / depth, the processors that can be
    kept busy on average (`opgraph.work.brent_bounds` says how many steps p of them take).
    """
    flops: dict[str, int] = {phase: graph.flops(phase) for phase in PHASES}
    work, depth = work_and_depth(graph)
    return {
        "params": graph.param_count,
        "ops": len(graph.ops),
        "flops": {**flops, "total": sum(flops.values())},
        "activation_bytes": activation_bytes(graph),
        "peak_bytes": replay_memory(graph).peak_bytes,
        "work": work,
        "depth": depth,
        "parallelism": work / depth if depth else 0.0,
        "precision": graph.precision,
        "traced_on": graph.traced_on,
        "notes": list(graph.notes),
    }


def model_flops(graph: OpGraph) -> int:
    """FLOP that the model asks for: forward and backward without anything computed twice, be it a checkpoint or the
    scores that fused attention makes again in backward (two products forward, four backward)."""
    return sum(
        op.flops - attention_again(op.name, [graph.tensors[t] for t in op.inputs])
        for op in graph.ops
        if op.flops and op.phase in ("forward", "backward")
    )


def activation_bytes(graph: OpGraph) -> int:
    """Bytes made in forward and alive when its last op has run."""
    last = max((op.id for op in graph.ops if op.phase == "forward"), default=-1)
    return sum(s.bytes for s in graph.storages if 0 <= s.birth <= last < s.death)


def work_and_depth(graph: OpGraph) -> tuple[int, int]:
    """Operations of the step, and the longest chain of them that no parallelism shortens.

    An op waits for whatever last wrote the storages that it reads; waiting for memory to be free does not count.
    """
    ready = [0] * len(graph.storages)
    where = [t.storage for t in graph.tensors]
    sizes = [prod(t.shape) for t in graph.tensors]
    work = 0
    for op in graph.ops:
        if op.is_view:
            continue
        begin = max((ready[where[t]] for t in op.inputs), default=0)
        end = begin + depth_of(op, graph, sizes)
        for t in (*op.outputs, *op.mutates):
            ready[where[t]] = max(ready[where[t]], end)
        work += op.flops or max((sizes[t] for t in (*op.inputs, *op.outputs)), default=0)
    return work, max(ready, default=0)


def depth_of(op: Op, graph: OpGraph, sizes: list[int] | None = None) -> int:
    """Steps that an op takes on a machine without limits."""
    if op.is_view:
        return 0
    name = base_name(op.name)
    size = sizes or [prod(t.shape) for t in graph.tensors]
    written = [size[t] for t in (*op.outputs, *op.mutates)]
    if "dot_product" in name and name in FORMULAS:
        q, k = (graph.tensors[t].shape for t in op.inputs[-3:-1]) if "backward" in name else _first_two(op, graph)
        return 2 * (_tree(q[-1]) + 1) + 2 * _tree(k[-2])  # two products, a maximum and a sum over the keys
    if name.startswith("mkldnn_rnn_layer"):  # time steps wait for each other; the passes of backward run one by one
        (steps, batch, features), hidden = graph.tensors[op.inputs[0]].shape, graph.tensors[op.inputs[2]].shape[1]
        gates = graph.tensors[op.inputs[2]].shape[0] // hidden
        return steps * int(rnn_cell(batch, features, hidden, gates).depth) * (2 if "backward" in name else 1)
    if name == "convolution_backward":
        gradient, weight = (graph.tensors[op.inputs[i]].shape for i in (0, 2))
        groups = op.args[-2]
        return 1 + max(_tree(weight[0] // groups * prod(weight[2:])), _tree(gradient[0] * prod(gradient[2:])))
    if name in FORMULAS and op.flops:
        return _tree(op.flops // (2 * max(1, *written, 1))) + 1
    if name in SAME_SIZE:
        return _tree(_reduced(op, graph, SAME_SIZE[name])) + 1
    if name.startswith(("_foreach_", "_fused_")) or any(name.startswith(p) for p in PICKS):
        return _tree(size[op.inputs[1]]) + 1 if name == "embedding_dense_backward" else 1  # all rows may meet in one
    largest = max((size[t] for t in op.inputs), default=0)
    smallest = max(written, default=0)
    if 0 < smallest < largest:
        return max(1, _tree(largest // smallest))
    return 1 if written else 0


def _first_two(op: Op, graph: OpGraph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return graph.tensors[op.inputs[0]].shape, graph.tensors[op.inputs[1]].shape


def _tree(terms: int) -> int:
    """Steps in which a tree adds up so many terms."""
    return ceil(log2(terms)) if terms > 1 else 0


def _reduced(op: Op, graph: OpGraph, how: str) -> int:
    """Number of terms in each sum of an op whose output is as large as its input."""
    shape = graph.tensors[op.inputs[0]].shape
    if how == "channel":
        return prod(shape) // max(1, shape[1]) if len(shape) > 1 else prod(shape)
    if how == "row":
        rows = next((a for a in op.args if isinstance(a, tuple) and all(isinstance(n, int) for n in a)), shape[-1:])
        return prod(rows)
    dims = [a for a in op.args if isinstance(a, int) and not isinstance(a, bool)]
    return shape[dims[0]] if dims and -len(shape) <= dims[0] < len(shape) else (shape[-1] if shape else 1)
