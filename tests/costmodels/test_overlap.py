"""What ops lose beside a collective: units and memory bandwidth."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

import costmodels.overlap as overlap
from costmodels.cluster import Cluster, load_cluster
from costmodels.collectives import collective_price
from costmodels.nccl_fabric import group_of
from costmodels.ops import OpShape, price_many
from costmodels.overlap import Beside, beside, channels, slowdowns

NONE = Beside(0, 0.0)


def product(m: int, n: int, k: int) -> OpShape:
    flops, read = 2 * m * n * k, 2 * (m + n) * k
    return OpShape("aten.mm.default", "forward", ((m, k), (k, n)), ((m, n),), "bfloat16", flops, read, 2 * m * n)


def stream(size: int) -> OpShape:
    return OpShape("aten.add.Tensor", "forward", ((size,),) * 2, ((size,),), "bfloat16", 0, 4 * size, 2 * size)


def gather(cluster: Cluster, ranks=range(8), nbytes: float = 1e8) -> Beside:
    return beside(cluster, "all_gather", nbytes, ranks, collective_price(cluster, "all_gather", nbytes, ranks).seconds)


def slowed(cluster: Cluster, shapes: list[OpShape], other: Beside) -> list[float]:
    return slowdowns(cluster.device, shapes, [p.seconds for p in price_many(cluster.device, shapes)], other)


def test_channels_of_known_machines() -> None:
    for name, count in (("dgx-h100", 24), ("dgx-a100", 24), ("dgx1-v100", 12)):
        assert channels(group_of(load_cluster(name), range(8)), 1e9) == count
    group = group_of(load_cluster("2x dgx-h100"), (0, 8))
    assert channels(group, 1e9) == 4, "one port of 50 GB/s feeds two rings"
    assert channels(group, 4096) == 1


def test_the_published_product_needs_a_second_wave() -> None:
    """NVIDIA forum 337991: 132 blocks beside an all-gather on 24 units: 80 % of the peak becomes 47 %, 1.7 times."""
    cluster = load_cluster("dgx-h100")
    other = gather(cluster)
    (exact,) = slowed(cluster, [product(11 * 128, 12 * 256, 8192)], other)
    assert other.units == 24 and 1.6 < exact < 2.05


def test_products_of_hopper_take_twice_as_long_and_others_lose_the_share_of_units() -> None:
    """pytorch issue 143988: all matmuls of a step on H100, twice as long beside NCCL."""
    large, small = product(16384, 4096, 4096), product(64, 64, 64)
    for name in ("dgx-h100", "dgx-h200"):
        cluster = load_cluster(name)
        other = gather(cluster)
        assert other.static and slowed(cluster, [large], other)[0] == pytest.approx(2.0, abs=0.01)
        assert slowed(cluster, [small], other)[0] < 1.2, "its few blocks find units that are free"
        copied = replace(other, units=0)  # by copy engines
        assert slowed(cluster, [large], copied)[0] < 1.2
        single = replace(large, dtype="float32", bytes_read=2 * large.bytes_read, bytes_written=2 * large.bytes_written)
        assert slowed(cluster, [single], other)[0] < 1.6, "float32 has kernels of another kind"
    for name, units in (("dgx-a100", 108), ("dgx-b200", 148)):
        cluster = load_cluster(name)
        other = gather(cluster)
        share = units / (units - other.units)
        assert not other.static and 0.9 * share < slowed(cluster, [large], other)[0] < 1.15 * share


def test_streams_lose_bandwidth_and_views_nothing() -> None:
    cluster = load_cluster("dgx-h100")
    other = gather(cluster)
    view = OpShape("aten.view.default", "forward", ((8,),), ((8,),), "bfloat16", 0, 0, 0)
    large, free = slowed(cluster, [stream(2**28), view], other)
    assert 1.05 < large < 1.4 and free == 1.0
    assert slowed(cluster, [stream(2**28), product(4096, 4096, 4096)], NONE) == [1.0, 1.0]


def test_a_group_with_one_port_takes_less() -> None:
    cluster = load_cluster("2x dgx-h100")
    shapes = [product(8192, 8192, 8192), stream(2**28)]
    inside, across = slowed(cluster, shapes, gather(cluster)), slowed(cluster, shapes, gather(cluster, (0, 8)))
    assert all(1 <= a <= i for a, i in zip(across, inside)) and sum(across) < sum(inside)


def test_nothing_is_taken_where_no_kernel_moves_messages() -> None:
    for name in ("local", "tpu-v5e-pod", "dgx-h100"):
        cluster = load_cluster(name)
        assert beside(cluster, "all_gather", 1e8, (0,), 1.0) == NONE
        if name != "dgx-h100":
            assert beside(cluster, "all_gather", 1e8, (0, 1), 1.0) == NONE


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(overlap).failed == 0


@pytest.mark.parametrize("queue", [[], [["a", 0.0]], [["a", 5.0]], [["a", 0.5], ["b", 0.2]]])
def test_contended_work_never_gains_and_loses_at_most_the_slowdown(queue: list[list]) -> None:
    under_way = sum(s for _, s in queue)
    spent = overlap.contended(1.0, 1.3, queue)
    assert 1.0 <= spent <= 1.3 and spent == pytest.approx(min(1.3, 1 + under_way * (1 - 1 / 1.3)))
    assert sum(s for _, s in queue) == pytest.approx(max(under_way - spent, 0.0))
