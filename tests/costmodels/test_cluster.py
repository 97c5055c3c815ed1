"""Clusters: catalogue, multiples, this machine, and broken files."""

from __future__ import annotations

from pathlib import Path

import pytest

from costmodels.cluster import CollectiveTable, list_clusters, load_cluster, local_cluster, tables_data
from costmodels.device import device_data, local_path, save_device
from costmodels.tomlfile import write_toml

GOOD = """
name = "box"
device = "a10g"
devices_per_node = 4
[intra]
name = "PCIe"
bandwidth = 2e10
latency = 1e-6
"""


def test_every_catalogue_cluster_loads() -> None:
    assert {"dgx-a100", "dgx-h100", "dgx-h200", "dgx-b200", "local"} <= set(list_clusters())
    for name in list_clusters():
        cluster = load_cluster(name)
        assert cluster.size >= 1 and cluster.intra.bandwidth > 0 and cluster.intra.latency >= 0
        assert (cluster.backend == "gloo") == (name == "local")


def test_a_count_multiplies_nodes() -> None:
    eight = load_cluster("8x dgx-h100")
    assert (eight.nodes, eight.size, eight.name) == (8, 64, "8x dgx-h100")
    assert load_cluster("2x 3x dgx-a100").nodes == 6
    assert [eight.node_of(r) for r in (0, 7, 8, 63, 64)] == [0, 0, 1, 7, 7]
    with pytest.raises(ValueError, match="1x or more"):
        load_cluster("0x dgx-h100")
    with pytest.raises(ValueError, match="dgx-h100"):
        load_cluster("dgx-z9")


def test_local_without_calibration_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster = load_cluster("local")
    assert cluster.cores == cluster.devices_per_node >= 1 and cluster.node_memory > 2**28
    assert "parplan calibrate" in " ".join(cluster.notes) and not cluster.device.calibrated


def test_local_uses_the_calibrated_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = CollectiveTable("all_reduce", 2, (1e3, 1e6), (1e-4, 1e-3), (0.5, 0.6))
    device = load_cluster("local").device
    data = device_data(device) | {
        "name": "mine",
        "loopback": {"name": "lo", "bandwidth": 3e9, "latency": 1e-4},
        "collectives": tables_data([table]),
    }
    write_toml(local_path(), data)
    cluster = load_cluster("local")
    assert cluster.device.name == "mine" and cluster.tables == (table,) and cluster.intra.bandwidth == 3e9
    assert local_cluster(local_path()).device.name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace('device = "a10g"', 'device = "nonesuch"'), ("nonesuch", "parplan devices")),
        (GOOD.replace("devices_per_node = 4", ""), ("'devices_per_node'", "missing")),
        (GOOD.replace("devices_per_node = 4", "devices_per_node = 2.5"), ("'devices_per_node'", "whole number")),
        (GOOD.replace("2e10", "0"), ("[intra]", "'bandwidth'", "bytes per second")),
        (GOOD[: GOOD.index("[intra]")], ("'intra'", "missing", "table")),
        ('backend = "mpi"\n' + GOOD, ("'backend'", "mpi", "gloo or nccl")),
        (
            GOOD + '[[collectives]]\nkind = "all_reduce"\nranks = 2\nbytes = [2, 1]\nseconds = [1, 1]\ndemand = [1, 1]',
            ("collective 1", "must rise"),
        ),
        (
            GOOD + '[[collectives]]\nkind = "all_reduce"\nranks = 2\nbytes = [1, 2]\nseconds = [1]\ndemand = [1, 1]',
            ("collective 1", "one length"),
        ),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "box.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_cluster(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_device_file_may_lie_beside_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text(GOOD.replace('"a10g"', '"mine.toml"'))
    save_device(load_cluster("g5-a10g").device, tmp_path / "mine.toml")
    cluster = load_cluster(tmp_path / "box.toml")
    assert cluster.device.name == "A10G" and cluster.inter == cluster.intra


def test_tiers_wires_and_caps_are_read(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text(
        'fabric = "pcie"\n'
        + GOOD
        + """
[inter]
name = "TCP"
bandwidth = 1e9
latency = 1e-4
ports = 1
flow_cap = 5e8
window = 1e6
ecmp = 0.8
[[tiers]]
name = "leaf"
nodes = 4
oversubscription = 3
rails = true
[[wires]]
name = "PCIe"
bandwidth = 2e10
latency = 1e-6
ends = ["gpu0 cpu0", "gpu1 cpu0", "gpu2 cpu1", "gpu3 cpu1"]
[[wires]]
name = "UPI"
bandwidth = 1e10
latency = 1e-6
ends = ["cpu0 cpu1"]
"""
    )
    cluster = load_cluster(path)
    assert (cluster.inter.flow_cap, cluster.inter.window, cluster.inter.ecmp) == (5e8, 1e6, 0.8)
    assert cluster.tiers[0].rails and cluster.tiers[0].oversubscription == 3 and len(cluster.wires) == 5
    path.write_text(path.read_text().replace("ecmp = 0.8", "ecmp = 1.8"))
    with pytest.raises(ValueError, match="'ecmp'"):
        load_cluster(path)
