"""Calibration: the fit, the recorder against the tracer, and a tiny run from end to end. No times are asserted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from costmodels.cluster import local_cluster
from costmodels.collectives import collective_price
from costmodels.device import device_data, load_device
from costmodels.families import FREE, family
from costmodels.ops import OpShape, price, shape_of, signature
from validation.anchor import Beat, make_beat
from validation.calibrate import _steps, calibrate
from validation.calibrate_fit import fit, fit_ops
from validation.calibrate_host import HOST_KEYS, per_op_of
from validation.calibrate_models import SOURCES
from validation.calibrate_record import (
    Overhead,
    Run,
    Step,
    at_pace,
    overhead,
    prepare,
    samples,
    time_ops,
    time_parts,
    undisturbed,
)  # fmt: skip

SOURCE = {s.name: s for s in SOURCES}


def test_a_fit_finds_the_coefficients_in_spite_of_outliers() -> None:
    rng = np.random.default_rng(1)
    design = np.column_stack((np.ones(80), 10 ** rng.uniform(3, 7, 80)))
    truth = np.array([2e-5, 3e-10])
    seconds = design @ truth * rng.uniform(0.98, 1.02, 80)
    seconds[:8] *= 3
    assert fit(design, seconds) == pytest.approx(truth, rel=0.05)


def test_a_feature_that_repeats_another_gets_no_coefficient() -> None:
    """Of calls on one matrix each nobody can tell what a matrix costs: it must not be all that a call costs."""
    calls = np.column_stack((np.ones(20), np.linspace(1e4, 1e6, 20), np.ones(20)))
    found = fit(calls, calls @ np.array([1e-5, 1e-10, 0.0]))
    assert found == pytest.approx([1e-5, 1e-10, 0.0])
    assert (calls[:, 2] == 1).all()  # what is given is left alone


def test_only_undisturbed_runs_count() -> None:
    calm, busy = Run((1.0,), 1.0), Run((5.0,), 2.0)
    assert undisturbed([busy, calm, calm, busy]) == [calm, calm]
    assert undisturbed([busy, Run((4.0,), 1.5), Run((6.0,), 3.0)]) == [Run((4.0,), 1.5)]


def test_the_anchor_says_what_its_parts_take() -> None:
    """By a clock that ticks when it is read: six products, convolutions and activations, streams, and calls."""
    ticks = iter(range(1000))
    assert make_beat(lambda: float(next(ticks)))() == Beat(6.0, 6.0, 7.0, 1.0)


def test_runs_are_brought_to_one_pace() -> None:
    """Ops by the part of the anchor that is like them, whole steps by all of it; a step whose ops differed does not
    count."""
    product = OpShape("aten.mm.default", "forward", ((8, 8), (8, 8)), ((8, 8),), "float32", 1024, 512, 256)
    step = Step(SOURCES[0], (), [product, replace(product, name="aten.relu.default", phase="backward")])
    step.times = [Run((1.0, 1.0), 1.0), Run((), 1.0), Run((2.0, 4.0), 1.0)]
    step.plain = [Run((2.0, 2.0, 1.0), 1.0), Run((9.0, 9.0, 9.0), 1.0), None]
    first, later = Beat(0.25, 0.125, 0.5, 0.125), Beat(1.0, 1.0, 1.0, 1.0)
    step.paces = [first, first, later]
    at_pace(step, Beat(0.5, 0.5, 0.5, 0.5))
    assert [r.seconds for r in step.times] == [(2.0, 4.0), (1.0, 2.0)], "a small pass goes by calls"
    assert step.plain == [Run((4.0, 4.0, 2.0), 1.0), None]
    found = overhead(step)  # of the one round that ran whole steps: beyond the ops of that round
    assert found.parts == {"forward": (4.0, 1.0, 1), "backward": (4.0, 2.0, 1), "optimizer": (2.0, 0.0, 0)}


def test_passes_of_one_step_are_summed_by_phase() -> None:
    product = OpShape("aten.mm.default", "forward", ((8, 8), (8, 8)), ((8, 8),), "float32", 1024, 512, 256)
    back = replace(product, phase="backward")
    step = Step(SOURCES[0], (), [product, back, product, back], phases=("forward", "backward") * 2 + ("optimizer",))
    step.times, step.plain = [Run((1.0, 2.0, 1.0, 2.0), 1.0)], [Run((2.0, 3.0, 2.5, 3.5, 1.0), 1.0)]
    assert overhead(step).parts == {"forward": (4.5, 2.0, 2), "backward": (6.5, 4.0, 2), "optimizer": (1.0, 0.0, 0)}


def test_small_steps_say_nothing_of_the_error_of_others() -> None:
    def of(name: str, seconds: float) -> Overhead:
        parts = {phase: (seconds / 2, seconds / 4, 1) for phase in ("forward", "backward")}
        return Overhead(name, parts, 0, ())

    both = [of("small", 0.004), of("large", 0.02)]
    large, small = {"large": ((), 0.01)}, {"small": ((), 0.002)}
    assert _steps([{"overheads": both}, {"overheads": both}]) == (large, small)
    assert _steps([{"overheads": both[:1]}]) == (small, small), "where there is no other"


def test_python_beside_ops_is_told_apart_by_what_the_op_before_moved() -> None:
    """Steps of 1 us an op, and 40 more after an op that emptied the caches; one step was disturbed."""
    product = OpShape("aten.mm.default", "forward", ((8, 8), (8, 8)), ((8, 8),), "float32", 1024, 512, 256)
    full, empty = product, replace(product, swept=2**23)
    steps = []
    for i, cold in enumerate((0, 1, 2, 4, 8, 3)):
        shapes = (*[full] * (20 - cold), *[empty] * cold)
        beyond = 20 * 1e-6 + cold * 4e-5 + (5e-3 if i == 5 else 0.0)
        steps.append(Overhead(str(i), {"forward": (1e-3 + beyond, 1e-3, 20), "backward": (0.0, 0.0, 0)}, 0, shapes))
    assert per_op_of(steps, "forward") == pytest.approx((1e-6, 4e-5), rel=0.05)
    assert per_op_of(steps, "backward") == (0.0, 0.0)


@pytest.mark.parametrize("name", ["t64", "residual24", "digits", "routed96"])
def test_the_recorder_sees_what_the_tracer_sees(name: str) -> None:
    """Laws are fitted on the recorder's shapes and asked with the tracer's: both must count alike."""
    from opgraph.trace import trace

    torch.set_num_threads(1)
    step = prepare(SOURCE[name])
    module, inputs, targets, loss = SOURCE[name].make()
    graph = trace(module, inputs, targets, loss=loss)
    traced = [s for s in (shape_of(graph, op) for op in graph.ops) if family(s.name) not in FREE]
    here = [s for s in step.shapes if family(s.name) not in FREE]
    assert Counter(signature(s) for s in traced) == Counter(signature(s) for s in here)
    for counted in ("flops", "bytes_read", "bytes_written"):
        assert sum(getattr(s, counted) for s in traced) == sum(getattr(s, counted) for s in here), counted


@pytest.mark.parametrize("name", ["index_select", "relu", "sum", "native_layer_norm"])
def test_bytes_that_were_always_met_cold_are_not_free_where_they_are_warm(name: str) -> None:
    def moves(width: int, swept: int) -> OpShape:
        gathers, size = name == "index_select", 512 * width
        ins, outs = ((512, width), *[(512,)] * gathers), ((512,),) if name == "sum" else ((512, width),)
        read, written = 4 * size, 4 * (512 if name == "sum" else size)
        return OpShape(f"aten.{name}.default", "forward", ins, outs, "float32", 0, read, written, swept=swept,
                       since=2**24)  # fmt: skip

    cold = [(moves(width, 0), 2e-5 + 1e-10 * 4 * 512 * width) for width in range(100, 400, 10)]
    laws, *_ = fit_ops(cold)
    device = replace(load_device("h100-sxm"), kind="cpu", laws=laws, samples={}, cache={})
    for width in (105, 395):
        as_measured, warm = (price(device, moves(width, swept)).seconds for swept in (0, 2**22))
        assert as_measured == pytest.approx(2e-5 + 1e-10 * 4 * 512 * width, rel=0.05)
        assert as_measured / 1.5 < warm <= as_measured * 1.001


def test_laws_come_from_measured_steps() -> None:
    torch.set_num_threads(1)
    steps = [prepare(SOURCE[name]) for name in ("t64", "digits")]
    for step in steps:
        for _ in range(2):
            time_ops(step)
            time_parts(step)
    measured = [(s.shape, s.seconds) for s in samples(steps)]
    laws, neighbours, errors = fit_ops(measured)
    assert laws["mm/float32"].samples > 5 and "pointwise:float32" in laws
    assert all(c >= 0 for law in laws.values() for c in law.coefficients)
    assert "gemm/float32" in errors and 0 < laws["mm/float32"].error < 1
    assert len(neighbours.ratios) > 50 and min(neighbours.ratios.values()) > 0


@pytest.mark.executed
def test_a_tiny_calibration_makes_a_usable_device(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    path = tmp_path / "local.toml"
    result = calibrate(path, 5.0, lambda what, f: seen.append((what, f)), models=("t64", "digits"), worlds=(2,))
    device = load_device(path)
    assert device_data(device)["host"].keys() == result.device.host.keys() <= HOST_KEYS.keys()
    for key in ("op_forward", "op_backward", "dtensor_linear_forward", "fsdp_unit_backward", "ddp_param", "pp_action"):
        assert device.host[key] >= 0
    assert device.host["checkpoint_forward"] > 0 and device.host["checkpoint_backward"] > 0
    assert 0 < device.host["skew"] < 1
    assert device.calibrated and device.anchor_seconds > 0 and device.kind == "cpu"
    assert {t.kind for t in result.tables} == {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "send"}
    cluster = local_cluster(path)
    assert collective_price(cluster, "all_reduce", 1e5, (0, 1)).seconds > 0
    step = prepare(SOURCE["t64"])
    prices = [price(cluster.device, s) for s in step.shapes]
    assert all(p.source != "roofline" for p, s in zip(prices, step.shapes) if s.dtype == "float32")
    assert sum(p.seconds for p in prices) > 0
    assert seen[-1] == ("done", 1.0) and not list(tmp_path.glob(".*"))
    assert not [p for p in psutil.Process().children(recursive=True) if "calibrate_worker" in " ".join(p.cmdline())]


@pytest.mark.executed
def test_ranks_die_with_the_calibration(tmp_path: Path) -> None:
    run = f"calibrate(Path({str(tmp_path / 'x')!r}))"
    code = f"from pathlib import Path; from validation.calibrate import calibrate; {run}"
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        ranks: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not ranks and time.monotonic() < deadline:
            time.sleep(0.1)
            ranks = psutil.Process(parent.pid).children(recursive=True)
        assert ranks
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive
    finally:
        parent.kill()
        parent.wait()
    assert not (tmp_path / "x").exists()


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        calibrate(tmp_path / "x.toml", budget_seconds=0)
