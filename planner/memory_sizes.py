"""Sizes that the memory replay asks for: what one rank holds of a stage's tensors, messages and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from opgraph.graph import DTYPE_BYTES, Op
from planner.layout import Layout, accumulates
from planner.runtime_data import padded
from planner.runtime_fsdp import unit_of
from planner.runtime_stage import Stage
from planner.stages import LOSS, shared_parameters


def received(stage: Stage) -> tuple[int, ...]:
    return stage.stages[stage.ops.index - 1].sends if stage.ops.index else ()


def outputs(stage: Stage) -> set[int]:
    """The model's outputs, which a pipeline stage keeps until their backward; a plain step keeps only the loss."""
    if stage.plan.pp == 1 or stage.ops.index + 1 < stage.plan.pp:
        return set()
    return outputs_of(stage.ops.forward)


def outputs_of(forward: Sequence[Op]) -> set[int]:
    """What the loss reads of what the model made."""
    read = {t for op in forward if op.module == LOSS for t in op.inputs}
    return read & {t for op in forward if op.module != LOSS for t in op.outputs}


def message_bytes(stage: Stage) -> list[int]:
    """Receive buffers of one micro-batch: activations from the stage before, gradients from the stage after."""
    tensors = stage.graph.tensors
    sends = stage.ops.sends if stage.ops.index + 1 < stage.plan.pp else ()
    return [tensors[t].bytes for t in (*received(stage), *sends)]


def local_bytes(layout: Layout, size: int, tensor: int | None) -> int:
    return size // layout.parts if tensor is not None and layout.placements[tensor] >= 0 else size


def gradient_owners(stage: Stage) -> dict[int, str]:
    """Storage of a parameter's final gradient -> parameter."""
    owners = {}
    where = {op.id: op for op in stage.ops.backward}
    for name, op in stage.ready.items():
        for t in (where[op].outputs or where[op].inputs)[:1]:
            owners[stage.graph.tensors[t].storage] = name
    shared = {name: stage.graph.parameters[name].shape for name, _ in shared_parameters(stage.stages)}
    mine = {t for op in stage.ops.backward for t in op.outputs}
    everywhere = {op.id for s in stage.stages for op in s.backward}
    for summing in stage.graph.ops:  # the sum of a tied weight's gradients is a message; every stage keeps its own term
        if accumulates(summing) and summing.id not in everywhere:
            for t in mine & set(summing.inputs):
                name = next((n for n, shape in shared.items() if shape == stage.graph.tensors[t].shape), "")
                if name:
                    owners[stage.graph.tensors[t].storage] = name
    return owners


def share_bytes(stage: Stage, name: str) -> int:
    """Bytes of a parameter that a rank keeps between steps."""
    p = stage.parameters[name]
    if not stage.units:
        return p.bytes
    return padded(p, stage.plan.dp) // stage.plan.dp * DTYPE_BYTES[p.dtype]


def state_bytes(stage: Stage, name: str, dp_index: int) -> int:
    """Bytes of one tensor of optimizer state of a parameter's shape: FSDP pads the shards of parameters to equal rows,
    but not the state, so that later ranks may hold less."""
    p = stage.parameters[name]
    if not stage.units or not p.shape:
        return share_bytes(stage, name)
    rows = -(-p.shape[0] // stage.plan.dp)
    own = max(0, min(rows, p.shape[0] - dp_index * rows))
    return own * prod(p.shape[1:]) * DTYPE_BYTES[p.dtype]


def buffer_bytes(stage: Stage) -> list[int]:
    graph = stage.graph
    read = (graph.tensors[t] for op in stage.ops.forward for t in op.inputs)
    used = {t.storage for t in read if t.role == "buffer"}
    return [graph.storages[s].bytes for s in used]


def path_of(stage: Stage, op: Op) -> str:
    unit = unit_of(stage, op)
    return unit.path if unit else ""
