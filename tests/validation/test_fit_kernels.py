"""The fits find the constants that made a table, score shapes they did not see, and say what is missing."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from costmodels import tomlfile
from costmodels.convolution import seconds_by_algorithm
from costmodels.convolution_law import ALGORITHMS, chosen
from costmodels.device import Device, load_device
from costmodels.rowwise import seconds_of
from validation import fit_attention, fit_common, fit_conv, fit_kernels, fit_rowwise, lavin_gray
from validation.fit_common import Constant, Fitted, fit_constants, fit_terms, held_out, score, write_sections

NOISE = 0.02


def noisy(seconds: np.ndarray) -> np.ndarray:
    return seconds * np.exp(np.random.default_rng(1).normal(0, NOISE, len(seconds)))


def test_halves_are_of_shapes_and_stay() -> None:
    rows = pd.DataFrame({"m": np.repeat(np.arange(500), 2), "n": np.repeat(np.arange(500) % 7, 2)})
    flags = held_out(rows.m, rows.n)
    assert (flags[::2] == flags[1::2]).all()  # equal shapes are on one side
    assert 0.4 < flags.mean() < 0.6
    assert (held_out(rows.m, rows.n) == flags).all()


def test_constants_and_terms_are_found_again() -> None:
    size = np.random.default_rng(0).uniform(1e3, 1e9, 400)
    measured = noisy(5e-6 + size / (2e12 * 0.8))
    measured[::40] *= 3  # measurements that went wrong do not lead
    wanted = (Constant("floor", 1e-5), Constant("share", 0.5, True))
    found = fit_constants(wanted, lambda x: x["floor"] + size / 2e12 / x["share"], measured)
    assert found["share"] == pytest.approx(0.8, rel=0.02) and found["floor"] == pytest.approx(5e-6, rel=0.1)
    weights = fit_terms(np.stack([np.ones(400), size]), measured)
    assert weights[1] * 2e12 == pytest.approx(1.25, rel=0.02)


def test_scores() -> None:
    found = score(np.array([0.1, -0.1, 0.3]))
    assert (found["n"], found["worst"]) == (3, 0.3)
    assert found["mean"] == pytest.approx(0.5 / 3) and found["bias"] == pytest.approx(0.1)


def conv_table(device: Device, rows: int) -> pd.DataFrame:
    """A table that the law itself made, with the V100's constants."""
    rng = np.random.default_rng(2)
    table = pd.DataFrame({
        "op": "conv", "device": "Tesla V100-PCIE-32GB", "batch": rng.integers(1, 64, rows),
        "in_channels": rng.integers(3, 1000, rows), "out_channels": rng.integers(3, 1000, rows), "kernel": 3,
        "input_size": rng.integers(5, 60, rows), "stride": 1, "padding": 1,
    })  # fmt: skip
    times = seconds_by_algorithm(device.kernels["conv"]["float32"], device, "float32", fit_conv.convs(table)) + 2e-4
    index = chosen(times)
    names = np.array([fit_conv.NAMED.get(a, a) for a in ALGORITHMS])
    return table.assign(latency_ms=noisy(times[index, np.arange(rows)]) * 1e3, algorithm=names[index])


def rowwise_table(device: Device, rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    table = pd.DataFrame({
        "op": rng.choice(["ln", "softmax", "add", "relu"], rows), "device": "Tesla V100-PCIE-32GB",
        "rows": rng.integers(4000, 60000, rows), "cols": 4 * rng.integers(128, 3000, rows),
    })  # fmt: skip
    seconds = np.zeros(rows)
    for kind, mine in fit_rowwise._kinds(table).items():
        work = fit_rowwise._work(table[mine], kind)
        seconds[mine] = 2e-5 + seconds_of(device.kernels["rowwise"]["float32"], device, kind, work)
    return table.assign(latency_ms=noisy(seconds) * 1e3)


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ops")
    device = load_device("v100-pcie-32gb")
    for name, table in (("conv_fp32", conv_table(device, 1500)), ("rowwise_fp32", rowwise_table(device, 600))):
        with gzip.open(folder / f"{name}.csv.gz", "wt") as file:
            table.to_csv(file, index=False)
    return folder


def test_tables_made_by_the_laws_are_fitted_to_their_noise(ops: Path) -> None:
    fits, algorithms = fit_kernels.fit_all(ops, None)
    errors = {fit.law: float(np.abs(fit.errors).mean()) for fit in fits}
    assert errors["rowwise"] < 2 * NOISE
    assert errors["conv"] < 0.08  # tiles that hardly differ leave constants open, not times
    assert algorithms.right[0] > 0.9
    (rowwise,) = (f for f in fits if f.law == "rowwise")
    truth = load_device("v100-pcie-32gb").kernels["rowwise"]["float32"]
    assert rowwise.constants["stream"] == pytest.approx(truth["stream"], rel=0.02)
    assert rowwise.constants["host_floor"] == pytest.approx(2.2e-5, rel=0.3)  # the table's 20 us and the law's launch


def test_the_attention_fit_finds_rates_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_device("a100-sxm-80gb")
    rng = np.random.default_rng(4)
    rows = pd.DataFrame({
        "batch_size": rng.integers(1, 32, 800), "isl": 2 ** rng.integers(4, 14, 800),
        "num_heads": rng.integers(1, 64, 800), "head_dim": 128, "causal": True,
    }).assign(num_key_value_heads=lambda t: t.num_heads)  # fmt: skip
    truth = {c.name: c.start for c in fit_attention.CONSTANTS} | {"rate128": 0.66}
    law = fit_attention._law(device, rows, [128], {"packs": False})
    rows["latency"] = noisy(law(truth, np.ones(800, bool))) * 1e3
    fit = fit_attention._fit_device(fit_attention.TABLES[0], rows, pd.DataFrame())
    assert float(np.abs(fit.errors).mean()) < 2 * NOISE
    assert fit.constants["rates"] == pytest.approx([0.66], rel=0.05)
    assert fit.constants["kernel"] == "FlashAttention-2"
    assert fit.again(fit.constants) == pytest.approx(fit.predicted)


def test_sections_are_written_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_common, "CATALOGUE", tmp_path)
    path = tmp_path / "kernels" / "t4.toml"
    path.parent.mkdir()
    tomlfile.write_toml(path, {"gemm": {"float32": {"compute": 0.5}}, "conv": {"float32": {"implicit_rate": 0.1}}})
    ones = np.ones(3)
    fit = Fitted("t4", "conv", "float32", {"implicit_rate": 0.7}, "a table", 6, 1.1 * ones, ones,
                 np.array(["a"] * 3), lambda lent: ones)  # fmt: skip
    write_sections([fit])
    content = tomlfile.read_toml(path)
    assert content["gemm"] == {"float32": {"compute": 0.5}}
    section = content["conv"]["float32"]
    assert section["implicit_rate"] == 0.7 and section["error"] == pytest.approx(0.1)
    assert (section["data"], section["rows"], section["held_out"]) == ("a table", 6, 3)


def test_the_command_writes_a_report_and_leaves_constants_where_told(ops: Path, tmp_path: Path) -> None:
    before = load_device("v100-pcie-32gb").kernels
    assert fit_kernels.main(["--ops", str(ops), "--out", str(tmp_path / "out"), "--keep"]) == 0
    assert load_device("v100-pcie-32gb").kernels == before
    text = (tmp_path / "out" / "report.md").read_text()
    assert "v100-pcie-32gb" in text and "Lavin" in text and str(ops) not in text
    errors = pd.read_csv(tmp_path / "out" / "errors.csv")
    assert set(errors.law) == {"conv", "rowwise"} and (errors["mean"] < 0.2).all()
    assert (tmp_path / "out" / "kernels.png").stat().st_size > 10_000


def test_missing_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_kernels.main(["--ops", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "conv_fp32.csv.gz is not there" in capsys.readouterr().err
    assert fit_kernels.main(["--tables", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "attention tables" in capsys.readouterr().err
    assert fit_kernels.main(["--out", str(tmp_path)]) == 2
    assert "nothing to fit" in capsys.readouterr().err


def test_lavin_and_grays_rows_agree_with_themselves_and_with_the_law() -> None:
    rows = lavin_gray.ROWS
    assert len(rows) == 14
    for row in rows:  # written down from memory: time times rate is the network's work
        assert row.seconds * row.rate == pytest.approx(lavin_gray.work(row.batch), rel=2e-3)
    errors = np.array([lavin_gray.predicted(row) / row.seconds - 1 for row in rows])
    assert np.abs(errors).mean() < 0.15 and np.abs(errors).max() < 0.15


def test_lavin_and_grays_rows_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert lavin_gray.main() == 0
    head, *rows, mean = capsys.readouterr().out.splitlines()
    assert "predicted/measured" in head and len(rows) == 14
    ratios = [float(line.split()[-1]) for line in rows]
    assert float(mean.split()[2].rstrip("%,")) == pytest.approx(100 * sum(abs(r - 1) for r in ratios) / 14, abs=0.06)
