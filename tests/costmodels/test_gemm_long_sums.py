"""Matrix products whose sums are longer than those of any table: split over all units, and never cheaper for that."""

from __future__ import annotations

from itertools import pairwise

import pytest

from costmodels.device import load_device
from costmodels.ops import price
from tests.costmodels.test_gemm import mm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_far_longer_than_any_of_the_table_is_split_over_all_units(dtype: str) -> None:
    found = {name: price(load_device(name), mm(64, 64, 2**20, dtype)).seconds for name in ("a100-sxm-80gb", "h100-sxm")}
    for name, one in found.items():
        device = load_device(name)
        size = 4 if dtype == "float32" else 2
        bound = max(2**27 * size / device.memory_bandwidth, 2 * 64 * 64 * 2**20 / device.peak_flops[dtype])
        assert bound < one < 3 * bound
    assert found["h100-sxm"] < found["a100-sxm-80gb"]
    if dtype == "float32":
        assert found["a100-sxm-80gb"] < price(load_device("v100-sxm2-16gb"), mm(64, 64, 2**20, dtype)).seconds


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "v100-pcie-32gb", "h100-sxm", "t4"])
@pytest.mark.parametrize("dims", [(64, 64), (16, 512), (1024, 1024)])
def test_a_longer_sum_costs_no_less_beyond_the_table(name: str, dims: tuple[int, int]) -> None:
    times = [price(load_device(name), mm(*dims, k, "float32")).seconds for k in range(2**15, 2**18, 2**12)]
    assert all(0.98 * few <= many for few, many in pairwise(times))
