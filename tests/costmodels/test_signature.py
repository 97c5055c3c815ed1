"""Signatures of ops: as text and back, and that what a file says is found again."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.device import Device, Law, load_device, save_device
from costmodels.ops import OpShape, price, signature
from costmodels.signature import SCALAR, is_written, parsed, written

SHAPES = st.lists(st.lists(st.integers(0, 10**9), max_size=5).map(tuple), max_size=4).map(tuple)


@given(st.sampled_from(("mm.nn/float32", "sum/bfloat16", "max_pool2d.3x3/float32")), SHAPES, SHAPES)
def test_what_is_written_reads_back(kernel, ins, outs) -> None:
    text = written((kernel, ins, outs))
    assert is_written(text) and " " not in text
    assert parsed(text) == (kernel, ins or SCALAR, outs or SCALAR), "no tensor and one scalar are written alike"


@pytest.mark.parametrize("text", ["", "mm/float32", "mm/float32|2,3", "mm|2,3|2,3", "mm/float32|2 ,3|2", "a/b|1|2|3"])
def test_other_texts_are_no_signatures(text: str) -> None:
    assert not is_written(text)


@pytest.mark.parametrize("outs", [((),), (), ((3, 4),), ((3, 4), ())])
def test_a_measured_op_is_found_again_in_its_file(tmp_path: Path, outs) -> None:
    shape = OpShape("aten.sum.dim_IntList", "forward", ((3, 4),), outs, "float32", 0, 48, 4)
    law = Law("sum/float32", "reduce", (1e-6, *(0.0,) * 10))
    samples = {signature(shape): 7e-4}
    device = Device("core", "cpu", {"float32": 1e11}, 2**34, 1e10, laws={law.key: law}, samples=samples)
    assert price(device, shape).seconds == 7e-4
    save_device(device, tmp_path / "core.toml")
    again = load_device(tmp_path / "core.toml")
    assert again.samples == device.samples and price(again, shape).seconds == 7e-4
    assert price(again, replace(shape, dtype="float64")).source != "measured"
