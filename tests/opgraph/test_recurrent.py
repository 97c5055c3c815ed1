"""Recurrent layers as accelerators run them, against the same layers step by step on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from opgraph.batch import trace_workload
from opgraph.export import load_graph
from opgraph.memory import replay_memory
from opgraph.recurrent import reserve_bytes
from opgraph.trace import trace
from opgraph.workload import Workload, adamw, mean_square

BATCH, STEPS, WIDTH, HIDDEN = 3, 7, 6, 10
LAYERS = {
    "rnn_tanh": lambda: nn.RNN(WIDTH, HIDDEN),
    "rnn_relu": lambda: nn.RNN(WIDTH, HIDDEN, 2, nonlinearity="relu", bias=False),
    "gru": lambda: nn.GRU(WIDTH, HIDDEN),
    "gru_first": lambda: nn.GRU(WIDTH, HIDDEN, 3, batch_first=True),
    "gru_both": lambda: nn.GRU(WIDTH, HIDDEN, 2, bidirectional=True, dropout=0.3),
    "lstm": lambda: nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True),
    "lstm_projected": lambda: nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True, proj_size=4),
}


class Model(nn.Module):
    """Words through a recurrent layer to a head; the batch comes first outside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, WIDTH), LAYERS[kind]()
        out = (self.rnn.proj_size or HIDDEN) * (1 + self.rnn.bidirectional)
        self.head = nn.Linear(out, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0])
        return self.head(self.rnn(x.transpose(0, 1))[0])


def workload(kind: str, batch: int = BATCH) -> Workload:
    def data(n: int):
        return (torch.randint(0, 11, (n, STEPS)),), ()

    return Workload(kind, lambda: Model(kind), data, mean_square, adamw, batch)


def kernels(graph, phase: str) -> list[str]:
    return [op.name for op in graph.ops if op.phase == phase and "rnn" in op.name]


def state_weights(graph) -> int:
    """Elements of the weights that meet the state in every step."""
    return sum(t.numel for n, t in graph.parameters.items() if "weight_hh" in n)


@pytest.fixture(scope="module")
def traced():
    return {kind: trace(Model(kind), (torch.randint(0, 11, (BATCH, STEPS)),)) for kind in LAYERS}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_op_and_one_for_its_backward(traced, kind):
    graph = traced[kind]
    assert graph.run_by("cpu") is graph and "aten._cudnn_rnn.default" not in {op.name for op in graph.ops}
    for device in ("gpu", "tpu", "npu"):
        fast = graph.run_by(device)
        assert kernels(fast, "forward") == ["aten._cudnn_rnn.default"]
        assert kernels(fast, "backward") == ["aten._cudnn_rnn_backward.default"]
        assert fast.run_by(device) is fast and len(fast.ops) < len(graph.ops) + 4


@pytest.mark.parametrize("kind", LAYERS)
def test_flop_are_those_of_the_steps(traced, kind):
    """Backward: autograd leaves out the gradient of the first state, which the kernel makes like all others. oneDNN's
    formula (LSTM without projection) counts it too."""
    graph, fast = traced[kind], traced[kind].run_by("gpu")
    assert fast.flops("forward") == graph.flops("forward")
    first = 0 if kind == "lstm" else 2 * BATCH * state_weights(graph)
    assert fast.flops("backward") == graph.flops("backward") + first


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_trained_and_returned_is_the_same(traced, kind):
    graph, fast = traced[kind], traced[kind].run_by("gpu")
    assert {n: t.shape for n, t in fast.parameters.items()} == {n: t.shape for n, t in graph.parameters.items()}
    assert {n for n, _ in fast.gradient_ops} == {n for n, _ in graph.gradient_ops} == set(graph.parameters)
    updates = [[op.name for op in g.ops if op.phase == "optimizer"] for g in (graph, fast)]
    assert updates[0] == updates[1]
    heads = [
        [g.tensors[t].shape for op in g.ops if op.module == "head" and op.phase == "forward" for t in op.outputs]
        for g in (graph, fast)
    ]
    assert heads[0] == heads[1]
    where = [op.module for op in fast.ops if "rnn" in op.name]
    assert where == ["rnn", "rnn"]
    forward, backward = (op for op in fast.ops if "rnn" in op.name)
    assert backward.forward == forward.id


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("rnn_tanh", 0), ("rnn_relu", HIDDEN), ("gru", 4 * HIDDEN), ("gru_first", 3 * 4 * HIDDEN + 2 * HIDDEN),
        ("gru_both", 2 * 2 * 4 * HIDDEN + 2 * HIDDEN), ("lstm", 2 * 5 * HIDDEN + HIDDEN),
        ("lstm_projected", 2 * 2 * 5 * HIDDEN + 2 * 4),
    ],
)  # fmt: skip
def test_the_reserve_space_lives_until_backward(traced, kind, kept):
    fast = traced[kind].run_by("gpu")
    op = next(op for op in fast.ops if op.name == "aten._cudnn_rnn.default")
    back = next(op for op in fast.ops if op.name == "aten._cudnn_rnn_backward.default")
    reserve = next(t for t in map(fast.tensors.__getitem__, op.outputs) if t.dtype == "uint8")
    assert fast.storages[reserve.storage].bytes == 4 * STEPS * BATCH * kept
    assert not kept or fast.storages[reserve.storage].death >= back.id
    assert reserve.id in back.inputs


def test_a_reserve_space_scales_with_everything():
    assert reserve_bytes(3, 5, 2, 8, 8, 1, 1, 2) == 2 * 5 * 2 * 4 * 8
    assert reserve_bytes(2, 5, 2, 8, 3, 2, 2, 4) == 4 * 5 * 2 * (4 * 5 * 8 + 2 * 3)


def test_it_needs_less_memory_than_the_steps(traced):
    """Step by step autograd keeps every intermediate value."""
    graph, fast = traced["gru"], traced["gru"].run_by("gpu")
    assert replay_memory(fast).peak_bytes < replay_memory(graph).peak_bytes


@pytest.mark.parametrize("kind", ["gru_both", "lstm_projected", "gru_first"])
def test_one_graph_serves_every_batch(kind):
    graph, other = trace_workload(workload(kind)), trace_workload(workload(kind, 8))
    found, wanted = graph.at_batch(8).run_by("gpu"), other.run_by("gpu")
    assert found.tensors == wanted.tensors and found.flops() == wanted.flops()
    assert [s.bytes for s in found.storages] == [s.bytes for s in wanted.storages]
    assert replace(found.ops[0], args=()) == replace(wanted.ops[0], args=())


def test_in_bf16_weights_and_input_are_cast(traced):
    ids = (torch.randint(0, 11, (BATCH, STEPS)),)
    fast = trace(Model("gru"), ids, precision="bf16").run_by("gpu")
    op = next(op for op in fast.ops if op.name == "aten._cudnn_rnn.default")
    assert {fast.tensors[t].dtype for t in op.inputs} == {"bfloat16"}
    casts = [o for o in fast.ops if o.module == "rnn" and o.phase == "forward" and o.name == "aten._to_copy.default"]
    assert len(casts) == 1 + 1 + 4
    assert fast.flops("forward") == traced["gru"].flops("forward")


def test_a_file_keeps_both(tmp_path):
    graph = trace_workload(workload("gru"))
    graph.save(tmp_path / "gru.json.gz")
    again = load_graph(tmp_path / "gru.json.gz")
    assert again == graph and again.run_by("gpu") == graph.run_by("gpu") != graph


def test_evaluation_keeps_nothing_for_backward():
    def build():
        return Model("gru").eval().requires_grad_(False)

    graph = trace_workload(replace(workload("gru"), build=build, loss=lambda y: y))
    fast = graph.run_by("gpu")
    assert all(op.phase == "forward" for op in fast.ops) and fast.flops() == graph.flops()
    assert not [s for s, t in ((fast.storages[t.storage], t) for t in fast.tensors) if t.dtype == "uint8" and s.bytes]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1]


def test_packed_sequences_say_that_they_run_step_by_step():
    graph = trace(Packed(), (torch.randn(3, STEPS, WIDTH), torch.tensor([7, 5, 2])))
    assert graph.run_by("gpu") is graph
    assert any("step by step" in note for note in graph.notes)


def test_other_models_are_traced_once():
    graph = trace(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert graph.on_accelerators is None and graph.run_by("gpu") is graph
