"""Fitting the law of matrix products: on tables made from known constants, and on files in the published formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from costmodels.device import load_device
from costmodels.gemm import wide_of
from costmodels.gemm_correction import factors, factors_of
from costmodels.gemm_law import Constants, fastest, hardware_of, law_seconds, menu
from validation.fit_gemm import _below_scores, main
from validation.fit_gemm_law import (
    SPLITS,
    TENSOR_TILES,
    _edge_nodes,
    calibration_half,
    fit,
    in_table,
    predictions,
    section_values,
    smooth_table,
)
from validation.tables_gemm import Table, eager_tables, kernel_tables

TRUTH = Constants(
    compute=0.8, area=0.15, prologue=150, smooth=0.5, stream=0.75, in_flight=70, reread=0.1, overlap=4, floor=3e-6,
    split_floor=2e-6, split_bytes=0.2, throttle=0.04,
)  # fmt: skip


def table(noise: float, bump: float = 0.0) -> Table:
    """Products on an A100 that follows TRUTH, with noise, and slower by `bump` (ln) around n = 1024."""
    rng = np.random.default_rng(3)
    dims = np.array([[1, m, n, k] for m in (1, 3, 16, 48, 128, 300, 700, 1500, 4096, 9000)
                     for n in (256, 512, 1024, 2048, 4096, 8192) for k in (256, 700, 2048, 5000)], float)  # fmt: skip
    hardware = hardware_of(load_device("a100-sxm-80gb"), "bfloat16", 2)
    exact = law_seconds(TRUTH, hardware, menu(TENSOR_TILES, SPLITS), dims)
    slower = bump * np.exp(-((np.log(dims[:, 2] / 1024)) ** 2))
    seconds = exact * np.exp(slower + noise * rng.standard_normal(len(dims)))
    return Table("a100-sxm-80gb", "bfloat16", "kernels", "made here", dims, seconds, False)


def mean_error(guess: np.ndarray, seconds: np.ndarray) -> float:
    return float(abs(guess / seconds - 1).mean())


def test_known_constants_are_found_again_from_half_of_the_rows() -> None:
    made = table(noise=0.0)
    mask = calibration_half(made.dims)
    assert 0.4 < mask.mean() < 0.6
    fitted = fit(made, mask)
    assert mean_error(predictions(fitted, made.dims[~mask])[0], made.seconds[~mask]) < 0.03
    assert fitted.constants.compute == pytest.approx(TRUTH.compute, rel=0.1)
    assert fitted.constants.stream == pytest.approx(TRUTH.stream, rel=0.1)


def test_the_correction_learns_what_the_law_cannot_say_also_for_unseen_pairs() -> None:
    made = table(noise=0.02, bump=0.5)
    for by_pair in (False, True):
        mask = calibration_half(made.dims, by_pair)
        fitted = fit(made, mask)
        bare, corrected = predictions(fitted, made.dims[~mask])
        seconds = made.seconds[~mask]
        assert mean_error(corrected, seconds) < 0.8 * mean_error(bare, seconds)
    values = section_values(made, fitted, mask)
    assert values["rows"] + values["held_out"] == len(made.dims)
    assert values["error"] == pytest.approx(mean_error(corrected, seconds), abs=0.01)


def test_pairs_are_never_on_both_sides() -> None:
    dims = table(0.0).dims
    mask = calibration_half(dims, by_pair=True)
    assert not {tuple(d) for d in dims[mask][:, 2:]} & {tuple(d) for d in dims[~mask][:, 2:]}


def test_a_smooth_table_averages_noise_and_ignores_outliers() -> None:
    rng = np.random.default_rng(0)
    dims = np.exp(rng.uniform(0, 8, (800, 4)) * [0, 1, 1, 1])
    left = 0.1 + 0.05 * rng.standard_normal(800)
    left[::50] = 3.0
    axes = (np.zeros(1), *[np.linspace(0, 8, 5)] * 3)
    assert abs(smooth_table(axes, dims, left, np.ones(800), 0.1).values.mean() - 0.1) < 0.03


def test_launches_are_told_from_kernels(tmp_path: Path) -> None:
    """An eager table in the published format: 50 us of launch in each time, the summed length in column N."""
    rng = np.random.default_rng(5)
    size = 900
    frame = pd.DataFrame({c: np.exp(rng.uniform(3, 8, size)).astype(int) for c in "MNK"})
    dims = np.column_stack([np.ones(size), frame.M, frame.K, frame.N]).astype(float)
    hardware = hardware_of(load_device("v100-pcie-32gb"), "float32", 4)
    kernel = law_seconds(TRUTH, hardware, menu(["64x64", "64x128", "128x128"], SPLITS), dims)
    names = rng.choice(["volta_sgemm_64x64_tn", "volta_sgemm_128x64_tn", "volta_sgemm_128x128_tn"], size)
    frame = frame.assign(op="linear", B=1, device="Tesla V100-PCIE-32GB", latency_ms=(kernel + 50e-6) * 1e3,
                         kernel_name=names, origin="train")  # fmt: skip
    frame.to_csv(tmp_path / "gemm_fp32.csv.gz", index=False)
    (made,) = list(eager_tables(tmp_path))
    assert made.eager and made.campaign == "random" and set(made.tiles) == {"64x64", "64x128", "128x128"}
    fitted = fit(made, calibration_half(made.dims))
    assert fitted.host == pytest.approx(50e-6, rel=0.1)
    assert mean_error(predictions(fitted, made.dims)[0], made.seconds) < 0.05


def test_kernel_tables_take_the_median_of_libraries(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for library, ms in (("sglang", 1.0), ("vllm", 3.0), ("trtllm", 2.0)):
        folder = tmp_path / "a100_sxm" / "gemm" / library / "1.0"
        folder.mkdir(parents=True)
        row = {"gemm_dtype": ["bfloat16"], "m": [8], "n": [16], "k": [32], "latency": [ms]}
        pd.DataFrame(row).to_parquet(folder / "gemm_perf.parquet")
    (found,) = list(kernel_tables(tmp_path))
    assert found.device == "a100-sxm-80gb" and found.section == "bfloat16"
    assert found.seconds.tolist() == [2e-3] and found.dims.tolist() == [[1, 8, 16, 32]]


def test_bad_input_gives_one_sentence_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tables", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--download" in capsys.readouterr().err
    assert main(["--ops", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "gemm_fp32.csv.gz" in capsys.readouterr().err
    assert main(["--out", str(tmp_path)]) == 2


def test_an_eager_table_shows_launch_and_kernel_but_no_less_than_the_issue() -> None:
    kernel = np.array([1e-6, 10e-6, 60e-6, 1.0])
    shown = in_table(kernel, 30e-6, 50e-6)
    assert shown[:2] == pytest.approx([50e-6, 50e-6], rel=1e-2) and shown[1] > shown[0] > 50e-6
    assert shown[2:] == pytest.approx(kernel[2:] + 30e-6, rel=1e-3)
    assert in_table(kernel, 30e-6, 0.0) == pytest.approx(kernel + 30e-6)
    assert in_table(kernel, 0.0, 0.0) == pytest.approx(kernel)


def test_a_correction_may_jump_at_a_tiles_edge() -> None:
    """Products that take 1.5 times as long from 65 rows on: nodes on both sides of the edge follow."""
    rng = np.random.default_rng(2)
    dims = np.column_stack([np.ones(1500), *rng.integers(1, 300, (2, 1500)), np.full(1500, 256)]).astype(float)
    left = np.where(dims[:, 1] > 64, np.log(1.5), 0.0)
    near = abs(dims[:, 1] - 64.5) < 6
    errors = []
    for m_nodes, gap in ((_edge_nodes(dims[:, 1]), 0.15), (np.linspace(0, np.log(300), 12), 0.0)):
        axes = (np.zeros(1), m_nodes, np.log([1.0, 300.0]), np.log([256.0]))
        table = smooth_table(axes, dims, left, np.ones(len(dims)), 0.01, gap)
        errors.append(float(abs(np.log(factors(table, dims)) - left)[near].mean()))
    assert errors[0] < 0.05 < 0.1 < errors[1]
    nodes = np.rint(np.exp(_edge_nodes(dims[:, 1]))).astype(int).tolist()
    assert {64, 65, 128, 129} <= set(nodes) and nodes[0] == dims[:, 1].min() and nodes[-1] == dims[:, 1].max()


def test_what_aligned_products_cannot_show_is_not_fitted_to_them() -> None:
    rng = np.random.default_rng(7)
    dims = np.column_stack([np.full(200, 8), *4 * rng.integers(8, 200, (3, 200))]).astype(float)
    hardware = hardware_of(load_device("v100-pcie-32gb"), "float32", 4)
    kernel = law_seconds(TRUTH, hardware, menu(["128x128"], [1]), dims)
    made = Table("v100-pcie-32gb", "float32_batched", "models", "made", dims, kernel + 30e-6, True, ("128x128",) * 200)
    assert fit(made, np.ones(200, bool)).constants.odd == 0.03


def test_what_lies_below_the_first_table_is_nearer_by_the_second() -> None:
    """Made of V100's own wide law, with its launch: the wide section gets its own times back, the first does not."""
    v100 = load_device("v100-pcie-32gb")
    wide, own = wide_of(v100, "float32", False), v100.kernels["gemm"]["float32_wide"]
    assert wide is not None and wide.correction is not None
    draw = np.random.default_rng(3)
    sides = draw.integers(500, 4000, (2, 400))
    dims = np.column_stack([np.ones(400), draw.integers(20, 400, 400), *sides]).astype(float)
    kernel = fastest(wide.law, wide.candidates, dims) * factors_of(wide.correction, dims)
    made = in_table(kernel, own["host_in_table"], own["issue_in_table"])
    (row,) = _below_scores(Table("v100-pcie-32gb", "float32", "random", "made", dims, made, True))
    assert row["wide_mean"] < 1e-9 < 0.03 < row["first_mean"] and 100 < row["n"] < 300
    assert _below_scores(Table("h100-sxm", "float32", "random", "made", dims, made, True)) == []
