"""Prices of ops: positive, growing with every dim, named by their source; families cover what models do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.conv_cpu import conv_flops, way
from costmodels.device import Device, Law, basis_of, list_devices, load_device
from costmodels.families import FAMILIES, FREE, base_name, family, is_known
from costmodels.features import FORMS, Shape, features, form_of, gemm_dims
from costmodels.ops import (
    OpShape,
    kernel_key,
    law_among,
    peak_of,
    price,
    price_many,
    shape_of,
    signature,
    stand_in,
    variant_of,
)

DIM = st.integers(1, 600)


def laws() -> dict[str, Law]:
    """A law with all coefficients positive for every form, under the names that the tests use."""
    names = ("mm", "addmm", "bmm", "convolution", "convolution_backward", "relu", "sum", "embedding", "_fused_adamw",
             "native_layer_norm", "max_pool2d_with_indices",
             "_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer")  # fmt: skip
    made = {}
    for name in names:
        form = form_of(name)
        counts = ("one", "batches", "steps", "tensors", "rows", "swept", "since")
        coefficients = tuple(1e-6 if f in counts else 1e-11 for f in FORMS[form])
        made[f"{name}/float32"] = Law(f"{name}/float32", form, coefficients, error=0.05)
    return made


LAWFUL = Device("core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws=laws())
DEVICES = [LAWFUL, load_device("h100-sxm"), load_device("v100-sxm2-32gb")]


def mm(m: int, n: int, k: int, dtype: str = "float32") -> OpShape:
    return OpShape("aten.mm.default", "forward", ((m, k), (k, n)), ((m, n),), dtype, 2 * m * n * k,
                   4 * (m * k + k * n), 4 * m * n)  # fmt: skip


def relu(rows: int, columns: int) -> OpShape:
    n = rows * columns
    return OpShape("aten.relu.default", "forward", ((rows, columns),), ((rows, columns),), "float32", 0, 4 * n, 4 * n)


def conv(batch: int, inp: int, out: int, size: int, kernel: int) -> OpShape:
    image, weight, result = (batch, inp, size, size), (out, inp, kernel, kernel), (batch, out, size, size)
    flops = 2 * math.prod(result) * inp * kernel**2
    return OpShape("aten.convolution.default", "forward", (image, weight), (result,), "float32", flops,
                   4 * (math.prod(image) + math.prod(weight)), 4 * math.prod(result))  # fmt: skip


# Real GPUs are not monotone (a full wave of tiles is faster than one tile more or less), and their law is not either.
@pytest.mark.parametrize("device", [LAWFUL, load_device("tpu-v4")], ids=lambda d: d.name)
@given(dims=st.tuples(DIM, DIM, DIM), axis=st.integers(0, 2), more=st.integers(1, 300))
def test_matrix_products_cost_more_when_larger(
    device: Device, dims: tuple[int, int, int], axis: int, more: int
) -> None:
    larger = tuple(n + more * (i == axis) for i, n in enumerate(dims))
    assert 0 < price(device, mm(*dims)).seconds <= price(device, mm(*larger)).seconds  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@given(rows=st.integers(1, 10**4), columns=DIM, more=DIM)
def test_pointwise_costs_more_when_larger(device: Device, rows: int, columns: int, more: int) -> None:
    assert 0 < price(device, relu(rows, columns)).seconds <= price(device, relu(rows + more, columns)).seconds


@given(batch=st.integers(1, 8), out=st.integers(1, 64), size=st.integers(4, 32), more=st.integers(1, 8))
def test_convolutions_cost_more_when_larger(batch: int, out: int, size: int, more: int) -> None:
    here = price(LAWFUL, conv(batch, 16, out, size, 3)).seconds
    assert 0 < here <= price(LAWFUL, conv(batch + more, 16, out, size, 3)).seconds
    assert here <= price(LAWFUL, conv(batch, 16, out + more, size, 3)).seconds
    assert here <= price(LAWFUL, conv(batch, 16, out, size + more, 3)).seconds


@given(st.lists(st.tuples(DIM, DIM, DIM), min_size=1, max_size=20))
def test_many_prices_are_the_single_prices(dims: list[tuple[int, int, int]]) -> None:
    shapes = [mm(*d) for d in dims] + [relu(d[0], d[1]) for d in dims]
    one = Device("core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws=laws())
    two = Device("core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws=laws())
    for many, single in zip(price_many(one, shapes), [price(two, s) for s in shapes]):
        assert many.seconds == pytest.approx(single.seconds) and many.source == single.source


def test_sources_say_how_a_price_was_found() -> None:
    law = Law("mm/float32", "gemm", (1e-6, 0, 0, 0, 1e-11, 0, 0, 0, 0, 0), (8, 8, 8), (64, 64, 64), 0.05, 20)
    pooled = Law("pointwise:float32", "stream", (1e-6, 0, 0, 0, 0, 0, 1e-11, 1e-11, 1e-11, 0), (1,), (1e9,), 0.1, 20)
    device = Device(
        "core", "cpu", {"float32": 1e11}, 2**34, 2e10, laws={law.key: law, pooled.key: pooled},
        samples={signature(mm(16, 16, 16)): 7e-6},
    )  # fmt: skip
    assert price(device, mm(16, 16, 16)).seconds == 7e-6
    assert price(device, mm(16, 16, 16)).source == "measured"
    assert price(device, mm(32, 32, 32)).source == "interpolated"
    assert price(device, mm(32, 32, 65)).source == "extrapolated"
    assert price(device, relu(8, 8)).source == "extrapolated"  # by the law of the family
    assert price(device, conv(1, 3, 8, 8, 3)).source == "roofline"
    assert price(device, mm(32, 32, 32, "bfloat16")).source == "roofline"


def test_views_cost_no_device_time() -> None:
    view = OpShape("aten.view.default", "forward", ((8, 8),), ((64,),), "float32", 0, 0, 0)
    assert all(price(d, view).seconds == 0.0 for d in DEVICES)


def test_names_lose_namespace_overload_and_in_place_mark() -> None:
    for name in ("aten.add_.Tensor", "aten::add.out", "add", "aten.add.Tensor"):
        assert base_name(name) == "add" and family(name) == "pointwise"
    assert family("aten._fused_adamw_.default") == "optimizer"
    assert not is_known("mylib.magic.default")
    assert len(set(FAMILIES)) == len(FAMILIES)


def test_dims_of_matrix_products() -> None:
    assert gemm_dims(mm(2, 3, 4)) == (1, 2, 3, 4)
    linear = OpShape("aten.addmm.default", "forward", ((3,), (2, 4), (4, 3)), ((2, 3),), "float32", 48, 0, 0)
    assert gemm_dims(linear) == (1, 2, 3, 4)
    batched = OpShape("aten.bmm.default", "forward", ((5, 2, 4), (5, 4, 3)), ((5, 2, 3),), "float32", 240, 0, 0)
    assert gemm_dims(batched) == (5, 2, 3, 4)
    vector = OpShape("aten.mv.default", "forward", ((6, 7), (7,)), ((6,),), "float32", 84, 0, 0)
    assert math.prod(gemm_dims(vector)) == 42


def test_flop_of_convolutions_and_their_backward() -> None:
    forward = conv(2, 16, 8, 10, 3)
    assert conv_flops(forward) == (forward.flops, 16)
    grad, image, weight = (2, 8, 10, 10), (2, 16, 10, 10), (8, 16, 3, 3)
    both = OpShape("aten.convolution_backward.default", "backward", (grad, image, weight), (image, weight), "float32",
                   2 * forward.flops, 0, 0)  # fmt: skip
    assert conv_flops(both)[0] == 2 * forward.flops
    first_layer = OpShape(both.name, "backward", both.in_shapes, (weight,), "float32", forward.flops, 0, 0)
    assert conv_flops(first_layer)[0] == forward.flops


def test_a_gather_pays_for_rows_not_for_the_table() -> None:
    small, large = (
        OpShape("aten.embedding.default", "forward", ((vocab, 8), (4,)), ((4, 8),), "float32", 0, vocab * 32, 128)
        for vocab in (10, 10**6)
    )
    by_name = dict(zip(FORMS["rows"], LAWFUL.laws["embedding/float32"].coefficients))
    cold = 4 * (1 - 2**20 / (32 * 10**6)) * by_name["rows_cold"]  # what a row of a table beyond the caches costs more
    assert price(LAWFUL, large).seconds == pytest.approx(price(LAWFUL, small).seconds + cold)


def test_the_tables_cover_the_ops_of_traced_models() -> None:
    from opgraph.trace import trace
    from validation.calibrate_models import SOURCES

    wanted = ("t64", "llama192", "digits", "residual24", "lstm192", "large-kernels24")
    for source in (s for s in SOURCES if s.name in wanted):
        module, inputs, targets, loss = source.make()
        graph = trace(module, inputs, targets, loss=loss)
        shapes = [shape_of(graph, op) for op in graph.ops]
        unknown = {s.name for s in shapes if not is_known(s.name)}
        assert not unknown, f"{source.name}: {unknown}"
        for op, shape in zip(graph.ops, shapes):
            assert not op.is_view or family(op.name) in FREE or shape.bytes_read == 0
            assert all(f >= 0 for f in features(shape, form_of(shape.name)))


@given(st.integers(1, 2**26), st.integers(1, 2**26))
def test_a_byte_never_costs_less_because_there_are_more(few: int, more: int) -> None:
    """Each further byte costs at least what the one before did, whatever non-negative coefficients a fit finds."""
    small, large = min(few, more), max(few, more)
    law = Law("relu/float32", "stream", (1e-6, 0, 0, 0, 0, 0, 2e-11, 0.0, 3e-11, 1e-11))

    def next_byte(n: int) -> float:
        at = [OpShape("aten.relu.default", "forward", (), (), "float32", 0, k, 0) for k in (n, n + 1024)]
        low, high = (sum(c * f for c, f in zip(law.coefficients, features(s, law.form))) for s in at)
        return high - low

    assert next_byte(large) >= next_byte(small) * (1 - 1e-6) > 0


def test_arguments_choose_kernels_that_shapes_do_not_show() -> None:
    assert variant_of("aten.gelu.default", (), (("approximate", "tanh"),)) == "tanh"
    assert variant_of("aten.gelu.default", (), ()) == variant_of("aten.relu.default", ((3, 3),), ()) == ""
    assert variant_of("aten.max_pool2d_with_indices.default", (None, [3, 3], [2, 2]), ()) == "3x3"
    assert variant_of("aten.mul.Tensor", (), (), ("float32", "bool")) == "cast"
    assert variant_of("aten.mul.Tensor", (), (), ("float32", "float32")) == variant_of("aten.mul.Tensor", (), ()) == ""
    assert variant_of("aten.where.self", (), (), ("bool", "float32")) == "", "a condition is not converted"
    plain, turned, row = ((8, 4), (4, 1)), ((8, 4), (1, 8)), ((8, 1), (1, 8))
    assert variant_of("aten.mm.default", (), (), (), (plain, turned)) == "nt"
    assert variant_of("aten.addmm.default", (), (), (), (((4,), (1,)), turned, row)) == "tn"
    exact = OpShape("aten.gelu.default", "forward", ((8, 8),), ((8, 8),), "float32", 0, 256, 256)
    tanh = replace(exact, variant="tanh")
    assert signature(tanh) != signature(exact)
    laws = {
        key: Law(key, "stream", (seconds, *[0] * 9))
        for key, seconds in (("gelu/float32", 1.0), ("gelu.tanh/float32", 2.0), ("pointwise:float32", 3.0))
    }
    assert law_among(laws, tanh) is laws["gelu.tanh/float32"] and law_among(laws, exact) is laws["gelu/float32"]
    del laws["gelu.tanh/float32"]
    assert law_among(laws, tanh) is laws["gelu/float32"]


def convolution(batch: int, channels: int, out: int, side: int, kernel: int, stride: int = 1) -> OpShape:
    image, weight = (batch, channels, side, side), (out, channels, kernel, kernel)
    result = (batch, out, side // stride, side // stride)
    return OpShape("aten.convolution.default", "forward", (image, weight), (result,), "float32", 0, 0, 0)


def through(shape: OpShape) -> OpShape:
    """Its backward, with the image's gradient."""
    (image, weight), (out,) = shape.in_shapes, shape.out_shapes
    name = "aten.convolution_backward.default"
    return replace(shape, name=name, phase="backward", in_shapes=(out, image, weight), out_shapes=(image, weight))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (convolution(15, 80, 80, 12, 1), "native"), (convolution(16, 80, 80, 12, 1), "onednn"),
        (convolution(4, 24, 48, 28, 1, 2), "onednn"), (convolution(2, 8, 8, 4, 3), "onednn"),
        (convolution(1, 32, 8, 16, 3), "native"), (convolution(1, 32, 8, 32, 3), "onednn"),
        (convolution(1, 16, 32, 8, 5), "onednn"),
    ],
)  # fmt: skip
def test_torch_takes_one_of_two_ways_to_convolve(shape: OpShape, expected: str) -> None:
    """oneDNN says on stderr what it runs; the ways were read off that, and torch's own code has the rule."""
    assert way(shape) == way(through(shape)) == expected
    assert kernel_key(shape) == f"convolution.{expected}/float32"
    assert way(replace(shape, dtype="bfloat16")) == "onednn" and way(replace(shape, dtype="float64")) == "native"
    grouped = replace(shape, in_shapes=(shape.in_shapes[0], (8, 1, 3, 3)))
    assert way(grouped) == "onednn"


def test_the_way_of_a_convolution_is_what_torch_runs() -> None:
    """Convolutions that oneDNN computes are in its log, the others are not."""
    torch = pytest.importorskip("torch")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    script = (
        "import sys, torch; torch.set_num_threads(1); image, weight, stride = map(eval, sys.argv[1:]); "
        "torch.conv2d(torch.ones(image), torch.ones(weight), stride=stride)"
    )
    for shape, stride in ((convolution(3, 8, 8, 6, 1), 1), (convolution(16, 8, 8, 6, 1), 1)):
        arguments = [*map(str, shape.in_shapes), str(stride)]
        command, log = [sys.executable, "-c", script, *arguments], {**os.environ, "ONEDNN_VERBOSE": "1"}
        done = subprocess.run(command, env=log, capture_output=True, text=True, check=True)
        assert ("convolution" in done.stdout) == (way(shape) == "onednn"), arguments


def test_what_a_convolution_by_products_counts() -> None:
    point, wide = convolution(4, 32, 16, 3, 1), convolution(1, 32, 16, 8, 3)
    assert part(point, "unfolded") == 0 and part(wide, "unfolded") == 64 * 32 * 9
    assert part(point, "images") == 4 and part(through(point), "images") == 8
    assert part(point, "weight_per_image") == 4 * 32 * 16
    work = 2 * 4 * 9 * 32 * 16
    assert part(point, "flops_tiny_map") == part(through(point), "flops_tiny_map") == work
    assert part(convolution(4, 32, 16, 4, 1), "flops_tiny_map") == 0
    first = replace(through(point), out_shapes=through(point).out_shapes[1:])
    assert part(first, "flops_tiny_map") == 0, "no gradient goes through a first layer"


def test_what_a_convolution_of_onednn_counts() -> None:
    strided = convolution(2, 40, 24, 8, 3, 2)
    work = 2 * 2 * 16 * 24 * 40 * 9
    assert part(strided, "flops") == part(strided, "flops_stride") == work
    assert part(strided, "flops_blocks") == work * (32 / 24) * (48 / 40)
    skipping = convolution(2, 32, 16, 8, 1, 2)
    assert part(skipping, "input") == 2 * 32 * 16 and part(skipping, "input_skipped") == 2 * 32 * 48
    assert part(strided, "input") == 2 * 40 * 64 and part(strided, "input_skipped") == 0


def part(shape: OpShape, name: str) -> float:
    form = form_of(shape.name, way(shape))
    return dict(zip(FORMS[form], features(shape, form)))[name]


def float32(name: str, ins: tuple[Shape, ...], outs: tuple[Shape, ...], variant: str = "") -> OpShape:
    read, written = (4 * sum(prod(s) for s in shapes) for shapes in (ins, outs))
    return OpShape(f"aten.{name}.default", "forward", ins, outs, "float32", 0, read, written, False, variant)


def test_a_norm_counts_what_it_normalises() -> None:
    image, channel = (2, 8, 3, 3), (8,)
    assert part(float32("native_batch_norm", (image, channel, channel), (image, channel)), "rows") == 2 * 8
    assert part(float32("native_layer_norm", ((4, 5, 64), (64,), (64,)), ((4, 5, 64),)), "rows") == 4 * 5


def test_sums_along_and_across() -> None:
    along = float32("sum", ((4, 128, 256),), ((4, 128, 1),))
    across = float32("sum", ((4, 128, 256),), ((1, 1, 256),))
    everything = float32("sum", ((4, 128, 256),), ((),))
    nbytes = 4 * 4 * 128 * 256
    for shape, kind in ((along, "along"), (across, "across"), (everything, "along")):
        assert part(shape, f"read_{kind}") == nbytes == part(shape, "read_along") + part(shape, "read_across")


def test_rows_of_a_large_table_are_met_cold() -> None:
    small, large = (float32("embedding", ((n, 256), (2, 8)), ((2, 8, 256),)) for n in (1000, 65536))
    assert part(small, "rows") == part(large, "rows") == 16
    assert part(small, "rows_cold") == 0 and part(large, "rows_cold") == pytest.approx(16 * (1 - 1 / 64))
    back = float32("embedding_dense_backward", ((2, 8, 256), (2, 8)), ((65536, 256),))
    assert part(back, "rows") == 16 and part(back, "written") == 4 * 65536 * 256
    assert part(back, "written_over_64M") == 0


def test_pooling_costs_what_its_windows_cover() -> None:
    whole, half = (2, 8, 16, 16), (2, 8, 8, 8)
    known = float32("max_pool2d_with_indices", (whole,), (half, half), "3x3")
    assert part(known, "taps") == 9 * prod(half)
    assert part(replace(known, variant=""), "taps") == prod(whole)
    assert part(float32("max_pool2d_with_indices", (whole,), (whole, whole)), "taps") == 9 * prod(whole)
    back = float32("max_pool2d_with_indices_backward", (half, whole, half), (whole,), "3x3")
    assert (part(back, "taps"), part(back, "large"), part(back, "small")) == (0, prod(whole), prod(half))


@pytest.mark.parametrize("name", list_devices())
def test_no_float_is_computed_faster_than_a_narrower_one(name: str) -> None:
    device = load_device(name)
    assert peak_of(device, "float64") <= peak_of(device, "float32") <= peak_of(device, "bfloat16")
    wide = {dtype: rate for dtype, rate in device.peak_flops.items() if dtype in ("float64", "float32")}
    assert all(peak_of(device, dtype) == rate for dtype, rate in wide.items())


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("gaudi2", "float32", 110e12), ("gaudi2", "float64", 4e12), ("tpu-v4", "float64", 4e12),
        ("apple-m4-max", "float64", 0.6e12),
    ],
)
def test_floats_that_no_sheet_lists_are_slow_and_said_to_be_assumed(name: str, dtype: str, most: float) -> None:
    device = load_device(name)
    n, once = 4096, 4096**2 * {"float32": 4, "float64": 8}[dtype]
    shape = OpShape("aten.mm.default", "forward", ((n, n), (n, n)), ((n, n),), dtype, 2 * n**3, 2 * once, once)
    found = price(device, shape)
    assert shape.flops / found.seconds < most
    assert found.source in ("roofline", "extrapolated") and found.error >= 0.9 and dtype in found.note
    half = price(device, replace(shape, dtype="float16" if name.startswith("apple") else "bfloat16"))
    assert not half.note
    assert any("float32" in said for said in basis_of(device)) == bool(stand_in(device, "float32"))


def test_a_listed_float_has_no_stand_in_and_a_cpu_none_at_all() -> None:
    assert not stand_in(load_device("a100-sxm-80gb"), "float64")
    cpu = Device("x", "cpu", {"float32": 2e11}, 1, 1e10)
    assert not stand_in(cpu, "float64") and peak_of(cpu, "float64") == 1e11
