"""Tables of collectives on one node: rows become sweeps, and what they say becomes values and curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodels.collectives import collective_price
from costmodels.nccl_fabric import group_of
from costmodels.nccl_law import Laws, class_of, curve, laws_from, shipped_tables, table_curve
from validation import tables_nccl
from validation.collective_cases import Sweep, setup_of
from validation.fit_collectives import points_of, start
from validation.fit_nccl_tables import errors_of, fit_tables, smooth, tables_data
from validation.tables_nccl import table_sweeps, version_of

SIZES = tuple(2.0**k for k in range(9, 30))


def sweep(gpus: int, kind: str = "all_gather", gpu: str = "A100 SXM4 80GB", nodes: int = 1, notes: str = "") -> Sweep:
    name = f"{gpu}-{gpus}-{kind}{notes}"
    return Sweep(name, gpu, gpus, nodes, "NVLink", kind, SIZES, (1.0,) * len(SIZES), "", notes)


def made(one: Sweep, factor: Any = 1.0) -> Sweep:
    """The sweep with the times of the law alone (no tables), times a factor for each size."""
    setup = setup_of(one)
    prices = [collective_price(setup.cluster, setup.kind, n, setup.ranks, laws=Laws()).seconds for n in SIZES]
    return one._replace(seconds=tuple((np.array(prices) * factor).tolist()))


# -- rows to sweeps ----------------------------------------------------------------------------------------------


def test_rows_are_merged_over_versions_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians: of half and int8 where nothing is added, of half alone for sums; old versions and 8 L40S are left."""
    pd = pytest.importorskip("pandas")
    for system, version in (("h100_sxm", "2.23"), ("h100_sxm", "2.27.3"), ("h100_sxm", "2.29.2"), ("l40s", "2.27.3")):
        path = tmp_path / "data" / system / "comm" / "nccl" / version / "nccl_perf.parquet"
        path.parent.mkdir(parents=True)
        path.touch()

    def rows(path: Path) -> Any:
        late = {"2.23": 100.0, "2.27.3": 1.0, "2.29.2": 3.0}[path.parent.name]
        cells = [
            (kind, gpus, 1024.0, op, late + (kind == "int8") * 4)
            for kind in ("half", "int8") for gpus in (2, 8) for op in ("all_gather", "all_reduce")
        ]  # fmt: skip
        return pd.DataFrame(cells, columns=["nccl_dtype", "num_gpus", "bytes", "op_name", "seconds"])

    monkeypatch.setattr(tables_nccl, "_read", rows)
    found = {s.config_id: s for s in table_sweeps(tmp_path)}
    assert set(found) == {
        "h100_sxm-2g-all_gather", "h100_sxm-8g-all_gather", "h100_sxm-2g-all_reduce", "h100_sxm-8g-all_reduce",
        "l40s-2g-all_gather", "l40s-2g-all_reduce",
    }  # fmt: skip
    assert found["h100_sxm-8g-all_gather"].seconds == (4.0,) and found["h100_sxm-8g-all_reduce"].seconds == (2.0,)
    assert found["l40s-2g-all_gather"].num_nodes == 1 and "2.29.2" in found["h100_sxm-2g-all_reduce"].notes
    assert "2.23" not in found["h100_sxm-2g-all_reduce"].notes
    assert setup_of(found["l40s-2g-all_reduce"]).cluster.fabric == "pcie"


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no nccl_perf"):
        table_sweeps(tmp_path)
    assert version_of("2.9") < version_of("2.27.3") < version_of("2.29")


# -- curves ------------------------------------------------------------------------------------------------------


def test_the_curve_of_a_table_returns_what_the_law_lacks() -> None:
    """Times of the law itself but twice as long at 1 MiB, on 8 devices alone: that curve, and no other, rises there."""
    bump = 1 + np.exp(-((np.log2(SIZES) - 20) ** 2) / 4)
    points = points_of([made(sweep(2)), made(sweep(4)), made(sweep(8), bump)], Laws())
    laws = fit_tables(points, np.ones(len(points.sizes), bool))
    lines = laws.tables["ampere", "gather"]
    assert sorted(lines) == [2, 4, 8]
    at = {n: float(np.interp(20, *line)) for n, line in lines.items()}
    assert at[8] - at[4] == pytest.approx(np.log(2), abs=0.1) and abs(at[4] - at[2]) < 0.1
    errors = errors_of(points, laws, np.ones(len(points.sizes), bool))
    assert errors["all"]["n"] == 63 and errors["all"]["256KiB_16MiB"] < 0.06
    back = laws_from(tables_data(laws, errors))
    assert back.tables.keys() == laws.tables.keys() and back.values == pytest.approx(laws.values, abs=1e-5)
    assert np.allclose(back.tables["ampere", "gather"][8], lines[8], atol=1e-4)


def test_a_smooth_curve_trusts_many_points_more_than_one() -> None:
    x, owner = np.full(8, 20.0), np.arange(8)
    one, many = (np.interp(20.0, *smooth(x[:n], np.full(n, 0.2), owner[:n])) for n in (1, 8))
    assert 0.15 < one < many < 0.2
    assert smooth(np.array([9.0, 29.0]), np.zeros(2), np.arange(2))[0][[0, -1]].tolist() == [9.0, 29.0]


def test_table_curves_lie_between_their_ranks_on_one_node_only() -> None:
    knots = np.array([10.0, 30.0])
    known = {("hopper", "all_reduce"): {2: (knots, np.zeros(2)), 8: (knots, np.log([2.0, 4.0]))}}
    laws = Laws(tables=known)

    def at(gpus: int, nodes: int = 1, size: float = 2.0**10) -> float:
        setup = setup_of(sweep(gpus, "all_reduce", "H100 SXM5 80GB", nodes))
        return float(np.exp(table_curve(laws, group_of(setup.cluster, setup.ranks), setup.kind, np.array([size])))[0])

    assert at(2) == pytest.approx(1) and at(8) == pytest.approx(2) and at(4) == pytest.approx(2**0.5)
    assert at(8, size=2.0**40) == pytest.approx(4) and at(8, size=1.0) == pytest.approx(2)
    assert at(16, 2) == pytest.approx(1)
    setup = setup_of(sweep(8, "all_reduce", "H100 SXM5 80GB"))
    group = group_of(setup.cluster, setup.ranks)
    assert curve(laws, group, "all_reduce", np.array([1024.0]))[0] == pytest.approx(2)
    assert curve(laws, group, "all_reduce", np.array([1024.0]), "ring")[0] == 1  # the table holds NCCL's own choice
    assert curve(laws, group, "all_gather", np.array([1024.0]))[0] == 1


# -- what is shipped ---------------------------------------------------------------------------------------------


def test_shipped_tables_start_the_fit_of_their_families() -> None:
    base = shipped_tables()
    assert {f for f, _ in base.tables} == {"ampere", "hopper", "blackwell", "rtx-pcie5", "ada-pcie"}
    assert {c for _, c in base.tables} == {class_of(k) for k in ("all_reduce", "all_gather", "all_to_all")}
    mean, spread = start("family.hopper.hop", base)
    assert mean == pytest.approx(np.log(base.values["family.hopper.hop"]))
    assert spread < start("family.volta.hop", base)[1]
    assert start("network.ib.crossing", base) == start("network.ib.crossing", Laws())
    assert start("family.hopper.inside", base)[1] == start("family.hopper.inside", replace(base, values={}))[1]
