"""Factories as users write them, good and bad ones; imported by path in test_models.py."""

import torch
from torch import nn

from opgraph.workload import Workload, adamw


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts)


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, ids, scale):
        x = self.embed(ids)
        for layer in self.body.layers:
            x = layer(x)
        return self.head(x) * scale.unsqueeze(-1)


def pair():
    return Net(), (torch.randint(10, 20, (4, 6)), torch.randn(4, 6))


def triple():
    return nn.Linear(3, 2), torch.randn(5, 3), lambda output: output.abs().mean()


def full():
    ids = torch.arange(12).view(2, 6)
    return {
        "module": Net(1),
        "inputs": (ids, torch.ones(2, 6)),
        "targets": torch.tensor([[0, 1, 2, 3, 0, 1]] * 2),
        "loss": lambda output, targets: nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "batch": 16,
    }


def workload():
    table = torch.randn(7, 3)
    return Workload("own", lambda: nn.Linear(3, 2), lambda n: ((table[:n],), ()), lambda o: o.sum(), adamw, 4)


def not_on_meta():
    width = int(torch.tensor([3, 5]).max())
    return nn.Linear(width, 2), torch.randn(4, width)


def huge():
    if torch.empty(0).device.type != "meta":
        raise RuntimeError("this machine is too small")
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    return nn.Linear(1_000_000, 1_000_000), (ids, torch.ones(1, 8, dtype=torch.bool))


def broken():
    return nn.Linear(3, 2).no_such_method()


def bare_module():
    return nn.Linear(3, 2)


def bad_key():
    return {"module": nn.Linear(3, 2), "inputs": torch.randn(2, 3), "criterion": None}


def no_inputs():
    return nn.Linear(3, 2), ()


def scalar_input():
    return nn.Linear(3, 2), (torch.tensor(1.0),)


def uneven():
    return Net(), (torch.zeros(4, 6, dtype=torch.long), torch.randn(3, 6))


def integers_on_meta():
    return nn.Embedding(5, 2), torch.zeros(2, 3, dtype=torch.long, device="meta")


def probabilities():
    picture = torch.rand(4, 1, 3, 3)
    return {
        "module": nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.Sigmoid()),
        "inputs": picture,
        "targets": (picture.flatten(1), (torch.randn(4, 9) > 0).float(), torch.randint(0, 2, (4, 9)).float()),
        "loss": lambda output, *targets: sum(nn.functional.binary_cross_entropy(output, t) for t in targets),
    }


def few_of_many():
    return nn.Embedding(1000, 2), torch.randint(1000, (2, 3))
