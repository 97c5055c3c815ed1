"""`parplan simulate --memory`: categories, reserved bytes, and the files, from the real planner."""

from __future__ import annotations

import csv
import pickle

MLP = "mlp:layers=2,hidden=32,ffn=64,features=16"


def test_memory_of_a_gpu_plan(parplan, tmp_path):
    path = tmp_path / "m.csv"
    words = ("simulate", MLP, "--plan", "dp2 fsdp mb2", "--cluster", "dgx-h100", "-b", 8)
    result = parplan(*words, "--json", "--memory", path)
    assert result.code == 0, result.err
    held = result.data["memory"]
    assert sum(held["at_peak"].values()) == held["peak_bytes"] == result.data["peak_bytes"] > held["resting_bytes"]
    assert held["reserved_bytes"] >= 34 * 2**20  # cuBLAS alone has 32 MiB
    assert held["reserved_expandable_bytes"] >= held["peak_bytes"]
    rows = list(csv.DictReader(path.open()))
    assert max(int(r["total"]) for r in rows) >= held["peak_bytes"]
    result = parplan(*words, "--memory", tmp_path / "m.pickle")
    assert result.code == 0 and "reserved" in result.out and "activations" in result.out
    assert pickle.loads((tmp_path / "m.pickle").read_bytes())["device_traces"][0]
    assert parplan(*words, "--memory", tmp_path / "m.png").code == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written(parplan, tmp_path):
    words = ("simulate", MLP, "--plan", "dp2", "-b", 8, "--memory")
    result = parplan(*words, tmp_path / "m.txt", "--cluster", "dgx-h100")
    assert result.code == 2 and "ends in none of .csv" in result.err
    result = parplan(*words, tmp_path / "m.pickle", "--cluster", "local")
    assert result.code == 2 and "only CUDA devices" in result.err and not (tmp_path / "m.pickle").exists()
    result = parplan(*words, tmp_path / "m.csv", "--cluster", "local", "--json")
    assert result.code == 0 and result.data["memory"]["reserved_bytes"] is None
