"""`parplan devices`: a table, one device in detail, everything as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from costmodels.device import Device, Law, list_devices, load_device, local_path, save_device
from costmodels.sheet import memory_share, stated
from parplan.cli_devices import calibrated_from, plain


def test_the_table_has_a_line_for_every_device(parplan) -> None:
    result = parplan("devices")
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert result.code == 0 and set(list_devices()) <= set(lines)
    for part in ("79.2 GiB", "3.35 TB/s", "989 T", "132", "NVLink4 450 GB/s", "700 W", "3.00", "0%"):
        assert part in lines["h100-sxm"]
    assert "unified" in lines["apple-m1"] and "PCIe 31.51 GB/s" in lines["l4"]
    assert f"{memory_share(load_device('h800')):.0%}" in lines["h800"]


def test_one_device_shows_each_field_its_sources_and_what_is_from_memory(parplan) -> None:
    result = parplan("devices", "AMD Instinct MI250X")
    spec = load_device("mi250x")
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert set(stated(spec)) <= set(lines)
    assert "from memory" in lines["l2_bytes"] and "from memory" not in lines["memory_bandwidth"]
    assert "383 TFLOP/s" in lines["peak_flops.bfloat16"] and "1, 2" in lines["peak_flops.bfloat16"]
    text = " ".join(result.out.split())
    assert all(f"[{i}] {source}" in text for i, source in enumerate(spec.sources, 1))
    assert all(" ".join(note.split()) in text for note in spec.notes), "square brackets of a note are no markup"


def test_json_has_everything(parplan) -> None:
    listed = parplan("devices", "--json").data["devices"]
    assert [d["name"] for d in listed] == list_devices()
    by_name = {d["name"]: d for d in listed}
    assert by_name["gb10"]["unified_memory"] is True and by_name["gb10"]["kind"] == "gpu"
    field = by_name["h100-sxm"]["fields"]["peak_flops.bfloat16"]
    assert field["value"] == 989e12 and field["backing"] == "stated"
    assert all("Epoch" in by_name["h100-sxm"]["sources"][i - 1] or "ml-eng" in by_name["h100-sxm"]["sources"][i - 1]
               for i in field["sources"])  # fmt: skip
    (one,) = parplan("devices", "nvidia tesla t4", "--json").data["devices"]
    assert one == by_name["t4"]


def test_this_machine_and_files_are_devices_too(parplan, tmp_path: Path) -> None:
    assert parplan("devices", "local").code == 2 and "parplan calibrate" in parplan("devices", "local").err
    law = Law("mm/float32", "gemm", (0.0, 1e-6, 2e-12, 0.0, 0.0, 1e-10, 0.0, 0.0, 0.0, 0.0))
    save_device(Device("this box", "cpu", {"float32": 1e11}, 2**34, 2.5e10, laws={law.key: law}), local_path())
    first = parplan("devices", "--json").data["devices"][0]
    assert first["name"] == "local" and first["laws"] == 1 and first["memory_share"] is None
    assert "1 laws measured here" in parplan("devices").out and parplan("devices", "local").code == 0
    (tmp_path / "mine.toml").write_text(local_path().read_text())
    (mine,) = parplan("devices", tmp_path / "mine.toml", "--json").data["devices"]
    assert mine["full_name"] == "this box" and json.dumps(mine["fields"])


def test_kernel_constants_are_shown_with_their_errors(parplan, tmp_path: Path) -> None:
    save_device(Device("chip", "gpu", {"float32": 1e13}, 2**34, 1e12), tmp_path / "chip.toml")
    (tmp_path / "chip.kernels.toml").write_text('[gemm.float32]\ndata = "t"\nrows = 90\nheld_out = 45\nerror = 0.043\n')
    out = parplan("devices", tmp_path / "chip.toml").out
    assert "calibrated from: tables: gemm" in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("gemm.float32")]
    assert line.split() == ["gemm.float32", "t", "90", "45", "4.3%"]
    assert calibrated_from(Device("x", "gpu", {"float32": 1.0}, 1, 1.0)) == "–"


def test_an_unknown_device_is_one_sentence(parplan) -> None:
    result = parplan("devices", "h1000")
    assert result.code == 2 and "h100-sxm" in result.err and result.out == ""


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("peak_flops.float32", 67e12, "67 TFLOP/s"), ("peak_flops.int8", 130e12, "130 TOP/s"),
        ("link_bandwidth", 450e9, "450 GB/s"), ("tdp", 72.0, "72 W"),
        ("l2_bytes", 2**20, "1 MiB"), ("boost_clock", 1.83e9, "1.83 GHz"), ("price_per_hour", 3.0, "3 USD/h"),
        ("units", 132, "132"), ("link", "NVLink4", "NVLink4"), ("floor_seconds", 5e-6, "5 us"),
    ],
)  # fmt: skip
def test_fields_have_units_for_people(key: str, value: object, text: str) -> None:
    assert plain(key, value) == text
