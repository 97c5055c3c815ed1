"""Operator tables of a NeuSight checkout, as the two files that the fits read.

    python -m validation.neusight_ops --checkout FOLDER --devices "AMD Instinct MI100" "AMD Instinct MI210" --out OPS

FOLDER is a copy of the repository sitar-lab/NeuSight (MIT), or any folder that holds files named as its own are:
`dataset*/{train,test}/collect/<op>/<torch version>/<device>.csv`, one row a measured op. OPS then holds
`gemm_fp32.csv.gz` and `rowwise_fp32.csv.gz` for `validation.fit_gemm --ops` and `validation.fit_kernels --ops`. These
are times of single ops; the repository's end-to-end labels are not read.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PRODUCTS = ("linear", "bmm")
ROWWISE = ("ln", "softmax", "gelu", "relu", "tanh", "pow", "powu", "add", "addu", "mul", "mulu", "div", "divu")
NAME_LENGTH = 60  # characters of a kernel's name that are kept: its tile is among them
LONGEST = 2**20  # characters of a cell: kernels' full names are long


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m validation.neusight_ops", description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the repository's files")
    parser.add_argument("--devices", nargs="+", required=True, help="names of files without .csv")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two tables")
    args = parser.parse_args(arguments)
    try:
        counts = convert(args.checkout, args.devices, args.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{counts[0]} products and {counts[1]} row-wise ops written to {args.out}", file=sys.stderr)
    return 0


def convert(checkout: Path, devices: Sequence[str], out: Path) -> tuple[int, int]:
    """Writes both tables; their numbers of rows. ValueError where a device has no file."""
    products, rows = [], []
    for device in devices:
        files = sorted(checkout.rglob(f"collect/*/*/{device}.csv"))
        if not files:
            raise ValueError(f"{checkout} holds no collect/<op>/<version>/{device}.csv; give a NeuSight checkout")
        for path in files:
            op, origin = path.parts[-3], path.parts[-5]
            if op in PRODUCTS:
                products += list(_products(path, op, origin))
            elif op in ROWWISE:
                rows += list(_rowwise(path, op))
    out.mkdir(parents=True, exist_ok=True)
    head = ("op", "device", "latency_ms", "B", "M", "N", "K", "kernel_name", "origin")
    _write(out / "gemm_fp32.csv.gz", head, products)
    _write(out / "rowwise_fp32.csv.gz", ("op", "device", "latency_ms", "rows", "cols"), rows)
    return len(products), len(rows)


def _products(path: Path, op: str, origin: str) -> Iterator[tuple[str, ...]]:
    for row in _read(path):
        name = row["Kernel Name"]
        at = name.find("_MT") + 1  # rocBLAS: the tile follows MT
        kept = name[at : at + NAME_LENGTH]
        yield op, row["Device"], row["Latency"], row["B"], row["M"], row["N"], row["K"], kept, origin


def _rowwise(path: Path, op: str) -> Iterator[tuple[str, ...]]:
    for row in _read(path):
        yield op, row["Device"], row["Latency"], row["B"], row["H"]


def _read(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(LONGEST)
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
