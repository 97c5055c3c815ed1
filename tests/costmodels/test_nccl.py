"""NCCL's choice of algorithm and protocol, what placement does to a price, and what no price may violate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import hockney
from costmodels.cluster import Cluster, Link, Tier, load_cluster
from costmodels.collectives import KINDS, collective_price
from costmodels.nccl_fabric import across_of, family_of, group_of, network_of
from costmodels.nccl_law import TUNER, Laws, shipped
from costmodels.nccl_tuner import candidates
from validation.collective_cases import catalogue_sweeps

H200, B200 = load_cluster("dgx-h200"), load_cluster("dgx-b200")
H100 = load_cluster("4x dgx-h100")
GIB, MIB = 2**30, 2**20
SIZES = st.floats(0, 36).map(lambda x: 2.0**x)
SOME = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send", "all_to_all")


def busbw(cluster: Cluster, ranks: int, algorithm: str = "", size: float = 8 * GIB) -> float:
    price = collective_price(cluster, "all_reduce", size, range(ranks), algorithm)
    return size / price.seconds * 2 * (ranks - 1) / ranks / 1e9


def with_links(cluster: Cluster, intra: float = 1.0, inter: float = 1.0, latency: float = 0.0) -> Cluster:
    """Other rates of both links, and more latency on both."""
    first, second = cluster.intra, cluster.inter
    return replace(
        cluster,
        intra=replace(first, bandwidth=first.bandwidth * intra, latency=first.latency + latency),
        inter=replace(second, bandwidth=second.bandwidth * inter, latency=second.latency + latency),
        cache={},
    )


# -- choices ---------------------------------------------------------------------------------------------------


def test_a_ring_has_the_latency_and_rate_of_nccls_tuner() -> None:
    group = group_of(H200, range(8))
    ways = {(w.algorithm, w.protocol): w for w in candidates(group, "all_reduce")}
    ll, simple = ways["ring", "LL"], ways["ring", "Simple"]
    assert ll.base + ll.hops == pytest.approx((6.6 + 14 * 0.6) * 1e-6)
    assert ll.inside == pytest.approx(2 * 7 / 8 / 141e9)  # llMaxBws of Hopper on one node
    assert simple.inside == pytest.approx(2 * 7 / 8 / (0.8 * 450e9)) and simple.crossings == 0


def test_an_exchange_goes_at_the_rate_of_its_nics() -> None:
    """Nothing fitted: of two nodes half the bytes leave, (N - 1) / N of N nodes (github NVIDIA/nccl-tests, issue 130);
    what is fitted of all_to_all for a vendor divides that rate, and no other's."""
    size, nic = 64 * GIB, 50e9
    slow = Laws({"common.ramp": 0.0, "common.crossing": 0.0, "all_to_all.nvidia": 0.5, "all_to_all.amd": 0.1})
    cluster = load_cluster("64x dgx-h100")
    for nodes in (2, 4, 9, 32):
        seconds = size * (nodes - 1) / nodes / nic
        ranks = range(8 * nodes)
        free = collective_price(cluster, "all_to_all", size, ranks, laws=TUNER).seconds
        assert free == pytest.approx(seconds, rel=1e-3), nodes
        taken = collective_price(cluster, "all_to_all", size, ranks, laws=slow).seconds
        assert taken == pytest.approx(seconds / 0.5, rel=1e-3), nodes
    alone = collective_price(cluster, "all_to_all", size, range(8), laws=slow).seconds
    assert alone == pytest.approx(size * 7 / 8 / 360e9, rel=1e-3)  # inside a node no NIC is asked


@pytest.mark.parametrize(("cluster", "first"), [(H200, 5), (B200, 6)], ids=["h200", "b200"])
def test_nvls_starts_at_the_published_group_sizes(cluster: Cluster, first: int) -> None:
    for ranks in range(2, 9):
        large = collective_price(cluster, "all_reduce", GIB, range(ranks))
        assert (large.algorithm == "nvls") == (ranks >= first), ranks
    assert collective_price(cluster, "all_gather", GIB, range(8)).algorithm == "ring"
    assert collective_price(cluster, "all_reduce", 64 * 1024, range(8)).protocol == "LL"


def test_nvls_and_ring_are_as_far_apart_as_measured() -> None:
    # github stas00/ml-engineering, network README: 8 GiB, busbw in GB/s
    for cluster, nvls, ring in ((H200, 473.1, 365.6), (B200, 838.0, 682.2)):
        assert busbw(cluster, 8, "nvls") == pytest.approx(nvls, rel=0.05)
        assert busbw(cluster, 8, "ring") == pytest.approx(ring, rel=0.07)


def test_the_answer_names_what_it_assumed() -> None:
    price = collective_price(H100, "all_reduce", 1e9, range(16))
    assert (price.algorithm, price.protocol) == ("nvls_tree", "Simple") and 0 < price.error < 1
    assert collective_price(H100, "all_gather", 1e9, (0, 8, 16, 24)).algorithm in ("ring", "pat")
    with pytest.raises(ValueError, match="use one of ring, tree"):
        collective_price(H100, "all_reduce", 1e9, range(16), "butterfly")


def test_a_message_between_two_ranks_gets_channels_with_its_size() -> None:
    # B200, 8-GPU communicator: 64 MiB in 793 us, 128 MiB in 798 us, 512 MiB in 859 us (public report, 2026-05-18)
    times = [collective_price(B200, "send", n * MIB, (0, 1)).seconds for n in (64, 128, 512)]
    assert times == pytest.approx([793e-6, 798e-6, 859e-6], rel=0.12)
    assert times[1] == pytest.approx(times[0], rel=0.02)


def test_the_first_efa_runs_simple_only() -> None:
    """github aws/aws-ofi-nccl, issue 76: EFA supports neither LL nor LL128; pull request 280: P5 does."""
    for ports, protocols in ((4, {"Simple"}), (32, {"LL", "LL128", "Simple"})):
        cluster = replace(H100, inter=replace(H100.inter, name="EFA", bandwidth=12.5e9, ports=ports), cache={})
        ways = candidates(group_of(cluster, range(16)), "all_reduce")
        assert {w.protocol for w in ways if w.algorithm != "nvls_tree"} == protocols
        inside = candidates(group_of(cluster, range(8)), "all_reduce")
        assert {w.protocol for w in inside} == {"LL", "LL128", "Simple"}


def test_small_messages_between_two_ranks_go_by_ll() -> None:
    """enqueue.cc: up to 16 KiB for each of 32 channels."""
    small, large = (collective_price(B200, "send", n * 1024, (0, 1)).protocol for n in (512, 1024))
    assert (small, large) == ("LL", "Simple")


# -- placement -------------------------------------------------------------------------------------------------


def test_the_same_group_costs_more_when_it_is_spread() -> None:
    packed = collective_price(H100, "all_reduce", GIB, range(8))
    spread = collective_price(H100, "all_reduce", GIB, range(0, 32, 4))
    assert spread.seconds > 1.3 * packed.seconds
    assert group_of(H100, (31, 0, 8, 0)).hosts == 3 and group_of(H100, (31, 0, 8, 0)).ranks == 3


def test_devices_share_the_ports_of_their_node() -> None:
    one_port = replace(H100, inter=replace(H100.inter, ports=1), cache={})
    alone, shared = group_of(one_port, (0, 8)), group_of(one_port, range(16))
    assert alone.across == shared.across == one_port.inter.bandwidth
    assert group_of(H100, range(16)).across == 8 * H100.inter.bandwidth
    fast, slow = (collective_price(c, "all_to_all", GIB, range(16)).seconds for c in (H100, one_port))
    assert slow > 6 * fast


def test_a_tree_of_two_nodes_passes_the_rate_of_its_nics_by() -> None:
    """Two nodes exchange each byte once: the bus bandwidth of nccl-tests lies above the 400 GB/s of the NICs."""
    two, four = load_cluster("2x dgx-b200"), load_cluster("4x dgx-b200")
    assert busbw(two, 16) == pytest.approx(690, rel=0.1)
    assert busbw(four, 32) == pytest.approx(382, rel=0.1)  # shared/facts/communication.md A1, not fitted


def test_oversubscribed_switches_slow_what_crosses_them() -> None:
    flat = load_cluster("64x dgx-h100")
    tree = replace(flat, tiers=(Tier("pod", 16, 7.0), Tier("spine", 64)), cache={})
    inside, across = range(128), range(256)
    for kind in ("all_reduce", "all_to_all"):
        prices = [collective_price(c, kind, GIB, ranks).seconds for c in (flat, tree) for ranks in (inside, across)]
        assert prices[0] == pytest.approx(prices[2])
        assert prices[3] >= prices[1]
    assert collective_price(tree, "all_to_all", GIB, across).seconds > 2 * (
        collective_price(flat, "all_to_all", GIB, across).seconds
    )


def test_a_domain_can_hold_several_hosts() -> None:
    tray = replace(B200, name="nvl", device=replace(B200.device, name="GB200 (per GPU)"), nodes=36, devices_per_node=4)
    rack, two = group_of(tray, range(72)), group_of(tray, range(144))
    assert (rack.hosts, rack.per_host, rack.domains, rack.per_domain) == (1, 72, 1, 72), "NCCL joins its hosts"
    assert (two.hosts, two.domains) == (36, 2) and two.across == 18 * 4 * tray.inter.bandwidth


def test_a_fifth_device_of_a_rack_crosses_no_network() -> None:
    rack = load_cluster("gb200-nvl72")
    four, five = (collective_price(rack, "all_gather", 8, range(n)).seconds for n in (4, 5))
    assert four < five < 1.3 * four
    whole = collective_price(rack, "all_reduce", 8 * GIB, range(72))
    assert 2 * 71 / 72 * 8 * GIB / whole.seconds == pytest.approx(835e9, rel=0.05), "communication.md A6"


def test_families_and_networks_are_found_by_name() -> None:
    names = {"H100 SXM5 80GB": "hopper", "GB200 (per GPU)": "blackwell-nvl72", "A10G": "ada-pcie", "L40S": "ada-pcie",
             "A100 SXM4 40GB": "ampere", "Instinct MI300X": "cdna", "Tesla T4": "old-pcie"}  # fmt: skip
    found = {name: family_of(name) for name in names}
    assert {name: family and family.name for name, family in found.items()} == names
    assert family_of("H100 PCIe 80GB") is None and family_of("Gaudi2") is None
    links = {
        "efa-v1": Link("EFA", 12.5e9, 0, ports=4),
        "efa": Link("EFA", 12.5e9, 0, ports=32),
        "roce": Link("RoCE", 5e10, 0),
        "ib": Link("NDR InfiniBand", 5e10, 0),
        "ethernet": Link("TCP", 1e9, 0),
    }
    assert {network_of(link) for link in links.values()} == set(links)
    assert all(network_of(link) == name for name, link in links.items())


def test_a_device_without_family_is_priced_by_its_links() -> None:
    unknown = replace(H200, device=replace(H200.device, name="Model X"), cache={})
    price = collective_price(unknown, "all_reduce", GIB, range(8))
    ring = collective_price(H200, "all_reduce", GIB, range(8), "ring")
    assert price.algorithm in ("ring", "tree") and price.seconds == pytest.approx(ring.seconds, rel=0.3)
    assert price.error >= collective_price(H200, "all_reduce", GIB, range(8)).error


# -- what holds for every price --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
@given(size=SIZES, more=st.floats(1, 100), ranks=st.integers(2, 32), step=st.integers(1, 8))
def test_prices_rise_with_bytes_and_latency_and_fall_with_bandwidth(
    kind: str, size: float, more: float, ranks: int, step: int
) -> None:
    members = range(0, 2 * step, step) if kind == "send" else range(0, min(ranks * step, 32), step)
    if len(members) < 2:
        return
    slack = 1 + 1e-9
    price = collective_price(H100, kind, size, members).seconds
    assert price > 0
    assert collective_price(H100, kind, size * more, members).seconds * slack >= price
    assert collective_price(with_links(H100, intra=more), kind, size, members).seconds <= price * slack
    assert collective_price(with_links(H100, inter=more), kind, size, members).seconds <= price * slack
    assert collective_price(with_links(H100, latency=more * 1e-6), kind, size, members).seconds * slack >= price


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "send", "all_to_all"])
@given(size=st.floats(20, 40).map(lambda x: 2.0**x), ranks=st.integers(2, 32))
def test_no_price_beats_the_wires(kind: str, size: float, ranks: int) -> None:
    """A device sends at least what the others need from it: the buffer (all_reduce, even if switches reduce), or
    (n - 1) / n of it; the same for a node and its NICs."""
    members = range(2) if kind == "send" else range(ranks)
    seconds = collective_price(H100, kind, size, members).seconds
    share = 1.0 if kind in ("all_reduce", "send") else (ranks - 1) / ranks
    assert seconds >= 0.999 * share * size / (H100.intra.bandwidth + (H100.inter.bandwidth if ranks > 8 else 0))
    if ranks > 8 and kind != "send":
        nodes, nics = -(-ranks // 8), 8 * H100.inter.bandwidth
        volume = {"all_reduce": 1.0, "all_to_all": 8 * (ranks - 8) / ranks}.get(kind, (nodes - 1) / nodes)
        assert seconds >= 0.999 * volume * size / nics


def test_nothing_fitted_still_gives_prices() -> None:
    for kind in KINDS:
        price = collective_price(H100, kind, MIB, range(2 if kind == "send" else 16), laws=Laws())
        assert 1e-6 < price.seconds < 1e-2
    assert len(shipped().values) > 20 and shipped().rows == 425


def test_a_group_of_16384_is_priced_once_and_read_from_a_curve() -> None:
    huge = load_cluster("2048x dgx-h100")
    prices = [collective_price(huge, "all_reduce", 2.0**k, range(16384)).seconds for k in range(36)]
    assert (np.diff(prices) >= 0).all()


# -- textbook algorithms ---------------------------------------------------------------------------------------


def test_textbook_costs() -> None:
    assert hockney.recursive_doubling(100, 8, 1.0, 0.1) == pytest.approx(3 * 11)
    assert hockney.recursive_doubling(100, 6, 1.0, 0.1) == pytest.approx(4 * 11)
    assert hockney.rabenseifner(800, 8, 1.0, 0.01) == pytest.approx(2 * 3 + 2 * 7 / 8 * 8)
    assert hockney.binomial(100, 5, 1.0, 0.1) == pytest.approx(3 * 11)
    flat = 2 * hockney.ring(800, 8, 1.0, 0.01)
    assert hockney.hierarchical(800, 1, 8, (1.0, 0.01), (9.0, 9.0)) == pytest.approx(flat)
    assert hockney.hierarchical(800, 8, 1, (9.0, 9.0), (1.0, 0.01)) == pytest.approx(flat)
    inner, outer = 2 * hockney.ring(800, 8, 1.0, 0.01), 2 * hockney.ring(100, 4, 2.0, 0.1)
    assert hockney.hierarchical(800, 4, 8, (1.0, 0.01), (2.0, 0.1)) == pytest.approx(inner + outer)


@pytest.mark.parametrize("algorithm", ["recursive_doubling", "rabenseifner", "hierarchical"])
def test_textbook_algorithms_can_be_asked_for(algorithm: str) -> None:
    price = collective_price(H100, "all_reduce", GIB, range(32), algorithm)
    assert price.algorithm == algorithm and price.source == "roofline" and price.seconds > 0
    with pytest.raises(ValueError, match=f"{algorithm} is no algorithm of send"):
        collective_price(H100, "send", GIB, (0, 1), algorithm)


def test_two_levels_beat_one_between_nodes() -> None:
    two_levels, one = (
        collective_price(H100, "all_reduce", GIB, range(32), a).seconds for a in ("hierarchical", "rabenseifner")
    )
    assert two_levels < one


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all"])
@pytest.mark.parametrize("nbytes", [8.0, 2.0**20, 2.0**29])
def test_rings_over_sockets_pass_every_device_of_their_hosts(kind: str, nbytes: float) -> None:
    """A second host of PCIe boxes makes nothing faster (an all-to-all leaves less inside)."""
    two = load_cluster("2x rtx4090-pcie")
    alone, both = (collective_price(two, kind, nbytes, range(n)).seconds for n in (8, 16))
    sparse = collective_price(two, kind, nbytes, (0, 8)).seconds
    assert both > sparse
    assert both > (0.5 if kind == "all_to_all" else 1.0) * alone
    if kind == "all_reduce" and nbytes > 2**28:
        assert both == pytest.approx(alone * (15 / 16) / (7 / 8), rel=0.01)


@pytest.mark.parametrize(("name", "ranks"), [("8x dgx-h100", 32), ("16x dgx-a100", 64), ("2x gb200-nvl72", 72)])
def test_one_rank_more_on_a_node_of_its_own_takes_its_own_nic_only(name: str, ranks: int) -> None:
    """All that reaches the lone rank comes through its NIC; the others do not wait for it with theirs."""
    cluster = load_cluster(name)
    group = group_of(cluster, range(ranks + 1))
    nic = across_of(cluster, 1, 1)
    seconds = collective_price(cluster, "all_to_all", 2.0**30, range(ranks + 1)).seconds
    bound = 2**30 * ranks / (ranks + 1) / nic
    assert group.leaving == pytest.approx(ranks / (ranks + 1))
    assert bound < seconds < 2.5 * bound


@pytest.mark.parametrize(("ranks", "config"), [(2, "RTX4090-2g1n-AR-b"), (4, "RTX4090-4g1n-AR")])
def test_a_box_without_peer_to_peer_is_as_fast_as_its_sweeps(ranks: int, config: str) -> None:
    """What staging costs is in the law of such devices, and once only."""
    (sweep,) = (s for s in catalogue_sweeps() if s.config_id == config)
    seconds = collective_price(load_cluster("rtx4090-pcie"), "all_reduce", sweep.bytes[-1], range(ranks)).seconds
    assert seconds == pytest.approx(sweep.seconds[-1], rel=0.15)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all"])
@pytest.mark.parametrize("ranks", [8, 72, 73, 76, 80, 100, 144])
def test_a_rack_of_trays_is_a_rack(kind: str, ranks: int) -> None:
    """The same machine as two nodes of 72 devices and as 36 of four; a lone rank of the second rack has its NIC."""
    racks = load_cluster("2x gb200-nvl72")
    trays = replace(racks, nodes=36, devices_per_node=4, cache={})
    one, other = (collective_price(c, kind, 2.0**33, range(ranks)).seconds for c in (racks, trays))
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "cut"), [("dgx1-v100", 150e9), ("dgx1-p100", 80e9), ("a100-pcie", 16e9)]
)  # bytes/s between the halves of a node, one way
def test_an_exchange_crosses_the_middle_of_a_node(name: str, cut: float) -> None:
    size = 2.0**32
    seconds = collective_price(load_cluster(name), "all_to_all", size, range(8)).seconds
    assert 4 * 4 / 8 * size / cut < seconds < 6 * 4 * 4 / 8 * size / cut


def test_a_bridged_pair_of_a_pcie_box_waits_no_longer_than_others() -> None:
    box = load_cluster("a100-pcie")
    pair, three = (collective_price(box, "all_reduce", 8, range(n)).seconds for n in (2, 3))
    assert pair < three


@pytest.mark.parametrize("name", ["2x rtx4090-pcie", "8x dgx-h100", "4x mi300x-8"])
@pytest.mark.parametrize("size", [2.0**20, 2.0**28])
def test_two_levels_are_the_sum_of_their_phases(name: str, size: float) -> None:
    """Priced by the law of each phase, so that a family that is slow inside its nodes is slow in two levels, too."""
    cluster = load_cluster(name)
    each, nodes = cluster.devices_per_node, cluster.nodes
    inside = sum(collective_price(cluster, k, size, range(each)).seconds for k in ("reduce_scatter", "all_gather"))
    heads = range(0, cluster.size, each)
    between = collective_price(cluster, "all_reduce", size / each, heads, firsts=tuple(range(each))).seconds
    whole = collective_price(cluster, "all_reduce", size, range(each * nodes), "hierarchical")
    assert whole.seconds == pytest.approx(inside + between) and whole.algorithm == "hierarchical"


def test_textbook_algorithms_feel_what_the_family_and_the_uplinks_leave() -> None:
    tree = load_cluster("h100-roce-tree")
    flat = replace(tree, tiers=(), cache={})
    one, other = (collective_price(c, "all_reduce", 2.0**28, range(256), "rabenseifner").seconds for c in (tree, flat))
    assert one > 1.5 * other
    box = load_cluster("rtx4090-pcie")
    ring, other = (collective_price(box, "all_reduce", 2.0**28, range(8), a).seconds for a in ("ring", "rabenseifner"))
    assert other == pytest.approx(ring, rel=0.1)
