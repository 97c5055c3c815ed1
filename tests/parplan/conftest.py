from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from parplan.cli import main
from tests.parplan import standin


@pytest.fixture
def planner(monkeypatch):
    """The planner of `standin` in place of the real one."""
    for name, module in standin.modules().items():
        monkeypatch.setitem(__import__("sys").modules, name, module)


@pytest.fixture
def parplan(capsys, tmp_path, monkeypatch):
    """Runs a command line in this process: its exit code, stdout, stderr, and JSON where there is one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # never this machine's own calibration

    def run(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        data = json.loads(out) if "--json" in words and out else None
        return SimpleNamespace(code=code, out=out, err=err, data=data)

    return run
