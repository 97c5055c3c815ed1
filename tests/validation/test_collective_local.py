"""Collectives between calibrated sizes: predictions from tables, pace, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from costmodels.cluster import CollectiveTable, local_cluster
from validation.calibrate_gloo import SIZES, smoothed
from validation.collective_local import TESTED, at_pace, examine, predictions, tables_of
from validation.collective_local_report import noise, spread, summarise, write


def row(kind: str, size: float, predicted: float, measured: float, ranks: int = 2, **more) -> dict:
    base = {"kind": kind, "ranks": ranks, "bytes": size, "how": "plain", "seconds": measured, "anchor": 1.0}
    base |= {"low": 0.9 * measured, "high": 1.1 * measured, "repeats": 25, "load": 1.0, "source": "interpolated"}
    return base | {"predicted": predicted, "at_pace": measured, "error": predicted / measured - 1} | more


def test_tested_sizes_lie_between_calibrated_ones() -> None:
    assert not set(TESTED) & set(SIZES) and len(TESTED) == 8
    assert sum(min(SIZES) < size < max(SIZES) for size in TESTED) == 7


def test_predictions_come_from_the_tables() -> None:
    line = tuple(float(s) for s in SIZES)
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
    tables = tuple(CollectiveTable(k, 2, line, tuple(1e-9 * s for s in line), (1.0,) * len(line)) for k in kinds)
    cluster = replace(local_cluster(Path("nowhere")), tables=tables, cache={})
    for p in predictions(cluster, 2, "plain"):
        expected = 1e-9 * max(p["bytes"], SIZES[0])
        assert p["predicted"] == pytest.approx(expected), "proportional to bytes, and the first point's time below it"
    assert {p["kind"] for p in predictions(cluster, 4, "plain")} == set(kinds) - {"send"}


def test_rows_become_tables_at_the_pace_of_the_calibration() -> None:
    rows = [row("send", s, 0.0 + 1, 2e-3 * s / 4096, anchor=2.0) for s in (4096, 8192)]
    table = tables_of(rows, 1.0)[0]
    assert table.seconds == pytest.approx((1e-3, 2e-3)) and at_pace(rows[0], 0.0) == 2e-3


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    rows = [row("send", 1e3, 1.05, 1.0), row("send", 1e6, 1.5, 1.0), row("broadcast", 1e6, 1.0, 1.0, high=3.0)]
    (tmp_path / "measured-2.json").write_text(json.dumps({"reference": 1.0, "cores": 2, "rows": rows}))
    text = write(tmp_path)
    assert "| plain | 2 | send | 2 | 28 % | 28 % | 28 % | 50 % |" in text
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report.json").read_text())["summary"] == summarise(rows)
    calm = {s["kind"]: s["calm_points"] for s in summarise(rows)}
    assert calm == {"all": 2, "send": 2, "broadcast": 0}
    assert spread(rows[0]) == pytest.approx(0.1) and noise(rows[0]) == pytest.approx(0.2 / 2.56 / 5)


def test_without_measurements_or_tables_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no measured"):
        write(tmp_path)
    with pytest.raises(ValueError, match="run parplan calibrate first"):
        examine(2, tmp_path / "nowhere.toml", tmp_path, 20, ["in place"])


def test_smoothing_keeps_laws_and_mends_one_noisy_point() -> None:
    law = [1e-3 + 2e-6 * s**0.5 + 1e-9 * s for s in SIZES]
    assert smoothed(SIZES, law, [0.1] * len(law)) == pytest.approx(law, rel=1e-4)
    noisy = [t * (3.0 if i == 2 else 1.0) for i, t in enumerate(law)]
    errors = [0.8 if i == 2 else 0.05 for i in range(len(law))]
    assert smoothed(SIZES, noisy, errors) == pytest.approx(law, rel=0.1)
    kink = [1e-4 + 1e-9 * s + 3e-9 * max(s - (32 << 20), 0) for s in SIZES]
    assert smoothed(SIZES, kink, [0.05] * len(kink)) == pytest.approx(kink, rel=1e-3)
