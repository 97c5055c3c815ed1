"""The GPU suite end to end on a CPU, and its pieces: shapes, resuming, time that ends, failures, comparison."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.host_thread import eager_costs
from validation import gpu_environment, gpu_models, gpu_steps, gpu_suite
from validation.gpu_calibrate import measured_row
from validation.gpu_compare import SETS, joined, spearman, summary
from validation.gpu_files import Budget, Rows, read_json
from validation.gpu_models import MODELS, PIECE_SECONDS, Run, Variant, pieces, runs
from validation.gpu_predict import devices_of, predict_runs
from validation.gpu_shapes import COUNTS, REGIONS, Case, cases, gemm_cases, held_back
from validation.gpu_time import CpuEngine

QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole quick run."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    assert gpu_suite.main(["--out", str(out), *QUICK]) == gpu_suite.DONE
    return out


def quiet(_: str) -> None:
    pass


# -- the whole road -------------------------------------------------------------------------------------------


def test_a_quick_run_writes_every_file_and_every_row(done: Path) -> None:
    files = {p.name for p in done.iterdir()}
    assert files == {
        "environment.json", "ops.json", "host.json", "copies.json", "device.toml", "device.kernels.toml", "fit.json",
        "predictions.json", "steps.json", "report.md", "compare.csv", "compare.png",
    }  # fmt: skip
    wanted = {r.key for r in runs(quick=True)}
    predictions, steps = Rows(done / "predictions.json").rows, Rows(done / "steps.json").rows
    assert set(predictions) == set(steps) == wanted
    assert {s["status"] for s in steps.values()} == {"ok"}
    assert {r["key"] for r in read_json(done / "ops.json")["rows"]} == {c.key for c in cases(quick=True)}
    assert not [r for r in read_json(done / "ops.json")["rows"] if "reason" in r]


def test_every_prediction_is_older_than_its_step_and_rests_on_no_step(done: Path) -> None:
    steps = Rows(done / "steps.json").rows
    for key, row in Rows(done / "predictions.json").rows.items():
        assert set(row["predictions"]) == {"catalogue", "calibrated"}
        assert all(said["at"] < steps[key]["at"] for said in row["predictions"].values())
        assert "reason" not in row
        for said in row["predictions"].values():
            assert said["seconds"] * (1 + 1e-9) >= max(said["device_seconds"], said["host_seconds"]) > 0


def test_all_variants_of_a_model_compute_the_same_loss(done: Path) -> None:
    by_step: dict[tuple[str, int], list[float]] = {}
    for row in Rows(done / "steps.json").rows.values():
        by_step.setdefault((row["model"], row["batch"]), []).append(row["first_loss"])
        assert row["last_loss"] < row["first_loss"]  # the optimizer ran
    assert all(max(losses) == pytest.approx(min(losses), rel=0.02) for losses in by_step.values())


def test_the_report_shows_all_rows_and_the_device_file_loads(done: Path) -> None:
    from costmodels.device import load_device

    with (done / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * len(runs(quick=True))
    text = (done / "report.md").read_text()
    assert f"{len(table)} of {len(table)} predictions were written before their step was measured." in text
    assert all(f"`{r.model.spec}` | {r.variant.label} | {r.batch}" in text for r in runs(quick=True))
    device = load_device(done / "device.toml")
    assert device.host["launch_op"] > 0 and set(device.kernels) == {"gemm", "attention", "conv", "rowwise"}
    assert device.kernels["gemm"]["float32"]["held_out"] > 20


def test_a_second_call_measures_nothing_again(done: Path) -> None:
    names = ("ops.json", "predictions.json", "steps.json", "host.json")
    before = {name: (done / name).read_bytes() for name in names}
    assert gpu_suite.main(["--out", str(done), *QUICK, "--pieces", "calibrate,predict,steps-1"]) == gpu_suite.DONE
    assert {name: (done / name).read_bytes() for name in names} == before


def test_another_machines_constants_predict_too(done: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(done, ours, ignore=shutil.ignore_patterns("steps.json", "predictions.json"))
    (ours / "host.json").write_text(json.dumps({"op": 1.0, "backward": 1.0, "view": 1.0, "module": 1.0}))
    devices = devices_of(ours, done)
    assert devices["lent"].kernels == devices["calibrated"].kernels
    assert eager_costs(devices["lent"]).op == pytest.approx(read_json(done / "host.json")["op"], rel=1e-4)
    assert eager_costs(devices["catalogue"]).op == 14e-6  # planner.software's assumption
    assert devices["catalogue"].kernels == {}
    run = Run(gpu_models.QUICK_MODELS[1], Variant("fp32"))
    assert predict_runs(ours, [run], done, Budget(100.0), True, quiet) == []
    row = Rows(ours / "predictions.json").rows[run.key]
    assert set(row["predictions"]) == set(SETS)
    lent, own = (row["predictions"][name]["device_seconds"] for name in ("lent", "calibrated"))
    assert lent == pytest.approx(own, rel=1e-3)  # the same machine; its file holds six digits


# -- time, failures, stops ------------------------------------------------------------------------------------


def test_out_of_time_keeps_what_there_is_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--out", str(tmp_path), *QUICK, "--pieces", "environment,calibrate,fit"]
    assert gpu_suite.main([*wanted, "--budget", "0.001"]) == gpu_suite.LEFT
    assert f"out of time in calibrate: {len(cases(quick=True))} ops; also left: fit" in capsys.readouterr().err
    assert (tmp_path / "host.json").is_file() and not (tmp_path / "device.toml").exists()


@pytest.mark.parametrize("piece", ["fit", "compare"])
def test_a_piece_that_is_done_whole_is_not_begun_without_time(
    piece: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when calibrate ends near the end of a call."""
    from validation import gpu_files

    ours = tmp_path / "ours"
    made = ("device.toml", "fit.json", "compare.csv", "report.md")
    shutil.copytree(done, ours, ignore=shutil.ignore_patterns(*made))
    if piece == "compare":
        shutil.copy(done / "fit.json", ours)
    words = ["--out", str(ours), "--device", "cpu", "--pieces", piece]
    with monkeypatch.context() as late:  # all but 20 of 540 s are over
        late.setattr(gpu_files.Budget, "left", property(lambda self: 20.0))
        assert gpu_suite.main(words) == gpu_suite.LEFT
    said = capsys.readouterr().err
    assert f"out of time in {piece}" in said and "go on with the same command" in said
    written = {"fit": "fit.json", "compare": "report.md"}[piece]
    assert not (ours / written).exists()
    assert gpu_suite.main([*words, "--budget", "25"]) == gpu_suite.DONE  # begun first, it is always done
    assert (ours / written).exists()


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    from validation.gpu_calibrate import sweep

    some = cases(quick=True)[:6]
    clock = iter([0.0, *(float(i) for i in range(1, 100))])
    left = sweep(tmp_path, "cpu", Budget(5.0, lambda: next(clock)), True, quiet, some)
    kept = Rows(tmp_path / "ops.json").rows
    assert 0 < left < 6 and len(kept) == 6 - left
    assert sweep(tmp_path, "cpu", Budget(100.0), True, quiet, some) == 0
    again = Rows(tmp_path / "ops.json").rows
    assert len(again) == 6 and all(again[key] == kept[key] for key in kept)


def steps_folder(done: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "steps"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("steps.json"))
    return folder


def raising(error: BaseException) -> Any:
    def measured(*_: Any) -> None:
        raise error

    return measured


def test_a_failing_step_is_a_row_with_its_reason(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, chosen = steps_folder(done, tmp_path), runs(quick=True)[:2]
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("the compiler\nfailed")])
    monkeypatch.setattr(gpu_steps, "measured", lambda *_: (_ for _ in ()).throw(next(errors)))
    assert gpu_steps.run_steps(folder, chosen, "cpu", Budget(100.0), True, quiet) == []
    rows = Rows(folder / "steps.json").rows
    found = [(rows[r.key]["status"], rows[r.key]["reason"]) for r in chosen]
    assert found == [("failed", "out of memory"), ("failed", "RuntimeError: the compiler failed")]
    assert gpu_steps.run_steps(folder, chosen, "cpu", Budget(100.0), True, quiet) == []  # and is not tried again


def test_a_lost_device_ends_the_piece(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, chosen = steps_folder(done, tmp_path), runs(quick=True)[:2]
    monkeypatch.setattr(gpu_steps, "measured", raising(RuntimeError("CUDA error: an illegal memory access was met")))
    with pytest.raises(ValueError, match="the device is lost to this process, call the piece again"):
        gpu_steps.run_steps(folder, chosen, "cpu", Budget(100.0), True, quiet)
    assert list(Rows(folder / "steps.json").rows) == [chosen[0].key]


def test_a_step_in_which_the_process_died_is_not_begun_again(done: Path, tmp_path: Path) -> None:
    folder, run = steps_folder(done, tmp_path), runs(quick=True)[0]
    Rows(folder / "steps.json").add({**run.head, "status": "running", "at": "2026"})
    assert gpu_steps.run_steps(folder, [run], "cpu", Budget(100.0), True, quiet) == []
    row = Rows(folder / "steps.json").rows[run.key]
    assert (row["status"], row["reason"]) == ("failed", "the process ended while this step was run")


def test_ctrl_c_leaves_the_step_for_the_next_call(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = steps_folder(done, tmp_path)
    monkeypatch.setattr(gpu_steps, "measured", raising(KeyboardInterrupt()))
    assert gpu_suite.main(["--out", str(folder), *QUICK, "--pieces", "steps-1"]) == gpu_suite.STOPPED
    assert Rows(folder / "steps.json").rows == {}


def test_a_step_that_the_time_of_the_call_ends_in_is_left(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = steps_folder(done, tmp_path), runs(quick=True)[:2]
    monkeypatch.setattr(gpu_steps, "measured", raising(gpu_steps.TimeUp()))
    left = gpu_steps.run_steps(folder, chosen, "cpu", Budget(50.0), True, quiet)
    assert left == [r.key for r in chosen] and Rows(folder / "steps.json").rows == {}
    gpu_steps.run_steps(folder, chosen[:1], "cpu", Budget(1e6), True, quiet)
    assert Rows(folder / "steps.json").rows[chosen[0].key]["reason"] == "took longer than 240 s"


def test_the_limit_of_a_row_interrupts_it_and_is_gone_afterwards() -> None:
    import signal
    import time

    with pytest.raises(gpu_steps.TimeUp), gpu_steps.time_limit(0.05):
        while True:
            time.sleep(0.01)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_no_step_without_a_prediction_and_no_prediction_after_its_step(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no prediction yet"):
        gpu_steps.run_steps(tmp_path, runs(quick=True), "cpu", Budget(100.0), True, quiet)
    late = tmp_path / "late"
    shutil.copytree(done, late, ignore=shutil.ignore_patterns("predictions.json"))
    with pytest.raises(ValueError, match="was measured before it was predicted"):
        predict_runs(late, runs(quick=True), None, Budget(100.0), True, quiet)


def test_an_op_that_is_not_there_is_a_row_with_the_reason() -> None:
    case = Case("attention", "cudnn", "float32", (1, 2, 2, 8, 8, 0, 0))
    row = measured_row(case, "cpu", 2**20, CpuEngine(), 1e-4, 1)
    assert row["reason"] and "seconds" not in row


# -- shapes and pieces ----------------------------------------------------------------------------------------


def test_shapes_are_the_same_in_every_run() -> None:
    keys = "\n".join(c.key for c in cases())
    assert keys == "\n".join(c.key for c in cases())
    assert hashlib.sha256("\n".join(sorted(keys.split("\n"))).encode()).hexdigest()[:16] == "b1d3b37d67ac3d1a"


def test_half_of_the_shapes_is_held_back_in_every_part_of_the_sweep() -> None:
    found = cases()
    assert len({c.key for c in found}) == len(found)
    for part in (found[:600], found[-600:]):
        assert 0.4 < sum(map(held_back, part)) / len(part) < 0.6
        assert {c.group for c in part} == {"gemm", "attention", "conv", "rowwise"}
    both = {c.dims[:5]: set[bool]() for c in found if c.group == "attention"}
    for c in found:
        if c.group == "attention":
            both[c.dims[:5]].add(held_back(c))
    assert all(len(sides) == 1 for sides in both.values())  # forward and backward of a shape on one side


def test_products_cover_the_four_regions_in_every_dtype() -> None:
    found = list(gemm_cases(quick=False))
    for section, count in COUNTS.items():
        mine = [c for c in found if c.section == section]
        for low, high in REGIONS:
            assert sum(low <= c.dims[1] < high for c in mine) >= count // 2, section
    assert all(d % 16 == 0 for c in found if c.dtype == "float8_e4m3fn" for d in c.dims[1:])


def test_pieces_hold_every_row_once_and_end_in_time() -> None:
    found = pieces()
    assert [r.key for rows in found.values() for r in rows] == [r.key for r in runs()]
    assert len({r.key for r in runs()}) == len(runs())
    assert all(sum(r.seconds for r in rows) <= PIECE_SECONDS for rows in found.values())
    assert list(found) == [f"steps-{i + 1}" for i in range(len(found))]


def test_ten_models_and_all_variants() -> None:
    variants = {r.variant for r in runs()}
    assert len(MODELS) >= 10
    assert {v.precision for v in variants} == {"fp32", "tf32", "bf16"}
    assert {v.compiled for v in variants} == {v.recompute for v in variants} == {v.large for v in variants}
    for model in MODELS:
        mine = [r for r in runs() if r.model == model]
        assert {r.batch for r in mine} == {model.small, model.large} and any(r.variant.compiled for r in mine)


# -- comparison -----------------------------------------------------------------------------------------------


def step(key: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"key": key, "model": key, "variant": "fp32", "batch": 1, "at": "2026-02", "status": "ok",
            "seconds": seconds, **more}  # fmt: skip


def test_the_arithmetic_of_the_comparison() -> None:
    def said(seconds: float, at: str = "2026-01") -> dict[str, Any]:
        return {"seconds": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "at": at}

    predictions = [
        {"key": "a", "predictions": {"catalogue": said(1.0), "lent": said(1.0, "2026-03")},
         "memory": {"allocated": 90, "reserved": 120}},
        {"key": "b", "predictions": {"catalogue": said(3.0)}, "memory": {}},
        {"key": "c", "predictions": {"catalogue": said(6.0)}},
        {"key": "d", "predictions": {"catalogue": {"at": "2026-01"}}, "reason": "not covered"},
    ]  # fmt: skip
    steps = [
        step("a", 2.0, allocated=100, reserved=100), step("b", 2.9), step("c", 4.0), step("d", 1.0),
        {**step("e", 1.0), "status": "failed", "reason": "out of memory"},
    ]  # fmt: skip
    rows = joined(predictions, steps)
    assert [(r.model, r.constants, r.before, r.inside) for r in rows] == [
        ("a", "catalogue", True, False), ("a", "lent", False, False), ("b", "catalogue", True, True),
        ("c", "catalogue", True, False),
    ]  # fmt: skip
    s = summary([r for r in rows if r.constants == "catalogue"])
    assert s["n"] == 3 and s["median"] == 0.5 and s["worst"] == 0.5
    assert s["mean"] == pytest.approx((0.5 + 0.1 / 2.9 + 0.5) / 3)
    assert s["bias"] == pytest.approx(0.1 / 2.9 / 3)
    assert s["inside"] == pytest.approx(1 / 3) and s["spearman"] == 1.0
    assert s["allocated"] == pytest.approx(0.1) and s["reserved"] == pytest.approx(0.2)


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1.0], [2.0]) != spearman([1.0], [2.0])  # nan: one pair has no order


# -- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pieces", "fits"], "there is no piece 'fits'; the pieces are environment, calibrate"),
        (["--budget", "0"], "the budget is 0 s; it must be more than 0"),
        (["--constants", "nowhere"], "nowhere holds no device.toml"),
        (["--pieces", "fit"], "environment.json is not there; run the piece"),
        (["--pieces", "compare"], "holds no step; run the pieces steps-1"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), *QUICK, *arguments]) == gpu_suite.WRONG
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and sentence in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_cuda_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--pieces", "environment"]) == gpu_suite.WRONG
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_folder_holds_one_machine(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = read_json(done / "environment.json")
    (tmp_path / "environment.json").write_text(json.dumps({**about, "name": "another"}))
    assert gpu_suite.main(["--out", str(tmp_path), *QUICK, "--pieces", "calibrate"]) == gpu_suite.WRONG
    assert "holds a run on another" in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_environment, "NEEDED", ("torch", "no_such_package"))
    assert gpu_suite.main(["--out", str(tmp_path)]) == gpu_suite.WRONG
    assert "has no no_such_package; install what is missing" in capsys.readouterr().err


def test_list_shows_the_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--list"]) == gpu_suite.DONE
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(pieces())
