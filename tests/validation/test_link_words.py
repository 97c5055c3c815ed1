"""The words of links: counts, rates and owners of NICs, kinds of networks; both commands read them alike."""

from __future__ import annotations

import pytest

from costmodels.nccl_fabric import network_of
from validation.cases import Case
from validation.cases_cluster import cluster_of
from validation.collective_cases import Sweep, setup_of
from validation.link_words import Nics, about_network, cube_mesh, network_named, nics_of, of_a_node

GIGABIT = 1.25e8


@pytest.mark.parametrize(
    ("words", "count", "gigabits", "whose", "network"),
    [
        ("100Gb InfiniBand", 0, 100, "", "InfiniBand"),
        ("25Gb Ethernet", 0, 25, "", "Ethernet"),
        ("25 Gbit Ethernet", 0, 25, "", "Ethernet"),
        ("100 Gbit/s", 0, 100, "", ""),
        ("100GbE", 0, 100, "", "Ethernet"),
        ("100 Gigabit Ethernet", 0, 100, "", "Ethernet"),
        ("10GBASE-T", 0, 10, "", "Ethernet"),
        ("100G RoCE", 0, 100, "", "RoCE"),
        ("RDMA over 100 Gb Ethernet", 0, 100, "", "RoCE"),
        ("10 GigE, no RDMA", 0, 10, "", "Ethernet"),
        ("IPoIB on EDR", 0, 100, "", "TCP"),
        ("HDR100", 0, 100, "", "InfiniBand"),
        ("InfiniBand HDR", 0, 200, "", "InfiniBand"),
        ("FDR10", 0, 40, "", "InfiniBand"),
        ("2x25GbE Ethernet", 2, 25, "", "Ethernet"),
        ("dual 25GbE", 2, 25, "", "Ethernet"),
        ("8x ConnectX-7 400Gb/s", 8, 400, "", ""),
        ("8 x CX-7 400Gb", 8, 400, "", ""),
        ("8 × 400 Gb/s", 8, 400, "", ""),
        ("8*400G", 8, 400, "", ""),
        ("NDR 400Gb/s x8", 8, 400, "", "InfiniBand"),
        ("8x NDR400", 8, 400, "", "InfiniBand"),
        ("4x HDR", 4, 200, "", "InfiniBand"),
        ("8x HDR (200 Gb/s)", 8, 200, "", "InfiniBand"),
        ("4x100 Gbps EFA", 4, 100, "", "EFA"),
        ("8x50GB/s", 8, 400, "", ""),
        ("400 Gb/s InfiniBand per GPU", 0, 400, "gpu", "InfiniBand"),
        ("400Gb/s/GPU", 0, 400, "gpu", ""),
        ("1 GB/s per node", 0, 8, "node", ""),
        ("8 GPUs per node, 400 Gb/s", 0, 400, "", ""),
        ("3200 Gb/s per node, 400 Gb/s per GPU", 0, 3200, "node", ""),
        ("one 400G NIC per GPU", 1, 400, "gpu", ""),
        ("8 ConnectX-7 400 Gb/s NICs per node", 8, 400, "node", ""),
        ("8 NICs, 3200 Gb/s per node", 8, 400, "node", ""),
        ("400 Gb/s per GPU (2x200 Gb/s)", 2, 200, "gpu", ""),
        ("8x400 Gb/s (400 Gb/s per GPU)", 8, 400, "", ""),
        ("4 NICs/node", 4, 0, "node", ""),
        ("8x H100, 400 Gb/s", 0, 400, "", ""),
        ("NVLink4 900 GB/s + 8x400Gb NDR", 8, 400, "", "InfiniBand"),
        ("PCIe Gen4 x16 100G IB", 0, 100, "", "InfiniBand"),
        ("100G IB, PCIe x16", 0, 100, "", "InfiniBand"),
    ],
)
def test_words_say_count_rate_owner_and_kind(words: str, count: int, gigabits: float, whose: str, network: str) -> None:
    about = about_network(words)
    assert nics_of(about) == Nics(count, pytest.approx(gigabits * GIGABIT), whose) and network_named(about) == network


@pytest.mark.parametrize("words", ["", "not stated", "25 GB Ethernet", "32 nodes x4 GPUs", "A100 80GB", "0 Gb/s"])
def test_what_is_no_rate_is_not_read(words: str) -> None:
    assert nics_of(words) is None


def test_a_rate_without_more_words_is_that_of_a_nic() -> None:
    usual = (8, 50e9)
    said = {"100 Gb/s": (1, 12.5e9), "200 Gb/s": (8, 25e9), "800 Gb/s": (8, 12.5e9), "400 Gb/s per node": (1, 50e9),
            "100 Gb/s per GPU": (4, 12.5e9), "2x400 Gb/s per GPU": (8, 50e9), "4 NICs": (4, 50e9),
            "3200 Gb/s per node": (8, 50e9)}  # fmt: skip
    assert {words: of_a_node(nics_of(words) or Nics(0, 0), 4, usual) for words in said} == said
    assert of_a_node(Nics(0, 25e9), 4, None) == of_a_node(Nics(0, 25e9), 4, (1, 12.5e9)) == (1, 25e9)


def test_cube_meshes_are_those_of_their_generation() -> None:
    volta, pascal = (cube_mesh("NVLink hybrid cube mesh", gpu) for gpu in ("Tesla V100 SXM2 16GB", "P100"))
    assert {w.link.bandwidth for w in volta if "NVLink" in w.link.name} == {25e9, 50e9}
    assert {w.link.bandwidth for w in pascal if "NVLink" in w.link.name} == {20e9}
    assert not cube_mesh("NVLink hybrid cube mesh", "A100 SXM4 80GB") and not cube_mesh("NVLink2", "V100")


@pytest.mark.parametrize(
    "words",
    ["100Gb InfiniBand", "100 Gb/s InfiniBand per node", "HDR100", "25Gb Ethernet", "2x25GbE Ethernet", "8*400G",
     "4x HDR", "200 Gb/s HDR InfiniBand", "400 Gb/s InfiniBand per GPU", "1600 Gb/s per node (RoCE)", "10GbE",
     "8x ConnectX-7 400Gb/s", "3.2 Tb/s EFA per node", "8 NICs of 200 Gb/s"],
)  # fmt: skip
def test_both_commands_read_alike(words: str) -> None:
    fields = {"gpu": "H100 SXM5 80GB", "num_gpus": "16", "gpus_per_node": "8", "inter_node": words}
    run = cluster_of(Case("transformer", fields), {}).inter
    sweep = setup_of(Sweep("x", "H100 SXM5 80GB", 16, 2, words, "all_reduce", (1e6,), (1e-4,))).cluster.inter
    assert run.bandwidth * 8 == pytest.approx(sweep.bandwidth * sweep.ports)
    assert network_named(words) in ("", run.name) and network_named(words) in ("", sweep.name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("25Gb Ethernet", "25 Gbps Ethernet"),
        ("25 Gbit Ethernet", "25GbE Ethernet"),
        ("100Gb InfiniBand", "100 Gb/s InfiniBand per node"),
        ("HDR100", "100 Gb/s InfiniBand"),
        ("NVLink + 8x200Gb HDR", "8x 200 Gb/s InfiniBand"),
        ("NVLink 600 GB/s, 2x25GbE Ethernet", "2 × 25 Gbit/s Ethernet"),
    ],
)
def test_equal_words_of_a_run_are_one_cluster(one: str, other: str) -> None:
    fields = {"gpu": "A100 SXM4 80GB", "num_gpus": "32"}
    first, second = (cluster_of(Case("vision", fields | {"interconnect": w}), {}) for w in (one, other))
    assert (first.inter, first.fabric, first.notes) == (second.inter, second.fabric, ())


@pytest.mark.parametrize(
    ("gpu", "count", "words", "rate"),
    [
        ("A100 PCIe 80GB", "2", "NVLink bridge", 300e9),
        ("A100 PCIe 80GB", "8", "NVLink bridge", 31.5e9 / 2),
        ("RTX 3090", "2", "NVLink", 56.25e9),
        ("RTX 3090", "4", "NVLink", 31.5e9),
        ("RTX 3090", "2", "no NVLink", 31.5e9),
    ],
)
def test_bridges_of_a_run_join_pairs(gpu: str, count: str, words: str, rate: float) -> None:
    cluster = cluster_of(Case("transformer", {"gpu": gpu, "num_gpus": count, "intra_node": words}), {})
    assert cluster.intra.bandwidth == pytest.approx(rate, rel=0.01)


def test_a_node_of_a_rack_has_its_own_nics() -> None:
    fields = {"gpu": "GB200", "num_gpus": "144", "gpus_per_node": "4", "intra_node": "NVLink5 (NVL72)"}
    cluster = cluster_of(Case("transformer", fields | {"inter_node": "4x 400 Gb/s per node"}), {})
    assert cluster.devices_per_node == 72 and cluster.inter.bandwidth == pytest.approx(50e9)


@pytest.mark.parametrize(
    ("inside", "between", "said"),
    [
        ("NVLink3", "fast", ("no rate was read from 'fast'",)),
        ("NVLink3", "-5Gb/s", ("no rate was read from '-5Gb/s'",)),
        ("wires of gold", "8x200Gb/s", ("nothing was read from 'wires of gold'",)),
        ("wires", "quick", ("nothing was read from 'wires'", "no rate was read from 'quick'")),
        ("none", "10 Gb/s", ()),
        ("not applicable (one GPU)", "HDR", ()),
    ],
)
def test_words_that_say_nothing_are_quoted(inside: str, between: str, said: tuple[str, ...]) -> None:
    fields = {"gpu": "A100 SXM4 80GB", "num_gpus": "16", "intra_node": inside, "inter_node": between}
    found = cluster_of(Case("transformer", fields), {}).notes
    assert len(found) == len(said) and all(quoted in note for quoted, note in zip(said, found))


def test_a_network_without_a_rate_is_of_its_kind() -> None:
    """Sockets have no reference design of these devices: 100 Gb/s a node."""
    fields = {"gpu": "A100 SXM4 80GB", "num_gpus": "16"}
    words = ("Ethernet", "RoCE", "")
    links = [cluster_of(Case("transformer", fields | {"inter_node": w}), {}).inter for w in words]
    assert [network_of(link) for link in links] == ["ethernet", "roce", "ib"]
    assert [link.bandwidth for link in links] == [12.5e9 / 8, 25e9, 25e9]
