"""`parplan gradients`: table, JSON, picture, mistakes."""

from __future__ import annotations

import pytest

MODEL = "gpt2:layers=2,hidden=128,heads=4,seq=32,vocab=512,batch=8"


def test_rows_policy_and_break_even(parplan, tmp_path):
    result = parplan("gradients", MODEL, "--cluster", "p3-tcp", "--ranks", "4", "--bucket-mb", "0.25,25", "--plot",
                     tmp_path / "x.png", "--lossy", "--json")  # fmt: skip
    assert result.code == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    data = result.data
    steps = [row["step_seconds"] for row in data["schemes"]]
    assert steps == sorted(steps) and data["policy_step_seconds"] <= steps[0] * (1 + 1e-9)
    keys = {"name", "step_seconds", "exposed_seconds", "wire_bytes", "encode_seconds", "decode_seconds", "memory_bytes"}
    assert all(keys <= row.keys() for row in data["schemes"])
    assert {"ring none", "ps/gradients fp16", "ps-sharded/parameters sign"} <= {row["name"] for row in data["schemes"]}
    assert all({"bucket_bytes", "scheme", "compression", "reason"} <= d.keys() for d in data["policy"])
    assert {"fp16", "sign"} <= data["break_even_bandwidth"].keys()
    assert any("convergence" in note for note in data["notes"])


def test_people_get_tables(parplan):
    result = parplan(
        "gradients", MODEL, "-c", "dgx-h100", "-n", "2", "--schemes", "ring,auto", "--compressions", "none,fp16"
    )
    assert result.code == 0 and "exposed" in result.out and "MB by" in result.out and "convergence" in result.err
    assert "parplan gradients resnet50" in parplan("gradients", "--help").out


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--ranks", "1"), "2 ranks"), (("--ranks", "2", "--schemes", "star"), "no known scheme"),
     (("--ranks", "2", "--compressions", "zip"), "no known compression"), (("--ranks", "99"), "99 devices"),
     (("--ranks", "2", "--bucket-mb", "big"), "MiB"),
     (("--ranks", "2", "--bucket-mb", "inf"), "MiB"), (("--ranks", "2", "--plot", "x.docx"), "ends in none of .png"),
     (("--ranks", "2", "--compressions", "powersgd2.5"), "whole number"),
     (("--ranks", "2", "--compressions", "sign"), "--lossy"),
     (("--ranks", "3", "-b", "8"), "8"), (("--ranks", "2", "--plot", "no/where.png"), "no folder")],
)  # fmt: skip
def test_mistakes_get_one_sentence(parplan, words, said):
    result = parplan("gradients", MODEL, "-c", "dgx-h100", *words)
    assert result.code == 2 and said in result.err and result.err.strip().splitlines()[-1].startswith("parplan: ")
