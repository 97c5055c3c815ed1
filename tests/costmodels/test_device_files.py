"""The catalogue's device files: complete, each field with its source, plausible by arithmetic, found by their names."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import names, sheet
from costmodels.device import CATALOGUE, Device, list_devices, load_device
from costmodels.ops import peak_of
from costmodels.tomlfile import read_toml

DEVICES = list_devices()
# As published tables and drivers write them -> file in the catalogue.
WRITTEN = {
    "A100 SXM4 80GB": "a100-sxm-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb",
    "H100 (variant not stated)": "h100-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "H100 SXM 96GB HBM2e (500 W limit)": "h100-sxm-96gb",
    "GB10 (DGX Spark)": "gb10",
    "GB200 (per GPU)": "gb200",
    "Instinct MI250 (1 of 2 GCDs)": "mi250-gcd",
    "AMD Instinct MI300X": "mi300x",
    "Instinct MI350X or MI355X (gfx950)": "mi350x",
    "RTX 6000D (Blackwell PCIe)": "rtx-6000d",
    "RTX 6000 Ada": "rtx-6000-ada",
    "Quadro RTX 6000": "quadro-rtx-6000",
    "Tesla K20": "k20",
    "Tesla K20X": "k20x",
    "Tesla K80 (one of the 2 GPUs of a board)": "k80",
    "Tesla K80 (board, 2 GPUs)": "k80-board",
    "Tesla V100 (variant not stated)": "v100-sxm2-16gb",
    "GeForce RTX 4090": "rtx-4090",
    "TPU v5e (chip)": "tpu-v5e",
    "Apple M1 Max (32-core)": "apple-m1-max",
}
# float32 lanes per unit of the architectures, of their data sheets (matrix lanes on CDNA).
LANES = {
    "k20": 192, "k20x": 192, "k40": 192, "k80": 192, "m40": 128, "p4": 128, "p40": 128, "p100-sxm2": 64, "titan-v": 64,
    "v100-sxm2-16gb": 64, "v100-pcie-32gb": 64, "t4": 64, "rtx-2080-ti": 64, "a100-sxm-80gb": 64, "a40": 128,
    "rtx-4090": 128, "rtx-5090": 128, "l4": 128, "l40s": 128, "gb200": 128, "mi210": 128, "mi300x": 128, "mi355x": 128,
    "apple-m1-max": 128, "apple-m4-max": 128, "gb10": 128,
}  # fmt: skip


@cache
def device(name: str) -> Device:
    return load_device(name)


def test_the_catalogue_holds_every_published_device() -> None:
    assert len(DEVICES) >= 79
    assert {device(n).kind for n in DEVICES} == {"gpu", "tpu", "npu"}
    assert len({device(n).name for n in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_every_field_names_its_source_or_is_marked(name: str) -> None:
    spec = device(name)
    assert spec.sources and all(spec.sources) and len(set(spec.sources)) == len(spec.sources)
    for field in sheet.stated(spec):
        assert sheet.backing_of(spec, field) != "unknown", field
    used = {number for numbers in spec.source_of.values() for number in numbers}
    assert used == set(range(1, len(spec.sources) + 1)), "a source that states nothing"


@pytest.mark.parametrize("name", DEVICES)
def test_files_hold_no_field_that_is_not_read(name: str) -> None:
    fields = set(Device.__dataclass_fields__)
    assert set(read_toml(CATALOGUE / "devices" / f"{name}.toml")) <= fields


@pytest.mark.parametrize("name", DEVICES)
def test_rates_are_plausible(name: str) -> None:
    spec = device(name)
    peaks = spec.peak_flops
    assert 1e9 < spec.memory_bytes < 6e11 and 5e10 < spec.memory_bandwidth < 1e13
    assert 5e-3 < spec.memory_bandwidth / spec.memory_bytes * 10 < 1e3  # the memory is read once in 10 ms to 2000 s
    # FLOP per byte: from Kepler's float32 (15) to the L40S's and GB10's float8 (850, 920)
    assert 10 < max(v for k, v in peaks.items() if k.startswith(("float", "bfloat"))) / spec.memory_bandwidth < 1000
    wide, half, eighth = peaks.get("float32", 0.0), peak_of(spec, "bfloat16"), peaks.get("float8_e4m3fn", 0.0)
    assert peaks.get("float64", 0.0) <= wide * 1.0001
    assert wide <= half
    assert not eighth or half <= eighth
    assert not peaks.get("tf32") or wide <= peaks["tf32"] <= half * 1.0001
    assert all(0.3 < spec.best_flops[k] / peaks[k] < 1 for k in spec.best_flops)
    assert all(0 < share <= 1 for share in spec.efficiency.values())


@pytest.mark.parametrize("name", DEVICES)
def test_board_and_links_are_plausible(name: str) -> None:
    spec = device(name)
    assert 1 <= spec.units <= 512
    assert spec.boost_clock == 0 or 0.5e9 < spec.boost_clock < 3e9
    assert spec.l2_bytes == 0 or 1e6 < spec.l2_bytes < 5e8
    assert spec.tdp == 0 or 15 <= spec.tdp <= 1500
    assert spec.price_per_hour == 0 or 0.05 < spec.price_per_hour < 20
    assert spec.link_bandwidth < spec.memory_bandwidth / 2, "no device sends faster than it reads and writes"
    assert bool(spec.link) >= bool(spec.link_bandwidth) and bool(spec.link) >= bool(spec.links)
    if spec.links and spec.link_bandwidth:
        assert 3e9 < spec.link_bandwidth / spec.links < 120e9, "one link, one direction"
    assert spec.pcie_bandwidth in (0.0, 8e9, 15.754e9, 31.508e9, 63.015e9, 121e9)
    if spec.tdp:
        assert max(spec.peak_flops.values()) / spec.tdp < 8e12, "FLOP per joule"


@pytest.mark.parametrize("name", sorted(LANES))
def test_float32_rate_is_units_times_lanes_times_clock(name: str) -> None:
    spec = device(name)
    assert spec.peak_flops["float32"] == pytest.approx(spec.units * LANES[name] * 2 * spec.boost_clock, rel=0.03)


def test_half_a_board_is_half_the_board() -> None:
    board, half = device("k80-board"), device("k80")
    assert half.units * 2 == board.units and half.memory_bandwidth * 2 == board.memory_bandwidth
    assert all(half.peak_flops[k] * 2 == pytest.approx(board.peak_flops[k]) for k in board.peak_flops)
    assert device("mi250-gcd").memory_bandwidth * 2 == pytest.approx(device("mi250x").memory_bandwidth, rel=0.01)


def test_only_unified_memory_saves_the_host_copy() -> None:
    unified = {n for n in DEVICES if device(n).unified_memory}
    assert unified == {n for n in DEVICES if n.startswith("apple-")} | {"gb10", "mi300a"}
    assert all(math.isinf(device(n).host_bandwidth) for n in unified)
    assert device("gb200").host_bandwidth == device("gb200").c2c_bandwidth == 450e9
    assert device("h100-sxm").host_bandwidth == pytest.approx(63e9, rel=0.01)
    assert all(not device(n).link for n in DEVICES if n.startswith("apple-"))


@pytest.mark.parametrize(("text", "name"), WRITTEN.items())
def test_published_names_find_their_device(text: str, name: str) -> None:
    assert names.catalogue_name(text) == name
    assert names.device_named(text).name == device(name).name


def test_every_name_of_every_device_leads_back_to_it() -> None:
    for name in DEVICES:
        for text in (name, device(name).name, *device(name).aliases):
            assert names.catalogue_name(text) == name, text


@given(st.sampled_from(DEVICES), st.sampled_from(["", "NVIDIA ", "amd-", "Google  "]), st.sampled_from(" -_/."))
def test_case_spaces_dashes_and_makers_do_not_matter(name: str, maker: str, gap: str) -> None:
    for written in (name.replace("-", gap), name.upper().replace("-", gap), name.title().replace("-", gap * 2)):
        assert names.catalogue_name(maker + written) == name


@pytest.mark.parametrize(
    ("text", "near"), [("h1000", "h100-sxm"), ("A100 SXM5 80GB", "a100-sxm-80gb"), ("zzz", "`parplan devices`")]
)
def test_an_unknown_name_gets_the_nearest_ones(text: str, near: str) -> None:
    with pytest.raises(ValueError, match="is no known device") as caught:
        names.device_named(text)
    assert near in str(caught.value) and text in str(caught.value) and len(str(caught.value)) < 300


def test_two_devices_never_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "devices").mkdir()
    for name in ("one", "two"):
        (tmp_path / "devices" / f"{name}.toml").write_text(f'name = "{name}"\naliases = ["Chip-X"]\n')
    monkeypatch.setattr(names, "CATALOGUE", tmp_path)
    names.names.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"two\.toml.*'chipx'.*one\.toml"):
            names.names()
    finally:
        names.names.cache_clear()


def test_backing_tells_sources_from_memory() -> None:
    spec = Device(
        "x", "gpu", {"float32": 1e13, "float16": 1e14}, 1, 1e12, tdp=100.0, sources=("a", "b"),
        source_of={"peak_flops": (1, 2), "memory_bytes": (2,)}, from_memory=("tdp", "peak_flops.float16"),
    )  # fmt: skip
    backings = {name: sheet.backing_of(spec, name) for name in sheet.stated(spec)}
    assert backings == {
        "peak_flops.float32": "stated", "peak_flops.float16": "derived", "memory_bytes": "stated",
        "memory_bandwidth": "unknown", "units": "unknown", "tdp": "memory",
    }  # fmt: skip
    assert sheet.memory_share(spec) == pytest.approx(1 / 6)
    assert sheet.memory_share(replace(spec, source_of={}, from_memory=())) is None


def test_ici_is_half_of_what_the_vendor_gives_for_both_directions() -> None:
    """Google Cloud TPU docs: v5e 400 GB/s, v5p 1200, v6e 800; v7 1200 (stas00/ml-engineering)."""
    both = {"tpu-v5e": 400e9, "tpu-v5p": 1200e9, "tpu-v6e": 800e9, "tpu-v7": 1200e9}
    assert all(device(name).link_bandwidth == rate / 2 for name, rate in both.items())


@pytest.mark.parametrize("name", ["rtx-2080-ti", "rtx-3090", "rtx-4090", "rtx-5090"])
def test_tensor_cores_of_geforces_add_up_in_float32(name: str) -> None:
    """With fp32 accumulate they run float16 at a quarter of the rate of int8, half of what fp16 accumulate gives."""
    assert device(name).peak_flops["float16"] == pytest.approx(device(name).peak_flops["int8"] / 4, rel=0.01)
