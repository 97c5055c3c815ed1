"""What a program runs by several of torch's operators where a trace has one op, or besides it: Megatron's masked
softmax, where its kernel cannot run, and its cross entropy; metrics that are cross entropies once more.

Descriptions of sources, no code of theirs; bytes are read and written per element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from costmodels.families import base_name, family
from costmodels.ops import OpShape
from opgraph.graph import Phase
from planner.folded_local import element_bytes
from planner.software import Software
from planner.stages import LOSS

# What stands in for Megatron's masked softmax where that cannot run. Scores of 16 bits are scaled, masked and summed in
# float32 (`forward_torch_softmax` in megatron/model/fused_softmax.py).
MATRICES = 4  # divides the heads times samples that the kernel takes, and the queries (`is_kernel_available` there)
SCORES = {
    "forward": (("_to_copy", 2, 4), ("mul", 4, 4), ("masked_fill_", 4, 4), ("_softmax", 4, 4), ("_to_copy", 4, 2)),
    "backward": (
        ("_to_copy", 2, 4), ("_softmax_backward_data", 8, 4), ("masked_fill", 4, 4), ("mul", 4, 4), ("_to_copy", 4, 2),
    ),
}  # fmt: skip
# Cross entropy over a vocabulary that may be split (mpu/cross_entropy.py, now core/tensor_parallel/cross_entropy.py):
# passes over float32 logits, in place, and kernels on a number a row: mask and index of the targets, the logit of each
# (12 forward, 6 backward), the mean over the loss mask, the micro-batch's share and the loss scale (pretrain_gpt.py
# `loss_func`, schedules.py). The trace has one of each.
LOGITS = {
    "forward": (("amax", 4, 0), ("sub_", 4, 4), ("exp", 4, 4), ("sum", 4, 0), ("div_", 4, 4)),
    "backward": (("mul_", 4, 4),),
}
ROWS = {"forward": 12 + 4, "backward": 6 + 3}
SUMS = 3  # all_reduces of a number a row in forward, which one rank calls, too
# A metric of the logits: torch's cross entropy, in float32 under autocast (composer/metrics/nlp.py), and two numbers.
METRIC = (("_to_copy", 2, 4), ("_log_softmax", 4, 4))
METRIC_ROWS = 3


def is_spelled(software: Software, shape: OpShape, module: str) -> bool:
    """Whether several operators stand in for this kernel."""
    return spelled_scores(software, shape, module) or _logits(software, shape, module)


def spelled(
    software: Software, shape: OpShape, module: str, host: float, phase: Phase
) -> Iterator[tuple[float, OpShape]]:
    """The operators that stand in for a kernel, whose launch would take `host` seconds, each with its own seconds of
    the host."""
    costs, way = software.host, "backward" if phase == "backward" else "forward"
    elements = prod(shape.in_shapes[0])
    if spelled_scores(software, shape, module):
        for name, read, written in SCORES[way]:
            yield host, _pass(shape, name, read * elements, written * elements)
            host = costs.backward if phase == "backward" else costs.op
        return
    for name, read, written in LOGITS[way]:
        yield host, _pass(shape, name, read * elements, written * elements)
        host = costs.op  # a function in Python both ways
    rows = elements // shape.in_shapes[0][-1]
    flat = replace(shape, in_shapes=((rows,),), out_shapes=((rows,),))
    yield from ((costs.op, _pass(flat, "sub", 8 * rows, 4 * rows)) for _ in range(ROWS[way]))


def metrics(software: Software, shape: OpShape) -> Iterator[tuple[float, OpShape]]:
    """The operators of `software.metrics` metrics beside the log-softmax of a shape, each with seconds of the host."""
    elements, rows = prod(shape.in_shapes[0]), prod(shape.in_shapes[0][:-1])
    flat = replace(shape, in_shapes=((rows,),), out_shapes=((rows,),))
    for _ in range(software.metrics):
        for name, read, written in METRIC:
            yield software.host.op, _pass(shape, name, read * elements, written * elements)
        yield from ((software.host.op, _pass(flat, "sum", 8 * rows, 8)) for _ in range(METRIC_ROWS))


def _pass(shape: OpShape, name: str, read: int, written: int) -> OpShape:
    return replace(shape, name=f"aten.{name}.default", dtype="float32", flops=0, bytes_read=read, bytes_written=written)


def spelled_scores(software: Software, shape: OpShape, module: str) -> bool:
    """Whether these scores (matrices of heads and samples, queries, keys) are none for the masked softmax."""
    most = software.softmax_keys
    if not most or family(shape.name) != "softmax" or not module.startswith("blocks."):
        return False
    *matrices, queries, keys = shape.in_shapes[0]
    uneven = prod(matrices) % MATRICES or queries % MATRICES
    return element_bytes(shape.dtype) == 2 and bool(uneven or not 16 < keys <= most)


def _logits(software: Software, shape: OpShape, module: str) -> bool:
    return software.spelled_loss and module == LOSS and base_name(shape.name).startswith("_log_softmax")
