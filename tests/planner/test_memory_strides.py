"""How a stage's tensors lie when what it received is contiguous, against the same layers run on contiguous inputs."""

from __future__ import annotations

import torch
from torch import nn

from opgraph.graph import OpGraph
from opgraph.trace import trace
from planner.lower import prepared_graph
from planner.memory_strides import stage_strides
from planner.plan import ParallelPlan
from planner.runtime_stage import prepare


class ChannelsLast(nn.Module):
    """As ConvNeXt does: convolutions whose inputs lie with channels last, because a layer norm wanted them so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.second(x)


def convolution(graph: OpGraph, index: int, plan: ParallelPlan) -> tuple[tuple[int, ...], ...]:
    """Input and output strides of the second convolution in a plan's last stage."""
    step, layout, stages = prepared_graph(graph, plan)
    stage = prepare(step, plan, layout, stages, index)
    found = stage_strides(stage)
    op = next(op for op in stage.ops.forward if "convolution" in op.name and op.module == "second")
    return tuple(found.get(t, step.tensors[t].strides) for t in (op.inputs[0], op.outputs[0]))


def test_a_stage_receives_contiguous_tensors_and_ops_carry_that_on() -> None:
    net, x = ChannelsLast(), torch.randn(4, 8, 6, 6)
    graph = trace(net, (x,), loss=lambda y: y.square().mean())
    last, plain = (288, 1, 48, 8), (288, 36, 6, 1)
    assert convolution(graph, 0, ParallelPlan(4)) == (last, last)
    with torch.no_grad():
        real = net.second(torch.randn(4, 8, 6, 6)).stride()
    plan = ParallelPlan(4, pp=2, cuts=("second",))
    assert convolution(graph, 1, plan) == (plain, plain) == (plain, real)
    step, layout, stages = prepared_graph(graph, plan)
    first = prepare(step, plan, layout, stages, 0)
    # the gradient of what was sent comes back contiguous too
    moved = stage_strides(first)
    assert [step.tensors[t].strides for t in moved if moved[t] == plain] and all(
        step.tensors[t].role in ("gradient", "activation") for t in moved
    )
