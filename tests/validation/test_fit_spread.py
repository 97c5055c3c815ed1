"""Spreads of GPUs, read from output in gpu-fryer's form that was made with a known one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from validation.fit_spread import fit, main, sections


def node(rates: list[float], precision: str = "BF16", model: str = "NVIDIA B200") -> str:
    """One run as gpu-fryer prints it: rates in Gflops/s."""
    lines = [f'Detected GPU #{i}: "{model}" (uuid-{i})' for i in range(len(rates))]
    lines += [f"Using precision(s):  {precision} ", "Matrices created"]
    lines += [" - ".join(f"691 ({rate:.0f} Gflops/s)" for rate in rates) + " | Throttling: None"]
    for i, rate in enumerate(rates):
        lines += [f"GPU #{i}: {rate:6.0f} Gflops/s (min: 1.00, max: 2.00, dev: 0.50)", "         Temperature: 60.00"]
    return "\n".join([*lines, "All GPUs seem healthy", "Freeing GPUs..."]) + "\n"


def folder(path: Path, nodes: int, spread: float, shared: float = 0.0) -> Path:
    """Nodes of eight GPUs whose times spread so much, each GPU alone and all of a node together."""
    rng = np.random.default_rng(3)
    for i in range(nodes):
        times = 1 + shared * rng.standard_normal() + spread * rng.standard_normal(8)
        (path / f"node{i:03d}.out").write_text("======== Run with bf16 ==========\n" + node((1.5e6 / times).tolist()))
    return path


def test_a_known_spread_of_independent_gpus_is_found(tmp_path):
    (row,) = fit(folder(tmp_path, 300, 0.01))
    assert (row["gpu"], row["precision"], row["nodes"], row["gpus"]) == ("NVIDIA B200", "bf16", 300, 2400)
    assert row["spread"] == pytest.approx(0.01, rel=0.05) == row["within"]
    assert row["nodes_differ"] == pytest.approx(row["independent"], rel=0.15)
    assert row["node"] == pytest.approx(row["node_law"], rel=0.1)
    assert row["all"] == pytest.approx(row["all_law"], rel=0.35)
    assert row["flops"] == pytest.approx(1.5e15, rel=0.01)


def test_nodes_that_differ_as_a_whole_are_told_from_gpus_that_do(tmp_path):
    (row,) = fit(folder(tmp_path, 300, 0.005, shared=0.02))
    assert row["within"] == pytest.approx(0.005, rel=0.1)
    assert row["nodes_differ"] > 2 * row["independent"]


def test_runs_of_one_file_are_told_apart_and_unfit_ones_left_out():
    text = node([100.0, 101.0], "FP32") + "noise\n" + node([200.0, 0.0]) + node([200.0, 210.0], "FP8", "NVIDIA H200")
    assert list(sections(text)) == [
        (("NVIDIA B200", "fp32"), [100e9, 101e9]),
        (("NVIDIA H200", "fp8"), [200e9, 210e9]),
    ]
    assert list(sections(node([100.0]))) == [] == list(sections("nothing here"))


def test_the_command_prints_a_row_for_each_model_and_says_what_it_lacks(tmp_path, capsys):
    assert main([str(folder(tmp_path, 5, 0.01))]) == 0
    assert "NVIDIA B200" in capsys.readouterr().out
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["gpus"] == 40
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2
    assert "gpu-fryer" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
