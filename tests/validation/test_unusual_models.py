"""Executed: models that return several tensors, optimizers that look at their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from costmodels.cluster import load_cluster
from opgraph.batch import trace_workload
from opgraph.workload import Workload, adamw, mean_square
from planner.plan import ParallelPlan
from planner.space import enumerate_plans
from planner.step_costs import step_costs
from validation.launch import run_plans
from validation.measure import Options

pytestmark = pytest.mark.executed
WIDTH = 16


class Several(nn.Module):
    """Returns its result, what it is made of, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(self.layers(x))
        return self.out(x), x, x.mean()


def grouped(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weights decay, the rest does not."""
    found = list(parameters)
    groups = [{"params": [p for p in found if p.dim() > 1], "weight_decay": 0.5},
              {"params": [p for p in found if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=0.01)


def several() -> Workload:
    def batch(n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (torch.randn(n, WIDTH),), (torch.randn(n, WIDTH),)

    def loss(output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return mean_square(output[0], target) + 0.1 * mean_square(output[1], target) + 0.1 * output[2]

    return Workload("several", Several, batch, loss, grouped, 8)


def test_all_that_a_model_returns_and_groups_of_parameters_go_through_every_kind_of_plan() -> None:
    pairs = (("layers.0.0", "colwise"), ("layers.1.0", "rowwise"))
    plans = [
        ParallelPlan(8, pp=2, micro_batches=2, cuts=("layers.2",)),
        ParallelPlan(8, dp=2, data_parallel="zero1"),
        ParallelPlan(8, dp=2, tp=2, data_parallel="fsdp", shardings=pairs),
    ]
    options = Options(memory=False, measure=False, timeout_seconds=60)
    for m in run_plans("tests.validation.test_unusual_models:several", plans, options):
        assert m.status == "ok", f"{m.plan.label}: {m.reason}"


def test_what_no_plan_can_train_is_refused() -> None:
    def frozen() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.ReLU())

    made = replace(several(), build=frozen, loss=mean_square)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        enumerate_plans(made, trace_workload(made), load_cluster("dgx-h100"), 8, devices=2)


class Reentrant(Several):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from torch.utils.checkpoint import checkpoint

        x = self.norm(checkpoint(self.layers, self.norm(x), use_reentrant=True))
        return self.out(x), x, x.mean()


def test_reentrant_checkpoints_are_refused_in_one_sentence() -> None:
    made = replace(several(), build=Reentrant)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        step_costs(trace_workload(made), load_cluster("dgx-h100"))


class Spare(Several):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)


def spare() -> Workload:
    return replace(several(), build=Spare)


def test_parameters_without_gradient_keep_ddp_out_and_are_blamed_for_it() -> None:
    space = enumerate_plans(spare(), trace_workload(spare()), load_cluster("dgx-h100"), 8, devices=2)
    kinds = {plan.data_parallel for plan in space.plans if plan.dp > 1}
    (reason,) = {r.reason for r in space.rejected if r.label == "ddp or zero1"}
    assert kinds == {"fsdp"} and reason.startswith("no gradient reaches spare.weight and 1 other, and")
    options = Options(memory=False, measure=False, timeout_seconds=60)
    plans = [ParallelPlan(8, dp=2), ParallelPlan(8, dp=2, data_parallel="fsdp", fsdp_units=("layers", "spare"))]
    ddp, fsdp = run_plans("tests.validation.test_unusual_models:spare", plans, options)
    assert ddp.status == "failed" and ddp.reason.startswith("no gradient reaches spare.weight, and torch's Dist")
    assert fsdp.status == "ok", fsdp.reason


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x[0, 0].item() > 0 else self.b(x)


def test_models_that_data_lead_through_other_code_get_no_data_parallel_plan() -> None:
    made = replace(several(), build=Forked, loss=mean_square)
    graph = trace_workload(made)
    assert graph.traced_on == "real" and graph.varies
    space = enumerate_plans(made, graph, load_cluster("dgx-h100"), 8, devices=2)
    assert not space.plans and any("takes another path for other data" in r.reason for r in space.rejected)
    (alone,) = {p.world_size for p in enumerate_plans(made, graph, load_cluster("dgx-h100"), 8, devices=1).plans}
    assert alone == 1


class Waves(nn.Module):
    """Complex parameters beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))


def waves() -> Workload:
    return replace(several(), build=Waves, loss=mean_square, optimizer=adamw)


def test_complex_parameters_train_under_every_plan_that_is_offered() -> None:
    space = enumerate_plans(waves(), trace_workload(waves()), load_cluster("dgx-h100"), 8, devices=2)
    plans = [p for p in space.plans if p.micro_batches == 1]
    assert {p.data_parallel for p in plans} == {"ddp", "fsdp"}
    assert any("filter is complex64" in r.reason for r in space.rejected if r.label == "zero1")
    options = Options(memory=False, measure=False, timeout_seconds=60)
    for m in run_plans("tests.validation.test_unusual_models:waves", plans, options):
        assert m.status == "ok", f"{m.plan.label}: {m.reason}"
