"""Executed hooks send and keep what `costmodels.compression` counts; what they compute is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from costmodels.cluster import local_cluster
from costmodels.compression import Message, compression_from
from opgraph.batch import trace_workload
from opgraph.models import load_workload
from planner.plan import ParallelPlan
from validation.compression_hooks import hook_of, kept_bytes, recorded, silent
from validation.compression_runs import COMPRESSIONS, compared, execute

SPEC = "gpt2:layers=2,hidden=64,heads=4,seq=16,vocab=256,batch=4"


@pytest.mark.executed
def test_two_ranks_send_and_keep_what_was_predicted_to_the_byte(tmp_path):
    plan = ParallelPlan(global_batch=8, dp=2, bucket_bytes=2**17)
    replies = execute(SPEC, plan, COMPRESSIONS, timed=False)
    runs = compared(SPEC, trace_workload(load_workload(SPEC)), plan, local_cluster(tmp_path / "none.toml"), replies)
    assert [r.compression for r in runs] == list(COMPRESSIONS)
    assert [r.compression for r in runs if not r.exact] == []
    size = {r.compression: r.wire_bytes for r in runs}
    assert size["fp16"] == size["none"] / 2 and size["sign"] < size["int8"] < size["none"]
    losses = {r["compression"]: r["losses"] for r in replies[0]}
    for name in ("fp16", "bf16", "int8"):  # the first steps hardly differ from those without compression
        assert losses[name] == pytest.approx(losses["none"], rel=0.01)
    assert all(found[-1] < found[0] for found in losses.values())


@pytest.mark.executed
def test_timed_steps_come_with_a_prediction_at_their_pace(tmp_path):
    plan = ParallelPlan(global_batch=8, dp=2, bucket_bytes=2**17)
    cluster = local_cluster(tmp_path / "none.toml")
    cluster = replace(cluster, device=replace(cluster.device, host={"anchor_in_rank": 0.01}))
    replies = execute(SPEC, plan, ["fp16"], timed=True)
    (run,) = compared(SPEC, trace_workload(load_workload(SPEC)), plan, cluster, replies)
    assert run.pace == pytest.approx(sum(replies[0][0]["slowest"]) / 0.01)
    assert run.steps >= 20 and min(run.measured, run.predicted, run.codec_measured, run.codec_predicted) > 0


class _Bucket:
    """What a hook needs of a DDP bucket."""

    def __init__(self, gradient):
        self.gradient = gradient

    def buffer(self):
        return self.gradient

    def index(self):
        return 0


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with silent():
        yield


@pytest.mark.parametrize("n", [1, 7, 8, 4096, 5001])
@pytest.mark.parametrize("name", ["int8", "sign", "topk0.05"])
def test_codes_of_equal_ranks_decode_to_what_was_encoded(alone, name, n):
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(n))
    state, hook = hook_of(compression_from(name))
    sent = hook(state, _Bucket(gradient.clone())).wait()
    if name == "int8":
        assert (sent - gradient).abs().max() <= gradient.abs().max() / 127 and kept_bytes(state) == 0
        return
    assert torch.allclose(sent + state.errors[0], gradient, atol=1e-6) and kept_bytes(state) == 4 * n
    if name == "sign":
        mean = float(gradient.abs().mean())
        assert torch.equal(sent > 0, gradient >= 0) and float(sent.abs().max()) == pytest.approx(mean, rel=1e-5)
    else:
        chosen = sent.nonzero().view(-1)
        assert len(chosen) == max(-(-n // 20), 1) and torch.equal(sent[chosen], gradient[chosen])
        assert gradient[chosen].abs().min() >= state.errors[0].abs().max()


def test_what_was_not_sent_comes_with_the_next_gradient(alone):
    state, hook = hook_of(compression_from("topk0.5"))
    first = hook(state, _Bucket(torch.tensor([3.0, 1.0]))).wait()
    second = hook(state, _Bucket(torch.tensor([0.0, 1.0]))).wait()
    assert first.tolist() == [3.0, 0.0] and second.tolist() == [0.0, 2.0]


def test_a_record_counts_gathered_bytes_and_leaves_empty_messages_out(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(dist, "all_gather", lambda *_, **__: None)
    messages: list[Message] = []
    with recorded(messages):
        dist.all_reduce(torch.zeros(0))
        dist.all_reduce(torch.zeros(3))
        dist.all_gather([torch.zeros(5)] * 4, torch.zeros(5))
    assert messages == [Message("all_reduce", 12), Message("all_gather", 80)]


def test_a_compression_without_hook_is_refused():
    with pytest.raises(ValueError, match="no hook"):
        hook_of(compression_from("dgc"))
