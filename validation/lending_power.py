"""What watts per FLOP say of the share of its peak that a measured board reaches, beside what its own table says.

    python -m validation.lending_power [--out FOLDER]

Every pair of devices with tables of products of one dtype whose watts are comparable (`costmodels.power.comparable`):
the share of its peak at 8192 x 8192 x 8192 by each one's own section, the ratio of both, and what `board_ratio` makes
of the lender's section. `power.csv` below `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from math import exp, log
from pathlib import Path
from statistics import fmean

import pandas as pd

from costmodels.gemm import gemm_price
from costmodels.ops import OpShape, peak_of
from costmodels.power import board_ratio, comparable, watts_per_flop
from costmodels.relatives import measured

EDGE = 8192
DTYPES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Pair:
    """watts, lent_watts: W for each TFLOP/s of the peak, of the device and of the lender. share, lent_share: of the
    peak. ratio: of these. said: what the watts say of it."""

    device: str
    lender: str
    dtype: str
    watts: float
    lent_watts: float
    share: float
    lent_share: float
    ratio: float
    said: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.lending_power", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for power.csv")
    options = parser.parse_args(arguments)
    found = list(pairs())
    for p in found:
        print(f"{p.device:20} from {p.lender:20} {p.dtype:9} {p.watts:5.2f} and {p.lent_watts:5.2f} W per TFLOP/s, "
              f"{p.share:4.2f} of {p.lent_share:4.2f}: ratio {p.ratio:4.2f}, said {p.said:4.2f}")  # fmt: skip
    said, one = off(found, True), off(found, False)
    print(f"{len(found)} pairs: off by a factor of {said:.2f} with the rule, {one:.2f} without")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(map(asdict, found)).to_csv(options.out / "power.csv", index=False, float_format="%.4g")
    return 0


def pairs() -> Iterator[Pair]:
    """All ordered pairs of measured devices with one dtype."""
    for dtype, width in DTYPES.items():
        owners = [d for d in measured() if dtype in d.kernels.get("gemm", {}) and d.tdp]
        size = width * EDGE * EDGE
        shape = OpShape("aten.mm.default", "forward", ((EDGE, EDGE),) * 2, ((EDGE, EDGE),), dtype,
                        2 * EDGE**3, 2 * size, size)  # fmt: skip
        shares = {}
        for d in owners:
            price = gemm_price(d, shape)
            assert price is not None, "it has a section of its own"
            shares[d.name] = shape.flops / price.seconds / peak_of(d, dtype)
        for device, lender in permutations(owners, 2):
            if comparable(device, lender, dtype):
                section = lender.kernels["gemm"][dtype]
                yield Pair(
                    device.name, lender.name, dtype, 1e12 * watts_per_flop(device, dtype),
                    1e12 * watts_per_flop(lender, dtype), shares[device.name], shares[lender.name],
                    shares[device.name] / shares[lender.name], board_ratio(device, lender, dtype, section),
                )  # fmt: skip


def off(found: Sequence[Pair], rule: bool) -> float:
    """By what factor the ratios are off in the (geometric) mean, as said or taken to be 1."""
    return exp(fmean(abs(log((p.said if rule else 1.0) / p.ratio)) for p in found))


if __name__ == "__main__":
    sys.exit(main())
