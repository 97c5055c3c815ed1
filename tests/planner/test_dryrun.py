"""The dry run's messages against collectives worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opgraph.workload import Workload
from planner.dryrun import dry_run
from planner.plan import ParallelPlan
from tests.planner.models import BLOCKS, SHARDINGS, gpt, mlp

BLOCK = 12 * 32 * 32 + 13 * 32  # parameters of a block of width 32: matrices, then biases and norms


def messages(run, kind: str | None = None):
    return [(c.kind, c.bytes, c.ranks, c.phase) for c in run.collectives if kind in (None, c.kind)]


def test_ddp_one_bucket_holds_all_gradients():
    run = dry_run(ParallelPlan(global_batch=8, dp=2), mlp(), 1)
    parameters = 16 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 8 + 8
    assert messages(run) == [("all_reduce", 4 * parameters, (0, 1), "backward")]


def squares() -> Workload:
    """Six layers of 1 MiB of weight and 2 KiB of bias."""
    layers = lambda: torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))  # noqa: E731
    return replace(mlp(), build=layers, batch=lambda n: ((torch.randn(n, 512),), (torch.randn(n, 512),)))


LAYER = 4 * (512 * 512 + 512)


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [(25 * 2**20, [LAYER, 5 * LAYER]), (2**21, 3 * [2 * LAYER]), (2**19, 6 * [LAYER]), (2**25, [6 * LAYER])],
)
def test_ddp_bucket_closes_once_it_holds_its_size(bucket_bytes, expected):
    """In the order of gradients. Only torch's default size (25 MiB) has a first bucket of its own size (1 MiB)."""
    run = dry_run(ParallelPlan(global_batch=8, dp=2, bucket_bytes=bucket_bytes), squares(), 0)
    assert [c.bytes for c in run.collectives] == expected


def test_zero1_broadcasts_every_parameter_once():
    run = dry_run(ParallelPlan(global_batch=8, dp=2, data_parallel="zero1"), mlp(), 0)
    sent = [c for c in run.collectives if c.kind == "broadcast"]
    assert {c.ranks for c in sent} == {(0, 1), (1, 0)} and {c.phase for c in sent} == {"optimizer"}
    assert sum(c.bytes for c in sent) == 4 * (16 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 8 + 8)


def test_fsdp_gathers_padded_shards():
    """Each unit gathers for forward and backward; the root is kept after forward. 3 ranks pad 32 rows to 33."""
    run = dry_run(ParallelPlan(global_batch=9, dp=3, data_parallel="fsdp", fsdp_units=BLOCKS), gpt(), 0)

    def padded(rows: int, columns: int = 1) -> int:
        return -(-rows // 3) * 3 * columns

    block = 4 * (4 * (padded(32, 32) + padded(32)) + padded(128, 32) + padded(128) + padded(32, 128) + padded(32))
    block += 4 * 4 * padded(32)
    root = 4 * (padded(64, 32) + padded(16, 32) + 2 * padded(32))
    gathered = [b for kind, b, *_ in messages(run) if kind == "all_gather"]
    scattered = [b for kind, b, *_ in messages(run) if kind == "reduce_scatter"]
    assert gathered == [root] + 4 * [block] + 4 * [block]
    assert scattered == 4 * [block] + [root]


def test_tensor_parallel_all_reduces():
    run = dry_run(ParallelPlan(global_batch=8, tp=2, shardings=SHARDINGS), gpt(), 0)
    activation = 4 * 8 * 16 * 32
    forward = [c for c in run.collectives if c.phase == "forward"]
    backward = [c for c in run.collectives if c.phase == "backward"]
    assert len(forward) == 2 * 4 and len(backward) == (3 + 1) * 4  # q, k, v and up each reduce their input's gradient
    assert {(c.kind, c.bytes, c.ranks) for c in run.collectives} == {("all_reduce", activation, (0, 1))}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipeline_sends_one_activation_per_micro_batch(schedule):
    plan = ParallelPlan(global_batch=8, pp=2, cuts=("blocks.2",), micro_batches=4, schedule=schedule)
    first, last = (dry_run(plan, gpt(), rank) for rank in (0, 1))
    activation, embedding = 4 * 2 * 16 * 32, 4 * 64 * 32
    assert messages(first, "send") == 4 * [("send", activation, (0, 1), "forward")]
    assert messages(first, "recv") == 4 * [("recv", activation, (1, 0), "backward")]
    assert messages(last, "recv") == 4 * [("recv", activation, (0, 1), "forward")]
    assert messages(last, "send") == 4 * [("send", activation, (1, 0), "backward")]
    tied = ("all_reduce", embedding, (0, 1), "backward")
    assert messages(first)[-1] == tied and messages(last)[-1] == tied


def test_mesh_groups_are_row_major_with_tp_innermost():
    plan = ParallelPlan(
        global_batch=8, pp=2, dp=2, tp=2, cuts=("blocks.2",), shardings=SHARDINGS, micro_batches=2, schedule="gpipe"
    )
    run = dry_run(plan, gpt(), 5)
    groups = {(c.kind, c.ranks) for c in run.collectives}
    assert groups == {
        ("all_reduce", (4, 5)), ("all_reduce", (5, 7)), ("recv", (1, 5)), ("send", (5, 1)), ("all_reduce", (1, 5))
    }  # fmt: skip


def test_peak_memory_of_one_device():
    """Between steps: parameters and two moments (and a step count each); the peak is above it."""
    run = dry_run(ParallelPlan(global_batch=8), mlp(), 0)
    parameters = 4 * (16 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 8 + 8)
    batch = 4 * 8 * (16 + 8)
    assert run.resting_bytes == 3 * parameters + 8 * 4 + batch
    assert run.peak_bytes > run.resting_bytes + parameters


def test_recompute_has_its_own_phase():
    run = dry_run(ParallelPlan(global_batch=8, recompute=BLOCKS), gpt(), 0)
    assert {op.phase for op in run.ops} == {"forward", "backward", "recompute", "optimizer"}
    again = [op for op in run.ops if op.phase == "recompute" and op.name == "aten.addmm.default"]
    assert len(again) == 4 * 6 and {op.module.split(".")[0] for op in again} == {"blocks"}


def test_nothing_is_allocated_for_a_large_model():
    """32 GiB of weights: real allocation would fail or take long."""

    def build():
        return torch.nn.Sequential(*(torch.nn.Linear(2**16, 2**15) if i % 2 == 0 else torch.nn.Linear(2**15, 2**16)
                                     for i in range(4)))  # fmt: skip

    def loss(y, target):
        return (y - target).square().mean()

    big = Workload("big", build, lambda n: ((torch.randn(n, 2**16),), (torch.randn(n, 2**16),)), loss,
                   gpt().optimizer, 4, ("0", "2"))  # fmt: skip
    for kind in ("ddp", "zero1", "fsdp"):
        run = dry_run(ParallelPlan(global_batch=4, dp=2, data_parallel=kind, fsdp_units=("0", "2")), big, 0)
        assert run.peak_bytes > 2**35


def test_existing_process_group_is_refused(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="process of its own"):
            dry_run(ParallelPlan(global_batch=8), mlp(), 0)
    finally:
        dist.destroy_process_group()


def test_rank_outside_the_world():
    with pytest.raises(ValueError, match="rank 2"):
        dry_run(ParallelPlan(global_batch=8, dp=2), mlp(), 2)
