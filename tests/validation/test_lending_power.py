"""Pairs of measured boards: what watts per FLOP say, beside what their tables say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from validation.lending_power import main, off, pairs


def test_the_rule_is_nearer_than_taking_shares_to_be_equal() -> None:
    found = list(pairs())
    assert len(found) > 30 and all(p.ratio == pytest.approx(p.share / p.lent_share) for p in found)
    assert off(found, True) < 1.15 < off(found, False)
    twins = {(p.device, p.lender): p for p in found if p.dtype == "float32"}
    l4 = twins["L4", "H100 SXM5 80GB"]
    assert l4.watts < l4.lent_watts and l4.said < 0.5 and l4.ratio < 0.5


def test_the_table_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    assert "with the rule" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "power.csv")) == len(list(pairs()))
