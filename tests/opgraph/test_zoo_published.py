"""Picture models of published runs have the parameters that their papers' checkpoints have."""

from __future__ import annotations

from math import prod

import pytest
import torch

from opgraph.batch import trace_workload
from opgraph.workload import Workload
from opgraph.zoo import inception, residual

# Counts of torchvision's and timm's checkpoints with 1000 classes.
PARAMETERS = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnext50": 25_028_904, "resnext101": 44_177_704,
    "seresnext101": 48_955_416, "wideresnet50": 68_883_240, "wideresnet101": 126_886_696, "inception3": 23_834_568,
}  # fmt: skip


def built(name: str) -> Workload:
    return inception.workload(batch=2) if name == "inception3" else residual.workload(name, batch=2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        module = built(name).build()
    assert sum(prod(p.shape) for p in module.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "gmacs"), [("inception3", 5.71), ("resnet18", 1.81), ("resnext50", 4.23)])
def test_work_of_a_forward_pass(name: str, gmacs: float) -> None:
    """Multiply-adds per picture as torchvision states them; a FLOP is half of one."""
    graph = trace_workload(built(name))
    flops = sum(op.flops for op in graph.ops if op.phase == "forward")
    assert flops / graph.batch / 2e9 == pytest.approx(gmacs, rel=0.01)
