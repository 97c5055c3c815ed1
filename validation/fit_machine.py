"""Constants of one machine from the op table that it was measured with: a system file of SimuMax.

    python -m validation.fit_machine --config b200_bf16_ceperm.json --device b200 --name b200-simumax

Machines of one device type differ: the products in SimuMax's table of a B200 take 1.34 times as long in the median as
those of aiconfigurator-core on another B200. Who has such a table of the machine that a run was made on should predict
the run with it: it holds times of single ops (products, attention, collectives), none of a step. Half of the shapes,
by a hash, calibrates; the errors on the other half are printed and stand in the file, which goes to
`costmodels/catalogue/kernels/machines`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from costmodels import tomlfile
from costmodels.accumulation import exposed_share
from costmodels.device import MACHINES, Device, load_device
from costmodels.ops import OpShape, price
from validation.fit_gemm_law import calibration_half, fit, predictions, section_values
from validation.machine_tables import attention, collectives
from validation.tables_gemm import Table

Dims = tuple[int, int, int, int]


def main(arguments: list[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m validation.fit_machine", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="system file of SimuMax (JSON)")
    parser.add_argument("--device", required=True, help="catalogue device that the machine has")
    parser.add_argument("--name", required=True, help="name of the machine: its file in the catalogue")
    args = parser.parse_args(arguments)
    try:
        config = json.loads(args.config.read_text())
        tables = list(products(config, args.device, args.name))
    except (OSError, ValueError, KeyError) as error:
        print(f"{args.config} is no system file of SimuMax with efficiencies of matmul: {error}", file=sys.stderr)
        return 2
    sections: dict[str, Any] = {}
    for table in tables:
        mask = calibration_half(table.dims)
        fitted = fit(table, mask)
        sections[table.section] = section_values(table, fitted, mask)
        held = ~mask
        bare, corrected = (s[held] / table.seconds[held] - 1 for s in predictions(fitted, table.dims))
        print(f"{table.section}: {mask.sum()} rows, {held.sum()} held out: law {abs(bare).mean():.1%}, "
              f"corrected {abs(corrected).mean():.1%}, bias {corrected.mean():+.1%}")  # fmt: skip
    content: dict[str, Any] = {"gemm": sections}
    if "sdp_fwd" in config["accelerator"]["op"]:
        content["attention"], errors = attention(config, load_device(args.device))
        for name, off in errors.items():
            print(f"attention {name}: held out {off:.1%}")
    if "networks" in config:
        content["collectives"] = collectives(config)
    tomlfile.write_toml(MACHINES / f"{args.name}.toml", content)
    return 0


def products(config: dict[str, Any], device: str, name: str, accumulating: bool = True) -> list[Table]:
    """The 16-bit products of a system file: of one matrix, and of many (experts); the median over layouts and results
    of a shape. Seconds are FLOP over the efficiency times the file's own peak. accumulating: with those that add to a
    buffer, without what that costs (`costmodels.accumulation`)."""
    ops, known = config["accelerator"]["op"], load_device(device)
    tables = []
    for op, section, read in (("matmul", "bfloat16", _dims), ("group_matmul", "bfloat16_batched", _grouped)):
        found: dict[Dims, list[float]] = defaultdict(list)
        for dims, words, taken in _rows(ops.get(op, {}), read):
            if words.get("accumulate") != "True":
                found[dims].append(taken)
            elif accumulating:
                found[dims].append(max(taken - _added(known, dims, words), taken / 2))
        if found:
            seconds = np.array([statistics.median(s) for s in found.values()])
            data = f"SimuMax 1.2, {name}: {op}"
            tables.append(Table(device, section, "machine", data, np.array(list(found), float), seconds, eager=False))
    return tables


def accumulated(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Shapes (batches, m, n, k) and seconds of the products that add to a float32 buffer."""
    rows = _rows(config["accelerator"]["op"].get("matmul", {}), _dims)
    found = [(d, t) for d, words, t in rows if (words.get("accumulate"), words.get("out_dtype")) == ("True", "fp32")]
    return np.array([d for d, _ in found], float), np.array([t for _, t in found])


def _rows(op: dict[str, Any], read: Callable[[dict[str, str]], Dims]) -> Iterator[tuple[Dims, dict[str, str], float]]:
    """Shape, words and seconds of each product of one kind."""
    for key, share in op.get("accurate_efficient_factor", {}).items():
        words = dict(part.split("=") for part in key.split(", "))
        b, m, n, k = dims = read(words)
        yield dims, words, 2.0 * b * m * n * k / (share * op["tflops"] * 1e12)


def _added(device: Device, dims: Dims, words: dict[str, str]) -> float:
    """Seconds by which adding to a buffer, of float32 or of 16 bits (2 bytes more read), lengthens a product."""
    b, m, n, _ = dims
    elements = b * m * n
    read, more = (4, 2) if words.get("out_dtype") == "fp32" else (2, 0)
    sizes = read * elements, more * elements
    shape = OpShape("aten.add_.Tensor", "backward", ((elements,),), ((elements,),), "float32", 0, *sizes)
    return exposed_share(device) * price(device, shape).seconds


def _dims(key: dict[str, str]) -> Dims:
    return int(key["b"]), int(key["m"]), int(key["n"]), int(key["k"])


def _grouped(key: dict[str, str]) -> Dims:
    """Forward: groups x (M x K) (K x N). The gradient of the input has N and K changed over, that of the weights is
    N x K, summed over M."""
    groups, m, n, k = (int(key[name]) for name in ("ng", "M", "N", "K"))
    return {"bwd_grad_act": (groups, m, k, n), "bwd_grad_w": (groups, n, k, m)}.get(key["stage"], (groups, m, n, k))


__all__ = ["main", "products"]

if __name__ == "__main__":
    sys.exit(main())
