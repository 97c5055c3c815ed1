"""The slowest of many GPUs: expected maxima against known values, and where the pace is felt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from costmodels.cluster import load_cluster, local_cluster
from costmodels.device import Law, load_device
from costmodels.ops import OpShape, price, price_many
from costmodels.variability import SPREAD, highest_of, slowest_of, synchronous


# Expected largest of n standard normals: Harter 1961, table 1 (5 decimals there).
@pytest.mark.parametrize("count,expected", [(2, 0.56419), (8, 1.42360), (64, 2.34373), (100, 2.50759)])
def test_expected_maximum_is_that_of_tables(count, expected):
    assert highest_of(count) == pytest.approx(expected, rel=1e-3)


def test_expected_maximum_matches_drawn_samples_of_many():
    drawn = np.random.default_rng(0).standard_normal((4000, 512)).max(axis=1).mean()
    assert highest_of(512) == pytest.approx(drawn, rel=0.01)


def test_one_device_is_the_one_measured_and_more_are_never_faster():
    paces = [slowest_of(n) for n in (1, 2, 8, 64, 1024, 16384)]
    assert paces[0] == 1.0 and paces == sorted(paces)
    assert 1.03 < paces[-1] < 1 + 5 * SPREAD


def test_a_devices_own_spread_counts_and_others_take_that_of_the_measured():
    b200, gb200 = load_cluster("dgx-b200"), load_cluster("gb200-nvl72")
    assert b200.device.spread == 0.0103 and gb200.device.spread == 0.0
    assert synchronous(b200, 8).device.slowest == slowest_of(8, 0.0103) == pytest.approx(1.0147, abs=1e-4)
    assert synchronous(gb200, 8).device.slowest == slowest_of(8)


def test_the_common_spread_is_the_root_mean_square_of_the_measured_models():
    names = ("b200", "a100-sxm-40gb", "h100-sxm", "v100-sxm2-32gb", "mi100")
    measured = [load_device(name).spread for name in names] + [0.0066]  # RTX PRO 6000, which the catalogue lacks
    assert np.sqrt(np.mean(np.square(measured))) == pytest.approx(SPREAD, abs=1e-4)


def _product(name: str = "aten.mm.default") -> OpShape:
    m = 4096
    return OpShape(name, "forward", ((m, m), (m, m)), ((m, m),), "bfloat16", 2 * m**3, 4 * m * m, 2 * m * m)


def test_products_slow_down_and_streams_do_not():
    one = load_cluster("dgx-h100")
    eight = synchronous(one, 8)
    relu = OpShape("aten.relu.default", "forward", ((1 << 24,),), ((1 << 24,),), "bfloat16", 0, 1 << 25, 1 << 25)
    for shape, pace in ((_product(), slowest_of(8, one.device.spread)), (relu, 1.0)):
        assert price(eight.device, shape).seconds == pytest.approx(pace * price(one.device, shape).seconds)
        assert price_many(eight.device, [shape])[0] == price(eight.device, shape)


def test_pace_follows_the_count_and_is_applied_once():
    one = load_cluster("2x dgx-h100")
    assert synchronous(one, 1) is one
    spread = one.device.spread
    assert synchronous(synchronous(one, 16), 8).device.slowest == slowest_of(8, spread)
    assert synchronous(one, 64).device.slowest == slowest_of(16, spread), "no more than there are"
    assert synchronous(synchronous(one, 16), 16) is synchronous(one, 16)
    assert synchronous(one, 16).device.step_error == pytest.approx(spread)


def test_tpus_and_cores_that_nobody_measured_do_not_differ():
    for cluster in (local_cluster(Path("nowhere")), load_cluster("tpu-v4-cube")):
        assert synchronous(cluster, 4) is cluster


def test_ranks_wait_for_the_slowest_core_as_calibration_found_it():
    local = local_cluster(Path("nowhere"))
    law = Law("relu/float32", "stream", (1e-6, 0, 0, 0, 0, 0, 1e-11, 1e-11, 2e-11, 0.0))
    device = replace(local.device, laws={law.key: law}, host={"skew": 0.1, "op_forward": 1e-6, "loaded": 1.5})
    cluster = replace(local, device=device, cores=4, devices_per_node=4, cache={})
    three = synchronous(cluster, 3)
    longer = 1 + 0.1 * highest_of(3)
    relu = OpShape("aten.relu.default", "forward", ((1 << 16,),), ((1 << 16,),), "float32", 0, 1 << 18, 1 << 18)
    assert price(three.device, relu).seconds == pytest.approx(longer * price(device, relu).seconds)
    assert three.device.host == pytest.approx({"op_forward": longer * 1e-6, "loaded": 1.5})
    assert synchronous(three, 3) is three, "once"
    assert synchronous(cluster, 64).device.host == synchronous(cluster, 4).device.host, "no more than there are"
    assert synchronous(cluster, 1).device.laws == device.laws and synchronous(cluster, 1).notes == local.notes
    assert any("slowest of 3 cores" in note for note in three.notes)
