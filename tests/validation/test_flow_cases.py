"""Published gloo collectives as flows."""

from __future__ import annotations

from pathlib import Path

import pytest

from validation.flow_cases import COLUMNS, main, predict, read_cases

# Two points of github BinhangYuan/tc_cluster_setting (results/broadcast.md, results/allreduce.md) and one of NCCL.
CASES = f"""{",".join(COLUMNS)}
b,gloo,8,5,2,broadcast,268435456,6567000
a,gloo,16,0,0,all_reduce,134217728,412000
n,nccl,16,1,5,broadcast,134217728,277000
"""


def test_points_of_two_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(CASES)
    cases = read_cases(path)
    assert [c.config for c in cases] == ["b", "a"] and all(abs(c.error) < 0.03 for c in cases)
    assert main(["--cases", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "| b | 5 | 2 | 256 | 6567 |" in (tmp_path / "out" / "flows.md").read_text()


def test_delays_and_rates_count() -> None:
    base = predict("broadcast", 8, 0.0, 1e8, 1e8)
    assert base == pytest.approx(6.0) and predict("broadcast", 8, 0.01, 1e8, 1e8) == pytest.approx(6.03)
    assert predict("all_reduce", 4, 0.0, 1e8, 2.0**27) == pytest.approx(1.5 * 2.0**27 / 1e8)


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.csv").write_text("config_id\n")
    assert main(["--cases", str(tmp_path / "bad.csv"), "--out", str(tmp_path)]) == 2
    assert "time_us" in capsys.readouterr().err
    assert main(["--cases", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2
