"""gloo and NCCL over TCP: published points of shaped networks, and what every formula must obey."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import gloo
from costmodels.cluster import Link

MIB = 2**20
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send", "all_to_all", "barrier")
# github BinhangYuan/tc_cluster_setting, AWS p3.2xlarge, TCP shaped by tc: nodes, delay s, bit/s, MiB, seconds
REDUCE = [(8, 1e-3, 5e9, 128, 0.427), (8, 5e-3, 2e9, 256, 2.307), (16, 1e-3, 5e9, 256, 0.873),
          (16, 10e-3, 1e9, 256, 4.525)]  # fmt: skip
SEND = [(2, 0.0, 5e9, 64, 0.110), (2, 1e-3, 5e9, 128, 0.224), (2, 5e-3, 2e9, 64, 0.311), (2, 10e-3, 1e9, 128, 1.160)]
NCCL_RING = [(8, 1e-3, 5e9, 128, 0.383), (8, 5e-3, 2e9, 256, 1.921), (8, 10e-3, 1e9, 128, 1.940)]
NCCL_BROADCAST = [(16, 1e-3, 5e9, 256, 0.502), (16, 5e-3, 2e9, 128, 0.831), (16, 10e-3, 1e9, 128, 1.651)]


@pytest.mark.parametrize(
    ("kind", "points", "limit", "nccl"),
    [
        ("reduce", REDUCE, 0.05, False),
        ("send", SEND, 0.03, False),
        ("all_reduce", NCCL_RING, 0.02, True),
        ("broadcast", NCCL_BROADCAST, 0.04, True),
    ],
    ids=["gloo reduce", "gloo send", "nccl all_reduce", "nccl broadcast"],
)
def test_formulas_meet_published_points(
    kind: str, points: list[tuple[int, float, float, int, float]], limit: float, nccl: bool
) -> None:
    errors = []
    for nodes, delay, bits, size, seconds in points:
        link = Link("tcp", bits / 8, delay)
        found = (
            gloo.nccl_sockets(kind, size * MIB, nodes, nodes, link)
            if nccl
            else gloo.seconds(kind, size * MIB, nodes, link)
        )
        errors.append(abs(found / seconds - 1))
    assert sum(errors) / len(errors) < limit


def test_a_broadcast_shares_its_port_and_obeys_the_cap_of_a_flow() -> None:
    """8 nodes, 10 Gbit/s ports, 5 Gbit/s a flow: stages of 1, 2 and 3 sends take S/5, S/5 and S/3.33."""
    link = Link("tcp", 1.25e9, 0.0, flow_cap=6.25e8)
    size = 128 * MIB
    assert gloo.seconds("broadcast", size, 8, link) == pytest.approx(size * (1 + 1 + 1.5) / 6.25e8)
    assert gloo.seconds("broadcast", size, 8, replace(link, flow_cap=0)) == pytest.approx(6 * size / 1.25e9)


def test_slow_start_ends_when_the_window_covers_the_path() -> None:
    assert gloo.slow_start(1e9, 1e9, 0.0) == 0.0
    assert gloo.slow_start(1e9, 1.46e6, 1e-2) == pytest.approx(1e-2)  # ten segments fill the path at once
    assert gloo.slow_start(1e9, 4 * 1.46e6, 1e-2) == pytest.approx(3e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nccl", [False, True], ids=["gloo", "nccl"])
@given(
    size=st.floats(0, 1e10), factor=st.floats(1, 50), ranks=st.integers(2, 32), rate=st.floats(1e7, 1e10),
    latency=st.floats(1e-6, 5e-2),
)  # fmt: skip
def test_times_rise_with_bytes_and_latency_and_fall_with_bandwidth(
    kind: str, nccl: bool, size: float, factor: float, ranks: int, rate: float, latency: float
) -> None:
    def seconds(nbytes: float, link: Link) -> float:
        n = 2 if kind == "send" else ranks
        return gloo.nccl_sockets(kind, nbytes, n, n, link) if nccl else gloo.seconds(kind, nbytes, n, link)

    link = Link("tcp", rate, latency)
    here, slack = seconds(size, link), 1 + 1e-9
    assert here > 0
    assert seconds(size * factor, link) * slack >= here
    assert seconds(size, replace(link, bandwidth=rate * factor)) <= here * slack
    assert seconds(size, replace(link, latency=latency * factor)) * slack >= here
    if kind not in ("barrier", "send", "all_gather", "all_to_all", "reduce_scatter"):
        assert here * slack >= size / rate
