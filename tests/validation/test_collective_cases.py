"""Published sweeps: words become clusters, scores are computed without the sweep that is scored."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from costmodels import gloo
from costmodels.cluster import load_cluster
from costmodels.collectives import collective_price
from costmodels.nccl import price
from costmodels.nccl_fabric import group_of
from costmodels.nccl_law import Laws, curve, laws_data, laws_from, shipped
from parplan.cli import main
from validation import collective_score
from validation.collective_cases import Sweep, catalogue_sweeps, setup_of
from validation.collective_score import is_same, read_sweeps, score, score_file, without
from validation.collective_table import group_on
from validation.collective_tcp import in_sample, tcp_points
from validation.fit_collectives import fit, points_of

HEADER = "config_id,gpu,num_gpus,num_nodes,interconnect,collective,bytes,time_us,busbw_GBps,source,notes\n"
TCP = "config_id,backend,hardware,num_nodes,gpus_per_node,delay_ms,bandwidth_gbps,collective,bytes,time_us\n"


def sweep(gpu: str, gpus: int, nodes: int, wires: str, kind: str = "all_reduce", notes: str = "") -> Sweep:
    return Sweep("x", gpu, gpus, nodes, wires, kind, (1e6,), (1e-4,), "", notes)


@pytest.fixture(scope="module")
def known() -> list[Sweep]:
    return catalogue_sweeps()


# -- words to clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "ports", "rate", "network"),
    [
        ("8x400Gb NDR InfiniBand CX7 + NVLink5", 8, 50e9, "InfiniBand"),
        ("32x100Gb EFAv2 + NVLink4", 32, 12.5e9, "EFA"),
        ("8x ionic 400Gb RoCE + xGMI", 8, 50e9, "RoCE"),
        ("NVLink2 + 100G IB (1 NIC-class)", 1, 12.5e9, "InfiniBand"),
        ("200G RoCE, 1 GPU/node", 1, 25e9, "RoCE"),
        ("RoCE/IB (k8s, ~4 NIC-class)", 4, 50e9, "RoCE"),
        ("PCIe Gen5 switch (CX8 as switch) + 400G-class RoCE, no NVLink", 8, 50e9, "RoCE"),
    ],
)
def test_networks_are_read_from_words(words: str, ports: int, rate: float, network: str) -> None:
    link = setup_of(sweep("H100 SXM5 80GB", 16, 2, words)).cluster.inter
    assert (link.ports, link.bandwidth, link.name) == (ports, rate, network)


def test_setups_say_algorithm_host_time_and_wires() -> None:
    forced = setup_of(sweep("H200 SXM 141GB", 8, 1, "NVLink4/NVSwitch", notes="NCCL algorithm ring (NVLS off)"))
    assert forced.algorithm == "ring" and forced.host == 0 and forced.cluster.intra.bandwidth == 4.5e11
    bench = setup_of(sweep("A100 SXM4 80GB", 8, 1, "NVLink3", notes="measured with torch all_reduce_bench.py"))
    assert bench.host > 0 and bench.algorithm == ""
    staged = sweep("GeForce RTX 4090", 2, 1, "PCIe, no P2P (host-staged SHM)", notes="GPUs at PCI 0x1a/0x1b")
    apart = staged._replace(notes="GPUs at PCI 0x1a/0x3d")
    assert setup_of(staged).cluster.fabric == "pcie"
    assert setup_of(apart).cluster.intra.bandwidth > 1.5 * setup_of(staged).cluster.intra.bandwidth
    lone = setup_of(sweep("H100 (variant not stated)", 2, 2, "4 NICs/node, NCCL_ALGO=Tree"))
    assert lone.algorithm == "tree" and lone.ranks == (0, 8)


@pytest.mark.parametrize(
    ("gpu", "gpus", "words", "wires", "port"),
    [
        ("A100 PCIe", 2, "NVLink bridge", "nvlink", 300e9),
        ("H100 NVL", 2, "NVLink bridge", "nvlink", 300e9),
        ("RTX A6000", 2, "NVLink bridge, PCIe Gen4", "nvlink", 56.25e9),
        ("GeForce RTX 3090", 2, "NVLink3", "nvlink", 56.25e9),
        ("A100 PCIe 80GB", 4, "NVLink bridges over pairs", "pci", 31.5e9),
        ("H100 NVL", 8, "NVLink bridges over pairs, PCIe Gen5", "pci", 64e9),
        ("GeForce RTX 3090", 4, "NVLink bridges over pairs", "host", 32e9),
        ("Tesla V100 PCIe 32GB", 2, "NVLink bridge", "pci", 15.75e9),
        ("A100 PCIe 80GB", 2, "PCIe Gen4, no NVLink bridge", "pci", 32e9),
        ("Tesla V100 SXM2 16GB", 2, "NVLink2 hybrid cube mesh", "nvlink", 25e9),
        ("Tesla V100 SXM2 16GB", 4, "NVLink2 hybrid cube mesh", "nvlink", 100e9),
        ("Tesla V100 SXM2 16GB", 8, "NVLink2 hybrid cube mesh", "nvlink", 150e9),
        ("Tesla V100 SXM2 16GB", 4, "NVLink2", "nvlink", 150e9),
    ],
)
def test_bridges_join_pairs_and_cube_meshes_have_their_wires(
    gpu: str, gpus: int, words: str, wires: str, port: float
) -> None:
    setup = setup_of(sweep(gpu, gpus, 1, words))
    group = group_of(setup.cluster, setup.ranks)
    assert group.wires == wires and group.port == pytest.approx(port, rel=0.01)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (sweep("Mystery 9", 16, 2, "a wire"), "does not say"),
        (sweep("H100 SXM5 80GB", 16, 2, "Ethernet"), "does not say how fast"),
        (sweep("H100 SXM5 80GB", 16, 2, "8x400Gb IB", "scan"), "'scan' is no known collective; use one of"),
        (sweep("H100 SXM5 80GB", 16, 2, "8x400Gb IB", "Barrier"), "no bytes to sweep"),
        (sweep("H100 SXM5 80GB", 15, 2, "8x400Gb IB"), "equally spread"),
        (sweep("H100 SXM5 80GB", 1, 1, "NVLink4"), "two or more"),
    ],
)
def test_what_cannot_be_priced_says_why(case: Sweep, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        setup_of(case)


@pytest.mark.parametrize(
    ("gpu", "gpus", "nodes", "words", "rate"),
    [
        ("L40S", 4, 1, "PCIe 4.0 no p2p", 0), ("L40S", 4, 1, "PCIe 4.0, P2P disabled", 0),
        ("L40S", 4, 1, "PCIe 4.0", 32e9),
        ("T4", 4, 1, "PCIe 3.0 x8", 8e9), ("T4", 4, 1, "PCIe 3.0 x16", 16e9), ("A800", 8, 1, "NVLink 400GB/s", 200e9),
        ("A100 SXM4 80GB", 8, 1, "NVLink3 300 GB/s", 150e9), ("A100 SXM4 80GB", 8, 1, "NVLink3 600GB/s", 300e9),
    ],
)  # fmt: skip
def test_lanes_rates_and_denied_peers_are_read(gpu: str, gpus: int, nodes: int, words: str, rate: float) -> None:
    setup = setup_of(sweep(gpu, gpus, nodes, words))
    if rate:
        assert setup.cluster.intra.bandwidth == rate
    else:
        assert group_of(setup.cluster, setup.ranks).wires == "host"


def test_a_rack_has_the_nics_of_its_trays() -> None:
    two, many = (setup_of(sweep("GB200", 144, nodes, "NVL72")).cluster for nodes in (2, 36))
    rates = [c.inter.bandwidth * c.inter.ports * c.nodes for c in (two, many)]
    assert rates[0] == rates[1] == 144 * 50e9


# -- scoring ---------------------------------------------------------------------------------------------------


def test_a_sweep_is_scored_without_its_own_points(known: list[Sweep]) -> None:
    """Points of the scored sweep may say anything: its prediction stays the same."""
    target = next(s for s in known if s.config_id == "B200-8g1n-RS")
    laws = without(known, [target.config_id])
    nonsense = [s._replace(seconds=tuple(t * 7 for t in s.seconds)) if s == target else s for s in known]
    again = without(nonsense, [target.config_id])
    assert score(target, laws).predicted == score(target, again).predicted
    points = points_of(nonsense)
    seen = fit(points, np.ones(len(points.sizes), bool))
    assert score(target, seen).predicted != pytest.approx(score(target, laws).predicted, rel=0.02)


def test_known_sweeps_are_recognised_by_name_or_by_points(known: list[Sweep]) -> None:
    one = known[0]
    assert is_same(one, one._replace(config_id="renamed"))
    assert is_same(one, one._replace(config_id="part", bytes=one.bytes[:2], seconds=one.seconds[:2]))
    assert not is_same(one, one._replace(config_id="other", seconds=tuple(1.01 * t for t in one.seconds)))
    assert not is_same(one, one._replace(config_id="other", num_gpus=4))


def test_the_shipped_constants_are_what_the_fit_of_the_catalogue_gives(known: list[Sweep]) -> None:
    points = points_of(known)
    fitted = fit(points, np.ones(len(points.sizes), bool))
    assert set(fitted.values) == set(shipped().values) and fitted.rows == shipped().rows
    for name, value in shipped().values.items():
        assert fitted.values[name] == pytest.approx(value, rel=0.03), name
    back = laws_from(laws_data(replace(fitted, errors={"other": (0.1, 0.2, 0.3)})))
    assert back.values["family.hopper.nvls"] == pytest.approx(fitted.values["family.hopper.nvls"], rel=1e-3)
    assert back.curves.keys() == fitted.curves.keys() and back.errors["other"] == (0.1, 0.2, 0.3)


def test_the_fit_finds_a_family_that_is_slower() -> None:
    """Times made by the law itself, with wires at nine tenths: the fit moves that family's rate and no other's."""
    sizes = tuple(2.0**k for k in range(10, 34))

    def made(name: str, gpu: str, share: float) -> Sweep:
        found = sweep(gpu, 8, 1, "NVLink", "all_gather")._replace(config_id=name, bytes=sizes, seconds=(1.0,) * 24)
        setup = setup_of(found)
        wires = replace(setup.cluster.intra, bandwidth=setup.cluster.intra.bandwidth * share)
        cluster = replace(setup.cluster, intra=wires, cache={})
        prices = (collective_price(cluster, "all_gather", n, setup.ranks, laws=shipped()).seconds for n in sizes)
        return found._replace(seconds=tuple(prices))

    def fitted(share: float) -> tuple[Laws, Sweep]:
        slow = [made(f"a{i}", "A100 SXM4 40GB", share) for i in range(8)]
        points = points_of([*slow, made("h", "H100 SXM5 80GB", 1.0)])
        return fit(points, np.ones(len(points.sizes), bool)), slow[0]

    (slow, one), (plain, _) = fitted(0.9), fitted(1.0)
    moved = {name: slow.values[name] / plain.values[name] for name in ("family.ampere.inside", "family.hopper.inside")}
    assert moved["family.ampere.inside"] < 0.96 and moved["family.hopper.inside"] == pytest.approx(1.0, abs=0.02)
    assert abs(score(one, slow).errors[-6:]).max() < 0.03 < abs(score(one, plain).errors[-6:]).max()


def test_what_an_exchange_loses_is_learned_for_each_vendor() -> None:
    """Exchanges at half the NICs' rate on two and four nodes; eight are met, another vendor learns nothing."""
    sizes = tuple(2.0 ** np.arange(28, 33))
    made = Laws({"common.across": 0.92, "all_to_all.nvidia": 0.5})
    setups = [(nodes, setup_of(_exchange(nodes, sizes, sizes))) for nodes in (2, 4, 8)]
    times = [[price(s.cluster, s.kind, b, group_of(s.cluster, s.ranks), made)[0] for b in sizes] for _, s in setups]
    sweeps = [_exchange(n, sizes, tuple(t)) for (n, _), t in zip(setups, times, strict=True)]
    points = points_of(sweeps)
    laws = fit(points, points.owner < 2)
    assert laws.values["all_to_all.nvidia"] == pytest.approx(0.5, abs=0.05)
    assert "all_to_all.amd" not in laws.values
    assert np.abs(score(sweeps[2], laws).errors).max() < 0.1  # the largest was not in the fit


def _exchange(nodes: int, sizes: tuple[float, ...], seconds: tuple[float, ...]) -> Sweep:
    wires = "8x400Gb NDR InfiniBand + NVLink4"
    return Sweep(f"n{nodes}", "H100 SXM5 80GB", 8 * nodes, nodes, wires, "all_to_all", sizes, seconds)


def test_families_share_what_they_have_in_common_between_hosts(known: list[Sweep]) -> None:
    """Without any sweep of a family its curve is that of all others, shrunk; on one node nothing is passed on."""
    points = points_of(known)
    laws = fit(points, np.array([g.family != "ampere" for g in points.groups])[points.owner])
    assert ("ampere", "many", "all_reduce") not in laws.curves and ("other", "one", "all_reduce") not in laws.curves
    setup = setup_of(next(s for s in known if s.config_id == "A100-16g2n-AR-b"))
    group = group_of(setup.cluster, setup.ranks)
    sizes = 2.0 ** np.arange(10, 30)
    x, y = laws.curves[("other", "many", "all_reduce")]
    np.testing.assert_allclose(curve(laws, group, "all_reduce", sizes), np.exp(np.interp(np.arange(10, 30), x, y)))
    assert 0.01 < np.abs(y).max() < 0.4
    # A family that has sweeps keeps its own, which differs.
    assert not np.allclose(laws.curves[("hopper", "many", "all_reduce")][1], y, atol=0.01)


def test_rings_and_nvls_of_the_catalogue_are_told_apart(known: list[Sweep]) -> None:
    """Each within 10 % without its own points; the other algorithm's time would be 20 to 30 % off."""
    chosen = [s for s in known if re.search("NCCL algorithm (nvls|ring)", s.notes) and s.collective == "all_reduce"]
    assert len(chosen) >= 8
    for one in chosen:
        laws = without(known, [one.config_id])
        assert abs(score(one, laws).errors).max() < 0.1, one.config_id


def test_files_are_scored_and_leftovers_listed(tmp_path: Path, known: list[Sweep]) -> None:
    path = tmp_path / "cases.csv"
    rows = [
        "new,H200 SXM 141GB,8,1,NVLink4/NVSwitch,all_reduce,1073741824,4000,0,s,n",
        "new,H200 SXM 141GB,8,1,NVLink4/NVSwitch,all_reduce,1024,20,0,s,n",
        f"{known[0].config_id},{known[0].gpu},8,1,NVLink5,all_reduce,1048576,30,0,s,n",
        "odd,Mystery 9,16,2,a wire,all_reduce,1024,20,0,s,n",
        "broken,H200 SXM 141GB,8,1,NVLink4,all_reduce,many,20,0,s,n",
        "endless,H200 SXM 141GB,inf,1,NVLink4,all_reduce,1024,20,0,s,n",
        "halves,H200 SXM 141GB,8.5,1,NVLink4,all_reduce,1024,20,0,s,n",
        "nothing,H200 SXM 141GB,8,1,NVLink4,all_reduce,1024,nan,0,s,n",
        " ,H200 SXM 141GB,8,1,NVLink4,all_reduce,1024,20,0,s,n",
        f" {known[0].config_id} ,{known[0].gpu},8,1,NVLink5,All-Reduce,2097152,40,0,s,n",
    ]
    path.write_text(HEADER + "\n".join(rows) + "\n")
    scored, skipped = score_file(path)
    assert {s.config_id: s.constants for s in scored} == {"new": "shipped", known[0].config_id: "left out"}
    reasons = {"odd": "does not say", "broken": "bytes is 'many'", "endless": "num_gpus is 'inf'",
               "halves": "num_gpus is '8.5'", "nothing": "time_us is 'nan'", "": "config_id is blank"}  # fmt: skip
    assert skipped.keys() == reasons.keys() and all(said in skipped[name] for name, said in reasons.items())
    assert scored[1].bytes == (2**20, 2**21)  # one name, two spellings of the collective
    data = collective_score.result(scored, skipped)
    new = data["configs"][0]
    small, large, summary = new["under_256KiB"], new["over_16MiB"], data["summary"]
    assert new["mape"] == pytest.approx((small["mape"] + large["mape"]) / 2) and "256KiB_16MiB" not in new
    assert [summary[band]["n"] for band in ("under_256KiB", "256KiB_16MiB", "over_16MiB")] == [1, 2, 1]
    assert summary["mape"] == pytest.approx(np.abs(np.concatenate([s.errors for s in scored])).mean())
    assert read_sweeps(path)[0][0].bytes == (1024, 1073741824)


# gloo's all_reduce on four p3.2xlarge of AWS: delay in ms, Gbit/s (0: not shaped), bytes, microseconds. Source: GitHub
# BinhangYuan/tc_cluster_setting, results/allreduce.md; the whole sweep.
GLOO_SWEEP = (
    (0, 0, 2**27, 327e3), (0, 0, 2**28, 657e3), (1, 5, 2**27, 485e3), (1, 5, 2**28, 959e3),
    (5, 2, 2**27, 1517e3), (5, 2, 2**28, 2989e3), (10, 1, 2**27, 2993e3), (10, 1, 2**28, 5909e3),
)  # fmt: skip


def test_tcp_files_are_scored_by_formula(tmp_path: Path) -> None:
    path = tmp_path / "tcp.csv"
    sweep = "".join(f"g,gloo,AWS,4,1,{ms},{rate},all_reduce,{n},{us:.0f}\n" for ms, rate, n, us in GLOO_SWEEP)
    path.write_text(
        TCP
        + sweep
        + "n,nccl,AWS,8,1,10,1,all_reduce,134217728,1940000\n"
        + "p,nccl,AWS,8,1,10,1,ps_central,268435456,5870000\n"
        + "m,mpi,AWS,8,1,10,1,all_reduce,134217728,1940000\n"
    )
    scored, skipped = score_file(path)
    errors = {s.config_id: np.abs(s.errors) for s in scored}
    assert len(errors["g"]) == 8 and errors["g"].mean() < 0.03 and errors["g"].max() < 0.04
    assert errors["n"].max() < 0.03 and errors["p"].max() < 0.25
    assert "mpi" in skipped["m"]


def test_configurations_that_gave_a_constant_are_in_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The window of a flow comes from the sweep of sends, so that sweep is in sample; the same rows of another campaign
    are not, nor is a broadcast, whose formula has no constant."""
    path = tmp_path / "tcp.csv"
    rows = {
        "own": ("gloo,AWS p3.2xlarge,2", "10,0,sendrecv,67108864,532000", "in sample"),
        "other": ("gloo,my cloud,2", "10,0,sendrecv,67108864,532000", "formula"),
        "tree": ("gloo,AWS p3.2xlarge,4", "1,5,broadcast,134217728,674000", "formula"),
        "step": ("nccl,AWS p3.2xlarge,4", "1,5,all_reduce_step,268435456,800000", "formula"),
        "socket": ("nccl,AWS p3.2xlarge,8", "10,1,all_reduce,134217728,1940000", "in sample"),
    }
    path.write_text(TCP + "".join(f"{name},{where},1,{what}\n" for name, (where, what, _) in rows.items()))
    assert main(["collectives", "--cases", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {c["config_id"]: c["constants"] for c in data["configs"]} == {name: row[2] for name, row in rows.items()}
    summary = data["summary"]
    seen, unseen = summary["in_sample"], summary["out_of_sample"]
    assert (seen["n"], unseen["n"]) == (2, 3) and summary["mape"] == pytest.approx(
        (2 * seen["mape"] + 3 * unseen["mape"]) / 5
    )
    assert (tmp_path / "out" / "points.csv").read_text().count(",in sample") == 2
    assert main(["collectives", "--cases", str(path)]) == 0
    text = capsys.readouterr().out
    assert "points out of sample" in text and "in sample: formulas with a constant" in text and "tuner:" not in text


@pytest.mark.parametrize(("constant", "moved"), [
    ("LATENCY_SHARE", {("gloo", "all_reduce", 4)}),
    ("REDUCE_LATENCY_SHARE", {("gloo", "reduce", 8)}),
    ("SOCKET_SHARE", {("nccl", "all_reduce", 8), ("nccl", "broadcast", 16), ("nccl", "reduce", 4)}),
    ("SOCKET_STARTS", {("nccl", "broadcast", 16), ("nccl", "reduce", 4)}),
])  # fmt: skip
def test_constants_taken_from_rows_price_only_what_is_in_sample_or_nccl(
    constant: str, moved: set[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which constant moves which price, found by moving it: what no constant moves is out of sample."""
    groups = [("gloo", "all_reduce", 4), ("gloo", "reduce", 8), ("gloo", "broadcast", 4), ("gloo", "broadcast", 8),
              ("nccl", "all_reduce", 8), ("nccl", "broadcast", 16), ("nccl", "reduce", 4)]  # fmt: skip

    def prices() -> list[float]:
        rows = [
            {"backend": b, "collective": kind, "num_nodes": str(n), "delay_ms": "5", "bandwidth_gbps": "2",
             "bytes": "1e8", "time_us": "1e6", "hardware": "AWS p3.2xlarge"} for b, kind, n in groups
        ]  # fmt: skip
        assert {g for g, row in zip(groups, rows, strict=True) if not in_sample(row)} == {
            ("gloo", "broadcast", 4), ("gloo", "broadcast", 8)
        }  # fmt: skip
        return [tcp_points([row])[2][0] for row in rows]

    before = prices()
    monkeypatch.setattr(gloo, constant, 0.9 * getattr(gloo, constant))
    changed = {g for g, a, b in zip(groups, before, prices(), strict=True) if a != b}
    assert changed == moved


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_prints_scores_and_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(HEADER + "new,H200 SXM 141GB,8,1,NVLink4/NVSwitch,all_reduce,1073741824,4000,0,s,n\n")
    assert main(["collectives", "--cases", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["configs"][0]["config_id"] == "new" and 0 <= data["configs"][0]["mape"] < 0.2
    assert data["summary"]["n"] == 1 and data["skipped"] == []
    assert (tmp_path / "out" / "scatter.png").stat().st_size > 10000
    assert (tmp_path / "out" / "points.csv").read_text().count("\n") == 2


def test_the_command_prices_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "bus.png"
    words = ["collectives", "--cluster", "dgx-h200", "--op", "all_reduce", "--out", str(picture), "--json"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    last = data["rows"][-1]
    assert last["algorithm"] == "nvls" and last["busbw"] == pytest.approx(1.75 * last["algbw"])
    assert last["interval"][0] < last["seconds"] < last["interval"][1]
    assert "H200-8g1n-AR-c" in data["measured"] and picture.stat().st_size > 10000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either --cases"),
        (["--cluster", "dgx-h200", "--ranks", "9"], "--ranks between 2 and 8"),
        (["--cluster", "dgx-h200", "--op", "sum"], "no known collective; use one of all_reduce, "),
        (["--cluster", "dgx-h200", "--op", "send", "--ranks", "8"], "a send has two ends, not 8"),
        (["--cluster", "dgx-h200", "--op", "barrier", "--out", "x.png"], "leave --out out"),
        (["--cluster", "dgx-a100", "--algorithm", "nvls"], "nvls is no algorithm of all_reduce among 8 ranks"),
        (["--cluster", "tpu-v5e-pod", "--algorithm", "ring"], "(a torus); use torus"),
        (["--cluster", "dgx-h100", "--op", "all_to_all", "--algorithm", "tree"], "; use pairwise"),
        (["--cluster", "local", "--algorithm", "nvls"], "(gloo); use one of ring"),
        (["--cluster", "tpu-v4-cube", "--backend", "gloo"], "is a torus"),
        (["--cluster", "local", "--backend", "nccl"], "use gloo"),
        (["--cases", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collectives", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_any_spelling_of_a_collective_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for op in ("reduce_scatter", "ReduceScatter", "reduce-scatter", "reduce_scatter_tensor", "reduce_scatter_perf"):
        assert main(["collectives", "--cluster", "dgx-h200", "--op", op, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["op"] == "reduce_scatter" and all(data == found[0] for data in found)


def test_a_barrier_has_one_time(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = load_cluster("2x dgx-h100")
    assert len({collective_price(cluster, "barrier", n, range(16)).seconds for n in (0.0, 8.0, 2.0**30)}) == 1
    assert main(["collectives", "--cluster", "2x dgx-h100", "--op", "barrier", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["rows"]
    assert only["bytes"] == 0 and only["interval"][0] < only["seconds"] < only["interval"][1]


def test_one_device_has_no_group() -> None:
    lone = replace(load_cluster("dgx-h100"), devices_per_node=1, cache={})
    with pytest.raises(ValueError, match="a collective needs two devices"):
        group_on(lone, None)


def test_a_folder_takes_the_picture_and_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["collectives", "--cluster", "dgx-h100", "--op", "all_gather", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    with (tmp_path / "out" / "all_gather.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(r["bytes"]) for r in written] == pytest.approx([r["bytes"] for r in rows], rel=1e-4)
    assert [float(r["high_seconds"]) for r in written] == pytest.approx([r["interval"][1] for r in rows], rel=1e-4)
    assert (tmp_path / "out" / "all_gather.png").exists()


def test_a_file_without_any_price_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(HEADER + "odd,Mystery 9,16,2,a wire,all_reduce,1024,20,0,s,n\n")
    assert main(["collectives", "--cases", str(path)]) == 2
    printed = capsys.readouterr()
    assert "No configuration of this file can be priced" in printed.out and printed.err.count("odd") == 1
