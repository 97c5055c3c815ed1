"""Lowering equals the dry run of the real program: every message, every op, and the peak memory."""

from dataclasses import replace

import pytest
import torch

from costmodels.cluster import load_cluster
from opgraph.batch import trace_workload
from opgraph.workload import Workload, adamw, mean_square
from planner.check import compare
from planner.dryrun import dry_run
from planner.lower import lower
from planner.memory import peak_bytes
from planner.plan import ParallelPlan
from planner.search import search
from planner.stage_costs import stage_costs
from planner.step_costs import step_costs
from planner.tensor_parallel import tp_shardings
from tests.planner.conftest import ALEXNET, GPT, LLAMA, VIT, model
from tests.planner.models import CORES, across, cored

KINDS = {
    "single": {},
    "micro-batches": {"micro_batches": 2},
    "ddp": {"dp": 2},
    "ddp mb": {"dp": 2, "micro_batches": 2},
    "zero1": {"dp": 2, "data_parallel": "zero1"},
    "fsdp": {"dp": 2, "data_parallel": "fsdp"},
    "fsdp mb": {"dp": 2, "data_parallel": "fsdp", "micro_batches": 2},
    "zero2": {"dp": 2, "data_parallel": "zero2"},
    "zero2 mb": {"dp": 2, "data_parallel": "zero2", "micro_batches": 2},
    "zero2 x tp": {"dp": 2, "tp": 2, "data_parallel": "zero2", "recompute": True},
    "tp": {"tp": 2},
    "gpipe": {"pp": 2, "micro_batches": 4, "schedule": "gpipe"},
    "1f1b": {"pp": 2, "micro_batches": 4},
    "ddp x tp": {"dp": 2, "tp": 2},
    "fsdp x tp": {"dp": 2, "tp": 2, "data_parallel": "fsdp"},
    "pp x ddp": {"pp": 2, "dp": 2, "micro_batches": 2},
    "pp x zero1": {"pp": 2, "dp": 2, "micro_batches": 2, "data_parallel": "zero1"},
    "pp x fsdp": {"pp": 2, "dp": 2, "micro_batches": 2, "data_parallel": "fsdp"},
    "pp x zero2": {"pp": 2, "dp": 2, "micro_batches": 4, "data_parallel": "zero2"},
    "fsdp offload": {"dp": 2, "data_parallel": "fsdp", "offload": ("parameters",)},
    "zero2 offload x tp mb": {
        "dp": 2, "tp": 2, "data_parallel": "zero2", "micro_batches": 2, "recompute": True, "offload": ("parameters",)
    },
    "pp x tp": {"pp": 2, "tp": 2, "micro_batches": 2},
    "pp x ddp x tp": {"pp": 2, "dp": 2, "tp": 2, "micro_batches": 2},
    "pp x fsdp x tp": {"pp": 2, "dp": 2, "tp": 2, "micro_batches": 2, "data_parallel": "fsdp"},
    "recompute": {"recompute": True, "dp": 2},
    "recompute fsdp": {"recompute": True, "dp": 2, "data_parallel": "fsdp"},
    "recompute tp": {"recompute": True, "tp": 2},
    "recompute first": {"recompute": True, "dp": 2, "recompute_first": (1,)},
    "keep products": {"recompute": True, "recompute_keeps": ("products",)},
    "keep attention fsdp": {
        "recompute": True, "dp": 2, "data_parallel": "fsdp", "micro_batches": 2, "recompute_keeps": ("attention",)
    },
    "keep both tp": {"recompute": True, "tp": 2, "recompute_keeps": ("products", "attention")},
    "stages recompute 1/0": {"pp": 2, "micro_batches": 4, "recompute": True, "recompute_first": (1, 0)},
    "stages keep 0/1": {
        "pp": 2, "micro_batches": 4, "schedule": "gpipe", "recompute": True, "recompute_first": (0, 1),
        "recompute_keeps": ("products",),
    },
}  # fmt: skip
SOME = ("ddp", "fsdp", "tp", "1f1b", "fsdp x tp", "pp x fsdp")
CASES = [(GPT, k) for k in KINDS] + [(spec, k) for spec in (ALEXNET, LLAMA, VIT) for k in SOME]
CASES += [(spec, "keep products") for spec in (LLAMA, VIT)]


def plan_of(spec, kind):
    workload, graph = model(spec)
    return plan_on(workload, graph, kind)


def plan_on(workload, graph, kind, precision="fp32"):
    options = dict(KINDS[kind])
    if options.get("pp", 1) > 1:
        options["cuts"] = (workload.blocks[len(workload.blocks) // 2],)
    if options.get("tp", 1) > 1:
        options["shardings"] = tp_shardings(graph, 2)
    if options.get("data_parallel") in ("fsdp", "zero2"):
        options["fsdp_units"] = workload.blocks
    if options.pop("recompute", False):
        options["recompute"] = workload.blocks
    return ParallelPlan(8, precision=precision, **options)


@pytest.mark.parametrize(("spec", "kind"), CASES, ids=[f"{s.partition(':')[0]}-{k}" for s, k in CASES])
def test_messages_ops_and_peak_equal_the_dry_run(spec, kind, uncalibrated):
    workload, graph = model(spec)
    plan = plan_of(spec, kind)
    peaks = peak_bytes(lower(graph, plan, uncalibrated).stages, plan)
    for rank in sorted({0, plan.world_size - 1}):
        run = dry_run(plan, workload, rank)
        mismatch = compare(graph, plan, rank, run.records)
        assert not mismatch, mismatch
        exact = 0.01 if spec == GPT else 0.05  # fake tensors know no scratch memory of convolutions
        assert peaks[rank] == pytest.approx(run.peak_bytes, rel=exact)


@pytest.mark.parametrize("spec", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_autocast_keeps_tensor_parallelism(spec, uncalibrated):
    """Casts stand around each product: the same pairs are found, and partial sums are reduced once, after the cast."""
    workload, whole = model(spec)
    graph = trace_workload(workload, precision="bf16")
    assert tp_shardings(graph, 2) == tp_shardings(whole, 2) != ()
    for kind in ("ddp x tp", "fsdp x tp", "pp x tp", "recompute tp"):
        plan = plan_on(workload, graph, kind, "bf16")
        run = dry_run(plan, workload, 0)
        mismatch = compare(graph, plan, 0, run.records)
        assert not mismatch, f"{kind}: {mismatch}"
        assert peak_bytes(lower(graph, plan, uncalibrated).stages, plan)[0] == pytest.approx(run.peak_bytes, rel=0.01)


SCALED = ("single", "micro-batches", "ddp mb", "zero1", "fsdp", "fsdp mb", "tp", "gpipe", "1f1b", "fsdp x tp",
          "pp x zero1", "pp x fsdp x tp", "fsdp offload", "recompute tp")  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_loss_scaling_of_fp16_lowers_as_it_runs(kind, fp16, uncalibrated):
    """The scaled loss, one pass over all gradients that a rank holds, and messages where ranks hold different ones."""
    workload, graph = fp16
    plan = plan_on(workload, graph, kind, "fp16")
    peaks = peak_bytes(lower(graph, plan, uncalibrated).stages, plan)
    for rank in sorted({0, plan.world_size - 1}):
        run = dry_run(plan, workload, rank)
        assert any("non_finite_check_and_unscale" in op.name for op in run.ops)
        mismatch = compare(graph, plan, rank, run.records)
        assert not mismatch, mismatch
        assert peaks[rank] == pytest.approx(run.peak_bytes, rel=0.01)


@pytest.fixture(scope="module")
def fp16():
    workload, _ = model(GPT)
    return workload, trace_workload(workload, precision="fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_that_are_added_apart_lower_as_they_run(precision, uncalibrated):
    """Linears on rows that do not lie side by side: copy, product, and a sum with the bias, a part of it by rank."""
    workload = across()
    graph = trace_workload(workload, precision=precision)
    assert not any(op.name == "aten.addmm.default" for op in graph.ops)
    for kind in ("single", "tp", "ddp x tp", "fsdp x tp", "zero2 x tp", "pp x tp", "recompute tp", "keep both tp"):
        plan = plan_on(workload, graph, kind, precision)
        run = dry_run(plan, workload, plan.world_size - 1)
        mismatch = compare(graph, plan, plan.world_size - 1, run.records)
        assert not mismatch, f"{kind}: {mismatch}"
        if not plan.recompute:  # memory of recomputed blocks is 2 to 17 % too high here, tensor-parallel or not
            peaks = peak_bytes(lower(graph, plan, uncalibrated).stages, plan)
            assert peaks[-1] == pytest.approx(run.peak_bytes, rel=0.01)


def test_an_output_that_changes_in_place_cannot_be_kept(uncalibrated):
    workload, graph = model(ALEXNET)
    with pytest.raises(ValueError, match="changes in place"):
        lower(graph, ParallelPlan(8, recompute=workload.blocks, recompute_keeps=("products",)), uncalibrated)


def test_a_wrong_lowering_is_noticed():
    workload, graph = model(GPT)
    plan = plan_of(GPT, "ddp")
    records = dry_run(plan, workload, 0).records
    other = ParallelPlan(8, dp=2, bucket_bytes=2**16)
    mismatch = compare(graph, other, 0, records)
    assert mismatch.messages and not mismatch.only_lowered
    assert compare(graph, plan, 0, records[:-1]).only_lowered


class Tables(torch.nn.Module):
    """Embeddings that are units of their own: what they read needs no gradient."""

    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.EmbeddingBag(500, 16) for _ in range(4))
        self.head = torch.nn.Linear(64, 8)

    def forward(self, ids):
        return self.head(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))


@pytest.mark.parametrize("kind", ["fsdp", "zero2"])
def test_units_that_read_no_gradients_stay_whole_until_the_end(kind, uncalibrated):
    batch = lambda n: ((torch.ones(n, 4, 3, dtype=torch.long),), ())  # noqa: E731
    workload = Workload("tables", Tables, batch, mean_square, adamw, 8)
    units = tuple(f"tables.{i}" for i in range(4))
    plan = ParallelPlan(8, dp=2, data_parallel=kind, fsdp_units=units)
    graph = trace_workload(workload)
    run = dry_run(plan, workload, 0)
    assert not compare(graph, plan, 0, run.records)
    assert peak_bytes(lower(graph, plan, uncalibrated).stages, plan)[0] == pytest.approx(run.peak_bytes, rel=0.001)


class Adapted(torch.nn.Module):
    """A frozen Linear with a trained one of low rank beside it."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(64, 64).requires_grad_(False)
        self.down, self.up = torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return torch.relu(self.base(x) + self.up(self.down(x)))


@pytest.fixture(scope="module")
def adapted():
    def build():
        return torch.nn.Sequential(*(Adapted() for _ in range(4)))

    workload = Workload("adapted", build, lambda n: ((torch.ones(n, 64),), ()), mean_square, adamw, 8, tuple("0123"))
    return workload, trace_workload(workload)


@pytest.mark.parametrize("kind", ["single", "ddp", "ddp mb", "zero1", "fsdp", "fsdp mb", "zero2", "pp x ddp"])
def test_frozen_parameters_are_not_reduced(kind, adapted, uncalibrated):
    workload, graph = adapted
    plan = plan_on(workload, graph, kind)
    run = dry_run(plan, workload, 0)
    mismatch = compare(graph, plan, 0, run.records)
    assert not mismatch, mismatch
    assert peak_bytes(lower(graph, plan, uncalibrated).stages, plan)[0] == pytest.approx(run.peak_bytes, rel=0.01)


def test_bounds_hold_for_frozen_parameters(adapted):
    workload, graph = adapted
    result = search(workload, graph, load_cluster("dgx-h100"), 32, devices=4)
    assert all(r.bound_seconds <= r.prediction.step_seconds for r in result.plans)
    costs = step_costs(graph, load_cluster("dgx-h100"))
    stages = stage_costs(costs, ParallelPlan(32, dp=4))
    assert stages.params[0] == 4 * (64 * 64 + 64 + 2 * 64 * 4) * 4 and stages.trained[0] == 4 * 2 * 64 * 4 * 4
    assert stages.tensors[0] == 8


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_selective_recomputation_equals_the_dry_run(micro_batches, uncalibrated):
    """Megatron's: paths of the modules between the projections of attention. When torch lets go of what a checkpoint
    read is known to a part of a block only: the peak is up to 3 % off."""
    workload = cored()
    graph = trace_workload(workload)
    plan = ParallelPlan(8, dp=2, micro_batches=micro_batches, recompute=CORES)
    run = dry_run(plan, workload, 0)
    mismatch = compare(graph, plan, 0, run.records)
    assert not mismatch, mismatch
    peaks, kept = (peak_bytes(lower(graph, p, uncalibrated).stages, p) for p in (plan, replace(plan, recompute=())))
    assert peaks[0] == pytest.approx(run.peak_bytes, rel=0.03) and peaks[0] < kept[0]
