"""What CPU offload moves, against tensors that really go to the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opgraph.summary import activation_bytes
from opgraph.trace import trace
from opgraph.workload import adamw
from planner.memory_offload import Offload, offload_activations, offload_optimizer
from tests.planner.conftest import GPT, model


def test_the_optimizers_state_goes_and_gradients_and_parameters_cross():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    size = 4 * sum(p.numel() for p in net.parameters())
    graph = trace(net, (torch.randn(32, 8),), loss=lambda y: y.square().sum(), optimizer=adamw)
    found = offload_optimizer(graph)
    counters = 4 * len(list(net.parameters()))  # AdamW counts its steps in a float per parameter
    assert (found.to_host, found.to_device) == (size, size)
    assert found.device == 2 * size + counters and found.host == found.device + size


def test_activations_are_what_autograd_saves():
    """The bytes that hooks of saved tensors see, each storage once, without parameters and inputs."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    x = torch.randn(32, 8)
    graph = trace(net, (x,), loss=lambda y: y.sum())
    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    seen: dict[int, int] = {}
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    assert offload_activations(graph).device == sum(seen.values()) == 4 * 32 * (16 + 24)
    assert offload_activations(graph, ("1",)).to_host == 4 * 32 * 16


def test_modules_of_a_transformer_add_up():
    workload, graph = model(GPT)
    each = [offload_activations(graph, (block,)).device for block in workload.blocks]
    together = offload_activations(graph, workload.blocks)
    assert together.device == sum(each) > 0 and each[0] == each[1]
    assert together.device < offload_activations(graph).device <= activation_bytes(graph)


def test_seconds_of_the_copies():
    found = Offload(device=10, host=10, to_host=6, to_device=4)
    assert found.seconds(2.0) == 3.0 and found.seconds(2.0, full_duplex=False) == 5.0
    with pytest.raises(ValueError, match="moves nothing"):
        found.seconds(0.0)
