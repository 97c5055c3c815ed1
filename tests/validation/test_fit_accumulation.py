"""The share that is found is the one by which a made-up table was lengthened."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from costmodels.accumulation import exposed_share
from costmodels.device import load_device
from costmodels.gemm import gemm_prices
from costmodels.ops import OpShape
from validation.fit_accumulation import additional_seconds, main, share_of
from validation.fit_machine import accumulated, products

DEVICE = "a100-pcie-80gb"
SIDES = (2048, 4096, 8192, 12288)


def config(share: float) -> dict[str, Any]:
    """Products by the catalogue's law; those that add take a share of the additional bytes' time longer."""
    device, peak = load_device(DEVICE), 312e12
    shapes = list(product(SIDES, SIDES, SIDES))
    ops = [OpShape("aten.mm", "", ((m, k), (k, n)), ((m, n),), "bfloat16", 2 * m * n * k, 2 * (m + n) * k, 2 * m * n)
           for m, n, k in shapes]  # fmt: skip
    prices = [p.seconds for p in gemm_prices(device, ops) if p is not None]
    found = {}
    for (m, n, k), alone in zip(shapes, prices, strict=True):
        for adds, kind, more in ((False, "bf16", 0.0), (True, "fp32", share * additional_seconds(device, m * n))):
            key = f"b=1, m={m}, k={k}, n={n}, layout=NN, accumulate={adds}, out_dtype={kind}"
            found[key] = 2 * m * n * k / peak / (alone + more)
    return {"accelerator": {"op": {"matmul": {"tflops": 312, "accurate_efficient_factor": found}}}}


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_share_is_found_again(share: float) -> None:
    found = share_of(config(share), DEVICE)
    assert found["share"] == pytest.approx(share, abs=0.1)
    assert found["fitted"] < min(found["none"], found["whole"]) and found["rows"] == len(SIDES) ** 3


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(config(0.5)))
    words = ["--config", str(path), "--device", DEVICE]
    assert main(words) == 0 and "share that is not hidden: 0." in capsys.readouterr().out
    path.write_text("{}")
    assert main(words) == 2 and "fit_accumulation" in capsys.readouterr().err


def test_a_machines_products_are_free_of_what_adding_costs() -> None:
    """A table in which adding costs the share of the device gives both kinds of a product one time."""
    made = config(exposed_share(load_device(DEVICE)))
    both, plain = (products(made, DEVICE, "x", adding)[0] for adding in (True, False))
    assert both.dims.tolist() == plain.dims.tolist()
    assert both.seconds == pytest.approx(plain.seconds, rel=1e-6)
    dims, seconds = accumulated(made)
    assert len(dims) == len(plain.dims) and (seconds > plain.seconds).all()
