"""`parplan collectives`: prices of collectives on a cluster, and how far they are from published measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import Json, check_file, refuse
from parplan.console import emit, number, percent, remark, seconds, show, size, table, working
from validation.report_files import check_writable, replacing

BANDS = (("under_256KiB", "under 256 KiB"), ("256KiB_16MiB", "256 KiB - 16 MiB"), ("over_16MiB", "over 16 MiB"))

LEGEND = {
    "shipped": "not in the catalogue, priced by its constants.",
    "formula": "published formulas of gloo and NCCL; no constant in them comes from this configuration.",
    "in sample": "formulas with a constant that was taken from rows of this very configuration; the error says how "
    "well the law describes the data, not how well it predicts.",
    "tuner": "nothing fitted.",
}


def collectives(
    cases: Annotated[
        Path | None,
        typer.Option(help="CSV of measured sweeps to compare with; docs/cases.md has the columns.", show_default=False),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", "-c", help="A cluster to price a collective on.", show_default=False)
    ] = None,
    op: Annotated[
        str | None,
        typer.Option(
            help="all_reduce, all_gather, reduce_scatter, broadcast, reduce, send, all_to_all, barrier.",
            show_default="all_reduce",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="The group: 8 (the first eight), 0,8,16 or 0-63:8; by default all.", show_default=False),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="nccl or gloo; by default the cluster's own.", show_default=False)
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Only this one (ring, tree, nvls, rabenseifner, ...).", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .png, or a folder for the picture and the numbers.", show_default=False)
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="With --cases: NCCL's own constants alone, nothing fitted.")
    ] = False,
    json: Json = False,
) -> None:
    """Price a collective over sizes, or compare predictions with published sweeps.

    Example: parplan collectives --cluster "2x dgx-h100" --op all_gather
    Example: parplan collectives --cluster "8x dgx-h100" --ranks 0-63:8
    Example: parplan collectives --cases examples/collectives_nccl.csv --out report
    """
    if (cases is None) == (cluster is None):
        raise ValueError("give either --cases with a CSV file or --cluster with a cluster")
    if out is not None:
        _check_out(out)
    if cases is not None:
        wanted = {"--op": op, "--ranks": ranks, "--algorithm": algorithm, "--backend": backend}
        refuse(wanted, "the file of --cases says what was measured; price one collective with --cluster")
        _score(cases, plain, out, json)
    elif cluster is not None:
        refuse({"--plain": plain}, "it leaves fitted constants out of a comparison with --cases; leave it out")
        _prices(cluster, backend, op or "all_reduce", ranks, algorithm or "", out, json)


def _check_out(out: Path) -> None:
    if out.suffix == ".png":
        check_file("--out", out)
    elif out.is_file() or (out.suffix and not out.is_dir()):
        raise ValueError(f"--out {out} is neither a .png nor a folder; give a name that ends in .png, or a folder's")
    else:
        check_writable(out)


def _score(cases: Path, plain: bool, out: Path | None, json: bool) -> None:
    with working() as progress:
        from validation.collective_plot import scatter
        from validation.collective_score import result, score_file

        scored, skipped = score_file(cases, progress, plain)
        data = result(scored, skipped)
        if out and scored:
            total = data["summary"]
            title = f"{cases.name}: {total['n']} points, mean error {total['mape']:.1%}"
            scatter(scored, title, _place(out, "scatter.png"))
            _points(scored, data, out)
    for row in data["skipped"]:
        remark(f"not priced: {row['config_id']}: {row['reason']}")
    emit(data) if json else _show_scores(data)
    if not scored:  # nothing to compare is no success
        raise typer.Exit(2)


def _points(scored: Any, data: dict[str, Any], out: Path) -> None:
    """points.csv and summary.json, where --out is a folder."""
    if out.suffix == ".png":
        return
    import json

    rows = [
        {"config_id": s.config_id, "bytes": int(b), "measured_us": m * 1e6, "predicted_us": p * 1e6, "error": p / m - 1,
         "way": way, "constants": s.constants}
        for s in scored
        for b, m, p, way in zip(s.bytes, s.measured, s.predicted, s.ways, strict=True)
    ]  # fmt: skip
    _csv(out / "points.csv", rows)
    (out / "summary.json").write_text(json.dumps(data, indent=1) + "\n")


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _place(out: Path, name: str) -> Path:
    return out if out.suffix == ".png" else out / name


def _show_scores(data: dict[str, Any]) -> None:
    if not data["configs"]:
        show("No configuration of this file can be priced.")
        return
    columns = ("configuration", "what", "constants", "points", "mean error", *(title for _, title in BANDS), "bias")
    rows = [(c["config_id"], c["what"], c["constants"], *_errors(c)) for c in data["configs"]]
    summary = data["summary"]
    titles = {
        "mean_of_configs": "mean of configurations", "median_of_configs": "median of configurations",
        "related": "relative measured", "unrelated": "no relative measured",
        "in_sample": "points in sample", "out_of_sample": "points out of sample",
    }  # fmt: skip
    rows.append(("all points", "", "", *_errors(summary)))
    rows += [(title, "", "", *_errors(summary[key])) for key, title in titles.items() if key in summary]
    show(table("Predicted against measured", columns, rows, left=3))
    if summary["left_out"]:
        show(f"left out: {summary['left_out']} configurations are in the catalogue; each was priced by constants that "
             "were fitted again without it.")  # fmt: skip
    if "related" in summary:
        show("relative measured: the fit had another configuration of the same family, class of collective and network "
             "at such sizes.")  # fmt: skip
    for constants in sorted({c["constants"] for c in data["configs"]} & LEGEND.keys()):
        show(f"{constants}: {LEGEND[constants]}")


def _errors(entry: dict[str, Any]) -> tuple[str, ...]:
    """Cells: points, mean error of all sizes and of each band, bias."""
    bands = (percent(entry[band]["mape"]) if band in entry else "" for band, _ in BANDS)
    bias = percent(entry["bias"], "+") if "bias" in entry else ""
    return str(entry.get("n", "")), percent(entry["mape"]), *bands, bias


def _prices(
    name: str, backend: str | None, op: str, ranks: str | None, algorithm: str, out: Path | None, json: bool
) -> None:
    from costmodels.cluster import load_cluster
    from costmodels.collectives import kind_named
    from costmodels.mixed_nodes import over
    from validation.collective_table import group_on, measured_on
    from validation.collective_table import table as prices

    op = kind_named(op)
    if out and op == "barrier":
        raise ValueError("a barrier carries no bytes, so that there is nothing to draw; leave --out out")
    cluster = over(load_cluster(name), backend)
    group = group_on(cluster, 2 if op == "send" and ranks is None else ranks)
    rows = prices(cluster, op, group, algorithm=algorithm)
    sweeps = measured_on(cluster, op, group) if cluster.backend == "nccl" else []
    title = f"{op} of {len(group)} ranks on {cluster.name} ({cluster.backend})"
    if out:
        with working():
            from validation.collective_plot import bandwidths

            bandwidths(rows, op, len(group), sweeps, title, _place(out, f"{op}.png"))
        if out.suffix != ".png":
            columns = ("bytes", "algorithm", "protocol", "seconds", "algbw", "busbw")
            ends = ({"low_seconds": low, "high_seconds": high} for low, high in (r["interval"] for r in rows))
            _csv(out / f"{op}.csv", [{c: r[c] for c in columns} | end for r, end in zip(rows, ends)])
    if json:
        emit({"cluster": cluster.name, "op": op, "ranks": len(group), "backend": cluster.backend, "rows": rows,
              "measured": [s.config_id for s in sweeps]})  # fmt: skip
        return
    cells = [
        (size(r["bytes"]), r["algorithm"], r["protocol"], seconds(r["seconds"]), number(r["algbw"], "B/s"),
         number(r["busbw"], "B/s"), f"{seconds(r['interval'][0])} - {seconds(r['interval'][1])}")
        for r in rows
    ]  # fmt: skip
    show(table(title, ("size", "algorithm", "protocol", "time", "algbw", "busbw", "interval"), cells, left=3))
    if sweeps:
        show(f"The catalogue has measured {', '.join(s.config_id for s in sweeps)}; --out draws them on top.")
