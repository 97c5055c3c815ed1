"""Op tables of a NeuSight checkout, as the fits read them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from validation.neusight_ops import main
from validation.tables_gemm import LEAST_ROWS, eager_tables

DEVICE = "AMD Instinct MI100"


def write(folder, op: str, columns: str, rows: list[str]) -> None:
    path = folder / "data" / "dataset_amd" / "test" / "collect" / op / "p2.4.1" / f"{DEVICE}.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([f"OPName,Latency,Device,Kernel Name,{columns}", *rows]) + "\n")


def test_tables_of_a_checkout_are_read_by_the_fits(tmp_path) -> None:
    kernel = "Cijk_Alik_Bljk_SB_MT128x64x32_MI32x32"
    rows = [f"linear,0.5,{DEVICE},{kernel},1,{64 + i},128,256" for i in range(LEAST_ROWS)]
    write(tmp_path, "linear", "B,M,N,K", rows)
    write(tmp_path, "ln", "B,H", [f"ln,0.25,{DEVICE},some_kernel,512,1024"])
    out = tmp_path / "out"
    assert main(["--checkout", str(tmp_path), "--devices", DEVICE, "--out", str(out)]) == 0
    (table,) = eager_tables(out)
    assert (table.device, table.section, table.campaign) == ("mi100", "float32", "models")
    assert table.dims[0].tolist() == [1, 64, 256, 128]  # batches, rows, columns, length that is summed over
    assert np.allclose(table.seconds, 5e-4)
    assert set(table.tiles) == {"64x128"}
    rowwise = pd.read_csv(out / "rowwise_fp32.csv.gz")
    assert rowwise.iloc[0].tolist() == ["ln", DEVICE, 0.25, 512, 1024]


def test_a_folder_without_the_device_is_named(tmp_path, capsys) -> None:
    assert main(["--checkout", str(tmp_path), "--devices", "Tesla X", "--out", str(tmp_path / "out")]) == 2
    assert "Tesla X.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--checkout", str(tmp_path)])
