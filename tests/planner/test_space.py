"""The plan space: what is legal, why the rest is not, and where pipelines are cut."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from costmodels.cluster import load_cluster
from opgraph.batch import trace_workload
from opgraph.workload import Workload, adamw, mean_square
from planner.apply import check
from planner.apply_model import check_paths
from planner.curves import curves
from planner.lower import lower
from planner.plan import ParallelPlan
from planner.space import balanced_cuts, check_devices, counted, cut_candidates, divisors, enumerate_plans, partition
from planner.split import split
from planner.step_costs import step_costs
from tests.planner.models import BLOCKS, gpt, mean_of_squares, mlp, norm_net

CLUSTER = load_cluster("dgx-a100")


@pytest.fixture(scope="module")
def gpt_graph():
    return trace_workload(gpt())


def space_of(workload, devices, batch=8, graph=None):
    return enumerate_plans(workload, graph or trace_workload(workload), CLUSTER, batch, devices)


@pytest.mark.parametrize("make", [gpt, mlp, norm_net])
def test_every_plan_is_executable(make):
    workload = make()
    space = space_of(workload, 4)
    with torch.device("meta"):
        model = workload.build()
    splits = {}
    assert len(set(space.plans)) == len(space.plans) > 20
    for plan in space.plans:
        assert plan.world_size == 4 and plan.micro_batch * plan.micro_batches * plan.dp == 8
        check(plan)
        check_paths(model, plan)
        if plan.pp > 1 and (plan.cuts, plan.micro_batch) not in splits:
            inputs, _ = workload.batch(plan.micro_batch)
            splits[plan.cuts, plan.micro_batch] = split(model, plan.cuts, inputs)
    assert splits
    for whole in splits.values():
        assert all(len(stage.sends) == 1 for stage in whole.stages[:-1])


def test_all_axes_kinds_and_schedules_are_there(gpt_graph):
    plans = space_of(gpt(), 8, graph=gpt_graph).plans
    meshes = {(p.pp, p.dp, p.tp) for p in plans}
    assert meshes == {(a, b, 8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if 8 % (a * b) == 0}
    two = [p for p in plans if p.pp == 2 and p.dp == 2]
    assert {p.data_parallel for p in two} == {"ddp", "zero1", "fsdp"}
    assert {p.schedule for p in two} == {"gpipe", "1f1b"} and {p.micro_batches for p in two} == {1, 2, 4}
    assert {bool(p.recompute) for p in two} == {True, False}
    assert all(p.fsdp_units == BLOCKS for p in plans if p.data_parallel == "fsdp" and p.pp == 1)


def test_rejections_say_why(gpt_graph):
    rejected = [r for n in (6, 8) for r in space_of(gpt(), n, batch=4, graph=gpt_graph).rejected]
    reasons = " | ".join(f"{r.label}: {r.reason}" for r in rejected)
    assert "dp8: the global batch of 4 is not divisible by dp = 8" in reasons
    assert "tp = 3 does not divide the features or heads of 'blocks.0.attention.q'" in reasons
    assert "pp4 1f1b: 1f1b needs as many micro-batches as stages, 4, or more: mb4, or gpipe" in reasons
    assert not any("dp1" in r.label for r in rejected)  # what shards nothing is no plan that was left out
    assert all(r.count > 0 and "\n" not in r.reason for r in rejected)
    assert [counted(n, "cut") for n in (0, 1, 2)] == ["0 cuts", "1 cut", "2 cuts"]
    assert any(r.label == "pp8" and "places to cut" in r.reason for r in space_of(norm_net(), 8).rejected)


def test_units_without_blocks_are_children_with_parameters():
    plans = space_of(norm_net(), 2).plans
    assert {p.fsdp_units for p in plans if p.data_parallel == "fsdp"} == {("0", "1", "5")}
    assert not any(p.recompute for p in plans)


def test_devices_of_the_cluster():
    assert check_devices(CLUSTER, None) == 8
    with pytest.raises(ValueError, match=r"9 devices are asked for, but .* takes 1 to 8"):
        check_devices(CLUSTER, 9)
    with pytest.raises(ValueError, match="1 or more samples"):
        space_of(mlp(), 2, batch=0)
    local = load_cluster("local")
    assert check_devices(local, 4 * local.cores) == 4 * local.cores
    with pytest.raises(ValueError, match="4 ranks for each of its"):
        check_devices(local, 4 * local.cores + 1)


class Odd(nn.Module):
    """A module called twice, an in-place op behind a Linear, a skip over several modules, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inplace = nn.ReLU(inplace=True)
        self.mid = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.pick = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.first(x))
        x = self.shared(self.inplace(x))
        x = x + self.mid(x)
        best = x.argmax(-1)
        x = self.pick(x)
        return self.last(x) * best.unsqueeze(-1)


def test_candidates_are_called_once_and_one_activation_crosses():
    workload = Workload(
        "odd", Odd, lambda n: ((torch.randn(n, 8),), (torch.randn(n, 8),)), mean_of_squares, adamw, 4
    )  # fmt: skip
    costs = step_costs(trace_workload(workload), CLUSTER)
    cuts = cut_candidates(costs)
    paths = [c.paths for c in cuts]
    # `shared` is called twice; `inplace` would change what its stage receives; mid.1 and mid.2 lie under the skip;
    # integers cross before `last`
    assert paths == [("mid", "mid.0")]
    inputs, _ = workload.batch(2)
    for cut in cuts:
        assert len(split(Odd(), cut.paths[:1], inputs).stages[0].sends) == 1


def test_partition_is_the_best_one():
    random = np.random.default_rng(0)
    for _ in range(60):
        n = int(random.integers(1, 9))
        parts = int(random.integers(1, n + 1))
        costs = random.integers(0, 10, n).astype(float)

        def worst(starts, costs=costs, n=n):
            return max(costs[a:b].sum() for a, b in zip((0, *starts), (*starts, n)))

        chosen = partition(costs, parts)
        assert len(chosen) == parts - 1 and chosen == sorted(set(chosen)) and all(0 < c < n for c in chosen)
        assert worst(chosen) == min(worst(c) for c in combinations(range(1, n), parts - 1))


def test_cuts_balance_the_stages(gpt_graph):
    costs = step_costs(gpt_graph, CLUSTER)
    probe = ParallelPlan(8)
    candidates = cut_candidates(costs, BLOCKS)
    c = curves(costs, probe)
    seconds = c.forward + c.backward

    def worst(starts):
        return max(seconds[a:b].sum() for a, b in zip((0, *starts), (*starts, costs.forward_ops)))

    chosen = balanced_cuts(costs, probe, candidates, 3)
    start = {p: cut.start for cut in candidates for p in cut.paths}
    every = combinations([cut.start for cut in candidates], 2)
    assert worst([start[p] for p in chosen]) == pytest.approx(min(worst(s) for s in every))


def test_nested_cuts_take_the_inner_path():
    """A cut at a module and one inside it: the outer one is named by its first child, or it would be no call."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        )

    workload = Workload(
        "nested", build, lambda n: ((torch.randn(n, 8),), (torch.randn(n, 8),)), mean_of_squares, adamw, 4, ("0", "1")
    )  # fmt: skip
    plans = [p for p in space_of(workload, 4, batch=4).plans if p.pp == 4]
    assert plans and plans[0].cuts == ("0.1", "1.0", "1.1")
    assert len(split(build(), plans[0].cuts, (torch.randn(1, 8),)).stages) == 4
    assert all(not p.recompute for p in plans)  # every block is divided


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_fully_shard_takes_no_scalars():
    workload = Workload("scaled", Scaled, lambda n: ((torch.ones(n, 8),), ()), mean_square, adamw, 4)
    graph = trace_workload(workload)
    space = enumerate_plans(workload, graph, CLUSTER, 8, 2)
    assert {p.data_parallel for p in space.plans if p.dp > 1} == {"ddp", "zero1"}
    said = "fully_shard takes no scalar parameter, and scale is one; make it a tensor of one element"
    assert said in {r.reason for r in space.rejected}
    with pytest.raises(ValueError, match=f"{said}, or use ddp or zero1"):
        lower(graph, ParallelPlan(8, dp=2, data_parallel="fsdp"), CLUSTER)


class Lending(nn.Module):
    """The weight of `first` is read again outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.second(self.first(x)), self.first.weight)


def test_a_module_whose_weight_others_read_is_no_unit():
    workload = Workload("lending", Lending, lambda n: ((torch.ones(n, 8),), ()), mean_square, adamw, 4)
    space = enumerate_plans(workload, trace_workload(workload), CLUSTER, 8, 2)
    assert {p.fsdp_units for p in space.plans if p.fully_sharded} == {("second",)}


class Choosing(nn.Module):
    """Rows that a value chooses: what runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[(x[:, 0] > 0).nonzero().flatten()].sum(0)


def test_what_depends_on_data_gets_no_pipeline():
    workload = Workload("choosing", Choosing, lambda n: ((torch.randn(n, 8),), ()), mean_square, adamw, 4)
    graph = trace_workload(workload)
    space = enumerate_plans(workload, graph, CLUSTER, 8, 2)
    assert graph.traced_on == "real" and {p.pp for p in space.plans} == {1}
    assert any("cannot record it for stages" in r.reason for r in space.rejected if "pp2" in r.label)
