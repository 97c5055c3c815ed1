"""Graphs to networkx, to pandas, to a file and back."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

from opgraph.batch import trace_workload
from opgraph.export import load_graph
from opgraph.graph import OpGraph
from opgraph.models import load_workload
from opgraph.trace import trace


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return trace_workload(load_workload("gpt2:layers=6,hidden=32,heads=2,ffn=64,seq=16,vocab=100"))


@pytest.mark.parametrize("spec", ["mlp", "lstm-medium", "resnet50"])
def test_a_saved_graph_comes_back(spec: str, tmp_path: Path) -> None:
    graph = trace_workload(load_workload(spec))
    graph.save(tmp_path / "g.graph")
    assert load_graph(tmp_path / "g.graph") == graph
    assert [p.name for p in tmp_path.iterdir()] == ["g.graph"]


def test_folded_graphs_and_odd_numbers_come_back(graph: OpGraph, tmp_path: Path) -> None:
    odd = replace(graph.ops[0], args=(float("inf"), float("-inf"), 1e-45, 2**70, True, None, "x", ((), (1,))))
    graph = replace(graph, ops=(odd, *graph.ops[1:]), notes=("a note",))
    graph.save(str(tmp_path / "g"))
    back = load_graph(str(tmp_path / "g"))
    assert back == graph and back.repeats == graph.repeats and back.ops[0].args[4] is True
    assert back.at_batch(5) == graph.at_batch(5)


def test_files_that_are_no_graphs(graph: OpGraph, tmp_path: Path) -> None:
    path = tmp_path / "g"
    path.write_text("hello")
    with pytest.raises(ValueError, match="is not an op graph that Parplan saved, or it is damaged"):
        load_graph(path)
    with gzip.open(path, "wt") as file:
        json.dump({"a": 1}, file)
    with pytest.raises(ValueError, match="is not an op graph that Parplan saved"):
        load_graph(path)
    graph.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_graph(path)
    data = json.loads(gzip.decompress(whole))
    older = "has version 99 of the format; this Parplan reads 1"
    for change, says in (({"version": 99}, older), ({"ops": {}}, "lacks")):
        with gzip.open(path, "wt") as file:
            json.dump(data | change, file)
        with pytest.raises(ValueError, match=says):
            load_graph(path)
    with pytest.raises(FileNotFoundError):
        load_graph(tmp_path / "nothing")


def test_a_save_that_fails_leaves_the_old_file(graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "g")
    broken = replace(graph, notes=(object(),))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(tmp_path / "g")
    assert load_graph(tmp_path / "g") == graph and len(list(tmp_path.iterdir())) == 1


def test_networkx(graph: OpGraph) -> None:
    net = graph.to_networkx()
    assert net.number_of_nodes() == len(graph.ops) and nx.is_directed_acyclic_graph(net)
    assert all(a < b for a, b in net.edges)
    assert sum(flops for _, flops in net.nodes(data="flops")) == graph.flops()
    softmax = next(op for op in graph.ops if op.name == "aten._log_softmax.default")
    loss = next(op for op in graph.ops if op.name == "aten.nll_loss_forward.default")
    edge = net.edges[softmax.id, loss.id]
    assert edge["kind"] == "data" and edge["bytes"] == graph.tensors[softmax.outputs[0]].bytes
    assert net.nodes[loss.id]["module"] == "<loss>" and net.nodes[loss.id]["phase"] == "forward"
    update = next(op.id for op in graph.ops if op.name == "aten._fused_adamw_.default")
    gradients = {op for _, op in graph.gradient_ops}
    assert gradients <= set(nx.ancestors(net, update)), "the optimizer waits for all gradients"


def test_networkx_knows_what_is_overwritten() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.sin()  # 0
            z = y.cos()  # 1 reads y
            y[0].mul_(2)  # 2 select, 3 overwrites part of y through a view
            return (y + z).sum()  # 4, 5

    graph = trace(InPlace(), (torch.randn(3, 4),), loss=lambda y: y)
    assert [op.name.split(".")[1] for op in graph.ops][:5] == ["sin", "cos", "select", "mul_", "add"]
    net = graph.to_networkx()
    assert net.edges[0, 1]["kind"] == "data" and net.edges[0, 1]["bytes"] == 48
    assert net.edges[2, 3]["kind"] == "data" and net.edges[0, 3]["bytes"] == 16
    assert net.edges[1, 3] == {"kind": "order", "bytes": 0}
    assert net.edges[3, 4]["bytes"] == 48 and net.edges[1, 4]["bytes"] == 48


def test_pandas(graph: OpGraph) -> None:
    table = graph.to_pandas()
    assert list(table.id) == list(range(len(graph.ops))) and table.flops.sum() == graph.flops()
    assert table.groupby("phase").flops.sum()["forward"] == graph.flops("forward")
    row = table[table.name == "aten.addmm.default"].iloc[0]
    assert row.module == "blocks.0.attn.q" and row.out_shapes == ((32, 32),)
    assert row.bytes_read == 4 * (32 + 32 * 32 + 32 * 32)
