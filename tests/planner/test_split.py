"""A split model computes what the unsplit one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.split import StageModule, split
from tests.planner.models import gpt, mlp, norm_net, untied


def stages_of(model: nn.Module, cuts: tuple[str, ...], inputs: tuple[torch.Tensor, ...]):
    whole = split(model, cuts, inputs)
    return whole, [StageModule(model, whole, i) for i in range(len(cuts) + 1)]


def run(stages: list[StageModule], inputs: tuple[torch.Tensor, ...]):
    values = inputs
    for stage in stages[:-1]:
        values = stage(*values)
    return stages[-1].unflatten(stages[-1](*values))


@pytest.mark.parametrize(
    ("workload", "cuts"),
    [(mlp, ("2",)), (mlp, ("1", "4", "6")), (gpt, ("blocks.2",)), (gpt, ("blocks.1", "blocks.2", "norm")),
     (untied, ("head",)), (gpt, ("blocks.1.attention", "blocks.3")), (norm_net, ("3",))],
)  # fmt: skip
def test_split_output_and_gradients_equal_unsplit(workload, cuts):
    load = workload()
    torch.manual_seed(0)
    model = load.build().eval()
    inputs, targets = load.batch(4)
    expected = load.loss(model(*inputs), *targets)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    whole, stages = stages_of(model, cuts, inputs)
    loss = load.loss(run(stages, inputs), *targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)
    first = set(grads)
    assert {fqn for stage in stages for fqn in stage.original_fqn.values()} == first
    shared = {name for name, _ in whole.shared_parameters}
    for name in first:
        assert (sum(name in stage.original_fqn.values() for stage in stages) > 1) == (name in shared)


def test_stage_keeps_names_and_drops_the_rest():
    load = gpt()
    model = load.build()
    whole, stages = stages_of(model, ("blocks.2",), load.batch(2)[0])
    names = set(dict(stages[1].named_parameters()))
    assert "head.weight" in names and "blocks.2.up.weight" in names
    assert not any(name.startswith(("embed", "position", "blocks.0", "blocks.1")) for name in names)
    assert stages[1].original_fqn["head.weight"] == "embed.weight"
    assert whole.shared_parameters == (("embed.weight", (0, 1)),)


def test_constants_are_repeated_and_not_sent():
    load = gpt()
    whole, _ = stages_of(load.build(), ("blocks.2",), load.batch(2)[0])
    assert len(whole.stages[1].receives) == 1


class Skip(nn.Module):
    """An early value is used by the last stage; an integer is used there too if `integers`."""

    def __init__(self, integers: bool = False, twice: bool = False, dynamic: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.weight = nn.Parameter(torch.ones(4))
        self.integers, self.twice, self.dynamic = integers, twice, dynamic

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        early = self.a(x) * self.weight
        index = early.argmax(-1)
        y = self.b(early)
        if self.twice:
            y = self.b(y)
        if self.dynamic and y.sum() > 0:
            y = -y
        z = self.c(y) + early
        if self.integers:
            z = z + index[:, None]
        return z, "name"


def test_values_that_skip_stages_are_forwarded():
    model = Skip()
    x = torch.randn(3, 4)
    whole, stages = stages_of(model, ("b", "c"), (x,))
    assert len(whole.stages[2].receives) == 2 and len(whole.stages[1].receives) == 1
    out = run(stages, (x,))
    assert out[1] == "name"
    torch.testing.assert_close(out[0], model(x)[0])


@pytest.mark.parametrize(
    ("options", "cuts", "message"),
    [({"integers": True}, ("b",), "cut at 'b' would have to send an integer tensor"),
     ({"twice": True}, ("b",), "called 2 times"),
     ({"dynamic": True}, ("b",), "cannot be recorded"),
     ({}, ("c", "b"), "not in execution order"),
     ({}, ("nothing",), "no module path")],
)  # fmt: skip
def test_what_cannot_be_split_says_why(options, cuts, message):
    with pytest.raises(ValueError, match=message):
        split(Skip(**options), cuts, (torch.randn(3, 4),))


def test_never_called_cut():
    model = Skip()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never called"):
        split(model, ("unused",), (torch.randn(3, 4),))


def test_meta_model_splits_without_memory():
    load = gpt()
    with torch.device("meta"):
        model = load.build()
    whole = split(model, ("blocks.1",), load.batch(2)[0])
    assert whole.values[whole.stages[1].receives[0]].shape == (2, 16, 32)


def test_bf16_recording_sends_what_autocast_makes():
    load = mlp()
    whole = split(load.build(), ("2",), load.batch(2)[0], autocast=torch.bfloat16)
    assert whole.values[whole.stages[1].receives[0]].dtype == torch.bfloat16


def test_sent_values_are_contiguous():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(self.a(x).t())

    model, x = Turned(), torch.randn(3, 4)
    whole, stages = stages_of(model, ("b",), (x,))
    (sent,) = stages[0](x)
    assert sent.is_contiguous() and whole.values[whole.stages[1].receives[0]].stride == (3, 1)
    torch.testing.assert_close(run(stages, (x,)), model(x))
