"""The exponent of power limits, on traces made with a known one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from costmodels.power import POWER
from validation.fit_power import LEAST_DRAW, SHARES, exponents, fit, main

HEADER = "dataset,network,batch_size,optimizer,power_limit,time_per_epoch,average_power\n"
TDP = 250.0
LIMITS = (250.0, 225.0, 200.0, 175.0, 150.0, 125.0, 100.0)


def trace(path: Path, exponent: float, draws: list[float], noise: float = 0.0, trials: int = 1) -> None:
    """Runs that draw so many W when free and whose time follows the law down to any limit."""
    rng = random.Random(7)
    lines = []
    for i, free in enumerate(draws):
        for limit in LIMITS:
            slower = max(free / limit, 1.0) ** exponent * rng.lognormvariate(0.0, noise)
            lines += [f"data,net,{i},sgd,{limit},{60 * slower},{min(free, limit)}\n"] * trials
    path.write_text(HEADER + "".join(lines))


@pytest.mark.parametrize("exponent", [0.25, 0.4, 1.0])
def test_a_known_exponent_is_found(tmp_path: Path, exponent: float) -> None:
    trace(tmp_path / "a.csv", exponent, [210.0, 225.0, 240.0], trials=2)
    mine, everything = fit(tmp_path)
    assert mine["gpu"] == "a" and everything["gpu"] == "all"
    for key in ("median", "p10", "p90"):
        assert mine[key] == pytest.approx(exponent) == everything[key]
    limits = [limit / free for free in (210.0, 225.0, 240.0) for limit in LIMITS]
    assert mine["runs"] == 3 and mine["pairs"] == sum(SHARES[0] <= share <= SHARES[1] for share in limits)


def test_noise_widens_the_spread_and_leaves_the_median(tmp_path: Path) -> None:
    trace(tmp_path / "a.csv", 0.4, [205.0 + i for i in range(40)], noise=0.02)
    mine = fit(tmp_path)[0]
    assert mine["median"] == pytest.approx(0.4, abs=0.03)
    assert mine["p10"] < 0.38 and mine["p90"] > 0.42


def test_each_gpu_and_all_together(tmp_path: Path) -> None:
    trace(tmp_path / "one.csv", 0.2, [240.0])
    trace(tmp_path / "two.csv", 0.6, [240.0] * 3)
    assert {r["gpu"]: r["median"] for r in fit(tmp_path)} == pytest.approx({"one": 0.2, "two": 0.6, "all": 0.6})


def test_runs_that_something_else_binds_do_not_count(tmp_path: Path) -> None:
    trace(tmp_path / "a.csv", 0.4, [LEAST_DRAW * TDP - 1])
    assert fit(tmp_path)[0] == {"gpu": "a", "runs": 1, "pairs": 0, "median": None, "p10": None, "p90": None}
    assert list(exponents([{TDP: (60.0, 240.0), 230.0: (90.0, 230.0), 100.0: (99.0, 100.0)}])) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace(tmp_path / "v9.csv", POWER, [240.0, 230.0])
    assert main(["--traces", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["gpu"] for row in data] == ["v9", "all"] and data[0]["median"] == pytest.approx(POWER)
    assert main(["--traces", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[0] == "v9" and f"{POWER:.2f}" in table[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no .csv file"),
        ("", "no rows"),
        ("dataset,network\nx,y\n", "columns average_power"),
        (HEADER + "x,y,1,sgd,many,60,200\n", "must be numbers"),
    ],
)
def test_bad_traces_get_one_sentence(
    tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "a.csv").write_text(text)
    assert main(["--traces", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
