"""The law of matrix products: what its terms do, what prices say of themselves, and how its constants are found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels.device import Device, list_devices, load_device
from costmodels.gemm import (
    BORROWED_ERROR,
    MOST,
    WIDE,
    _evaluate,
    gemm_price,
    gemm_prices,
    pricing_of,
    product_dims,
    wide_of,
)
from costmodels.gemm_correction import STEP, Correction, correction_from, factors, section_of
from costmodels.gemm_law import Constants, Hardware, law_seconds, menu
from costmodels.kernels import kernel_price
from costmodels.ops import OpShape, peak_of, price, price_many
from costmodels.relatives import distance, find, measured, relatives, section_for

PLAIN = Constants(
    compute=0.9, area=0.1, prologue=100, smooth=0.0, stream=0.8, in_flight=60, reread=0.2, overlap=4, floor=3e-6,
    split_floor=2e-6, split_bytes=0.2, throttle=0.03,
)  # fmt: skip
CHIP = Hardware(units=100, peak=3e14, bandwidth=2e12, cache=4e7, operand_bytes=2, result_bytes=2)
TILES = menu(["64x64", "128x128", "128x256"], [1, 2, 4])


def mm(m: int, n: int, k: int, dtype: str = "bfloat16") -> OpShape:
    size = 4 if dtype == "float32" else 2
    return OpShape("aten.mm.default", "forward", ((m, k), (k, n)), ((m, n),), dtype, 2 * m * n * k,
                   size * (m * k + k * n), size * m * n)  # fmt: skip


def seconds(constants: Constants, hardware: Hardware, *dims: tuple[int, int, int, int]) -> list[float]:
    return law_seconds(constants, hardware, TILES, np.array(dims, float)).tolist()


def test_large_products_run_at_the_share_of_the_peak_and_thin_ones_at_the_bandwidth() -> None:
    large, thin = seconds(PLAIN, CHIP, (1, 12800, 25600, 8192), (1, 1, 16384, 16384))
    assert 0.75 < 2 * 12800 * 25600 * 8192 / 3e14 / large < 0.9
    assert 0.7 < 2 * 16384**2 / 2e12 / thin < 0.8


def test_one_tile_more_than_a_full_wave_costs_another_wave() -> None:
    fast_memory = replace(CHIP, bandwidth=1e14)
    dims = np.array([[1, 128, 12800, 8192], [1, 128, 12928, 8192]], float)
    full, more = law_seconds(PLAIN, fast_memory, menu(["128x128"], [1]), dims).tolist()
    assert 1.8 < more / full < 2.1
    full, more = law_seconds(replace(PLAIN, smooth=1.0), fast_memory, menu(["128x128"], [1]), dims).tolist()
    assert more / full < 1.05


def test_a_split_of_k_helps_few_tiles_and_is_never_forced_on_many() -> None:
    dims = np.array([[1, 64, 256, 65536], [1, 8192, 8192, 1024]], float)
    without = law_seconds(PLAIN, CHIP, menu(["64x64", "128x128"], [1]), dims)
    with_splits = law_seconds(PLAIN, CHIP, menu(["64x64", "128x128"], [1, 8]), dims)
    assert with_splits[0] < 0.6 * without[0] and with_splits[1] == without[1]


def test_small_operands_come_from_the_cache() -> None:
    warm = replace(PLAIN, resident=0.2, hot=3.0)
    small, large = (1, 1, 1024, 1024), (1, 1, 16384, 16384)
    assert seconds(warm, CHIP, small)[0] < seconds(PLAIN, CHIP, small)[0]
    assert seconds(warm, CHIP, large)[0] == pytest.approx(seconds(PLAIN, CHIP, large)[0], rel=1e-3)


def test_k_is_rounded_up_to_the_step_of_the_kernel() -> None:
    compute_only = replace(PLAIN, prologue=0, floor=0.0)
    fast_memory = replace(CHIP, bandwidth=1e17)
    for step, ratio in ((8.0, 4.0), (32.0, 1.0)):
        short, long = seconds(replace(compute_only, k_step=step), fast_memory, (1, 64, 64, 8), (1, 64, 64, 32))
        assert long / short == pytest.approx(ratio, rel=1e-3)


def test_a_lone_block_takes_as_long_as_several_at_once() -> None:
    """Waves w of a unit take (w**3 + alone**3)**(1/3) of them: one 3 times as long, many no longer."""
    alone, fast_memory = replace(PLAIN, alone=3.0, floor=0.0), replace(CHIP, bandwidth=1e17)
    dims = np.array([[waves * 100, 128, 128, 8192] for waves in (1, 2, 100)], float)
    tile = menu(["128x128"], [1])
    whole = law_seconds(replace(alone, alone=0.0), fast_memory, tile, dims)
    ratio = law_seconds(alone, fast_memory, tile, dims) / whole
    waves = np.array([1, 2, 100])
    assert ratio == pytest.approx((waves**3 + 27) ** (1 / 3) / waves, rel=1e-6)


def test_misaligned_lengths_slow_compute() -> None:
    odd = replace(PLAIN, odd=0.3)
    aligned, misaligned = seconds(odd, CHIP, (1, 4096, 4096, 4096), (1, 4096, 4095, 4096))
    assert 1.2 < misaligned / aligned < 1.3


@given(st.tuples(st.integers(1, 64), *[st.integers(1, 20000)] * 3))
def test_seconds_are_positive_and_not_below_the_floor_or_either_roof(dims: tuple[int, int, int, int]) -> None:
    b, m, n, k = dims
    (value,) = seconds(PLAIN, CHIP, dims)
    assert value >= PLAIN.floor
    assert value >= 2.0 * b * m * n * k / CHIP.peak
    assert value >= 2.0 * b * (m * k + k * n + m * n) / CHIP.bandwidth


@given(st.tuples(*[st.integers(1, 4000)] * 3))
def test_a_better_chip_is_never_slower(dims: tuple[int, int, int]) -> None:
    here = seconds(PLAIN, CHIP, (1, *dims))[0]
    for better in ({"peak": 6e14}, {"bandwidth": 4e12}):
        assert seconds(PLAIN, replace(CHIP, **better), (1, *dims))[0] <= here * (1 + 1e-9)


def test_correction_is_stored_to_half_a_step_and_fades_outside() -> None:
    axes = tuple(np.log(np.array(a, float)) for a in ([1], [1, 64, 4096], [64, 4096], [64, 4096]))
    table = Correction(axes, np.linspace(-0.3, 0.3, 12))
    stored = correction_from(section_of(table))
    assert stored is not None
    assert np.abs(stored.values - table.values).max() <= STEP / 2 + 1e-12
    nodes = np.array([[1, 1, 64, 64], [1, 4096, 4096, 4096]], float)
    assert factors(table, nodes) == pytest.approx(np.exp([-0.3, 0.3]))
    middle = np.exp(np.array([[0, np.log(512), np.log(512), np.log(512)]]))
    assert np.exp(-0.3) < factors(table, middle)[0] < np.exp(0.3)
    assert factors(table, np.array([[1, 4096 * 5, 4096, 4096], [8, 1, 64, 64]], float)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [d.name for d in measured() if "gemm" in d.kernels])
def test_every_section_of_the_catalogue_is_complete(name: str) -> None:
    device = next(d for d in measured() if d.name == name)
    for dtype, section in device.kernels["gemm"].items():
        assert section["rows"] > 100 and section["held_out"] > 100 and section["data"]
        assert 0 < section["error"] < 0.25 and len(section["errors"]) == 4
        assert all(low <= high for low, high in zip(section["low"], section["high"]))
        assert pricing_of(device, *kind_of(dtype)) is not None


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "b200"])
def test_best_rates_are_those_that_others_measured(name: str) -> None:
    """The device files' best measured rates come from another source (mamf-finder) than the tables of the law."""
    device = load_device(name)
    shapes = [mm(m, n, k) for m in (4096, 8192, 16384) for n in (4096, 8192, 16384) for k in (4096, 8192, 16384)]
    best = max(s.flops / p.seconds for s, p in zip(shapes, gemm_prices(device, shapes)) if p)
    assert best == pytest.approx(device.best_flops["bfloat16"], rel=0.12)


def test_prices_say_where_they_come_from() -> None:
    h100 = load_device("h100-sxm")
    inside, outside = price(h100, mm(4096, 4096, 4096)), price(h100, mm(4096, 4096, 4096 * 64))
    assert inside.source == "interpolated" and outside.source == "extrapolated"
    assert outside.error > inside.error
    assert price(h100, mm(4096, 4096, 4096, "float16")).seconds == pytest.approx(inside.seconds)
    relative = price(load_device("h800"), mm(4096, 4096, 4096))
    assert relative.source == "extrapolated" and relative.error == BORROWED_ERROR["generation"]
    assert price(load_device("mi300x"), mm(4096, 4096, 4096)).error == BORROWED_ERROR["other"]
    assert price(load_device("tpu-v4"), mm(4096, 4096, 4096)).source == "roofline"
    assert kernel_price(Device("core", "cpu", {"float32": 1e11}, 2**34, 2e10), mm(64, 64, 64)) is None
    assert (
        kernel_price(h100, OpShape("aten.mm.default", "forward", ((2, 2), (2, 2)), ((2, 2),), "int64", 16, 64, 32))
        is None
    )


GPUS = [name for name in list_devices() if load_device(name).kind == "gpu"]
DOUBLED = st.sampled_from([(2, 1, 1), (1, 2, 1), (1, 1, 2)])


def doubled(name: str, dtype: str, dims: tuple[int, int, int], times: tuple[int, int, int]) -> float:
    """Price of a product with a dim doubled over that of the product."""
    before, after = gemm_prices(
        load_device(name), [mm(*dims, dtype), mm(*(d * t for d, t in zip(dims, times)), dtype)]
    )  # fmt: skip
    assert before is not None and after is not None
    return after.seconds / before.seconds


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(GPUS), st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn"]),
       st.tuples(*[st.integers(128, 1024).map(lambda x: 8 * x)] * 3), DOUBLED)  # fmt: skip
def test_doubling_a_dim_of_a_large_product_is_never_cheaper(
    name: str, dtype: str, dims: tuple[int, int, int], times: tuple[int, int, int]
) -> None:
    """Where every dim is 1024 or more it costs a tenth more at least; twice is what a full grid takes. In 8 bits
    the correction follows tables in which one in ten is faster: there it never costs less than 0.95."""
    assert doubled(name, dtype, dims, times) > (0.95 if dtype.startswith("float8") else 1.1)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(GPUS), st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn"]),
       st.tuples(*[st.floats(0, 12).map(lambda x: 8 * round(2**x))] * 3), DOUBLED)  # fmt: skip
def test_doubling_a_dim_of_any_product_saves_less_than_libraries_do(
    name: str, dtype: str, dims: tuple[int, int, int], times: tuple[int, int, int]
) -> None:
    """Small and thin products can get cheaper, by 60 % at most: a larger grid keeps more bytes in flight, and the
    correction follows the tables, in which 4 to 22 % of the products that have a dim doubled are faster, down to 0.3
    to 0.7 of the time (0.13 on L40S), because the library chooses another kernel."""
    assert doubled(name, dtype, dims, times) > 0.4


@settings(derandomize=True, max_examples=200)
@given(st.tuples(st.integers(1, 64), *[st.floats(0, 12).map(lambda x: 8 * round(2**x))] * 3))
def test_the_law_alone_never_gains_from_a_longer_k(dims: tuple[int, int, int, int]) -> None:
    b, m, n, k = dims
    short, long = seconds(PLAIN, CHIP, dims, (b, m, n, 2 * k))
    assert long >= short * (1 - 1e-9)


def test_one_rule_says_whose_constants_every_law_borrows() -> None:
    """The nearest device that has the section lends it, to products as to other kernels; a device's own comes first."""
    for name in ("h800", "a40", "rtx-3090", "titan-v", "b100", "mi300x"):
        device = load_device(name)
        section = section_for(device, "gemm", "bfloat16")
        lender = next(d for d in relatives(device) if {"bfloat16", "float16"} & set(d.kernels.get("gemm", {})))
        assert section is not None and section.device == lender.name and not section.own
        lender = next(d for d in relatives(device) if "attention" in d.kernels)
        found = find(device, "attention", "bfloat16")
        assert found is not None and found.whose == "relative"
        assert found.constants in lender.kernels["attention"].values()
    h200 = load_device("h200")
    for dtype, whose in (("bfloat16", "own"), ("float16", "own"), ("float32", "dtype")):  # 16-bit floats share kernels
        found = find(h200, "attention", dtype)
        assert found is not None and found.whose == whose
    assert find(h200, "gemm", "bfloat16", needs="nothing has this") is None


def test_the_distance_is_symmetric_and_a_board_held_back_by_its_power_is_far() -> None:
    for one in measured():
        for other in measured():
            assert distance(one, other) == pytest.approx(distance(other, one))
            assert (distance(one, other) == 0) == (one is other)
    h100 = load_device("h100-sxm")
    assert distance(h100, replace(h100, tdp=h100.tdp / 2, cache={})) == pytest.approx(np.log(2))


def test_relatives_are_of_the_same_maker_and_generation() -> None:
    def nearest(name: str) -> str:
        return next(iter(relatives(load_device(name)))).name

    assert nearest("h800") == load_device("h100-sxm").name
    assert nearest("a100-sxm-40gb").startswith("A100")
    assert nearest("v100-sxm2-32gb") == load_device("v100-pcie-32gb").name
    assert nearest("rtx-6000-ada") == load_device("l40s").name
    same = load_device("h200")
    assert distance(same, same) == 0.0
    own = section_for(load_device("h100-sxm"), "gemm", "bfloat16")
    assert own is not None and own.own and own.device == ""


def test_a_changed_device_follows_its_data_sheet() -> None:
    h100 = load_device("h100-sxm")
    thin, wide = mm(1, 16384, 16384), mm(16384, 16384, 16384)
    faster_memory = replace(h100, memory_bandwidth=2 * h100.memory_bandwidth, cache={})
    assert 0.4 < price(faster_memory, thin).seconds / price(h100, thin).seconds < 0.65
    assert price(faster_memory, wide).seconds == pytest.approx(price(h100, wide).seconds, rel=0.05)


def test_every_device_prices_products_or_says_roofline() -> None:
    for name in list_devices():
        for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
            found = price(load_device(name), mm(512, 512, 512, dtype))
            assert 0 < found.seconds < 1 and found.source in ("interpolated", "extrapolated", "roofline")


def test_many_prices_are_the_single_ones() -> None:
    shapes = [mm(17 + i, 1000 + 8 * i, 4096) for i in range(2000)]
    one, two = load_device("h100-sxm"), load_device("h100-sxm")
    price_many(one, shapes[:1])
    many = price_many(one, shapes)
    singles = [gemm_price(two, s) for s in shapes[:20]]
    assert [p.seconds for p in many[:20]] == pytest.approx([p.seconds for p in singles if p])


def test_dims_of_every_kind_of_product() -> None:
    grouped = OpShape("aten._grouped_mm.default", "forward", ((96, 64), (8, 64, 32)), ((96, 32),), "bfloat16", 0, 0, 0)
    assert product_dims(grouped) == (8, 12, 32, 64)
    weights = replace(grouped, in_shapes=((64, 96), (96, 32)), out_shapes=((8, 64, 32),))
    assert product_dims(weights) == (8, 64, 32, 12)
    matmul = OpShape(
        "aten.matmul.default", "forward", ((2, 3, 5, 7), (2, 3, 7, 11)), ((2, 3, 5, 11),), "float32", 0, 0, 0
    )
    assert product_dims(matmul) == (6, 5, 11, 7)
    linear = OpShape("aten.linear.default", "forward", ((2, 3, 7), (11, 7)), ((2, 3, 11),), "float32", 0, 0, 0)
    assert product_dims(linear) == (1, 6, 11, 7)
    batched = OpShape(
        "aten.baddbmm.default", "forward", ((4, 5, 6), (4, 5, 7), (4, 7, 6)), ((4, 5, 6),), "float32", 0, 0, 0
    )
    assert product_dims(batched) == (4, 5, 6, 7)


def test_experts_that_share_the_rows_cost_more_than_one_product_of_all_rows() -> None:
    h100 = load_device("h100-sxm")
    experts = OpShape("aten._grouped_mm.default", "forward", ((4096, 2048), (64, 2048, 1024)), ((4096, 1024),),
                      "bfloat16", 2 * 4096 * 2048 * 1024, 0, 0)  # fmt: skip
    assert price(h100, experts).seconds > 1.5 * price(h100, mm(4096, 1024, 2048)).seconds


def kind_of(section: str) -> tuple[str, bool]:
    """Dtype and whether batched, of the name of a section."""
    plain = section.removesuffix(WIDE)
    return plain.removesuffix("_batched"), plain.endswith("_batched")


def test_what_lies_below_a_table_is_priced_by_the_wide_one_of_the_device() -> None:
    """V100's table of models' products begins at 512 rows; the wide one was measured from 3 rows on."""
    v100 = load_device("v100-pcie-32gb")
    main, wide = pricing_of(v100, "float32", False), wide_of(v100, "float32", False)
    assert main is not None and wide is not None
    assert main.low[1] == 512 and wide.low[1] < 32 and not wide.borrowed
    inside, below = mm(2048, 2048, 2048, "float32"), mm(100, 2000, 2000, "float32")
    assert price(v100, inside) == _evaluate(main, [product_dims(inside)])[0]
    assert price(v100, below) == _evaluate(wide, [product_dims(below)])[0]
    assert price(v100, below).source == "interpolated"
    sister = load_device("v100-sxm2-32gb")
    assert price(sister, below).source == "extrapolated" and price(sister, below).seconds < price(v100, below).seconds
    assert wide_of(load_device("h100-sxm"), "float32", False) is None  # no sister of it has one


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "b200", "v100-pcie-32gb", "t4", "mi300x"])
def test_a_vector_times_a_matrix_reads_the_matrix(name: str) -> None:
    device = load_device(name)
    vector = mm(1, 8192, 8192, "float32")
    least = 4 * 8192 * 8192 / device.memory_bandwidth
    assert least < price(device, vector).seconds < 1.6 * least
    assert price(device, vector).seconds <= price(device, mm(2, 8192, 8192, "float32")).seconds
    assert price(device, mm(8192, 1, 8192, "float32")).seconds < 1.6 * least


@pytest.mark.parametrize("name", ["l4", "a10g", "rtx-3090", "h20", "a100-sxm-80gb", "gb10"])
def test_tf32_takes_no_longer_than_float32(name: str) -> None:
    for dims in ((1, 128, 16384), (32, 4096, 4096), (4096, 4096, 128), (4096, 4096, 4096)):
        rounded, plain = (price(load_device(name), mm(*dims, dtype)).seconds for dtype in ("tf32", "float32"))
        assert rounded <= plain


@pytest.mark.parametrize("name", ["l40s", "l4", "rtx-4090", "h100-sxm", "b200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32"])
def test_thin_products_read_their_weights_from_memory(name: str, dtype: str) -> None:
    device, size = load_device(name), {"bfloat16": 2, "float8_e4m3fn": 1, "float32": 4}[dtype]
    for m, n, k in ((1, 1600, 1600), (8, 4096, 1024), (64, 1024, 4096), (4096, 16, 4096)):
        assert price(device, mm(m, n, k, dtype)).seconds >= size * (m * k + k * n) / device.memory_bandwidth


def test_products_of_8_bit_integers_have_units_of_their_own() -> None:
    shape = replace(mm(4096, 4096, 4096, "int32"), name="aten._int_mm.default")
    for name in ("h100-sxm", "rtx-4090", "gb10"):
        device = load_device(name)
        found = kernel_price(device, shape)
        assert found is not None
        assert found.seconds > shape.flops / peak_of(device, "int8")
        assert found.seconds < 1.5 * price(device, mm(4096, 4096, 4096, "float8_e4m3fn")).seconds


def test_an_error_grows_with_the_distance_from_the_table() -> None:
    h100 = load_device("h100-sxm")
    errors = [price(h100, mm(m, 4096, 4096, "float32")).error for m in (512, 256, 64, 16)]
    assert errors == sorted(errors) and len(set(errors[1:])) == 3
    assert price(h100, mm(2**22, 2**22, 2**22, "float32")).error <= MOST


def test_boards_that_their_power_does_not_hold_back_are_faster_than_the_lender() -> None:
    """L40S reaches 0.54 of its peak in 16 bits at 0.97 W for each TFLOP/s, L4 0.32 of float32's at 2.4 W."""
    def share(name: str, dtype: str) -> float:
        device = load_device(name)
        return 2 * 8192**3 / price(device, mm(8192, 8192, 8192, dtype)).seconds / device.peak_flops[dtype]

    assert share("rtx-4090", "bfloat16") == pytest.approx(0.8, abs=0.08)
    assert share("l4", "bfloat16") < share("rtx-6000-ada", "bfloat16") < share("l40s", "bfloat16")
    assert share("l40s", "bfloat16") < share("l40", "bfloat16") < share("rtx-4090", "bfloat16") + 1e-9
    assert share("l4", "float32") < share("l40", "float32") < share("l40s", "float32") < share("rtx-4090", "float32")
    assert share("t4", "float16") < 0.4 < share("quadro-rtx-6000", "float16")
    assert price(load_device("l40s"), mm(8192, 8192, 8192, "float32")).error > 2 * BORROWED_ERROR["generation"]


def test_a_board_with_less_power_sustains_a_lower_rate() -> None:
    """H100 with 500 W instead of 700: (5 / 7) ** 0.4 of the rate that its relative reaches on large products."""
    from costmodels.gemm_lending import sustained
    from costmodels.power import POWER
    from costmodels.relatives import Section

    weak, strong = load_device("h100-sxm-96gb"), load_device("h100-sxm")
    lent = Section({}, strong.name, "bfloat16", False)
    assert sustained(weak, lent, "bfloat16") == pytest.approx((500 / 700) ** POWER)
    assert sustained(strong, Section({}, weak.name, "bfloat16", False), "bfloat16") == 1.0
    both_measured = Section({}, load_device("a100-sxm-80gb").name, "bfloat16", False)
    assert sustained(load_device("a100-pcie-80gb"), both_measured, "bfloat16") == pytest.approx(253 / 271, rel=0.02)
