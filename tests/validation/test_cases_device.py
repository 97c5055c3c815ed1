"""Rows whose device is a file, or this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from costmodels.cluster import local_cluster
from tests.validation.test_cases import row
from validation.cases import CaseError
from validation.cases_cluster import cluster_of
from validation.cases_run import run_cases

DEVICE = """
name = "Foo X1"
kind = "gpu"
memory_bytes = 80000000000
memory_bandwidth = 3e12
units = 120
link = "FooLink"
link_bandwidth = 4e11
[peak_flops]
float32 = 6e13
float16 = 8e14
"""


def test_device_files_are_found_beside_the_cases_where_the_command_runs_and_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "foo.toml").write_text(DEVICE)
    (tmp_path / "here.toml").write_text(DEVICE.replace("X1", "X2"))
    monkeypatch.chdir(tmp_path)
    names = {"foo.toml": "Foo X1", "here.toml": "Foo X2", str(tmp_path / "cases" / "foo.toml"): "Foo X1"}
    for cell, name in names.items():
        found = cluster_of(row(gpu=cell, intra_node="", num_gpus="16"), {}, tmp_path / "cases")
        assert found.device.name == name and (found.intra.name, found.nodes) == ("FooLink", 2)
    with pytest.raises(CaseError, match=r"'bar\.toml' is no file"):
        cluster_of(row(gpu="bar.toml"), {}, tmp_path)
    (outcome,) = run_cases([row(gpu="foo.toml")], lambda what, share: None, tmp_path / "cases")
    assert outcome.predicted_seconds and outcome.reserved_bytes


def test_local_is_this_machine() -> None:
    one = {"gpu": "local", "dp": "1", "tp": "1", "pp": "1", "num_gpus": "1", "precision": "fp32", "global_batch": "2"}
    (found,) = run_cases([row(**one)], lambda what, share: None)
    assert found.predicted_seconds and any("cores of this machine" in note for note in found.notes)
    assert found.reserved_bytes is None  # no caching allocator serves a CPU
    with pytest.raises(CaseError, match="gpu is 'local', but this machine has"):
        cluster_of(row(gpu="local", num_gpus=str(local_cluster().size + 1)), {})


def test_a_torus_needs_no_network_between_hosts() -> None:
    chips = {"gpu": "TPU v4", "intra_node": "", "inter_node": "", "num_gpus": "64"}
    assert cluster_of(row(**chips), {}).fabric == "torus" and cluster_of(row(**chips), {}).notes == ()
    assert cluster_of(row(**chips | {"gpu": "A100 SXM4 80GB"}), {}).notes


@pytest.mark.parametrize(
    ("gpu", "count", "closed"),
    [
        ("TPU v4", 64, (True, True, True)), ("TPU v5p", 8, (False, False, False)), ("TPU v5e", 16, (False, False)),
        ("TPU v5e", 256, (True, True)), ("TPU v3", 256, (False, False)), ("TPU v3", 1024, (True, True)),
        ("TPU v4", 384, (True, True, True)), ("TPU v4", 192, (True, True, True)),
    ],
)  # fmt: skip
def test_slices_close_along_whole_sides_of_pods_and_in_whole_cubes(
    gpu: str, count: int, closed: tuple[bool, ...]
) -> None:
    chips = {"gpu": gpu, "intra_node": "", "inter_node": "", "num_gpus": str(count)}
    assert cluster_of(row(**chips), {}).wraps == closed
