"""Topology files of NCCL and RCCL: switches in switches, ports, links of both makers, and what is said of guesses."""

from __future__ import annotations

from itertools import combinations

import pytest

from costmodels.cluster import Cluster, load_cluster
from costmodels.device import list_devices
from costmodels.import_device import BY_BRIDGE, BY_CAPABILITY, BY_GFX, BY_MESH, BY_PCI, BY_SWITCH, GRACE
from costmodels.import_xml import from_xml
from costmodels.nccl_fabric import group_of
from tests.costmodels import topology_samples as samples


def below(cluster: Cluster, top: str) -> set[str]:
    return {w.a for w in cluster.wires if w.b == top and "PCIe" in w.link.name}


def note(cluster: Cluster, words: str) -> str:
    return next(n for n in cluster.notes if words in n)


FAST = 'link_speed="32.0 GT/s PCIe" link_width="16"'


def one_gpu(inside: str = "", after: str = "", switch: str = FAST) -> str:
    """A GPU of H100's kind below a switch, and what else hangs there, behind the switch, or in the CPU."""
    return (
        '<system version="1"><cpu numaid="0" arch="x86_64" vendor="GenuineIntel">'
        f'<pci busid="0000:10:00.0" class="0x060400" {switch}>'
        '<pci busid="0000:11:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">'
        '<gpu dev="0" sm="90" rank="0" gdr="1"><nvlink target="fffffff:ffff:ff" count="18" tclass="0x068000"/></gpu>'
        f"</pci>{inside}</pci>{after}</cpu></system>"
    )


def port(name: str, speed: str, bus: str = "12", guid: str = "0x1", more: str = "") -> str:
    return (
        f'<pci busid="0000:{bus}:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16"><nic>'
        f'<net name="{name}" dev="0" speed="{speed}" port="1" latency="0.000000" guid="{guid}" maxconn="131072"'
        f' gdr="1"/>{more}</nic></pci>'
    )


def test_mi300x_is_the_mesh_of_the_catalogue() -> None:
    cluster, known = from_xml(samples.rccl(), "node.xml"), load_cluster("mi300x-8")
    assert (cluster.device.name, cluster.fabric) == (known.device.name, known.fabric) == ("Instinct MI300X", "mesh")
    assert (cluster.intra.name, cluster.intra.bandwidth) == (known.intra.name, pytest.approx(known.intra.bandwidth))
    pairs = {(w.a, w.b): w.link.bandwidth for w in cluster.wires if "xGMI" in w.link.name}
    assert pairs == pytest.approx({(f"gpu{a}", f"gpu{b}"): 64e9 for a, b in combinations(range(8), 2)})
    assert [below(cluster, f"plx{i}") for i in range(8)] == [{f"gpu{i}", f"nic{i}"} for i in range(8)]
    assert below(cluster, "cpu1") == {f"plx{i}" for i in range(4, 8)}
    assert cluster.inter.ports == 8 and cluster.inter.bandwidth == pytest.approx(50e9)
    assert cluster.inter.name == "RoCE" and "eth0" in note(cluster, "left out")
    ours, theirs = group_of(cluster, range(8)), group_of(known, range(8))
    assert (ours.family, ours.wires, ours.hop) == (theirs.family, theirs.wires, theirs.hop)
    assert ours.port == pytest.approx(theirs.port)
    assert "guessed from gfx942 (MI300A, MI325X" in cluster.notes[0]


def test_amd_without_links_and_of_other_kinds() -> None:
    bare = from_xml(samples.rccl(links=False), "node.xml")
    assert (bare.device.name, bare.fabric) == ("Instinct MI300X", "pcie")
    names = {"gfx90a": "Instinct MI250 (one GCD)", "910": "Instinct MI250 (one GCD)", "gfx950": "Instinct MI350X"}
    for gcn, device in names.items():
        assert from_xml(samples.rccl().replace("gfx942", gcn), "node.xml").device.name == device
    ring = samples.rccl().replace('count="1"', 'count="2"', 1)
    assert from_xml(ring, "node.xml").fabric == "cube-mesh", "links that differ are no mesh"


@pytest.mark.parametrize(
    ("capability", "bare", "bridged"),
    [
        (60, "Tesla P100 PCIe 16GB", "Tesla P100 SXM2 16GB"),
        (70, "Tesla V100 PCIe 32GB", "Tesla V100 SXM2 32GB"),
        (75, "Tesla T4", "GeForce RTX 2080 Ti"),
        (80, "A100 PCIe 80GB", "A100 PCIe 80GB"),
        (86, "A10G", "A40 PCIe"),
        (89, "L40S", None),
        (90, "H100 PCIe 80GB", "H100 NVL 94GB"),
        (120, "GeForce RTX 5090", None),
    ],
)
def test_a_capability_names_a_family(capability: int, bare: str, bridged: str | None) -> None:
    version = f"compute capability {capability // 10}.{capability % 10}"
    for device, links in ((bare, False), (bridged, True)):
        cluster = from_xml(samples.dump(capability, links), "node.xml")
        assert cluster.fabric == "pcie" and version in cluster.notes[0] and "--device" in cluster.notes[0]
        assert device is None or cluster.device.name == device
        assert "would look alike" in cluster.notes[0]


def test_an_unknown_capability_is_said() -> None:
    cluster = from_xml(samples.dump(62, True), "node.xml")
    assert "compute capability 6.2 is not known here" in cluster.notes[0]
    missing = from_xml(samples.dump(62, False).replace('sm="62" ', ""), "node.xml")
    assert "guessed from GPUs without NVLink" in missing.notes[0]
    mixed = samples.dump(80, False).replace('sm="80"', 'sm="90"', 1)
    assert note(from_xml(mixed, "node.xml"), "several kinds")


def test_grace_hosts() -> None:
    text = one_gpu().replace("x86_64", "arm64")
    assert from_xml(text, "node.xml").device.name == "GH200 (96GB HBM3)"
    assert from_xml(text.replace('sm="90"', 'sm="103"'), "node.xml").device.name == "GB300 (per GPU)"
    assert from_xml(one_gpu().replace('sm="90"', 'sm="100"'), "node.xml").device.name == "B200 SXM 180GB"


def test_bridges_in_a_dump() -> None:
    cluster = from_xml(samples.dump(86, True), "node.xml")
    bridges = {(w.a, w.b): w.link.bandwidth for w in cluster.wires if "NVLink" in w.link.name}
    assert bridges == pytest.approx({("gpu0", "gpu1"): 56.25e9, ("gpu2", "gpu3"): 56.25e9})
    assert cluster.intra.bandwidth == pytest.approx(24e9) and group_of(cluster, range(4)).wires == "pci"
    named = from_xml(samples.dump(86, True), "node.xml", "rtx-a6000")
    assert named.device.name == "RTX A6000" and named.wires == cluster.wires


def test_the_gpu_with_the_fewest_links_to_a_switch_sets_the_rate() -> None:
    link = '<nvlink target="fffffff:ffff:ff" count="18" tclass="0x068000"/></gpu>'
    text = samples.dump(90, False).replace("</gpu>", link).replace('count="18"', 'count="17"', 1)
    cluster = from_xml(text, "node.xml")
    assert cluster.fabric == "nvswitch" and cluster.intra.bandwidth == pytest.approx(17 * 25e9)
    lost = from_xml(text.replace(link.replace("18", "17"), "</gpu>"), "node.xml")
    assert lost.fabric == "pcie" and lost.device.name == "H100 SXM5 80GB" and note(lost, "only some GPUs")


def test_a_pair_that_only_one_gpu_lists() -> None:
    text = samples.dump(86, True)
    last = text.rindex("<nvlink")
    text = text[:last] + text[text.index("/>", last) + 2 :]
    first = text.index("<nvlink")
    text = text[:first] + text[text.index("/>", first) + 2 :]
    bridges = [(w.a, w.b) for w in from_xml(text, "node.xml").wires if "NVLink" in w.link.name]
    assert bridges == [("gpu0", "gpu1"), ("gpu2", "gpu3")]


def test_links_to_a_power9_cpu_are_no_switch() -> None:
    text = samples.dump(70, True).replace("</gpu>", '<nvlink target="0004:00:00.0" count="3" tclass="0x068001"/></gpu>')
    assert from_xml(text, "node.xml").wires == from_xml(samples.dump(70, True), "node.xml").wires


def test_pci_ids_name_the_model() -> None:
    def named(vendor: str, device: str, text: str = samples.dump(90, False)) -> Cluster:
        return from_xml(text.replace('" link_speed', f'" vendor="{vendor}" device="{device}" link_speed'), "node.xml")

    h200 = named("0x10de", "0x2335")
    assert h200.device.name == "H200 SXM 141GB" and h200.notes[0] == "device h200, by the PCI id 10de:2335 in the file"
    assert "guessed" in named("0x10de", "0x2300").notes[0], "an id that is not known here"
    four = samples.rccl()
    apu = named("0x1002", "0x74A0", four.replace("gfx942", "940"))
    assert apu.device.name == "Instinct MI300A" and apu.intra.bandwidth == pytest.approx(3.84e11)
    assert all(is_known(device) for device in BY_PCI.values())


def is_known(device: str) -> bool:
    return device in list_devices()


def test_every_guess_is_in_the_catalogue() -> None:
    rows = [*(row[:3] for row in BY_CAPABILITY.values()), *(row[:1] for row in BY_GFX.values())]
    rows += [tuple(t.values()) for t in (BY_SWITCH, BY_MESH, BY_BRIDGE, GRACE)]
    assert all(is_known(device) for row in rows for device in row)


def test_amd_of_no_known_kind_is_no_nvidia_gpu() -> None:
    cluster = from_xml(samples.rccl().replace("gfx942", "906"), "node.xml")
    assert cluster.device.name == "Instinct MI100" and "gfx906 is not known here" in cluster.notes[0]


@pytest.mark.parametrize("speed", ["-1", "0", "", "200000000"])
def test_an_unknown_speed_is_assumed_and_said(speed: str) -> None:
    cluster = from_xml(one_gpu(port("ibp0", speed)), "node.xml")
    assert cluster.inter.bandwidth == pytest.approx(50e9)
    assert "no speed of ibp0: 400 Gb/s a port assumed, usual beside H100" in note(cluster, "gives no speed")
    both = from_xml(one_gpu(port("ibp0", speed) + port("ibp1", "200000", "13", "0x2")), "node.xml")
    assert both.inter.ports == 2 and both.inter.bandwidth == pytest.approx(25e9)
    assert "as the others have" in note(both, "gives no speed")


def test_ports_of_one_card_share_its_link() -> None:
    more = '<net name="mlx5_1" dev="1" speed="400000" port="2" latency="0.0" guid="0x1" maxconn="131072" gdr="1"/>'
    cluster = from_xml(one_gpu(port("mlx5_0", "400000", more=more)), "node.xml")
    assert cluster.inter.ports == 2 and below(cluster, "card0") == {"nic0", "nic1"}
    assert "card0" in below(cluster, "plx0")
    assert cluster.inter.bandwidth == pytest.approx(48e9 / 2), "16 lanes of Gen5 for both"
    assert "mlx5_0, mlx5_1" in note(cluster, "share its PCIe link")
    slow = from_xml(one_gpu(port("mlx5_0", "100000", more=more.replace("400000", "100000"))), "node.xml")
    assert slow.inter.bandwidth == pytest.approx(12.5e9), "which the link does not bound"
    nets = "".join(f'<net name="m{i}" dev="{i}" speed="400000" guid="0x{g}"/>' for i, g in enumerate((7, 7, 8)))
    virtual = from_xml(one_gpu(after=f"<nic>{nets}</nic>"), "node.xml")
    assert below(virtual, "card0") == {"nic0", "nic1"} and below(virtual, "cpu0") == {"plx0", "card0", "nic2"}
    assert virtual.inter.bandwidth == pytest.approx(24e9) and virtual.inter.ports == 3
    apart = from_xml(one_gpu(port("mlx5_0", "400000") + port("mlx5_1", "400000", "13", "0x2")), "node.xml")
    assert apart.inter.bandwidth == pytest.approx(50e9) and below(apart, "plx0") == {"gpu0", "nic0", "nic1"}


def test_switches_in_switches() -> None:
    inner = f'<pci busid="0000:20:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">{port("a", "1")}'
    storage = port("b", "400000", "40", "0x3")
    cluster = from_xml(one_gpu(inner.replace('speed="1"', 'speed="400000"') + "</pci>", storage), "node.xml")
    assert below(cluster, "plx1") == {"nic0"} and below(cluster, "plx0") == {"gpu0", "plx1"}
    assert cluster.inter.ports == 1 and note(cluster, "left out").endswith(": b")
    empty = from_xml(one_gpu(f'<pci busid="0000:20:00.0" class="0x060400">{inner}</pci></pci>', storage), "node.xml")
    assert below(empty, "plx0") == {"gpu0"}, "the slow port is left out, and its switches with it"


def test_what_hypervisors_pretend() -> None:
    """A switch of one lane of 2.5 GT/s above GPUs of 32 GT/s; a socket port below every CPU."""
    cluster = from_xml(one_gpu(port("a", "400000"), switch='link_speed="2.5 GT/s PCIe" link_width="1"'), "node.xml")
    assert {w.link.bandwidth for w in cluster.wires if w.a == "plx0"} == {48e9}
    sockets = samples.dump(89, False, nets='<nic><net name="eth0" dev="0" speed="25000" guid="0x0"/></nic>')
    listed = sockets.replace("</cpu></system>", '<nic><net name="eth0" speed="25000" guid="0x0"/></nic></cpu></system>')
    both = from_xml(listed, "node.xml")
    assert listed != sockets and both.inter.ports == 1 and both.inter.name == "Ethernet (TCP)"


def test_files_of_clouds_name_gpus_by_their_class() -> None:
    text = samples.dump(80, False).replace('class="0x030000"', 'class="0x030200"')
    for g in range(4):
        text = text.replace(f'<gpu dev="{g}" sm="80" rank="{g}" gdr="1"></gpu>', "")
    text = text.replace("</cpu>", '<pci busid="0101:00:00.0" class="0x020700"/></cpu>', 1)
    assert "<gpu" not in text
    cluster = from_xml(text, "node.xml")
    assert cluster.devices_per_node == 4 and cluster.inter.ports == 1
    assert "port at 0101:00:00.0" in note(cluster, "gives no speed") and note(cluster, "NVLink is not priced")
    efa = from_xml(text.replace('class="0x020700"', 'class="0x020000" vendor="0x1d0f"'), "node.xml")
    assert (efa.inter.name, efa.inter.bandwidth) == ("EFA", pytest.approx(12.5e9))
