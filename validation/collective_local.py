"""gloo's collectives on this machine at sizes that calibration did not measure: predicted, then measured.

Three exams, each of a table of calibrated sizes and the interpolation between them (`costmodels.collectives`):

* in place: the table of the calibration file, whose prices are of calls after a round of work;
* plain: calls in a loop, as nccl-tests times them; a table of the same calibrated sizes is measured just before;
* interleaved: the same, but calibrated and tested sizes are measured in turn, pass by pass. The machine moves bytes at
  one speed now and at another a minute later (the table of "plain" is up to twice off at its own sizes by then), so
  this exam shows what the sizes between say, and the one before what waiting costs.

Predictions are written to the folder before the first of their sizes is measured; those of "interleaved" come from the
calibrated sizes alone. Times are brought to the pace of the calibration by the anchor beside every point; the report
says both. "interleaved" needs no pace.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.cluster import Cluster, CollectiveTable, local_cluster
from costmodels.collectives import collective_price
from costmodels.device import local_path
from validation.calibrate import run_ranks
from validation.calibrate_gloo import KINDS, SIZES, smoothed

# Geometric means of neighbouring calibrated sizes, one below the first, and two that are no powers of two.
TESTED = (1536, 11584, 92672, 524288, 1_500_000, 8 << 20, 12_345_678, 48 << 20)
NEAR = 0.10
PASSES = 4  # of the interleaved exam
WORKER = "validation.collective_local_worker"


def measured_rows(
    ranks: int, sizes: Sequence[int], how: Sequence[str], repeats: int, limit: float, passes: int = 1
) -> list[Any]:
    """Times all kinds at `sizes` among `ranks` ranks; a row's seconds are means over repetitions, the most over ranks.

    Row: kind, ranks, bytes, how, seconds (middle four fifths of the repetitions, as calibration takes them), anchor
    (mean over ranks), low and high (10th and 90th percentile), repeats, load.
    """
    kinds = [k for k in KINDS if k != "send" or ranks == 2]
    with tempfile.TemporaryDirectory(prefix="parplan-collectives-") as folder:
        job = {
            "ranks": ranks, "kinds": kinds, "sizes": list(sizes), "how": list(how), "repeats": repeats,
            "passes": passes, "store": str(Path(folder) / "store"), "timeout": limit, "until": time.time(),
        }  # fmt: skip
        results = run_ranks(job, Path(folder), lambda what, fraction: None, WORKER)
    rows = []
    for same in zip(*results):
        means = [_mean(r["seconds"]) for r in same]
        slowest = same[int(np.argmax(means))]
        low, high = np.quantile(slowest["seconds"], [0.1, 0.9]).tolist()
        rows.append({
            "kind": same[0]["kind"], "ranks": ranks, "bytes": same[0]["bytes"], "how": same[0]["how"],
            "seconds": max(means), "anchor": statistics.fmean(r["anchor"] for r in same), "low": low, "high": high,
            "repeats": len(slowest["seconds"]), "load": same[0]["load"],
        })  # fmt: skip
    return rows


def _mean(seconds: Sequence[float]) -> float:
    cut = len(seconds) // 10
    return max(statistics.fmean(sorted(seconds)[cut : len(seconds) - cut]), 2e-5)


def tables_of(rows: Sequence[dict[str, Any]], reference: float) -> tuple[CollectiveTable, ...]:
    """Tables from measured rows at the pace at which the anchor takes `reference` seconds (0: as measured)."""
    found = []
    for kind, ranks in dict.fromkeys((r["kind"], r["ranks"]) for r in rows):
        own = [r for r in rows if (r["kind"], r["ranks"]) == (kind, ranks)]
        sizes = tuple(float(r["bytes"]) for r in own)
        errors = [(r["high"] - r["low"]) / 2.56 / r["seconds"] / r["repeats"] ** 0.5 for r in own]
        seconds = tuple(smoothed(sizes, [at_pace(r, reference) for r in own], errors))
        found.append(CollectiveTable(kind, ranks, sizes, seconds, (1.0,) * len(own)))
    return tuple(found)


def at_pace(row: dict[str, Any], reference: float) -> float:
    """Seconds of a row when the anchor takes `reference` seconds."""
    return float(row["seconds"] * (reference / row["anchor"] if reference else 1.0))


def predictions(cluster: Cluster, ranks: int, how: str) -> list[dict[str, Any]]:
    """What the cluster's tables say of all kinds at the tested sizes."""
    rows = []
    for kind in (k for k in KINDS if k != "send" or ranks == 2):
        for size in TESTED:
            sent = max(size // 4 // ranks, 1) * ranks * 4
            price = collective_price(cluster, kind, sent, range(ranks))
            rows.append({
                "kind": kind, "ranks": ranks, "bytes": sent, "how": how, "predicted": price.seconds,
                "source": price.source, "expected_error": price.error,
            })  # fmt: skip
    return rows


def examine(ranks: int, calibration: Path, out: Path, repeats: int, how: Sequence[str]) -> list[dict[str, Any]]:
    """Predicts, measures, and writes `measured-RANKS.json`; rows with "predicted" and "error"."""
    from dataclasses import replace

    cluster = local_cluster(calibration)
    if not cluster.tables:
        raise ValueError(f"{calibration} holds no collectives; run parplan calibrate first, or name its file")
    reference = cluster.device.host.get("anchor_in_rank", 0.0)
    predicted, calibrated = [], []
    if "in place" in how:
        predicted += predictions(cluster, ranks, "in place")
    if "plain" in how:
        calibrated = measured_rows(ranks, SIZES, ["plain"], repeats, 150.0)
        loops = replace(cluster, tables=tables_of(calibrated, reference), cache={})
        predicted += predictions(loops, ranks, "plain")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"predicted-{ranks}.json").write_text(json.dumps(predicted, indent=1) + "\n")
    before = [h for h in how if h != "interleaved"]
    found = measured_rows(ranks, TESTED, before, repeats, 150.0) if before else []
    known = {(p["kind"], p["bytes"], p["how"]): p for p in predicted}
    rows = []
    for row in found:
        price = known[row["kind"], row["bytes"], row["how"]]
        paced = at_pace(row, reference)
        rows.append(row | price | {"at_pace": paced, "error": price["predicted"] / paced - 1})
    if "interleaved" in how:
        rows += interleaved(cluster, ranks, repeats)
    data = {"reference": reference, "cores": cluster.cores, "calibrated": calibrated, "rows": rows}
    (out / f"measured-{ranks}.json").write_text(json.dumps(data, indent=1) + "\n")
    return rows


def interleaved(cluster: Cluster, ranks: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the tested sizes, predicted from a table of the calibrated ones that were measured in turn with them."""
    from dataclasses import replace

    least = -(-repeats // PASSES)
    found = measured_rows(ranks, sorted((*SIZES, *TESTED)), ["plain"], least, 300.0, PASSES)
    tested = {p["bytes"] for p in predictions(cluster, ranks, "plain")}
    table = tables_of([r for r in found if r["bytes"] not in tested], 0.0)
    prices = predictions(replace(cluster, tables=table, cache={}), ranks, "interleaved")
    known = {(p["kind"], p["bytes"]): p for p in prices}
    rows = []
    for row in (r for r in found if r["bytes"] in tested):
        price = known[row["kind"], row["bytes"]]
        rows.append(row | price | {"at_pace": row["seconds"], "error": price["predicted"] / row["seconds"] - 1})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of predictions, measurements and report")
    parser.add_argument("--calibration", type=Path, default=None, help="device file (default: parplan calibrate's)")
    parser.add_argument("--ranks", default="2,3,4", help="group sizes; 0 writes the report of what the folder holds")
    parser.add_argument("--repeats", type=int, default=20, help="least repetitions of a point, 20 or more")
    parser.add_argument("--how", default="in place,plain,interleaved", help="exams")
    options = parser.parse_args()
    if options.repeats < 20:
        parser.error(f"--repeats is {options.repeats}; give 20 or more")
    for ranks in (int(r) for r in options.ranks.split(",")):
        if ranks:
            examine(ranks, options.calibration or local_path(), options.out, options.repeats, options.how.split(","))
    from validation.collective_local_report import write

    print(write(options.out))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
