"""The examples and the front door work as they are written."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

import parplan

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
