"""float32 in tf32: which operators, on which devices, and that prices follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodels.cluster import load_cluster
from costmodels.device import load_device
from costmodels.ops import OpShape, price, price_many
from costmodels.rounding import ASKED, UNASKED, in_precision, rounded_families

PRODUCT = OpShape(
    "aten.mm.default", "forward", ((4096, 4096), (4096, 4096)), ((4096, 4096),), "float32", 2 * 4096**3, 2**27, 2**26
)
IMAGE, WEIGHT = (64, 256, 28, 28), (256, 256, 3, 3)
CONVOLUTION = OpShape(
    "aten.convolution.default", "forward", (IMAGE, WEIGHT), (IMAGE,), "float32",
    2 * 64 * 256 * 28 * 28 * 256 * 9, 4 * (64 * 256 * 28 * 28 + 256 * 256 * 9), 4 * 64 * 256 * 28 * 28,
)  # fmt: skip
SUM = OpShape("aten.add.Tensor", "forward", ((2**20,), (2**20,)), ((2**20,),), "float32", 0, 2**23, 2**22)


@pytest.mark.parametrize(
    ("device", "precision", "families"),
    [
        ("a100-sxm-80gb", "fp32", UNASKED), ("a100-sxm-80gb", "tf32", ASKED), ("a100-sxm-80gb", "bf16", ()),
        ("v100-sxm2-16gb", "fp32", ()), ("v100-sxm2-16gb", "tf32", ()), ("mi300x", "fp32", ()),
        ("mi300x", "tf32", ASKED), ("trainium2", "fp32", ()), ("tpu-v5p", "tf32", ()),
    ],
)  # fmt: skip
def test_what_rounds_where(device, precision, families):
    assert rounded_families(load_device(device), precision) == families


def test_prices_are_those_of_the_format_that_an_op_runs_in():
    plain = load_cluster("dgx-a100")
    torch_as_it_comes, asked = in_precision(plain, "fp32"), in_precision(plain, "tf32")
    for shape, rounds in ((PRODUCT, (False, True)), (CONVOLUTION, (True, True)), (SUM, (False, False))):
        full = price(plain.device, shape)
        faster = price(plain.device, replace(shape, dtype="tf32"))
        for cluster, rounded in zip((torch_as_it_comes, asked), rounds):
            found = price(cluster.device, shape)
            assert found == (faster if rounded else full)
            assert price_many(cluster.device, [shape, shape]) == [found, found]
            assert price(cluster.device, replace(shape, dtype="bfloat16")) == price(
                plain.device, replace(shape, dtype="bfloat16")
            )
    assert price(asked.device, PRODUCT).seconds < 0.3 * price(plain.device, PRODUCT).seconds


def test_many_at_once_are_priced_in_their_format():
    device = in_precision(load_cluster("dgx-a100"), "fp32").device
    alone = [price(replace(device, cache={}), s) for s in (PRODUCT, CONVOLUTION, SUM)]
    together = price_many(replace(device, cache={}), [PRODUCT, CONVOLUTION, SUM])
    assert [p.source for p in together] == [p.source for p in alone]
    assert [p.seconds for p in together] == pytest.approx([p.seconds for p in alone], rel=1e-12)


def test_a_cluster_is_rounded_once_and_back():
    cluster = load_cluster("dgx-a100")
    rounded = in_precision(cluster, "fp32")
    assert in_precision(cluster, "fp32") is rounded and in_precision(rounded, "fp32") is rounded
    assert in_precision(rounded, "bf16").device.in_tf32 == () and cluster.device.in_tf32 == ()
