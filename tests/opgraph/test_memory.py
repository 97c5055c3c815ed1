"""The traced step's peak memory is what a real step on this CPU allocates, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch.utils._pytree import tree_leaves

from opgraph.batch import trace_workload
from opgraph.graph import OpGraph, Storage
from opgraph.memory import replay_memory
from opgraph.models import load_workload
from validation.allocations import recorded_allocations

# spec -> largest error allowed. The LSTM's real run asks oneDNN for a workspace inside the op, and its backward is
# another op than under fake tensors; ResNet's convolutions take scratch memory inside the op.
CASES = {
    "mlp": 0.01,
    "gpt2:layers=6,hidden=128,heads=4,ffn=512,seq=128,vocab=2000,batch=4": 0.01,
    "bert-base:layers=6,hidden=128,heads=4,ffn=512,seq=128,vocab=2000,batch=4": 0.01,
    "vit-b16:layers=6,hidden=128,heads=4,ffn=512,batch=4": 0.01,
    "llama3-8b:layers=6,hidden=128,heads=4,kv_heads=2,ffn=512,seq=128,vocab=2000,batch=4": 0.01,
    "mixtral-8x7b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=128,seq=64,vocab=500,batch=2": 0.01,
    "alexnet:batch=8": 0.01,
    "resnet50:batch=4": 0.03,
    "lstm-medium:batch=4": 0.10,
}


def real_peak(spec: str) -> int:
    """Highest sum of the profiler's memory events over one settled step, on top of what rested before it."""
    workload = load_workload(spec)
    torch.manual_seed(0)
    model = workload.build()
    optimizer = workload.optimizer(model.parameters())
    inputs, targets = workload.batch(workload.batch_size)

    def step() -> None:
        loss = workload.loss(model(*inputs), *targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = [t for s in optimizer.state.values() for t in tree_leaves(s) if isinstance(t, torch.Tensor)]
    resting = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers(), *state, *inputs, *targets)
    }
    with recorded_allocations() as allocations:
        step()
    changes = [size for _, _, size in allocations]
    return sum(resting.values()) + max(accumulate(changes), default=0)


def relative_error(spec: str) -> float:
    return replay_memory(trace_workload(load_workload(spec))).peak_bytes / real_peak(spec) - 1


@pytest.mark.parametrize("spec,allowed", CASES.items(), ids=[spec.partition(":")[0] for spec in CASES])
def test_peak_of_a_real_step(spec: str, allowed: float) -> None:
    assert abs(relative_error(spec)) <= allowed


def graph_of(*storages: Storage, ops: int = 3) -> OpGraph:
    from opgraph.graph import Op

    return OpGraph(
        "hand", 1, tuple(Op(i, "aten.x", "forward", "", (), (), (), (), (), 0, False) for i in range(ops)), (),
        storages, (),
    )  # fmt: skip


def test_replay_by_hand() -> None:
    graph = graph_of(
        Storage(0, 10, 0, "parameter", -1, 3),  # always there
        Storage(1, 4, 0, "activation", 0, 1),  # made by op 0, freed by op 1
        Storage(2, 7, 0, "activation", 1, 3),  # made by op 1: both live while it runs
        Storage(3, 1, 0, "gradient", 2, 2),
    )
    replay = replay_memory(graph)
    assert replay.live.tolist() == [10, 14, 21, 18]
    assert (replay.peak_bytes, replay.peak_op) == (21, 1)
    assert replay.by_role == {"parameter": 10, "activation": 11}


def test_the_models_output_is_freed_as_in_the_executed_step() -> None:
    """Nobody but autograd holds the output: without a use in backward it is gone with the loss."""
    from torch import nn

    from opgraph.trace import trace

    big: Callable[[torch.Tensor], torch.Tensor] = lambda y: y.sum()  # noqa: E731 - sum's backward needs no output
    graph = trace(nn.Linear(4, 1000), (torch.randn(50, 4),), loss=big)
    output = next(op for op in graph.ops if op.name == "aten.addmm.default").outputs[0]
    storage = graph.storages[graph.tensors[output].storage]
    assert graph.ops[storage.death].phase == "forward"
