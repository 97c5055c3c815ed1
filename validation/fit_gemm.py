"""Fit the law of matrix products to half of every measured table, write the constants, score the other half.

    python -m validation.fit_gemm --tables FOLDER --ops FOLDER --out reports/gemm

`--tables` holds the unpacked wheel of kernel tables (`--download` fetches it there), `--ops` NeuSight's float32 table.
Constants go to `costmodels/catalogue/kernels`, one section per dtype; errors to CSV files below `--out`, from which
`validation.report_gemm` writes the page. Several runs with `--only DEVICE` add up. A further run with `--borrow` scores
what devices without tables get: each device by the constants of its nearest relative.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from costmodels import tomlfile
from costmodels.device import CATALOGUE, load_device
from costmodels.gemm import WIDE, borrowed_pricing, pricing_of, wide_of
from costmodels.gemm_correction import factors_of
from costmodels.gemm_law import constants_from, fastest, law_seconds, menu
from costmodels.relatives import measured, relatives
from validation.fit_gemm_law import Array, Fit, Mask, calibration_half, fit, in_table, predictions, section_values
from validation.table_clock import clock_scores
from validation.tables_gemm import Table, download, eager_tables, kernel_tables, library_rows

REGIONS = {"m < 64": (1, 64), "64 <= m < 512": (64, 512), "512 <= m < 1024": (512, 1024), "m >= 1024": (1024, 10**9)}
ALL_LARGE = "m, n, k >= 1024"
PACES = 1.5  # factor in the time of a large product up to which two campaigns of a device are taken to belong together
WORST = 6  # rows of each table that worst.csv shows


def main(arguments: list[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    args = _parser().parse_args(arguments)
    try:
        if args.download:
            download(args.tables)
        tables = [t for t in _tables(args.tables, args.ops) if not args.only or t.device in args.only]
        for table in tables if not args.borrow else []:
            _do(table, args.out)
        if args.tables:
            for device in sorted({t.device for t in tables if t.section == "bfloat16"}):
                _merge(args.out / "libraries.csv", _library_scores(args.tables, device), ["device"])
        for table in tables:
            if table.section.endswith("_batched"):
                _merge(args.out / "pace.csv", [_pace(table)], ["device", "section", "campaign"])
                clock = clock_scores(table, calibration_half(table.dims))
                _merge(args.out / "clock.csv", clock, ["device", "section", "campaign"])
            if args.borrow:
                _merge(args.out / "borrowed.csv", _borrowed_scores(table), ["device", "section", "campaign"])
            if args.borrow and table.campaign == "random":
                _merge(args.out / "below.csv", _below_scores(table), ["device", "section"])
            if args.borrow and table.section == "float32" and table.campaign == "models":
                _merge(args.out / "hull.csv", _outside_tables(table), ["shapes", "device"])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m validation.fit_gemm", description=__doc__)
    parser.add_argument("--tables", type=Path, help="folder of the unpacked aiconfigurator-core wheel")
    parser.add_argument("--download", action="store_true", help="fetch the wheel into --tables first")
    parser.add_argument("--ops", type=Path, help="folder with gemm_fp32.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("reports/gemm"), help="where the errors go")
    parser.add_argument("--only", nargs="*", default=[], help="devices to fit; all where it is left out")
    parser.add_argument(
        "--borrow", action="store_true", help="fit nothing; score each device by its nearest relative's kept constants"
    )
    return parser


def _tables(kernel_folder: Path | None, eager_folder: Path | None) -> Iterator[Table]:
    if kernel_folder is None and eager_folder is None:
        raise ValueError("there is nothing to fit; give --tables or --ops")
    if kernel_folder is not None:
        yield from kernel_tables(kernel_folder)
    if eager_folder is not None:
        yield from eager_tables(eager_folder)


def _do(table: Table, out: Path) -> None:
    """Fit and score one table, by both splits; keep the constants of the first."""
    begun = time.perf_counter()
    scores, worst = [], []
    for split in ("shape", "n, k"):
        mask = calibration_half(table.dims, by_pair=split != "shape")
        fitted = fit(table, mask)
        bare, corrected = predictions(fitted, table.dims)
        for law, seconds in (("bare", bare), ("corrected", corrected)):
            scores += _scores(table, ~mask, seconds, {"split": split, "law": law})
        if split == "shape":
            keep(table, fitted, mask)
            worst = _worst(table, ~mask, corrected)
    key = ["device", "section", "campaign"]
    _merge(out / "errors.csv", scores, key)
    _merge(out / "worst.csv", worst, key)
    error = next(s["mean"] for s in scores if s["law"] == "corrected")
    print(f"{table.device} {table.section} {table.campaign}: {len(table.dims)} rows, held-out {error:.1%}, "
          f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)  # fmt: skip


def keep(table: Table, fitted: Fit, mask: Mask) -> None:
    """Write the section of a table into the device's kernels file; that of a second campaign beside the first as the
    one that prices what lies below its range (`costmodels.gemm.WIDE`)."""
    path = CATALOGUE / "kernels" / f"{table.device}.toml"
    data: dict[str, Any] = tomlfile.read_toml(path) if path.is_file() else {}
    sections = data.setdefault("gemm", {})
    found, name = section_values(table, fitted, mask), table.section
    if table.campaign == "random" and "models" in sections.get(name, {}).get("data", ""):
        name += WIDE
        if not _same_pace(fitted, sections[table.section]):
            print(f"{table.device} {name}: left out, its long products run at another pace than the first table's")
            return
    sections[name] = found
    tomlfile.write_toml(path, data)


def _same_pace(fitted: Fit, first: dict[str, Any]) -> bool:
    """Whether a large product takes about the same time by a second campaign's law as by the first section (P4's takes
    3.1 times as long: its campaigns call different kernels)."""
    large = np.array([[1.0, 4096, 4096, 4096]])
    second = law_seconds(fitted.constants, fitted.hardware, fitted.menu, large)
    one = law_seconds(constants_from(first), fitted.hardware, menu(first["tiles"], first["splits"]), large)
    return bool(abs(np.log(second / one)).max() < np.log(PACES))


def _scores(table: Table, held: Mask, seconds: Array, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Errors of predictions per region: n, mean, median, 90th percentile of the absolute, and mean of the signed; and
    the share outside the range of the calibration half."""
    dims, error = table.dims[held], seconds[held] / table.seconds[held] - 1
    low, high = table.dims[~held].min(axis=0), table.dims[~held].max(axis=0)
    outside = ((dims < low) | (dims > high)).any(axis=1)
    rows = []
    regions = {"all": np.ones(len(dims), bool), ALL_LARGE: dims[:, 1:].min(axis=1) >= 1024}
    regions |= {name: (dims[:, 1] >= a) & (dims[:, 1] < b) for name, (a, b) in REGIONS.items()}
    for region, inside in regions.items():
        if inside.any():
            e = error[inside]
            rows.append({
                "device": table.device, "section": table.section, "campaign": table.campaign, **labels,
                "region": region, "n": len(e), "mean": float(abs(e).mean()), "median": float(np.median(abs(e))),
                "p90": float(np.quantile(abs(e), 0.9)), "bias": float(e.mean()),
                "outside": float(outside[inside].mean()),
            })  # fmt: skip
    return rows


def _worst(table: Table, held: Mask, seconds: Array) -> list[dict[str, Any]]:
    error = np.where(held, seconds / table.seconds - 1, 0.0)
    rows = []
    for i in np.argsort(-abs(error))[:WORST]:
        b, m, n, k = table.dims[i].astype(int).tolist()
        rows.append({"device": table.device, "section": table.section, "campaign": table.campaign, "batches": b,
                     "m": m, "n": n, "k": k, "measured_us": table.seconds[i] * 1e6, "predicted_us": seconds[i] * 1e6,
                     "error": error[i]})  # fmt: skip
    return rows


def _library_scores(folder: Path, device: str) -> list[dict[str, Any]]:
    """How far each library's own bfloat16 rows lie from the other libraries' rows of the same shapes, and from the
    corrected law on the held-out half."""
    found = {name: dict(zip(map(tuple, dims), s)) for name, (dims, s) in library_rows(folder, device).items()}
    pricing = borrowed_pricing(load_device(device), load_device(device), "bfloat16")
    rows = []
    for name, times in found.items():
        for other in (o for o in found if o > name):
            common = [d for d in times if d in found[other]]
            ratio = np.array([times[d] / found[other][d] for d in common])
            rows.append({"device": device, "library": name, "against": other, "n": len(common),
                         "mean": float(abs(ratio - 1).mean()), "bias": float((ratio - 1).mean())})  # fmt: skip
        dims = np.array(list(times))
        held = ~calibration_half(dims)
        law = law_seconds(pricing.constants, pricing.hardware, pricing.menu, dims[held])
        assert pricing.correction is not None, "a device's own section has a correction"
        error = law * factors_of(pricing.correction, dims[held]) / np.array(list(times.values()))[held] - 1
        rows.append({"device": device, "library": name, "against": "law", "n": len(error),
                     "mean": float(abs(error).mean()), "bias": float(error.mean())})  # fmt: skip
    return rows


def _pace(table: Table) -> dict[str, Any]:
    """How much the rate of products differs that differ in the number of batches only and take more than 1 ms: no law
    of shapes can say why. Mean and 90th percentile of the distance (ln) to the median of each (m, n, k)."""
    long = table.seconds > 1e-3
    frame = pd.DataFrame(table.dims[long, 1:], columns=["m", "n", "k"])
    frame["rate"] = np.log(table.dims[long].prod(axis=1) / table.seconds[long])
    groups = frame.groupby(["m", "n", "k"]).rate
    apart = abs(frame.rate - groups.transform("median"))[groups.transform("size") >= 3]
    return {"device": table.device, "section": table.section, "campaign": table.campaign, "n": len(apart),
            "mean": float(apart.mean()), "p90": float(apart.quantile(0.9))}  # fmt: skip


def _outside_tables(table: Table) -> list[dict[str, Any]]:
    """Share of real models' linear shapes that lie outside the range of each device's bfloat16 table."""
    rows = []
    for device in measured():
        section = device.kernels.get("gemm", {}).get("bfloat16")
        if section:
            inside = (table.dims >= np.array(section["low"])) & (table.dims <= np.array(section["high"]))
            rows.append({"shapes": table.data, "device": device.name, "n": len(table.dims),
                         "outside": float((~inside.all(axis=1)).mean())})  # fmt: skip
    return rows


def _borrowed_scores(table: Table) -> list[dict[str, Any]]:
    """Errors on the held-out half when the constants are the nearest relative's, without and with its correction."""
    mask = calibration_half(table.dims)
    device = load_device(table.device)
    near = next((d for d in relatives(device) if table.section in d.kernels.get("gemm", {})), None)
    if near is None:
        return []
    own = device.kernels["gemm"][table.section]
    host, issue = (float(own.get(name, 0.0)) for name in ("host_in_table", "issue_in_table"))
    pricing = borrowed_pricing(device, near, table.section)
    bare = law_seconds(pricing.constants, pricing.hardware, pricing.menu, table.dims)
    assert pricing.correction is not None, "every fitted section has a correction"
    rows = _scores(table, ~mask, in_table(bare, host, issue), {"split": "shape", "law": "bare", "from": near.name})
    corrected = in_table(bare * factors_of(pricing.correction, table.dims), host, issue)
    return rows + _scores(table, ~mask, corrected, {"split": "shape", "law": "corrected", "from": near.name})


def _below_scores(table: Table) -> list[dict[str, Any]]:
    """Errors on the held-out rows below the range of a device's first section: by that section, beyond its range, and
    by the wide one. Empty where a device has no second section."""
    device, batched = load_device(table.device), table.section.endswith("_batched")
    own = device.kernels["gemm"].get(table.section + WIDE)
    if own is None:
        return []
    dtype = table.section.removesuffix("_batched")
    first, wide = pricing_of(device, dtype, batched), wide_of(device, dtype, batched)
    assert first is not None and wide is not None, "the device has both sections"
    below = ~calibration_half(table.dims) & (table.dims < np.array(first.low)).any(axis=1)
    row: dict[str, Any] = {"device": table.device, "section": table.section, "n": int(below.sum())}
    for name, pricing in (("first", first), ("wide", wide)):
        kernel = fastest(pricing.law, pricing.candidates, table.dims[below])
        assert pricing.correction is not None, "a device's own section has a correction"
        kernel *= factors_of(pricing.correction, table.dims[below])
        error = in_table(kernel, own["host_in_table"], own["issue_in_table"]) / table.seconds[below] - 1
        row |= {f"{name}_mean": float(abs(error).mean()), f"{name}_bias": float(error.mean())}
    return [row]


def _merge(path: Path, rows: list[dict[str, Any]], key: list[str]) -> None:
    """Add rows to a CSV file in place of those with the same key."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pd.DataFrame(rows)
    if path.is_file():
        old = pd.read_csv(path)
        same = old.set_index(key).index.isin(new.set_index(key).index)
        new = pd.concat([old[~same], new])
    new.to_csv(path, index=False, float_format="%.5g")


if __name__ == "__main__":
    measured.cache_clear()
    sys.exit(main())
