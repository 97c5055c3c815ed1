"""Matrices of machines: which device hangs on which switch, port and CPU, how fast, and what is said of guesses."""

from __future__ import annotations

import re

import pytest

from costmodels.cluster import Cluster, load_cluster
from costmodels.import_matrix import from_matrix
from costmodels.nccl_fabric import group_of
from costmodels.topology import expand, route
from tests.costmodels import topology_samples as samples


def below(cluster: Cluster, top: str) -> set[str]:
    """What hangs on a switch or CPU by PCIe."""
    return {w.a for w in cluster.wires if w.b == top and "PCIe" in w.link.name}


def nvlinks(cluster: Cluster) -> dict[tuple[str, str], float]:
    return {(w.a, w.b): w.link.bandwidth for w in cluster.wires if "NVLink" in w.link.name}


def note(cluster: Cluster, words: str) -> str:
    return next(n for n in cluster.notes if words in n)


def test_dgx_a100_with_storage_ports() -> None:
    cluster = from_matrix(samples.dgx_a100(), "node.txt")
    assert (cluster.device.name, cluster.fabric) == ("A100 SXM4 80GB", "nvswitch")
    assert cluster.intra.bandwidth == pytest.approx(3e11)
    switches = [below(cluster, f"plx{i}") for i in range(4)]
    assert switches == [{f"gpu{2 * i}", f"gpu{2 * i + 1}", f"nic{2 * i}", f"nic{2 * i + 1}"} for i in range(4)]
    assert below(cluster, "cpu0") == {"plx0", "plx1"} and below(cluster, "cpu1") == {"plx2", "plx3"}
    assert cluster.inter.ports == 8 and cluster.inter.bandwidth == pytest.approx(25e9)
    assert note(cluster, "left out").endswith(": mlx5_4, mlx5_5")
    assert "200 Gb/s a port assumed" in note(cluster, "gives no speed of mlx5_0,")
    assert "a100-sxm-80gb was guessed" in cluster.notes[0] and "--device" in cluster.notes[0]


def test_dgx_h100_with_a_legend() -> None:
    cluster = from_matrix(samples.dgx_h100(), "node.txt")
    assert (cluster.device.name, cluster.fabric) == ("H100 SXM5 80GB", "nvswitch")
    assert [below(cluster, f"plx{i}") for i in range(8)] == [{f"gpu{i}", f"nic{i}"} for i in range(8)]
    assert cluster.inter.ports == 8 and cluster.inter.bandwidth == pytest.approx(50e9)
    assert "mlx5_2, mlx5_3" in note(cluster, "gives no speed"), "by the names of the legend"
    assert {w.link.bandwidth for w in cluster.wires if w.a == "gpu0"} == {450e9, 48e9}


@pytest.mark.parametrize(
    "names",
    [
        ("mlx5_bond_0", "mlx5_1", "mlx5_2", "mlx5_bond_3"),
        ("ibp0s0", "ibp1s0", "ibs1", "ibs2"),
        ("hfi1_0", "hfi1_1", "hfi1_2", "hfi1_3"),
        ("irdma0", "irdma1", "bnxt_re0", "bnxt_re1"),
        ("rdmap16s27", "rdmap32s27", "efa_0", "efa_1"),
        ("roceP1p1s0", "roceP2p1s0", "a", "42"),
    ],
)
def test_ports_of_any_name_keep_every_gpu_at_its_switch(names: tuple[str, ...]) -> None:
    text = samples.bonded()
    for old, new in zip(("mlx5_bond_0", "mlx5_1", "mlx5_2", "mlx5_bond_3"), names):
        text = re.sub(rf"(?<!\S){old}(?!\S)", new, text)
    cluster = from_matrix(text, "node.txt")
    assert [below(cluster, f"plx{i}") for i in range(4)] == [
        {f"gpu{2 * i}", f"gpu{2 * i + 1}", f"nic{i}"} for i in range(4)
    ]
    assert below(cluster, "cpu0") == {"plx0", "plx1"} and below(cluster, "cpu1") == {"plx2", "plx3"}
    assert cluster.inter.ports == 4
    assert route(expand(cluster), 0, 7) == ["n0/gpu0", "n0/nvswitch", "n0/gpu7"]


def test_ports_tell_the_network_by_their_names() -> None:
    def inter(*names: str) -> tuple[str, float]:
        text = samples.bonded()
        for old, new in zip(("mlx5_bond_0", "mlx5_1", "mlx5_2", "mlx5_bond_3"), names):
            text = re.sub(rf"(?<!\S){old}(?!\S)", new, text)
        link = from_matrix(text, "node.txt").inter
        return link.name, link.bandwidth

    assert inter("rdmap16s27", "rdmap32s27", "rdmap144s27", "rdmap160s27") == ("EFA", 12.5e9)
    assert inter("bnxt_re0", "bnxt_re1", "bnxt_re2", "bnxt_re3") == ("RoCE", 25e9)
    assert inter("ibp0s0", "ibp1s0", "ibp2s0", "ibp3s0") == ("network port", 25e9)


def test_l40s_without_nvlink() -> None:
    cluster = from_matrix(samples.L40S, "node.txt")
    assert cluster.fabric == "pcie" and cluster.device.name == "L40S" and not nvlinks(cluster)
    assert below(cluster, "plx0") == {"gpu0", "gpu1", "nic0"} and below(cluster, "plx3") == {"gpu6", "gpu7"}
    assert below(cluster, "cpu1") == {"plx2", "plx3"} and cluster.inter.ports == 2
    assert "any GPU without NVLink" in cluster.notes[0]


def test_pairs_by_bridges_are_pcie_with_wires_as_in_the_catalogue() -> None:
    cluster, known = from_matrix(samples.A100_PCIE, "node.txt"), load_cluster("a100-pcie")
    assert (cluster.fabric, cluster.device.name) == (known.fabric, known.device.name) == ("pcie", "A100 PCIe 80GB")
    assert nvlinks(cluster) == pytest.approx(nvlinks(known))
    assert cluster.intra.name == "PCIe" and cluster.intra.bandwidth == pytest.approx(24e9)
    assert cluster.inter.ports == 1 and below(cluster, "cpu0") == {"gpu0", "gpu1", "gpu2", "gpu3", "nic0"}
    everyone = group_of(cluster, range(8))
    assert everyone.wires == "pci" and everyone.port == pytest.approx(24e9), "a group over pairs goes by PCIe"
    assert route(expand(cluster), 4, 5) == ["n0/gpu4", "n0/gpu5"] and len(route(expand(cluster), 0, 2)) == 3
    assert note(cluster, "NVLink joins only some GPUs")


def test_two_cards_and_two_pairs_of_ampere() -> None:
    pair, pairs = from_matrix(samples.RTX3090, "node.txt"), from_matrix(samples.A6000, "node.txt")
    for cluster in (pair, pairs):
        assert cluster.fabric == "pcie" and "RTX A6000, RTX 3090" in cluster.notes[0]
        assert set(nvlinks(cluster).values()) == {56.25e9}, "four links of 14 GB/s, not of 25"
    assert below(pair, "cpu0") == {"gpu0", "gpu1"}, "same affinity"
    assert below(pairs, "cpu0") == {"gpu0", "gpu1"} and below(pairs, "cpu1") == {"gpu2", "gpu3"}
    named = from_matrix(samples.RTX3090, "node.txt", "GeForce RTX 3090")
    assert named.device.name == "GeForce RTX 3090" and not any("guessed" in n for n in named.notes)
    assert nvlinks(named) == nvlinks(pair)


def test_pairs_of_modules_stay_nvlink() -> None:
    """Two GPUs of a board with NVSwitch, as virtual machines have them: 18 links are no bridge."""
    text = samples.matrix(["GPU0", "GPU1"], ["NV18"], ["0-15", "0-15"])
    cluster = from_matrix(text, "node.txt")
    assert (cluster.fabric, cluster.device.name) == ("cube-mesh", "H100 SXM5 80GB")
    assert cluster.intra.bandwidth == pytest.approx(450e9)


@pytest.mark.parametrize(
    ("rows", "device", "fabric"),
    [
        (["NV4 NV4 NV4", "NV4 NV4", "NV4"], "A100 SXM4 80GB", "cube-mesh"),
        (["NV6 NV6 NV6", "NV6 NV6", "NV6"], "H100 SXM5 80GB", "cube-mesh"),
        (["NV1 NV1 NV2", "NV2 NV1", "NV2"], "Tesla V100 SXM2 32GB", "cube-mesh"),
        (["NV1 NV1 NV1", "NV1 NV1", "NV1"], "Tesla P100 SXM2 16GB", "cube-mesh"),
        (["NV8 NV8 NV8", "NV8 NV8", "NV8"], "H800 SXM", "nvswitch"),
        (["NV18 SYS SYS", "SYS SYS", "NV18"], "H200 SXM 141GB", "pcie"),
        (["NV2 SYS SYS", "SYS SYS", "NV2"], "GeForce RTX 2080 Ti", "pcie"),
        (["NV3 SYS SYS", "SYS SYS", "NV3"], "Tesla V100 SXM2 32GB", "pcie"),
        (["NV12 SYS SYS", "SYS SYS", "SYS"], "A100 PCIe 80GB", "pcie"),
    ],
)
def test_the_pattern_of_links_tells_boards_from_bridges(rows: list[str], device: str, fabric: str) -> None:
    cluster = from_matrix(samples.matrix([f"GPU{i}" for i in range(4)], rows, []), "node.txt")
    assert (cluster.device.name, cluster.fabric) == (device, fabric)


def test_a_tray_of_gb200() -> None:
    cluster = from_matrix(samples.GB200, "node.txt")
    assert (cluster.device.name, cluster.fabric) == ("GB200 (per GPU)", "nvswitch"), "memory that is a NUMA node"
    assert cluster.intra.bandwidth == pytest.approx(9e11) and cluster.inter.ports == 4
    assert below(cluster, "cpu1") == {"gpu2", "gpu3", "nic2", "nic3"}
    x86 = re.sub(r"\t\d+$", "\tN/A", samples.GB200, flags=re.MULTILINE)
    assert from_matrix(x86, "node.txt").device.name == "H100 SXM5 80GB"


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.partition("\nLegend")[0],
        lambda t: t.expandtabs(8).replace("\n", "\n   "),
        lambda t: "user@node:~$ nvidia-smi topo -m\n" + re.sub(r"^(\tGPU0.*)$", "\x1b[4m\\1\x1b[0m", t, flags=re.M),
        lambda t: re.sub(r"\t(NUMA Affinity|[01])$", "", t, flags=re.MULTILINE),
        lambda t: re.sub(r"\tCPU Affinity.*|\t\d+-\d+\t[01]$", "", t, flags=re.MULTILINE),
    ],
    ids=["windows", "no legend", "spaces", "colour", "no NUMA", "no affinity"],
)
def test_forms_of_the_same_matrix(form) -> None:
    plain = samples.bonded()
    changed = form(plain)
    assert changed != plain and from_matrix(changed, "node.txt").wires == from_matrix(plain, "node.txt").wires


def test_a_port_that_only_some_gpus_are_near_to() -> None:
    """GPU1 has no port below its switch: the nearest one is kept for it, the one that is nearest to none is not."""
    text = samples.matrix(
        ["GPU0", "GPU1", "NIC0", "NIC1", "NIC2"],
        ["NV12 PIX SYS NODE", "SYS NODE SYS", "SYS NODE", "SYS", ""],
        ["0-15", "16-31"],
    )
    cluster = from_matrix(text, "node.txt")
    assert cluster.inter.ports == 2 and "NIC2" in note(cluster, "left out")


def test_more_ports_than_gpus_are_said() -> None:
    text = samples.matrix(["GPU0", "NIC0", "NIC1"], ["PIX PIX", "PIX", ""], [])
    assert "2 ports for 1 GPUs" in note(from_matrix(text, "node.txt"), "virtual functions")
    assert not any("virtual" in n for n in from_matrix(samples.dgx_h100(), "node.txt").notes)


def test_cells_of_affinity_may_be_blank() -> None:
    """A job that may use one core: other CPUs' GPUs show none."""
    text = samples.matrix(
        [f"GPU{i}" for i in range(4)] + ["NIC0"],
        ["NV4 NV4 NV4 NODE", "NV4 NV4 NODE", "NV4 SYS", "SYS"],
        ["0\t0\t\tN/A", "0\t0\t\tN/A", "\t1\t\tN/A", "\t1\t\tN/A"],
        "CPU Affinity\tNUMA Affinity\tGPU NUMA ID",
    )
    cluster = from_matrix(text, "node.txt")
    assert cluster.device.name == "A100 SXM4 80GB"
    assert below(cluster, "cpu0") == {"gpu0", "gpu1", "nic0"} and below(cluster, "cpu1") == {"gpu2", "gpu3"}


def test_no_port_is_said() -> None:
    assert "no network port: one of 200 Gb/s" in note(from_matrix(samples.A6000, "node.txt"), "no network port")


H100 = samples.dgx_h100()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing of the kind", "no header line"),
        (H100.replace("GPU1\tNV18\t X \tNV18", "GPU1\tNV18\t X "), "row GPU1 has 15 cells, the header 16 devices"),
        (H100.replace("GPU1\tNV18", "GPU1\tNV18\tNV18"), "row GPU1 has 17 cells, the header 16 devices"),
        (H100.replace("GPU1\tNV18\t X \tNV18", "GPU1\tNV18\tNV18\t X "), "row GPU1 has its X under GPU2"),
        (H100.replace("GPU3\tNV18", "GPU3\tNV12"), "GPU0 to GPU3 is NV18, but GPU3 to GPU0 is NV12"),
        (re.sub(r"^GPU5.*\n", "", H100, flags=re.MULTILINE), "no row for GPU5"),
        (H100.replace("\tNIC7\tCPU", "\tCPU"), "row GPU0 has 16 cells, the header 15"),
        (H100.replace("\tGPU7\t", "\t", 1), "row GPU7 has no column"),
        (H100 + H100, "row GPU0 is there more than once"),
        (H100.replace("\tNIC7\tCPU", "\tNIC6\tCPU"), "the header names NIC6 more than once"),
        (H100.replace("PIX", "ZAP"), "'ZAP' in row GPU0"),
    ],
)
def test_a_broken_matrix_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        from_matrix(text, "node.txt")
    assert str(caught.value).startswith("node.txt: ") and "\n" not in str(caught.value)
