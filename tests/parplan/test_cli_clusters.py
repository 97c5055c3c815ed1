"""`parplan clusters`: list, details, JSON, pictures, files of machines."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["2x dgx1-v100", "tpu-v4-cube", "h100-roce-tree", "mi300x-8", "local"])
def test_a_cluster_is_drawn(parplan, tmp_path, name):
    result = parplan("clusters", name, "--out", tmp_path / "x.png", "--json")
    assert result.code == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (entry,) = result.data["clusters"]
    assert entry["fabric"] in ("cube-mesh", "torus", "nvswitch", "mesh", "loopback") and entry["size"] >= 1


def test_details_name_tiers_wires_and_groups(parplan):
    (tree,) = parplan("clusters", "llama3-roce-16k", "--json").data["clusters"]
    assert [t["oversubscription"] for t in tree["tiers"]] == [1.0, 7.0] and tree["size"] == 16384
    (mixed,) = parplan("clusters", "2x dgx-h100 + 1x dgx-a100", "--json").data["clusters"]
    assert [g["nodes"] for g in mixed["groups"]] == [2, 1]
    (cube,) = parplan("clusters", "dgx1-p100", "--json").data["clusters"]
    assert sum("NVLink" in w["name"] for w in cube["wires"]) == 16
    assert "1x NVLink1" in parplan("clusters", "dgx1-p100").out


def test_what_a_machine_prints_is_a_cluster(parplan, tmp_path):
    text = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV4\t0-7\nGPU1\tNV4\t X \t0-7\n"
    (tmp_path / "topo.txt").write_text(text)
    (entry,) = parplan("clusters", tmp_path / "topo.txt", "--json").data["clusters"]
    assert entry["size"] == 2 and entry["sources"] == ["imported from topo.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--out", "x.png"), "name it"), (("dgx-h100", "--out", "x.svg"), ".png"), (("none.xml",), "cannot be read")],
)
def test_mistakes_get_one_sentence(parplan, words, said):
    result = parplan("clusters", *words)
    assert result.code == 2 and said in result.err


def test_a_file_of_a_machine_takes_its_device_from_an_option(parplan, tmp_path):
    text = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV4\t0-7\nGPU1\tNV4\t X \t0-7\n"
    (tmp_path / "topo.txt").write_text(text)
    guessed = parplan("clusters", tmp_path / "topo.txt")
    assert guessed.code == 0 and "--device" in guessed.out and "RTX 3090" in guessed.out
    (entry,) = parplan("clusters", tmp_path / "topo.txt", "--device", "RTX 3090", "--json").data["clusters"]
    assert entry["device"] == "GeForce RTX 3090" and not any("guessed" in note for note in entry["notes"])
    for words, said in (
        (("--device", "a40"), "name the file"),
        (("dgx-h100", "--device", "a40"), "names its device itself"),
        ((tmp_path / "topo.txt", "--device", "voodoo2"), "no known device"),
    ):
        result = parplan("clusters", *words)
        assert result.code == 2 and said in result.err and "Traceback" not in result.err


def test_details_have_units_and_leave_out_what_is_not_set(parplan):
    single = parplan("clusters", "dgx-h100").out
    assert "450 GB/s a direction" in single and "2.7 us one way" in single and "8: 1 node of 8" in single
    assert not any(word in single for word in ("flow_cap", "cores", "tiers", "wires", "window", "False", "0.0"))
    assert "notes of its sources, which are not shipped" in single  # its sources name shared/...
    tree = parplan("clusters", "llama3-roce-16k").out
    assert "pod: 384 nodes below a switch, oversubscribed 1:7" in tree and "2 us more" in tree
    capped = parplan("clusters", "p3-tcp").out
    assert "at most 625 MB/s" in capped and "of a flow under way" in capped
    assert "1 a node, shared by its devices" in parplan("clusters", "g5-12xlarge").out
    assert "shared/" not in parplan("clusters", "g5-12xlarge").out


def test_json_keeps_the_fields_of_links(parplan):
    (entry,) = parplan("clusters", "dgx-h100", "--json").data["clusters"]
    assert entry["intra"]["flow_cap"] == 0 and entry["inter"]["ports"] == 0 and entry["cores"] == 0
