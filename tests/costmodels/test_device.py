"""Device files: round trips, and one clear sentence for every way to break one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import tomlfile
from costmodels.device import Device, Law, device_data, list_devices, load_device, local_path, rescale, save_device
from costmodels.features import FORMS

GOOD = """
name = "chip"
kind = "gpu"
memory_bytes = 1000
memory_bandwidth = 1e12
[peak_flops]
float32 = 1e13
"""


def device_file(folder: Path, text: str) -> Path:
    path = folder / "chip.toml"
    path.write_text(text)
    return path


def test_every_catalogue_device_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert {"a100-sxm-80gb", "h100-sxm", "h200", "b200", "v100-sxm2-32gb", "l40s", "a10g"} <= set(list_devices())
    for name in list_devices():
        device = load_device(name)
        assert device.sources and max(device.peak_flops.values()) > 1e12 and device.memory_bandwidth > 5e10, name
        save_device(device, tmp_path / "copy.toml")
        assert device_data(load_device(tmp_path / "copy.toml")) == device_data(device)


def test_a_calibrated_device_survives_a_round_trip(tmp_path: Path) -> None:
    coefficients = (0.0, 1e-6, 2e-12, 0.0, 0.0, 1e-10, 0.0, 0.0, 0.0, 0.0)
    law = Law("mm/float32", "gemm", coefficients, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 0.05, 9)
    device = Device(
        'a "quoted" core', "cpu", {"float32": 1e11}, 2**34, 2.5e10, laws={law.key: law},
        samples={("mm/float32", ((2, 3), (3, 4)), ((2, 4),)): 1.5e-5},
        host={"op_forward": 3e-6}, anchor_seconds=0.01, notes=("über",),
    )  # fmt: skip
    save_device(device, tmp_path / "local.toml")
    loaded = load_device(tmp_path / "local.toml")
    assert device_data(loaded) == device_data(device)
    assert loaded.laws == device.laws and loaded.calibrated


def test_writing_leaves_no_part_behind(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.toml"
    tomlfile.write_toml(path, {"a": 1})
    with pytest.raises(TypeError):
        tomlfile.write_toml(path, {"a": object()})
    assert [p.name for p in path.parent.iterdir()] == ["x.toml"]
    assert tomlfile.read_toml(path) == {"a": 1}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.one_of(
            st.text(max_size=30), st.integers(-(2**60), 2**60), st.booleans(), st.lists(st.text(max_size=9), max_size=5)
        ),
    )
)
def test_toml_text_reads_back(data: dict[str, object]) -> None:
    import tomllib

    assert tomllib.loads(tomlfile.to_toml(data)) == data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = \n", ("not valid TOML", "line 1")),
        (GOOD.replace('kind = "gpu"', ""), ("'kind'", "missing", "string")),
        (GOOD.replace('"gpu"', '"toaster"'), ("'kind'", "toaster", "cpu, gpu, tpu")),
        (GOOD.replace("memory_bytes = 1000", 'memory_bytes = "80GB"'), ("'memory_bytes'", "80GB", "number")),
        (GOOD.replace("memory_bytes = 1000", "memory_bytes = -5"), ("'memory_bytes'", "-5", "1 or more")),
        (GOOD.replace("1e12", "0"), ("'memory_bandwidth'", "bytes per second")),
        (GOOD.replace("[peak_flops]\nfloat32 = 1e13", ""), ("'peak_flops'", "missing", "table")),
        (GOOD.replace("float32 = 1e13", ""), ("peak_flops", "at least one dtype")),
        (GOOD.replace("float32 = 1e13", "float32 = nan"), ("peak_flops", "'float32'", "nan")),
        (
            GOOD + '[[laws]]\nkey = "mm/float32"\nform = "magic"\ncoefficients = [1]',
            ("law 1", "'form'", "magic", "gemm"),
        ),
        (
            GOOD + '[[laws]]\nkey = "mm/float32"\nform = "stream"\ncoefficients = [1]',
            ("law 1", "'coefficients' has 1 numbers", "needs 10"),
        ),
        ('samples = ["mm"]\n' + GOOD, ("sample 'mm'", "op/dtype|shapes|shapes=seconds")),
        ('samples = ["mm/float32|2,3=-1"]\n' + GOOD, ("sample 'mm/float32|2,3=-1'",)),
        ('samples = ["mm/float32|2,3|2,3=0"]\n' + GOOD, ("sample 'mm/float32|2,3|2,3=0'",)),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = device_file(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load_device(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    said = message.replace(str(path), "")  # the folder's own name may hold a number
    for word in words:
        assert word in said


def test_unknown_names_list_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="h100-sxm"):
        load_device("h1000")
    with pytest.raises(ValueError, match="no such file"):
        load_device(tmp_path / "none.toml")


def test_rescaling_multiplies_times_and_leaves_ratios() -> None:
    law = Law("relu/float32", "stream", (1e-6, 0, 0, 0, 0, 0, 1e-11, 1e-11, 2e-11, 0.0))
    device = Device(
        "x", "cpu", {"float32": 1e11}, 1, 1e10, laws={law.key: law}, samples={("s/float32", ((2,),), ((2,),)): 1.0},
        host={"op_forward": 2e-6, "loaded": 1.1}, anchor_seconds=0.5,
    )  # fmt: skip
    slower = rescale(device, 2.0)
    assert slower.laws[law.key].coefficients == tuple(2 * c for c in law.coefficients)
    assert list(slower.samples.values()) == [2.0] and slower.host == {"op_forward": 4e-6, "loaded": 1.1}
    assert slower.anchor_seconds == 1.0 and "2.000" in slower.notes[-1]
    with pytest.raises(ValueError, match="more than 0"):
        rescale(device, 0.0)
    with pytest.raises(ValueError, match="more than 0"):
        rescale(device, 1.0, {"passes": -1.0})


def test_ops_go_by_the_part_of_the_anchor_that_is_like_them() -> None:
    """Bytes of a pass by passes, what its call takes by calls."""

    def law(key: str, form: str) -> Law:
        return Law(key, form, tuple({"one": 1e-6, "bytes": 1e-9}.get(f, 0.0) for f in FORMS[form]))

    forms = {
        "mm.nn/float32": "gemm", "convolution.native/float32": "conv_native", "gemm:float32": "gemm",
        "gelu.tanh/float32": "stream", "_softmax/float32": "stream", "pointwise:float32": "stream",
    }  # fmt: skip
    laws = {k: law(k, form) for k, form in forms.items()}
    host = {"loaded": 1.1, "op_forward": 1.0, "anchor_in_rank": 1.0, "anchor_passes": 1.0, "anchor_calls": 1.0}
    device = Device("x", "cpu", {}, 1, 1e10, laws=laws, samples={(k, ((8,),), ((8,),)): 1.0 for k in forms}, host=host)
    found = rescale(device, 2.0, {"products": 5.0, "passes": 3.0, "calls": 4.0})
    expected = [5.0, 2.0, 5.0, 3.0, 3.0, 3.0]  # of convolutions nothing is known: they go by the whole
    assert list(found.samples.values()) == expected
    ratios = [found.laws[k].coefficients[0] / laws[k].coefficients[0] for k in forms]
    assert ratios == pytest.approx([5.0, 2.0, 5.0, 4.0, 4.0, 4.0])
    at = FORMS["stream"].index("bytes")
    assert found.laws["_softmax/float32"].coefficients[at] == pytest.approx(3e-9)
    assert list(found.host.values()) == [1.1, 2.0, 2.0, 3.0, 4.0]  # overheads go by the whole of it


def test_the_local_file_respects_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_path() == tmp_path / "parplan" / "local.toml"


def test_forms_have_distinct_features() -> None:
    for names in FORMS.values():
        assert len(set(names)) == len(names) and names[0] == "one"
