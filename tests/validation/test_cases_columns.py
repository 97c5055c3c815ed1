"""Tables of published runs with columns missing or cells blank: usual values, and a reason for a row without one."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest

from costmodels.names import device_named
from parplan.cli import main
from tests.validation.test_cases import row
from validation import cases_vision
from validation.cases import TRANSFORMER, VISION, Case, CaseError, read_cases
from validation.cases_cluster import nodes_of
from validation.cases_model import family_of
from validation.cases_run import run_cases
from validation.cases_software import software_of
from validation.cases_transformer import Traces as Shapes
from validation.cases_transformer import model_of, plan_of

BARE = {"layers": "4", "hidden": "512", "heads": "8", "seq_len": "128", "vocab": "1000", "gpu": "A100 SXM4 80GB",
        "num_gpus": "8", "global_batch": "16", "micro_batch": "2"}  # fmt: skip
PICTURE = {"model": "AlexNet", "gpu": "Tesla V100 SXM2 16GB", "num_gpus": "1", "global_batch": "32"}
OPTIONAL = {"model": "GPT", "family": "gpt", "ffn": "2048", "kv_heads": "8", "dp": "8", "tp": "1", "pp": "1", "cp": "1",
            "ep": "1", "vpp": "1", "zero_fsdp": "none", "sp": "0", "recompute": "none", "precision": "bf16",
            "gpus_per_node": "8", "attention": "flash", "software": "torch", "notes": "", "set": "s"}  # fmt: skip


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def seconds(*cases: Case) -> list[float | None]:
    return [o.predicted_seconds for o in run_cases(cases, lambda what, share: None)]


def test_needed_columns_are_enough_and_others_asked_for_by_nobody(tmp_path: Path) -> None:
    assert set(BARE) == set(TRANSFORMER) and set(PICTURE) == set(VISION)
    words = read_cases(write(tmp_path / "t.csv", BARE | {"model": "GPT-2"}))
    pictures = read_cases(write(tmp_path / "v.csv", PICTURE, PICTURE))
    assert (words[0].kind, pictures[0].kind) == ("transformer", "vision")
    assert [case.id for case in pictures] == ["row 1", "row 2"] and pictures[0].set == "(no set)"
    assert all(seconds(*words, *pictures))


@pytest.mark.parametrize("name", sorted(BARE))
def test_a_needed_column_is_asked_for_by_name(name: str, tmp_path: Path) -> None:
    lacking = {k: v for k, v in BARE.items() if k != name}
    with pytest.raises(ValueError, match=rf"lacks the column\(s\) {name} of transformer cases"):
        read_cases(write(tmp_path / "t.csv", lacking))


def test_a_batch_may_be_that_of_one_gpu(tmp_path: Path) -> None:
    each = {**PICTURE, "num_gpus": "4", "parallelism": "dp", "per_gpu_batch": "8"}
    del each["global_batch"]
    (case,) = read_cases(write(tmp_path / "v.csv", each))
    assert cases_vision.plan_of(case).global_batch == 32
    del each["per_gpu_batch"]
    with pytest.raises(ValueError, match=r"column\(s\) global_batch of vision"):
        read_cases(write(tmp_path / "v.csv", each))


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_blank_cells_are_what_is_usual(name: str) -> None:
    """Each alone: absent, blank and the usual value make one plan and one model."""
    whole = BARE | OPTIONAL
    rows = [Case("transformer", whole), Case("transformer", whole | {name: ""}),
            Case("transformer", {k: v for k, v in whole.items() if k != name})]  # fmt: skip
    plans = [plan_of(case, software_of(case)) for case in rows]
    models = [model_of(case, software_of(case), Shapes()) for case in rows]
    assert plans[0] == plans[1] == plans[2] and plans[0].dp == 8
    assert len({len(m.graph.ops) for m in models}) == 1


def test_what_was_taken_is_noted() -> None:
    fields = {k: v for k, v in (BARE | OPTIONAL).items() if k not in ("ffn", "dp", "precision")}
    (outcome,) = run_cases([Case("transformer", fields)], lambda what, share: None)
    taken = {"ffn is not stated and taken as four times hidden", "dp is not stated and taken as 8",
             "precision is not stated and taken as bf16"}  # fmt: skip
    assert taken <= set(outcome.notes)
    (picture,) = run_cases([Case("vision", PICTURE)], lambda what, share: None)
    assert "precision is not stated and taken as fp32" in picture.notes


def test_a_family_without_a_word_is_that_of_its_model() -> None:
    names = {"Llama 3 8B": "llama", "GPT-22B": "gpt", "BERT-large": "bert", "DeepSeek-V2": "moe_mla"}
    assert {n: family_of(Case("transformer", BARE | {"model": n})) for n in names} == names
    with pytest.raises(CaseError, match="family 't5-large' is none of"):
        family_of(Case("transformer", BARE | {"model": "T5-large"}))
    gated = Case("transformer", BARE | {"model": "Llama 3 8B"})
    with pytest.raises(CaseError, match="gated MLPs have no usual width"):
        model_of(gated, software_of(gated), Shapes())


def test_chunks_are_needed_by_pipelines_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = {**PICTURE, "parallelism": "gpipe", "model": "ResNet-101", "num_gpus": "2", "pp": "2"}
    path = write(tmp_path / "v.csv", PICTURE | {"parallelism": "single", "pp": "1"}, pipe)
    assert main(["predict", "--cases", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["cases"]
    assert rows[0]["predicted_seconds"] and "reason" not in rows[0]
    assert rows[1]["reason"].startswith("column chunks is ''; gpipe needs")


def test_no_blank_cell_ends_in_a_traceback() -> None:
    cases = [Case("vision", PICTURE | {name: ""}) for name in PICTURE]
    cases += [Case("transformer", BARE | {"model": "GPT", name: ""}) for name in (*BARE, "model")]
    outcomes = run_cases(cases, lambda what, share: None)
    assert all(o.reason and "fault of Parplan" not in o.reason for o in outcomes)


def test_tensor_parallelism_of_torchtitan_splits_the_sequence_and_the_vocabulary() -> None:
    titan = {"software": "torchtitan", "zero_fsdp": "fsdp", "tp": "2", "dp": "4", "pp": "1"}
    case = row(**titan, sp="")
    software = software_of(case)
    assert plan_of(case, software).sequence_parallel and software.vocab_parallel and not software.joined
    assert not plan_of(row(**titan, sp="0"), software).sequence_parallel
    compiled = software_of(row(software="Megatron-LM (core)", notes="compile"))
    assert compiled.joined and compiled.fusion == "chain"  # a compiler leaves products as they are


def test_steps_of_hugging_face_have_an_optimizer_where_the_row_does_not_say_otherwise() -> None:
    plain = software_of(row(software="Hugging Face"))
    timed = software_of(row(software="Hugging Face", step_time_how="measured latency of forward + backward"))
    noted = software_of(row(software="PyTorch", notes="forward and backward, no optimizer step"))
    whole = software_of(row(software="PyTorch", step_time_how="forward + backward + optimizer"))
    assert (plain.optimizer, timed.optimizer, noted.optimizer, whole.optimizer) == ("adam", "none", "none", "adam")


@pytest.mark.parametrize("layers", [24, 40, 26])
def test_interleaved_stages_have_equal_shares_of_layers_that_do_not_divide(layers: int) -> None:
    case = row(layers=str(layers), pp="4", vpp="4", tp="1", dp="1", num_gpus="4")
    ends = [0, *(int(cut.split(".")[1]) for cut in plan_of(case, software_of(case)).cuts), layers]
    sizes = [b - a for a, b in pairwise(ends)]
    stages = [sum(sizes[s::4]) for s in range(4)]
    assert len(sizes) == 16 and sum(stages) == layers and max(stages) - min(stages) <= 1
    assert max(sizes) - min(sizes) <= 1 or layers == 26


@pytest.mark.parametrize(
    ("words", "nodes"),
    [
        ({}, (4, 72)), ({"gpus_per_node": "4"}, (4, 72)), ({"gpus_per_node": "8"}, (8, 8)),
        ({"intra_node": "NVL36"}, (8, 36)), ({"intra_node": "NVLink5"}, (8, 8)), ({"gpu": "B200"}, (8, 8)),
    ],
)  # fmt: skip
def test_a_rack_is_one_domain_where_the_row_does_not_say_otherwise(
    words: dict[str, str], nodes: tuple[int, int]
) -> None:
    case = row(**{"gpu": "GB200", "gpus_per_node": "", "intra_node": "", "interconnect": ""} | words)
    assert nodes_of(case, device_named(case.text("gpu"))) == nodes
