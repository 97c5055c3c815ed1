"""Reports: their keys, their page, their picture, and that they replace an older one whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from planner.plan import ParallelPlan
from validation.compare import Comparison
from validation.report import COLUMNS, MARKER, environment, write_report
from validation.report_files import assembled, check_replaceable, check_writable, plain, replacing
from validation.study import SearchNote, Study

PLANS = {
    "ddp": ParallelPlan(global_batch=8, dp=2),
    "fsdp": ParallelPlan(global_batch=8, dp=2, data_parallel="fsdp"),
    "pipe": ParallelPlan(global_batch=8, pp=2, cuts=("h.1",), micro_batches=4),
}


def study(model: str = "gpt2:layers=2") -> Study:
    runs = (
        Comparison(model, PLANS["ddp"], "ok", "", 0.10, (0.09, 0.12), 0.11, (2**20, 2**20), (2**20, 2**20), 0.1, 0.12),
        Comparison(model, PLANS["fsdp"], "ok", "", 0.20, (0.18, 0.22), 0.25, (2**21, 2**20), (2**21, 2**20), 0.2, 0.3),
        Comparison(model, PLANS["pipe"], "failed", "rank 1 died", 0.2, (0.1, 0.3), math.nan, (7, 7), ()),
    )
    note = SearchNote(2, 40, 3, 37, 0.5, (("tp2", "no Linear", 4),))
    anchors = (1.05, 1.1, 1.4, 1.5)
    return Study(model, "local", "CPU", 8, runs, (note,), anchors, "2026-01-01", "2026-01-02", 9.0, ("a note",))


def test_report_holds_every_file_and_key(tmp_path: Path):
    target = tmp_path / "reports" / "x"
    with assembled(target, MARKER) as folder:
        returned = write_report(folder, [study()], environment("parplan validate gpt2"), "Title")
    data = json.loads((target / "results.json").read_text())
    assert data == json.loads(json.dumps(returned))
    assert set(data["summary"]) >= {"median_error", "worst_error", "spearman", "top1_regret", "bias", "coverage"}
    keys = {"plan", "predicted_seconds", "measured_seconds", "error", "predicted_peak_bytes", "measured_peak_bytes"}
    assert all(set(run) >= keys for run in data["runs"])
    assert data["runs"][0]["plan"] == json.loads(json.dumps(PLANS["ddp"].to_dict()))
    assert data["runs"][0]["error"] == pytest.approx(0.10 / 0.11 - 1)
    assert data["runs"][2]["measured_seconds"] is None and data["runs"][2]["reason"] == "rank 1 died"
    assert set(data["environment"]) >= {"command", "commit", "machine", "versions", "load"}
    rows = list(csv.DictReader((target / "results.csv").open()))
    assert len(rows) == 3 and tuple(rows[0]) == COLUMNS and rows[0]["interval_low"] == "0.09"
    assert (target / "predicted_vs_measured.png").read_bytes().startswith(b"\x89PNG")
    page = (target / "report.md").read_text()
    for part in ("rank 1 died", "a note", "1.050", "no Linear", "parplan validate gpt2", "| dp2 ddp | 2 | – | 100.0 |"):
        assert part in page
    assert "changed by a factor of 1.38" in page
    assert target.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in target.parent.iterdir()] == ["x"]


def test_two_models_and_no_success_still_make_a_report(tmp_path: Path):
    write_report(tmp_path, [study(), study("alexnet")], environment("c"), "Two")
    assert set(json.loads((tmp_path / MARKER).read_text())["summary"]["by_model"]) == {"gpt2:layers=2", "alexnet"}
    bad = study()
    bad = Study(*(getattr(bad, f) if f != "comparisons" else bad.failures for f in Study.__slots__))
    write_report(tmp_path, [bad], environment("c"), "None")
    assert json.loads((tmp_path / MARKER).read_text())["summary"]["median_error"] is None


def test_a_failed_report_leaves_the_old_one(tmp_path: Path):
    target = tmp_path / "x"
    for text in ("old", "new"):
        with assembled(target, MARKER) as folder:
            (folder / MARKER).write_text(text)
    assert (target / MARKER).read_text() == "new"
    with pytest.raises(KeyboardInterrupt), assembled(target, MARKER) as folder:
        (folder / MARKER).write_text("half")
        raise KeyboardInterrupt
    assert (target / MARKER).read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in (("mine", "holds other files"), ("file", "is a file")):
        with pytest.raises(ValueError, match=words), assembled(tmp_path / name, MARKER):
            pass
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_where_nobody_may_write_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_writable(tmp_path / "file" / "plans")

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"nothing can be written into .* \(Permission denied\); give another"):
        check_replaceable(tmp_path / "new" / "plans", MARKER)


def test_files_appear_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "a.json"
    with pytest.raises(OSError, match="full"), replacing(target) as path:
        path.write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with replacing(target) as path:
        path.write_text("whole")
    assert target.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="no folder"), replacing(tmp_path / "none" / "a.json"):
        pass


def test_json_is_strict():
    assert plain({1: (math.nan, math.inf, 2, "a", None, True)}) == {"1": [None, None, 2, "a", None, True]}
