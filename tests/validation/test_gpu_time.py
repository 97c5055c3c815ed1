"""Timing of ops: the logic around CUDA's events on a stand-in, the CPU clock, batches and copies."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from validation.gpu_files import Budget, Rows, read_json, sentence, write_json
from validation.gpu_time import MOST_CALLS, MOST_COPIES, TRIES, CpuEngine, CudaEngine, calls_of, copies_of, sample

GHZ = 1e9


@dataclass
class Event:
    """A mark in a stream: the device's clock when everything before it is done."""

    cuda: Cuda
    at: float = 0.0

    def record(self) -> None:
        self.at = self.cuda.busy_until()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@dataclass
class Cuda:
    """As much of `torch.cuda` as the engine uses: one stream, whose kernels run one behind the other and never begin
    before the host has issued them. Seconds of the host are real (`time.perf_counter`), of the device made up."""

    free: float = 0.0
    sleeps: list[int] = field(default_factory=list)

    def Event(self, enable_timing: bool) -> Event:  # the name is torch's
        assert enable_timing
        return Event(self)

    def busy_until(self) -> float:
        return max(self.free, time.perf_counter())

    def run(self, seconds: float) -> None:
        self.free = self.busy_until() + seconds

    def _sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.run(cycles / GHZ)

    def synchronize(self) -> None:
        time.sleep(max(self.free - time.perf_counter(), 0.0))


def test_a_batch_behind_a_sleep_gives_the_kernels_seconds_alone() -> None:
    cuda = Cuda()
    seconds, host, hidden = CudaEngine(cuda, cycles=20_000_000).batch(lambda i: cuda.run(1e-4), 10, 0)
    assert hidden
    assert seconds == pytest.approx(1e-4, rel=1e-6)
    assert host > 0


def test_calls_are_numbered_from_the_first() -> None:
    cuda, seen = Cuda(), list[int]()
    CudaEngine(cuda, cycles=20_000_000).batch(seen.append, 3, 7)
    assert seen[:3] == [7, 8, 9]


def test_a_sleep_that_ends_too_early_is_made_longer_until_the_host_is_hidden() -> None:
    cuda = Cuda()

    def call(_: int) -> None:
        time.sleep(1e-3)
        cuda.run(1e-5)

    engine = CudaEngine(cuda, cycles=1_000_000)  # 1 ms, where the host needs 5
    seconds, host, hidden = engine.batch(call, 5, 0)
    assert hidden and seconds == pytest.approx(1e-5, rel=1e-6) and host >= 1e-3
    assert cuda.sleeps == sorted(cuda.sleeps) and len(cuda.sleeps) > 1
    assert engine.cycles == cuda.sleeps[-1]  # the next batch begins with what sufficed


def test_an_op_that_waits_for_the_device_is_marked_and_lengthens_no_later_sleep() -> None:
    cuda = Cuda()

    def call(_: int) -> None:
        cuda.run(1e-4)
        cuda.synchronize()

    engine = CudaEngine(cuda, cycles=100_000)
    assert engine.batch(call, 2, 0)[2] is False
    assert len(cuda.sleeps) == TRIES
    assert engine.cycles == CudaEngine(cuda).cycles


def test_the_sample_is_the_median_of_batches_with_their_spread() -> None:
    class Scripted:
        found = iter([0.9, 0.001, 0.001, 0.004, 0.002, 0.003])  # warm-up, rough, then four batches

        def batch(self, call: object, calls: int, first: int) -> tuple[float, float, bool]:
            self.calls = calls
            return next(self.found), 1e-6, True

    engine = Scripted()
    one = sample(engine, lambda i: None, batch_seconds=0.01, batches=4)
    assert one.seconds == 0.0025 and one.spread == pytest.approx(3e-3 / 2.5e-3)
    assert engine.calls == 10 and one.calls == 40 and one.host == 1e-6 and one.hidden


def test_the_cpu_engine_divides_its_clock_by_the_calls() -> None:
    ticks = iter([10.0, 12.0])
    assert CpuEngine(lambda: next(ticks)).batch(lambda i: None, 4, 0) == (0.5, 0.0, True)


def test_batches_and_copies_stay_within_their_limits() -> None:
    assert calls_of(1e-12, 1.0) == MOST_CALLS and calls_of(10.0, 0.01) == 2
    assert copies_of(1, 2**26) == MOST_COPIES
    assert copies_of(2**30, 2**26) == 1  # larger than the cache: it never stays
    assert copies_of(3 * 2**30, 2**33) == 1  # memory for one
    moved, cache = 7 * 2**20, 50 * 2**20
    assert copies_of(moved, cache) * moved > 2 * cache


def test_rows_come_back_after_a_stop(tmp_path) -> None:
    rows = Rows(tmp_path / "x.json", every=2)
    rows.add({"key": "a", "value": 1.0})
    assert not (tmp_path / "x.json").exists()
    rows.add({"key": "b", "value": float("nan")})
    again = Rows(tmp_path / "x.json")
    assert again.rows == {"a": {"key": "a", "value": 1.0}, "b": {"key": "b", "value": None}}
    again.add({"key": "a", "value": 2.0})
    assert [r["value"] for r in read_json(tmp_path / "x.json")["rows"]] == [2.0, None]


def test_the_budget_counts_down() -> None:
    clock = [100.0]
    budget = Budget(30.0, lambda: clock[0])
    assert budget.left == 30.0
    clock[0] = 112.5
    assert budget.left == 17.5


def test_broken_and_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not there; run the piece"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path / "bad.json")
    write_json(tmp_path / "good.json", {"a": (1, 2)})
    assert read_json(tmp_path / "good.json") == {"a": [1, 2]}
    assert sentence(RuntimeError("one\n two")) == "RuntimeError: one two" and sentence(KeyError()) == "KeyError"
