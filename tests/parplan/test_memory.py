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


def test_a_model_that_fits_with_offload_only(parplan, tmp_path):
    """A small Llama on four GPUs of 24 MB."""
    (tmp_path / "small.toml").write_text(
        'name = "small"\ndevice = "gpu.toml"\nnodes = 1\ndevices_per_node = 4\n'
        '[intra]\nname = "wire"\nbandwidth = 20e9\nlatency = 1e-5\n'
    )
    (tmp_path / "gpu.toml").write_text(
        'name = "small GPU"\nkind = "gpu"\nmemory_bytes = 24000000\nmemory_bandwidth = 1e12\n'
        "pcie_bandwidth = 32e9\n[peak_flops]\nfloat32 = 50e12\n"
    )
    llama = "llama3-8b:layers=6,hidden=256,heads=8,kv_heads=4,ffn=768,seq=16,vocab=512"
    words = ("simulate", llama, "--cluster", tmp_path / "small.toml", "-b", 4)
    here = parplan(*words, "--plan", "dp4 fsdp", "--json").data
    away = parplan(*words, "--plan", "dp4 fsdp offload", "--json").data
    assert not here["fits"] and away["fits"]
    assert here["memory"]["offload_peak_bytes"] == away["peak_bytes"] < 24_000_000 < here["peak_bytes"]
    assert away["memory"]["offload_peak_bytes"] is None and not here["memory"]["host_bytes"]
    held = away["memory"]["host_bytes"]
    assert away["memory"]["host_pinned_bytes"] == held["parameters"] + held["gradients"] == 2 * held["parameters"]
    assert away["step_seconds"] > here["step_seconds"]
    shown = parplan(*words, "--plan", "dp4 fsdp").out
    assert "DOES NOT FIT" in shown and "with offload" in shown and "would fit" in shown
    shown = parplan(*words, "--plan", "dp4 fsdp offload").out
    assert "host memory" in shown and "pinned" in shown and "DOES NOT FIT" not in shown
