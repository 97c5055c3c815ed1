"""Fit the laws of attention, convolution and memory-bound ops to tables of measured ops; score them on other shapes.

    python -m validation.fit_kernels --ops OPS --tables TABLES --out reports/kernels

OPS holds NeuSight's `conv_fp32.csv.gz` and `rowwise_fp32.csv.gz`; TABLES the unpacked aiconfigurator-core wheel
(parquet files, read with pyarrow). Half of all shapes, chosen by a hash, is fitted; errors are those of the other half.
Constants go to `costmodels/catalogue/kernels/<device>.toml`; nothing is fitted to training runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from validation.fit_attention import fit_attentions
from validation.fit_common import Fitted, write_sections
from validation.fit_conv import fit_convolutions
from validation.fit_report import write_report
from validation.fit_rowwise import fit_casts, fit_eager

COMMAND = "python -m validation.fit_kernels --ops OPS --tables TABLES --out reports/kernels"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, write the constants, and write the report. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        fits, algorithms = fit_all(options.ops, options.tables)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.keep:
        write_sections(fits)
    write_report(options.out, fits, algorithms, COMMAND, _commit())
    print(f"{len(fits)} sections fitted; {options.out / 'report.md'} written", file=sys.stderr)
    return 0


def fit_all(ops: Path | None, tables: Path | None) -> tuple[list[Fitted], pd.DataFrame]:
    """Every law that the given folders have data for, and how often each device's convolution algorithm was right."""
    if ops is None and tables is None:
        raise ValueError("there is nothing to fit; give --ops, --tables or both")
    fits: list[Fitted] = []
    algorithms = pd.DataFrame()
    if ops is not None:
        if not (ops / "rowwise_fp32.csv.gz").is_file():
            _check(ops, "conv_fp32.csv.gz", "rowwise_fp32.csv.gz")
        fits += fit_eager(ops)
        if (ops / "conv_fp32.csv.gz").is_file():  # a NeuSight checkout has none for AMD (`validation.neusight_ops`)
            convolutions, algorithms = fit_convolutions(ops)
            fits += convolutions
    if tables is not None:
        if not any(tables.rglob("context_attention_perf.parquet")):
            raise ValueError(f"{tables} holds no attention tables; give the folder of the unpacked wheel")
        if find_spec("pyarrow") is None:
            raise ValueError("these tables are parquet files; install pyarrow to read them")
        fits += fit_attentions(tables) + fit_casts(tables)
    return fits, algorithms


def _check(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not there; give the folder that holds it")


def _commit() -> str:
    """The short hash of the commit that runs, or "unknown" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m validation.fit_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", type=Path, help="folder of rowwise_fp32.csv.gz, and of conv_fp32.csv.gz where known")
    parser.add_argument("--tables", type=Path, help="folder of the unpacked aiconfigurator-core wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--keep", action="store_true", help="leave the constants in the catalogue as they are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
