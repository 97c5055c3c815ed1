"""What `nvidia-smi topo -m` prints and what NCCL dumps, in texts written here in those formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from costmodels.cluster import load_cluster
from costmodels.import_matrix import from_matrix
from costmodels.import_xml import from_xml
from costmodels.topology import expand, route

SWITCHED = """\
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      NV18    NV18    NV18    PIX     SYS     0-55    0               N/A
GPU1    NV18     X      NV18    NV18    NODE    SYS     0-55    0               N/A
GPU2    NV18    NV18     X      NV18    SYS     PIX     56-111  1               N/A
GPU3    NV18    NV18    NV18     X      SYS     NODE    56-111  1               N/A
NIC0    PIX     NODE    SYS     SYS      X      SYS
NIC1    SYS     SYS     PIX     NODE    SYS      X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""

MESH = """\
\x1b[4m      GPU0  GPU1  GPU2  GPU3  GPU4  GPU5  GPU6  GPU7  mlx5_0  CPU Affinity\x1b[0m
GPU0   X    NV1   NV1   NV2   NV2   SYS   SYS   SYS   PIX   0-19,40-59
GPU1  NV1    X    NV2   NV1   SYS   NV2   SYS   SYS   PIX   0-19,40-59
GPU2  NV1   NV2    X    NV2   SYS   SYS   NV1   SYS   PHB   0-19,40-59
GPU3  NV2   NV1   NV2    X    SYS   SYS   SYS   NV1   PHB   0-19,40-59
GPU4  NV2   SYS   SYS   SYS    X    NV1   NV1   NV2   SYS   20-39,60-79
GPU5  SYS   NV2   SYS   SYS   NV1    X    NV2   NV1   SYS   20-39,60-79
GPU6  SYS   SYS   NV1   SYS   NV1   NV2    X    NV2   SYS   20-39,60-79
GPU7  SYS   SYS   SYS   NV1   NV2   NV1   NV2    X    SYS   20-39,60-79
mlx5_0 PIX  PIX   PHB   PHB   SYS   SYS   SYS   SYS    X
"""

PLAIN = """\
# device: GeForce RTX 4090
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity
GPU0\t X \tPIX\tSYS\tSYS\t0-31\t0
GPU1\tPIX\t X \tSYS\tSYS\t0-31\t0
GPU2\tSYS\tSYS\t X \tPHB\t32-63\t1
GPU3\tSYS\tSYS\tPHB\t X \t32-63\t1
"""


def test_a_switched_matrix() -> None:
    cluster = from_matrix(SWITCHED, "node.txt")
    assert (cluster.devices_per_node, cluster.fabric, cluster.device.name) == (4, "nvswitch", "H100 SXM5 80GB")
    assert cluster.intra.bandwidth == pytest.approx(450e9) and cluster.inter.ports == 2
    assert "guessed" in cluster.notes[0]
    topology = expand(cluster)
    assert route(topology, 0, 3) == ["n0/gpu0", "n0/nvswitch", "n0/gpu3"]
    assert topology.capacity[topology.road(0, 3).links[0]] == pytest.approx(450e9)
    hosts = [n for n, kind in topology.graph.nodes(data="kind") if kind == "host"]
    assert len(hosts) == 2, "NICs tell which GPUs share a CPU"


def test_a_hybrid_cube_mesh_matrix_is_the_one_of_the_catalogue() -> None:
    cluster, known = from_matrix(MESH, "dgx1.txt"), load_cluster("dgx1-v100")
    assert cluster.fabric == "cube-mesh" and cluster.device.name.startswith(known.device.name.split()[0])

    def nvlinks(wires):
        return {(min(w.a, w.b), max(w.a, w.b)): w.link.bandwidth for w in wires if "NVLink" in w.link.name}

    assert nvlinks(cluster.wires) == pytest.approx(nvlinks(known.wires))
    assert route(expand(cluster), 0, 5)[1] in ("n0/gpu1", "n0/gpu4")


def test_a_plain_pcie_matrix_with_its_device_named() -> None:
    cluster = from_matrix(PLAIN, "box.txt")
    assert cluster.fabric == "pcie" and cluster.device.name == "GeForce RTX 4090"
    assert not any("guessed" in note for note in cluster.notes)
    topology = expand(cluster)
    names = route(topology, 0, 3)
    assert names == ["n0/gpu0", "n0/plx0", "n0/cpu0", "n0/cpu1", "n0/gpu3"]
    assert len(route(topology, 0, 1)) == 3 and len(route(topology, 2, 3)) == 3


XML = """\
<!-- device: a100-sxm-80gb -->
<system version="1">
  <cpu numaid="0" affinity="0000ffff" arch="x86_64" vendor="AuthenticAMD" familyid="143" modelid="49">
    <pci busid="0000:01:00.0" class="0x060400" link_speed="16.0 GT/s PCIe" link_width="16">
      <pci busid="0000:03:00.0" class="0x030200" link_speed="16.0 GT/s PCIe" link_width="16">
        <gpu dev="0" sm="80" rank="0" gdr="1">
          <nvlink target="0000:c4:00.0" count="6" tclass="0x068000"/>
          <nvlink target="0000:c5:00.0" count="6" tclass="0x068000"/>
        </gpu>
      </pci>
      <pci busid="0000:04:00.0" class="0x020700" link_speed="16.0 GT/s PCIe" link_width="16">
        <nic>
          <net name="mlx5_0" dev="0" speed="200000" port="1" latency="0.000000" maxconn="131072" gdr="1"/>
        </nic>
      </pci>
    </pci>
  </cpu>
  <cpu numaid="1" affinity="ffff0000" arch="x86_64" vendor="AuthenticAMD" familyid="143" modelid="49">
    <pci busid="0000:81:00.0" class="0x030200" link_speed="16.0 GT/s PCIe" link_width="16">
      <gpu dev="1" sm="80" rank="1" gdr="1">
        <nvlink target="0000:c4:00.0" count="6" tclass="0x068000"/>
        <nvlink target="0000:c5:00.0" count="6" tclass="0x068000"/>
      </gpu>
    </pci>
    <nic>
      <net name="eth0" dev="1" speed="10000" port="0" keep="0"/>
    </nic>
  </cpu>
</system>
"""


def test_an_nccl_dump() -> None:
    cluster = from_xml(XML, "topo.xml")
    assert (cluster.devices_per_node, cluster.fabric) == (2, "nvswitch")
    assert cluster.intra.bandwidth == pytest.approx(12 * 25e9)
    assert cluster.inter.ports == 1 and cluster.inter.bandwidth == pytest.approx(25e9), "eth0 is not kept"
    graph = expand(cluster).graph
    assert graph.edges["n0/gpu0", "n0/plx0"]["bandwidth"] == pytest.approx(24e9), "Gen4 x16 as NCCL counts it"
    assert graph.edges["n0/cpu0", "n0/cpu1"]["bandwidth"] == pytest.approx(16e9)
    both = expand(replace(cluster, nodes=2, cache={}))
    assert len(both.road(0, 2).links) == 6  # gpu, plx, nic, core, nic, plx, gpu


def test_only_the_ports_that_serve_gpus_count() -> None:
    """A third NIC that shares no PCIe switch with a GPU, and a slow one of the host, carry no traffic of theirs."""
    text = """\
     GPU0 GPU1 NIC0 NIC1 NIC2 CPU Affinity NUMA Affinity
GPU0  X   NV18 PIX  NODE NODE 0-55 0
GPU1 NV18  X   NODE PXB  NODE 0-55 0
NIC0 PIX  NODE  X   NODE NODE
NIC1 NODE PXB  NODE  X   NODE
NIC2 NODE NODE NODE NODE  X
"""
    assert from_matrix(text, "node.txt").inter.ports == 2
    assert from_matrix(text.replace("PIX", "PHB").replace("PXB", "PHB"), "node.txt").inter.ports == 3
    slow = from_xml(XML.replace('port="0" keep="0"', 'port="0"'), "topo.xml")
    assert slow.inter.ports == 1 and slow.inter.bandwidth == pytest.approx(25e9)


def test_a_pair_by_four_links_is_a_bridge() -> None:
    pair = "     GPU0 GPU1 CPU Affinity\r\nGPU0  X   NV4  0-31\r\nGPU1 NV4   X   32-63\r\n"
    assert from_matrix(pair, "node.txt").device.name == "A40 PCIe"


def test_nvlinks_between_gpus_in_an_nccl_dump() -> None:
    """Two V100 joined by two links, as a DGX-1 writes pairs: the target is the other GPU's bus id."""
    text = """<system version="1"><cpu numaid="0" vendor="GenuineIntel">
      <pci busid="0000:06:00.0" link_speed="8 GT/s" link_width="16"><gpu dev="0" sm="70" rank="0" gdr="1">
        <nvlink target="0000:07:00.0" count="2" tclass="0x030200"/></gpu></pci>
      <pci busid="0000:07:00.0" link_speed="8 GT/s" link_width="16"><gpu dev="1" sm="70" rank="1" gdr="1">
        <nvlink target="0000:06:00.0" count="2" tclass="0x030200"/></gpu></pci></cpu></system>"""
    cluster = from_xml(text, "pair.xml")
    assert "V100" in cluster.device.name and "guessed" in cluster.notes[0]
    assert expand(cluster).graph.edges["n0/gpu0", "n0/gpu1"]["bandwidth"] == pytest.approx(50e9)


def test_files_are_loaded_by_their_ending(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(SWITCHED)
    (tmp_path / "mine.xml").write_text(XML)
    assert load_cluster(tmp_path / "mine.txt").size == 4
    assert load_cluster(f"3x {tmp_path / 'mine.xml'}").size == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing of the kind", "GPU0"),
        (
            SWITCHED.replace(
                "GPU2    NV18    NV18     X      NV18    SYS     PIX     56-111  1               N/A\n", ""
            ),
            "GPU2",
        ),
        (SWITCHED.replace("PIX", "ZAP"), "ZAP"),
    ],
)
def test_a_broken_matrix_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_matrix(text, "node.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<system", "well-formed"),
        ("<system></system>", "<cpu>"),
        ("<system><cpu/></system>", "no <gpu>"),
        (XML.replace('count="6"', 'count="six"'), "six"),
        (XML.replace('count="6"', 'count="-1"'), "1 or more"),
        (XML.replace('speed="200000"', 'speed="inf"'), "finite"),
        (XML.replace('sm="80"', 'sm="eighty"'), "eighty"),
        (XML.replace("0000:81:00.0", "0000:03:00.0"), "two GPUs have busid '0000:03:00.0'"),
        (XML.replace('numaid="1"', 'numaid="1" host_hash="0x2"'), "several hosts"),
    ],
)
def test_a_broken_dump_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_xml(text, "topo.xml")


@pytest.mark.parametrize("name", ["none.xml", "none.txt"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="is empty"):
        load_cluster(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_windows(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.txt").write_bytes(SWITCHED.replace("\n", "\r\n").encode(encoding))
    assert load_cluster(tmp_path / "mine.txt").wires == from_matrix(SWITCHED, "mine.txt").wires
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_cluster(tmp_path / "mine.txt")


def test_a_device_is_given_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(PLAIN)
    cluster = load_cluster(f"2x {tmp_path / 'mine.txt'}", "L40S")
    assert cluster.device.name == "L40S" and cluster.nodes == 2, "goes before the file's own"
    with pytest.raises(ValueError, match="no known device"):
        load_cluster(tmp_path / "mine.txt", "voodoo2")
    with pytest.raises(ValueError, match="names its device itself"):
        load_cluster("dgx-h100", "L40S")


def test_the_name_of_a_file_changes_no_price() -> None:
    """Names of links tell laws of collectives what they are; that of a file must not be among them."""
    link = from_matrix(SWITCHED, "host-pcie.txt").intra
    assert link == from_matrix(SWITCHED, "a.txt").intra


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_cluster(tmp_path / "none.xml")
