"""`parplan predict`: JSON keys, files, and sentences for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parplan.cli import main
from tests.validation.test_cases import ROW, write


def test_json_has_the_promised_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "cases.csv", [ROW, ROW | {"case_id": "b", "set": "other", "gpu": "Abacus 9000"}])
    assert main(["predict", "--cases", str(path), "--json", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    first, second = data["cases"]
    assert {"case_id", "predicted_seconds", "measured_seconds", "error", "interval"} <= set(first)
    assert second["reason"] and second["predicted_seconds"] is None
    assert {"n", "mape", "median", "worst", "bias", "spearman", "coverage"} <= set(data["summary"]["s"])
    assert "Abacus" in captured.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cases.csv", "cases.json", "report.md", "scatter.png"}


def test_the_example_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    """22B on eight A100, fully recomputed and with sequence parallelism; 1.42 and 1.10 s were measured."""
    runs = Path(__file__).parents[2] / "examples" / "runs.csv"
    assert main(["predict", "--cases", str(runs), "--json"]) == 0
    full, selective = (c["predicted_seconds"] for c in json.loads(capsys.readouterr().out)["cases"])
    assert full == pytest.approx(1.42, rel=0.1) and selective == pytest.approx(1.10, rel=0.1)


def test_one_set_and_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "cases.csv", [ROW, ROW | {"case_id": "b"}, ROW | {"case_id": "c", "set": "other"}])
    assert main(["predict", "--cases", str(path), "--set", "s", "--limit", "1", "--json"]) == 0
    assert [c["case_id"] for c in json.loads(capsys.readouterr().out)["cases"]] == ["a"]
    assert main(["predict", "--cases", str(path), "--set", "none"]) == 2
    assert "it has s, other" in capsys.readouterr().err


def test_a_file_that_is_none_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert main(["predict", "--cases", str(tmp_path / "bad.csv")]) == 2
    assert "lacks the column" in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text("")
    assert main(["predict", "--cases", str(tmp_path / "bad.csv")]) == 2
    assert "is empty" in capsys.readouterr().err


def test_a_recurrent_model_runs_as_kernels_on_gpus_and_step_by_step_on_cpus(parplan):
    model = f"{Path(__file__).parent / 'models.py'}:gru"
    gpu = parplan("simulate", model, "--cluster", "dgx-h100", "--plan", "single", "-b", 4, "--json").data
    cpu = parplan("simulate", model, "--cluster", "local", "--plan", "single", "-b", 4, "--json").data
    assert "aten._cudnn_rnn.default" in gpu["unpriced"] and gpu["step_seconds"] < 0.02
    assert not any("cudnn" in name for name in cpu["unpriced"])
    found = parplan("search", model, "--cluster", "dgx-h100", "-b", 4, "--devices", 2, "--json").data
    assert all("aten._cudnn_rnn.default" in p["unpriced"] for p in found["plans"])


@pytest.mark.parametrize("measured", ["abc", "0", "-4"])
def test_a_row_whose_measured_time_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: str
) -> None:
    path = write(tmp_path / "cases.csv", [ROW | {"step_time_s": measured}])
    assert main(["predict", "--cases", str(path)]) == 0
    assert f"1 rows are not scored: column step_time_s is '{measured}'" in capsys.readouterr().err


def test_a_file_of_which_nothing_can_be_predicted_ends_with_2(tmp_path: Path) -> None:
    path = write(tmp_path / "cases.csv", [ROW | {"gpu": "Abacus 9000"}])
    assert main(["predict", "--cases", str(path)]) == 2
