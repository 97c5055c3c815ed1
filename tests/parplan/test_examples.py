"""The examples and the front door work as they are written."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import parplan
from validation.cases import TRANSFORMER, VISION

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4 and "nan" not in done.stdout


@pytest.mark.parametrize("name", ["runs.csv", "runs_own.csv", "runs_vision.csv"])
def test_the_runs_are_predicted(parplan, name):
    """Every row; what nobody measured is not scored."""
    result = parplan("predict", "--cases", ROOT / "examples" / name, "--json")
    cases = result.data["cases"]
    assert result.code == 0 and len(cases) >= 2
    assert all(0.01 < case["predicted_seconds"] < 10 and "reason" not in case for case in cases)
    assert all((case["measured_seconds"] is None) == case["case_id"].startswith("invented") for case in cases)


@pytest.mark.parametrize(("name", "configs", "points"), [("nccl", 2, 7), ("tcp", 2, 5)])
def test_the_sweeps_are_compared(parplan, name, configs, points):
    data = parplan("collectives", "--cases", ROOT / "examples" / f"collectives_{name}.csv", "--json").data
    assert (len(data["configs"]), data["summary"]["n"], data["skipped"]) == (configs, points, [])


def test_files_that_help_and_readme_name_are_there(parplan):
    texts = [parplan(verb, "--help").out for verb in ("predict", "collectives", "simulate", "search")]
    texts += [(ROOT / name).read_text() for name in ("README.md", "docs/cases.md")]
    named = {word for text in texts for word in re.findall(r"(?:examples|docs)/\w+\.\w+", text)}
    assert {"examples/runs_vision.csv", "examples/collectives_nccl.csv", "docs/cases.md"} <= named
    assert all((ROOT / word).is_file() for word in named)
    assert not any(re.search(r"(nccl|tcp|transformer|vision)_cases", text) for text in texts)


def test_the_columns_are_described():
    text = (ROOT / "docs" / "cases.md").read_text()
    sections = {kind: text.partition(f"### {kind}")[2].partition("###")[0] for kind in ("Transformers", "Vision")}
    for names, section in ((TRANSFORMER, sections["Transformers"]), (VISION, sections["Vision"])):
        assert not [name for name in names if f"`{name}`" not in section]


def test_own_cluster_loads():
    cluster = parplan.load_cluster(ROOT / "examples" / "own_cluster.toml")
    assert cluster.size == 8 and cluster.device.name == "L40S" and cluster.inter.ports == 1


def test_front_door():
    for name in parplan.__all__:
        assert getattr(parplan, name) is not None and name in dir(parplan)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = parplan.nothing


def test_the_docstring_is_true():
    assert doctest.testmod(parplan, raise_on_error=False).failed == 0
