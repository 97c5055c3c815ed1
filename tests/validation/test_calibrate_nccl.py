"""Collectives of a cluster measured under torchrun: the same sweep with gloo, two ranks, into a cluster file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from costmodels.cluster import CollectiveTable, load_cluster
from costmodels.collectives import collective_price
from parplan.cli_calibrate import calibrate as command
from validation.calibrate_nccl import KINDS, SIZES, calibrate_cluster, groups_of, store
from validation.environment import RANK_ENV

ROOT = Path(__file__).resolve().parents[2]


def test_groups_of_a_machine_and_of_several() -> None:
    assert groups_of(8, 8) == [(0, 1), (0, 1, 2, 3), tuple(range(8))]
    assert groups_of(6, 6) == [(0, 1), (0, 1, 2, 3), tuple(range(6))]
    assert groups_of(16, 8)[3:] == [(0, 8), tuple(range(16))]
    assert groups_of(2, 1) == [(0, 1)] and groups_of(1, 8) == []
    assert len(SIZES) == 8 and list(SIZES) == sorted(SIZES)


@pytest.mark.executed
def test_two_ranks_measure_and_store_a_cluster_file(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "mine.toml"
    call = f"main('dgx-h100', Path({str(out)!r}), 'gloo', (4096, 65536), 0.01)"
    code = f"from pathlib import Path; from validation.calibrate_nccl import main; {call}"
    ranks = []
    for rank in range(2):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {**os.environ, **RANK_ENV, **{k: str(v) for k, v in given.items()}, "MASTER_ADDR": "127.0.0.1"}
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks.append(subprocess.Popen([sys.executable, "-c", code], env={**env, "PYTHONPATH": str(ROOT)}))
    try:
        assert [p.wait(timeout=90) for p in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    cluster = load_cluster(out)
    assert {(t.kind, t.ranks, t.nodes) for t in cluster.tables} == {(kind, 2, 1) for kind in KINDS}
    assert cluster.device.name == load_cluster("dgx-h100").device.name
    for table in cluster.tables:
        price = collective_price(cluster, table.kind, 65536, (0, 1))
        assert price.source == "interpolated" and price.seconds == pytest.approx(table.seconds[-1])
    assert any("calibrate --cluster" in note for note in cluster.notes)


def test_tables_of_several_nodes_price_groups_just_like_them(tmp_path: Path) -> None:
    out = tmp_path / "two.toml"
    described = (ROOT / "costmodels/catalogue/clusters/dgx-h100.toml").read_text()
    source = tmp_path / "source.toml"
    source.write_text(described.replace("nodes = 1", "nodes = 2", 1))
    far = CollectiveTable("all_reduce", 2, (1e6, 1e8), (1e-3, 1e-1), (0.0, 0.0), 0.02, nodes=2)
    near = CollectiveTable("all_reduce", 2, (1e6, 1e8), (1e-4, 1e-2), (0.0, 0.0), 0.02)
    cluster = store(str(source), [far, near], out)
    assert collective_price(cluster, "all_reduce", 1e7, (0, 8)).seconds == pytest.approx(1e-2)
    assert collective_price(cluster, "all_reduce", 1e7, (0, 1)).seconds == pytest.approx(1e-3)
    assert collective_price(cluster, "all_reduce", 1e7, (0, 1, 8, 9)).algorithm != "measured"
    again = store(str(out), [far], out)
    assert len(again.tables) == 2, "tables of the same group are replaced"


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cluster = load_cluster("dgx-h100")
    with pytest.raises(ValueError, match="under torchrun"):
        calibrate_cluster(cluster)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="has 8 devices"):
        calibrate_cluster(cluster)
    with pytest.raises(ValueError, match="no single cluster file"):
        store("2x dgx-h100", [], tmp_path / "x.toml")
    with pytest.raises(ValueError, match="needs --out"):
        command(cluster="dgx-h100")
    with pytest.raises(ValueError, match="--backend is 'mpi'"):
        command(out=tmp_path / "x.toml", cluster="dgx-h100", backend="mpi")
