"""The error of whole steps: each set scored with what the others ask for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planner.predict import NINE_IN_TEN, STEP_ERROR
from validation.fit_step_error import GRID, by_set, inside, least, main, read


def rows(errors: list[float], width: float = 0.0) -> np.ndarray:
    return np.array([(e, width, width) for e in errors])


def test_a_row_is_inside_by_both_errors_together() -> None:
    one = rows([0.1], 0.03)
    enough = np.sqrt((0.1 / NINE_IN_TEN) ** 2 - 0.03**2)
    assert inside(one, enough * 1.001) == 1.0 and inside(one, enough * 0.999) == 0.0
    assert inside(rows([-0.99]), 1.0) == 1.0  # a time cannot be less than nothing


def test_a_set_is_scored_with_what_the_others_ask_for() -> None:
    sets = {"calm": rows([0.01, -0.01] * 10), "wild": rows([0.2, -0.2] * 10)}
    calm, wild = by_set(sets)
    assert (calm["others"], calm["inside"]) == (least(sets, ["wild"]), 1.0)
    assert wild["others"] == pytest.approx(0.01 / NINE_IN_TEN, abs=0.005) and wild["inside"] == 0.0
    assert least({"far": rows([9.0])}, ["far"]) == pytest.approx(GRID[-1])
    with pytest.raises(ValueError, match="several sets"):
        by_set({"calm": sets["calm"]})


def test_the_present_number_is_taken_out_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side = NINE_IN_TEN * np.hypot(0.03, STEP_ERROR)
    lines = ["set,predicted_seconds,measured_seconds,low,high,scored"]
    lines += [f"{s},2.0,{2 + 0.02 * i},{2 * (1 - side)},{2 * (1 + side)},True" for s in "ab" for i in range(10)]
    lines += ["a,2.0,9.0,1.0,3.0,False", "a,2.0,,1.0,3.0,True"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cases.csv").write_text("\n".join(lines))
    found = read(tmp_path)
    assert found["a"].shape == found["b"].shape == (10, 3)
    assert found["a"][:, 1:] == pytest.approx(0.03)
    assert main([str(tmp_path), "--json"]) == 0
    assert [row["set"] for row in json.loads(capsys.readouterr().out)["sets"]] == ["a", "b"]
    assert main([str(tmp_path)]) == 0 and "mean of sets" in capsys.readouterr().out
    (tmp_path / "one" / "cases.csv").write_text("\n".join([lines[0], "a,2.0,2.1,1.9,2.1,True"]))
    assert main([str(tmp_path)]) == 2 and "with the present code first" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2 and "there is no cases.csv" in capsys.readouterr().err
