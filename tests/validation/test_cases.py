"""Published runs become models, plans and clusters by their columns alone; scores count what they say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from planner.folded import predict_folded
from planner.folded_model import chunks_of
from validation import cases_vision
from validation.cases import TRANSFORMER, VISION, Case, CaseError, read_cases
from validation.cases_cluster import cluster_of
from validation.cases_model import activation_of, family_of
from validation.cases_notes import notes_of
from validation.cases_report import write_report
from validation.cases_run import Outcome, run_cases
from validation.cases_score import score, summary
from validation.cases_software import software_of
from validation.cases_transformer import Traces, model_of, plan_of

ROW = {
    "case_id": "a", "set": "s", "model": "GPT", "family": "gpt", "layers": "8", "hidden": "512", "heads": "8",
    "kv_heads": "8", "ffn": "2048", "gated_mlp": "0", "seq_len": "128", "vocab": "1000", "moe_experts": "",
    "moe_topk": "", "moe_ffn": "", "gpu": "A100 SXM4 80GB", "num_gpus": "8", "gpus_per_node": "8",
    "intra_node": "NVLink3 + NVSwitch", "inter_node": "800 Gb/s per node (4x 200 Gb/s HDR)", "dp": "2", "tp": "2",
    "pp": "2", "cp": "1", "vpp": "1", "sp": "0", "ep": "1", "zero_fsdp": "none", "global_batch": "16",
    "micro_batch": "2", "recompute": "full", "precision": "fp16", "attention": "unfused",
    "software": "Megatron-LM 2022", "step_time_s": "0.05", "peak_mem_alloc_gib": "", "notes": "",
}  # fmt: skip
PICTURE = {
    "case_id": "v", "set": "cnn", "model": "AlexNet", "gpu": "Tesla V100 SXM2 16GB", "num_gpus": "4",
    "gpus_per_node": "8", "interconnect": "NVLink2 hybrid cube mesh (DGX-1)", "parallelism": "dp", "dp": "4", "pp": "1",
    "chunks": "", "balance": "", "global_batch": "128", "precision": "fp32", "software": "PyTorch DDP",
    "step_time_s": "0.05", "notes": "", "from_memory": "0",
}  # fmt: skip
PIPE = {
    "model": "ResNet-101", "parallelism": "gpipe", "dp": "1", "pp": "2", "num_gpus": "2", "chunks": "4",
    "balance": "[135,235]",
}  # fmt: skip


def row(**changes: str) -> Case:
    return Case("transformer", ROW | changes)


def picture(**changes: str) -> Case:
    return Case("vision", PICTURE | changes)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_of_both_schemas_are_read(tmp_path: Path) -> None:
    assert set(TRANSFORMER) <= set(ROW) and set(VISION) <= set(PICTURE)
    assert read_cases(write(tmp_path / "t.csv", [ROW, ROW]))[1].whole("layers") == 8
    assert read_cases(write(tmp_path / "v.csv", [PICTURE]))[0].kind == "vision"


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    lacking = {k: v for k, v in ROW.items() if k not in ("layers", "hidden")}
    with pytest.raises(ValueError, match="lacks the column"):
        read_cases(write(tmp_path / "t.csv", [lacking]))
    (tmp_path / "empty.csv").write_text(",".join(ROW) + "\n")
    with pytest.raises(ValueError, match="no rows"):
        read_cases(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        read_cases(tmp_path / "none.csv")


def test_degrees_become_a_plan() -> None:
    case = row(pp="2", vpp="2", sp="1", zero_fsdp="zero1", recompute="selective")
    plan = plan_of(case, software_of(case))
    assert (plan.dp, plan.tp, plan.pp, plan.vpp, plan.micro_batches, plan.micro_batch) == (2, 2, 2, 2, 4, 2)
    assert plan.sequence_parallel and plan.data_parallel == "zero1"
    assert plan.cuts == ("blocks.2", "blocks.4", "blocks.6")
    assert plan.recompute == tuple(f"blocks.{i}.attn.core" for i in range(3))


def test_embedding_and_loss_count_as_blocks_where_only_that_divides() -> None:
    case = row(layers="14", pp="4", tp="1", dp="2")
    assert plan_of(case, software_of(case)).cuts == ("blocks.3", "blocks.7", "blocks.11")
    notes = "operators per stage [66, 41]; recomputed operators per stage [33, 0]; stages may hold unequal work"
    uneven = row(layers="8", pp="2", dp="2", notes=notes)
    assert plan_of(uneven, software_of(uneven)).cuts == ("blocks.5",)
    assert software_of(uneven).recompute_share == pytest.approx(33 / 107)
    assert software_of(uneven).recompute_shares == (0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dp": "4"}, "differs from num_gpus"),
        ({"global_batch": "15"}, "no multiple"),
        ({"zero_fsdp": "zero7"}, "none, zero1, zero2 or zero3"),
        ({"recompute": "some"}, "none, full or selective"),
        ({"precision": "int4"}, "fp8"),
        ({"layers": "many"}, "whole number"),
        ({"ep": "8"}, "ep = 8 without moe_experts"),
        ({"zero_fsdp": "4"}, "or 0 to 3"),
        ({"sp": "-1"}, "sp is '-1'; it must be 0 or 1"),
        ({"sp": "maybe"}, "sp is 'maybe'; it must be 0 or 1"),
    ],
)
def test_rows_that_make_no_plan_say_why(changes: dict[str, str], sentence: str) -> None:
    case = row(**changes)
    with pytest.raises(CaseError, match=sentence):
        plan_of(case, software_of(case))


def test_links_are_read_from_their_text() -> None:
    cluster = cluster_of(row(), {})
    assert cluster.intra.bandwidth == pytest.approx(300e9)
    assert cluster.inter.bandwidth == pytest.approx(12.5e9)  # 800 Gb/s for eight devices
    assert cluster_of(row(inter_node="400Gb/s RDMA per GPU"), {}).inter.bandwidth == pytest.approx(50e9)
    assert cluster_of(row(inter_node="8x200Gb/s HDR IB per node"), {}).inter.bandwidth == pytest.approx(25e9)
    assumed = cluster_of(row(inter_node="not stated", num_gpus="64"), {})
    assert assumed.inter.bandwidth == pytest.approx(25e9) and assumed.notes
    domain = cluster_of(row(intra_node="NVLink5 (NVL72: 72 GPUs in one NVLink domain)", gpu="GB200"), {})
    assert domain.devices_per_node == 72
    with pytest.raises(CaseError):
        cluster_of(row(gpu="Abacus 9000"), {})


def test_rows_are_predicted_or_keep_their_reason(tmp_path: Path) -> None:
    odd = {"b": {"gpu": "Abacus 9000"}, "c": {"family": "rnn"}, "d": {"tp": "1", "dp": "4"}}
    cases = [row(), *(row(case_id=name, **changes) for name, changes in odd.items())]
    outcomes = run_cases(cases, lambda what, share: None)
    assert [bool(o.reason) for o in outcomes] == [False, True, True, False]
    done = outcomes[0]
    assert done.predicted_seconds and done.interval and done.interval[0] < done.predicted_seconds < done.interval[1]
    assert done.error == pytest.approx(done.predicted_seconds / 0.05 - 1)
    assert done.allocated_bytes and "gemm" in done.parts
    found = summary(outcomes)["s"]
    assert (found.n, found.unpredicted) == (2, 2)
    write_report(outcomes, tmp_path / "out", "parplan predict")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Abacus" in text and (tmp_path / "out" / "scatter.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]) == 4


def test_scores_are_those_of_the_errors() -> None:
    def outcome(predicted: float, measured: str, **changes: str) -> Outcome:
        return Outcome(row(step_time_s=measured, **changes), predicted, (predicted * 0.95, predicted * 1.05))

    found = score([outcome(1.1, "1"), outcome(1.6, "2"), outcome(3.0, "3"), outcome(9.0, "1", from_memory="1")])
    assert found.n == 3 and found.unscored == 1
    assert found.mape == pytest.approx(0.1) and found.bias == pytest.approx(-0.1 / 3)
    assert found.median == pytest.approx(0.1) and found.worst == pytest.approx(-0.2)
    assert found.spearman == pytest.approx(1.0) and found.coverage == pytest.approx(1 / 3)


def test_pictures_become_plans() -> None:
    plan = cases_vision.plan_of(picture())
    assert (plan.dp, plan.micro_batch, plan.micro_batches) == (4, 32, 1)
    pipe = picture(**PIPE)
    cut = cases_vision.plan_of(pipe)
    assert cut.cuts == ("blocks.12.conv1",) and cut.micro_batches == 4 and cut.recompute
    assert cases_vision.sharing_of(picture(parallelism="ps", notes="variables on the CPU")).exchange == "server"
    assert cases_vision.sharing_of(picture(parallelism="owt")).divided == ("blocks.5", "blocks.6", "head")
    with pytest.raises(CaseError, match="owt"):
        cases_vision.sharing_of(picture(parallelism="owt", model="ResNet-50"))
    with pytest.raises(CaseError, match="zoo has no"):
        cases_vision.model_name(picture(model="Perceptron"))


def test_replicas_of_a_picture_model_cost_messages() -> None:
    one, four, served = run_cases(
        [picture(dp="1", num_gpus="1", global_batch="32"), picture(), picture(parallelism="ps", notes="")],
        lambda what, share: None,
    )
    assert one.predicted_seconds and four.predicted_seconds and served.predicted_seconds
    assert one.predicted_seconds < four.predicted_seconds < served.predicted_seconds
    assert "dp all_reduce" in four.parts and "dp server" in served.parts


def test_recomputation_by_layers_and_by_operators_of_torchtitan() -> None:
    base = {"software": "torchtitan", "zero_fsdp": "zero3", "tp": "1", "dp": "8", "pp": "1"}
    whole = software_of(row(**base, recompute="full"))
    assert (whole.recompute_matmuls, whole.recompute_share, whole.fsdp_copies) == (1.0, 1.0, True)
    by_op = software_of(row(**base, recompute="selective", notes="FSDP2; selective (per-op list)"))
    assert (by_op.recompute_matmuls, by_op.recompute_share) == (0.5, 1.0)
    layers = "FSDP2; selective (whole layers, frequency not restated)"
    assert software_of(row(**base, recompute="selective", notes=layers)).recompute_share == 0.5


def test_gelu_of_hugging_faces_gpt2_is_spelled_out() -> None:
    import torch

    from opgraph.zoo.transformer import Activation

    x = torch.linspace(-4, 4, 101)
    spelled = Activation("gelu_new", True)(x)
    assert torch.allclose(spelled, torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
    eager = {"software": "PyTorch 2.1, Hugging Face eager", "family": "gpt"}
    assert activation_of(row(**eager, model="gpt2_large")) == "gelu_new"
    assert activation_of(row(**eager, model="opt_13")) == "gelu"
    assert activation_of(row(**{**eager, "software": "Hugging Face eager, Megatron via accelerate"})) == "gelu"


def test_tables_that_spreadsheets_wrote_are_read(tmp_path: Path) -> None:
    """A byte order mark, other line ends, capital headers, another order, and further columns change nothing."""
    header = [*reversed([k.upper() for k in ROW]), "Remark"]
    lines = [",".join(header), ",".join([*(f'"{v}"' for v in reversed(ROW.values())), "", "too", "much"]), ""]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (case,) = read_cases(tmp_path / "t.csv")
    assert case.whole("layers") == 8 and case.text("intra_node") == ROW["intra_node"]
    assert plan_of(case, software_of(case)) == plan_of(row(), software_of(row()))


def test_words_of_the_schema_are_read_in_any_case_and_spelling() -> None:
    words = {"recompute": "Full", "precision": "BF16-mixed", "zero_fsdp": "ZeRO-1", "sp": "True", "family": "GPT"}
    odd = row(vpp="0", cp="0", ep="nan", **words)
    plan, plain = plan_of(odd, software_of(odd)), row(precision="bf16", zero_fsdp="zero1", sp="1")
    assert plan == plan_of(plain, software_of(plain))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": "inf"}, "whole number"),
        ({"layers": "1e400"}, "whole number"),
        ({"layers": "1e9"}, "a whole number from 1 to 10,000"),
        ({"global_batch": "1e9"}, "250,000,000 micro-batches"),
        ({"global_batch": "1048576"}, "is this one in tokens?"),
        ({"gated_mlp": "2"}, "gated_mlp is '2'; it must be 0 or 1"),
        ({"intra_node": "NVLink 0GB/s"}, "move nothing"),
        ({"hidden": "0"}, "a whole number from 1 to 1,000,000,000,000"),
        ({"hidden": "500"}, "divide"),
        ({"heads": "6", "kv_heads": "4"}, "divide"),
        ({"micro_batch": "nan"}, "whole number"),
        ({"seq_len": ""}, "whole number"),
        ({"pp": "2", "vpp": "8"}, "cannot fill"),
        ({"family": "mixtral", "moe_experts": "7", "moe_topk": "2", "moe_ffn": "64", "tp": "1", "dp": "4", "ep": "2"},
         "does not divide moe_experts"),
    ],
)  # fmt: skip
def test_odd_numbers_are_reasons_not_tracebacks(changes: dict[str, str], sentence: str) -> None:
    (outcome,) = run_cases([row(**changes)], lambda what, share: None)
    assert outcome.predicted_seconds is None and sentence in outcome.reason


def test_a_fault_of_ours_in_one_row_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr("planner.whole_step.predict_whole", broken)
    first, second = run_cases([picture(), row(family="rnn")], lambda what, share: None)
    assert "fault of Parplan" in first.reason and "rnn" in second.reason


def test_impossible_measurements_are_no_measurements() -> None:
    for text in ("0", "-3", "inf", "nan", "n/a", "slow"):
        assert Outcome(row(step_time_s=text), predicted_seconds=1.0).error is None


def test_families_outside_the_schema_are_built_as_what_their_layers_are_like() -> None:
    names = {"OPT": "0", "falcon": "0", "Mistral": "1", "mixtral": "1", "DeepSeek-V3": "1", "roberta": "0"}
    found = [family_of(row(family=name, gated_mlp=gated)) for name, gated in names.items()]
    assert found == ["gpt", "gpt", "llama", "llama", "moe_mla", "bert"]
    with pytest.raises(CaseError, match="none of gpt"):
        family_of(row(family="t5"))
    (outcome,) = run_cases([row(family="opt")], lambda what, share: None)
    assert "family opt is predicted as gpt" in outcome.notes


def test_a_step_that_would_not_fit_is_predicted_with_a_note() -> None:
    large = row(layers="96", hidden="12288", heads="96", kv_heads="96", ffn="49152", recompute="none")
    fits, exceeds = run_cases([row(), large], lambda what, share: None)
    assert fits.notes == () and exceeds.predicted_seconds is not None
    (note,) = exceeds.notes
    assert note.startswith("does not fit by this prediction: ")
    assert "GiB reserved" in note and note.endswith(" allocated, on a device of 80.0 GiB")


def test_a_step_whose_loss_keeps_the_logits_once_fits() -> None:
    """llm-foundry's loss is flash-attn's, without which this step (24 sequences a GPU) would not fit."""
    case = row(
        family="mpt", layers="24", hidden="1536", heads="12", kv_heads="12", ffn="6144", seq_len="2048", vocab="50368",
        gpu="H100 SXM5 80GB", dp="8", tp="1", pp="1", zero_fsdp="zero3", global_batch="384", micro_batch="24",
        recompute="none", precision="bf16", attention="flash", software="Composer / PyTorch FSDP (llm-foundry)",
    )  # fmt: skip
    (found,) = run_cases([case], lambda what, share: None)
    assert found.notes == () and found.allocated_bytes is not None
    software, traces = software_of(case), Traces()
    assert software.loss == "logits" and software.fused_loss
    cluster = cluster_of(case, {})
    eager, fused = (
        predict_folded(model_of(case, s, traces), plan_of(case, s), cluster, s).memory.allocated
        for s in (replace(software, loss="traced", fused_loss=False), software)
    )
    logits = 24 * 2048 * 50368
    assert found.allocated_bytes == pytest.approx(fused, rel=1e-4)  # a few small blocks are rounded up
    assert fused < cluster.device.memory_bytes < eager
    assert eager - fused == pytest.approx(8 * logits, rel=0.01)  # 12 bytes a logit before, 4 after


def test_losses_norms_and_gradients_are_those_of_the_program() -> None:
    names = ("NeMo / Megatron-Core", "Megatron-Bridge v0.5.0, NeMo 26.06", "Megatron-LM 2022", "JAX")
    core, bridge, older, xla = (software_of(row(software=name)) for name in names)
    assert (core.loss, core.fused_loss, core.main_grads, core.fp8_inputs) == ("softmax", False, 4, True)
    assert (bridge.loss, bridge.fused_loss, bridge.main_grads, bridge.reduce_bytes) == ("in place", True, 2, 2)
    assert (older.loss, older.fp8_inputs) == ("softmax", False) and xla.loss == "logits"
    assert software_of(row(software="Megatron-LM (core)", notes="fused cross entropy")).loss == "in place"
    titan = {"software": "torchtitan", "zero_fsdp": "zero3"}
    april, december = (software_of(row(**titan, notes=notes)) for notes in ("FSDP2 1D eager", "FSDP+compile"))
    assert april.fused_norms and not december.fused_norms
    assert april.loss == december.loss == "traced" and not december.fused_loss and december.fusion == "chain"
    compiled = software_of(row(software="PyTorch DDP", tp="1", pp="1", notes="compile"))
    assert (compiled.loss, compiled.fused_loss) == ("logits", True)


def test_experts_of_every_block_and_of_all_but_the_first() -> None:
    changes = {"moe_experts": "4", "moe_topk": "2", "moe_ffn": "256", "ep": "2", "tp": "1", "dp": "4", "gated_mlp": "1"}
    rows = [row(family="mixtral", ffn="", **changes), row(family="moe_mla", **changes),
            row(family="moe_mla", notes="3 dense + 5 MoE layers", **changes)]  # fmt: skip
    models = [model_of(case, software_of(case), Traces()) for case in rows]
    assert [m.different for m in models] == [0, 1, 3]
    plan = plan_of(rows[2], software_of(rows[2]))
    assert [c.parts for c in chunks_of(models[2], plan)] == [
        (("first", 1), ("block0", 3), ("block", 1)), (("block", 4), ("last", 1))
    ]  # fmt: skip


def test_experts_have_two_matrices_where_the_mlp_has() -> None:
    changes = {"moe_experts": "4", "moe_topk": "2", "moe_ffn": "256", "tp": "1", "dp": "4", "family": "moe"}
    weights = []
    for gated in ("0", "1"):
        case = row(gated_mlp=gated, **changes)
        graph = model_of(case, software_of(case), Traces()).graph
        weights.append(sum(prod(t.shape) for name, t in graph.parameters.items() if len(t.shape) == 3))
    assert weights[0] / weights[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("gpu", "inside", "fabric", "rate"),
    [
        ("A100 SXM4 80GB", "", "nvswitch", 300e9),
        ("A100 SXM4 80GB", "not stated", "nvswitch", 300e9),
        ("A100 SXM4 80GB", "PCIe 4.0, no NVLink", "pcie", 16e9),
        ("A100 PCIe 80GB", "", "pcie", 16e9),
        ("H100 SXM5 80GB", "NVLink 0.9 TB/s", "nvswitch", 450e9),
        ("Instinct MI300X", "Infinity Fabric", "mesh", 448e9),
        ("Gaudi2", "RoCE", "mesh", 300e9),
        ("TPU v5p", "ICI", "torus", 600e9),
        ("L40S", "not stated", "pcie", 16e9),
        ("H100 SXM5 80GB", "no NVLink", "pcie", 31.5e9),
        ("H100 SXM5 80GB", "none", "pcie", 31.5e9),
        ("H100 SXM5 80GB", "PCIe Gen3 x16 16 GB/s", "pcie", 8e9),
        ("H100 SXM5 80GB", "PCIe gen3 x16", "pcie", 8e9),
        ("A100 SXM4 80GB", "NVLink bridges between pairs", "pcie", 16e9),
    ],
)
def test_nodes_are_joined_by_what_the_device_has(gpu: str, inside: str, fabric: str, rate: float) -> None:
    cluster = cluster_of(row(gpu=gpu, intra_node=inside, num_gpus="48"), {})
    assert cluster.fabric == fabric and cluster.intra.bandwidth == pytest.approx(rate, rel=0.02)
    assert cluster.size >= 48 and (fabric != "torus" or cluster.dims == (4, 3, 4))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8 x 400 Gbps NDR", 50e9),
        ("3200 Gbps EFA per node", 50e9),
        ("3.2 Tb/s EFA per node", 50e9),
        ("400 Gbit/s InfiniBand", 50e9),
        ("100 GbE", 12.5e9 / 8),
        ("1600 Gb/s per node (RoCE)", 25e9),
        ("0 Gb/s per node", 50e9),
        ("1.25 Gb/s per GPU", 1.25e9 / 8),
        ("12.5 Gb/s per node", 12.5e9 / 64),
        ("2x2.5Gb/s", 5e9 / 64),
        ("0.1 Gb/s", 0.1e9 / 64),
        ("100 Mb/s Ethernet", 0.1e9 / 64),
        ("10 gbps", 10e9 / 64),
        ("400 gb/s per gpu", 50e9),
        ("1 GB/s per node", 1e9 / 8),
        ("10GigE", 10e9 / 64),
        ("4x100G RoCE", 50e9 / 8),
        ("8x HDR InfiniBand", 25e9),
        ("InfiniBand NDR400", 50e9),
    ],
)
def test_networks_are_read_from_their_text(text: str, rate: float) -> None:
    cluster = cluster_of(row(gpu="H100 SXM5 80GB", num_gpus="16", inter_node=text), {})
    assert cluster.inter.bandwidth == pytest.approx(rate)


def test_a_network_that_cannot_be_read_is_quoted() -> None:
    found = cluster_of(row(num_gpus="64", inter_node="7 lanes of something"), {})
    assert "no rate was read from '7 lanes of something'" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "inside", "between"),
    [
        ("10 Gb/s Ethernet", 150e9, 1.25e9 / 8),
        ("100 Gb/s InfiniBand", 150e9, 12.5e9 / 8),
        ("25GbE", 150e9, 25e9 / 64),
        ("PCIe, 10 Gb/s Ethernet", 7.9e9, 1.25e9 / 8),
        ("PCIe inside the node, 10 Gb/s between nodes", 7.9e9, 1.25e9 / 8),
        ("", 150e9, 6.25e9),
    ],
)
def test_one_column_tells_of_links_and_network(text: str, inside: float, between: float) -> None:
    fields = {"set": "s", "gpu": "Tesla V100 SXM2 16GB", "num_gpus": "16", "interconnect": text}
    cluster = cluster_of(Case("vision", fields), {})
    assert cluster.intra.bandwidth == pytest.approx(inside, rel=0.02)
    assert cluster.inter.bandwidth == pytest.approx(between)


def test_tf32_rows_run_products_in_tf32() -> None:
    """On an A100 tf32 is eight times as fast as float32 by the data sheet; a step gains some of it."""
    shape = {"hidden": "4096", "ffn": "16384", "heads": "32", "kv_heads": "32", "layers": "2"}
    case = row(pp="1", tp="1", dp="8", **shape)
    names = ("fp32", "tf32", "bf16")
    found = run_cases([Case("transformer", case.fields | {"precision": p}) for p in names], lambda what, share: None)
    steps = dict(zip(names, found))
    seconds = {p: o.predicted_seconds or 0.0 for p, o in steps.items()}
    assert seconds["bf16"] < seconds["tf32"] < 0.6 * seconds["fp32"]
    assert steps["tf32"].parts["gemm"] > 1.5 * steps["bf16"].parts["gemm"]


def test_fsdp_inside_a_pipeline_keeps_what_it_gathered() -> None:
    case = row(zero_fsdp="zero3")
    assert plan_of(case, software_of(case)).data_parallel == "zero1"
    case = row(zero_fsdp="zero3", pp="1", dp="4")
    assert plan_of(case, software_of(case)).data_parallel == "fsdp"


def test_names_of_picture_models_are_matched_whole() -> None:
    names = {
        "ResNet-50 v1.5": "resnet50", "resnet_152": "resnet152", "VGG16": "vgg16", "Inception v1": "googlenet",
        "InceptionV3": "inception3", "SE-ResNeXt101-32x4d": "seresnext101", "Wide ResNet-101-2": "wideresnet101",
        "AlexNet one-tower variant": "alexnet", "ViT-B/16": "vit-b16", "ResNet-34 (ImageNet)": "resnet34",
        "ResNet-100 face recognition, about 85,000-class FC": "face",
    }  # fmt: skip
    assert {name: cases_vision.model_name(picture(model=name)) for name in names} == names
    for name in ("ResNet-50-D", "SE-ResNet-50", "ResNet-500", "AmoebaNet-D (18, 256)", "U-Net (5, 64)", ""):
        with pytest.raises(CaseError, match="can be built"):
            cases_vision.model_name(picture(model=name))


@pytest.mark.parametrize(
    "balance", ["", "3", '["a", 1]', "[1, 369]", "[369, 1]", "[185]", "[0, 370]", "[135, 236]", "[135, 234]"]
)
def test_balances_that_make_no_partitions_say_why(balance: str) -> None:
    with pytest.raises(CaseError, match="balance"):
        cases_vision.plan_of(picture(**PIPE | {"balance": balance}))


def test_balances_count_the_layers_of_their_model() -> None:
    one = {**PIPE, "pp": "1", "num_gpus": "1"}
    assert cases_vision.plan_of(picture(**one | {"balance": "[370]"})).pp == 1
    assert cases_vision.plan_of(picture(**PIPE | {"model": "ResNet-50", "balance": "[92, 91]"})).pp == 2
    with pytest.raises(CaseError, match="sums to 369, but ResNet-101 has 370"):
        cases_vision.plan_of(picture(**one | {"balance": "[369]"}))
    with pytest.raises(CaseError, match="a list of 2, but pp is 1"):
        cases_vision.plan_of(picture(**one))


def test_replicas_that_are_not_stated_are_as_many_as_gpus() -> None:
    assert [cases_vision.plan_of(picture(dp="", parallelism=p)).dp for p in ("dp", "ddp", "ps", "owt")] == [4] * 4
    assert cases_vision.plan_of(picture(**PIPE | {"dp": ""})).dp == 1
    assert cases_vision.plan_of(picture(**PIPE | {"parallelism": "dp", "dp": "", "num_gpus": "4"})).dp == 2
    assert cases_vision.plan_of(picture(per_gpu_batch="32")).micro_batch == 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dp": "1"}, "dp x pp = 1 x 1 differs from num_gpus = 4; dp would be 4"),
        ({"dp": "8"}, "differs from num_gpus = 4; dp would be 4"),
        ({"dp": "", "parallelism": ""}, "differs from num_gpus"),
        ({**PIPE, "num_gpus": "8"}, "dp x pp = 1 x 2 differs from num_gpus = 8"),
        ({"parallelism": "single"}, "single is one GPU, but dp is 4"),
        ({"parallelism": "single", "dp": "1"}, "single is one GPU, but dp is 1, pp is 1 and num_gpus is 4"),
        ({"per_gpu_batch": "64"}, "64 x dp 4 = 256 differs from global_batch 128; per_gpu_batch would be 32"),
        ({"per_gpu_batch": "many"}, "number is needed"),
    ],
)
def test_pictures_that_contradict_themselves_say_what_would_be_right(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(CaseError, match=sentence):
        cases_vision.plan_of(picture(**changes))


def test_pictures_that_would_not_fit_are_predicted_with_a_note() -> None:
    fits, exceeds = run_cases([picture(), picture(global_batch=str(4 * 8192))], lambda what, share: None)
    assert fits.notes == () and exceeds.predicted_seconds is not None
    (note,) = exceeds.notes
    assert note.startswith("does not fit by this prediction: ") and note.endswith(" GiB on a device of 15.8 GiB")


def test_convolutions_of_pictures_run_in_tf32_unasked_and_faster_still_in_16_bits() -> None:
    """Products, which torch rounds only where it is asked to, are 1 % of VGG-16's FLOP."""
    changes = {"model": "VGG-16", "gpu": "A100 SXM4 80GB", "interconnect": "NVLink3", "notes": "NHWC"}
    rows = [picture(precision=p, **changes) for p in ("fp32", "tf32", "fp16 (AMP)")]
    found = run_cases(rows, lambda what, share: None)
    seconds = [o.predicted_seconds or 0.0 for o in found]
    assert 1.1 * seconds[1] > seconds[0] > seconds[1] > 1.5 * seconds[2] > 0
    assert [any("tf32 as torch does it unasked" in note for note in o.notes) for o in found] == [True, False, False]
    (older,) = run_cases([picture(precision="fp32", **changes | {"gpu": "Tesla V100 SXM2 16GB"})], lambda *a: None)
    assert (older.predicted_seconds or 0.0) > 1.5 * seconds[0] and not older.notes


def test_experts_beside_tensor_parallelism_work_on_a_part_of_the_sequence() -> None:
    """Attention is split, experts are not where ep spans tp: each rank has 1/tp of the tokens, so that its experts'
    products stay as they are a token, and its activations shrink."""
    changes = {"family": "mixtral", "moe_experts": "4", "moe_topk": "2", "moe_ffn": "1024", "gated_mlp": "1", "ep": "4",
               "pp": "1", "hidden": "1024", "seq_len": "512", "zero_fsdp": "zero1", "recompute": "none",
               "precision": "bf16", "attention": "flash"}  # fmt: skip
    rows = [row(tp=tp, dp=str(8 // int(tp)), **changes | {"ep": "8", "moe_experts": "8"}) for tp in ("1", "2", "4")]
    plans = [plan_of(case, software_of(case)) for case in rows]
    assert [p.sequence_parallel for p in plans] == [False, True, True]
    assert [(p.etp, p.expert_replicas) for p in plans] == [(1, 1)] * 3
    outcomes = run_cases(rows, lambda what, share: None)
    memory = [o.allocated_bytes or 0 for o in outcomes]
    assert memory[0] > memory[1] > memory[2] > 0
    gemm = [o.parts["gemm"] for o in outcomes]  # of all micro-batches: the same work on as many GPUs
    assert all(g == pytest.approx(gemm[0], rel=0.35) for g in gemm)


def test_latent_attention_splits_heads_and_keeps_latents_whole() -> None:
    """Products of the heads are divided, those that make latents run on parts of the sequence: as many FLOP a GPU as
    without tensor parallelism, less memory, and what tp gathers are narrow latents."""
    changes = {"family": "moe_mla", "moe_experts": "8", "moe_topk": "2", "moe_ffn": "1024", "gated_mlp": "1", "ep": "8",
               "pp": "1", "hidden": "2048", "heads": "16", "seq_len": "512", "zero_fsdp": "zero1", "recompute": "none",
               "precision": "bf16", "attention": "flash"}  # fmt: skip
    rows = [row(tp=tp, dp=str(8 // int(tp)), **changes) for tp in ("1", "2", "4")]
    assert "blocks.0.attn.kv_up" in plan_of(rows[1], software_of(rows[1])).style
    one, two, four = run_cases(rows, lambda what, share: None)
    assert (one.allocated_bytes or 0) > (two.allocated_bytes or 0) > (four.allocated_bytes or 0) > 0
    assert all(o.parts["gemm"] == pytest.approx(one.parts["gemm"], rel=0.35) for o in (two, four))
    assert "tp all_gather" in two.parts and "tp reduce_scatter" in two.parts and "tp all_gather" not in one.parts
    (uneven,) = run_cases([row(**{**changes, "heads": "12", "hidden": "1536", "tp": "8", "dp": "1"})], lambda *a: None)
    assert uneven.reason


MIXTRAL = {
    "model": "Mixtral-8x7B", "family": "mixtral", "layers": "8", "hidden": "4096", "heads": "32", "kv_heads": "8",
    "ffn": "14336", "gated_mlp": "1", "seq_len": "4096", "vocab": "32000", "moe_experts": "8", "moe_topk": "2",
    "moe_ffn": "14336", "gpu": "H100 SXM5 80GB", "pp": "1", "zero_fsdp": "none", "global_batch": "8",
    "micro_batch": "1", "recompute": "none", "precision": "bf16", "attention": "flash", "software": "Megatron-Core 0.9",
}  # fmt: skip


def test_experts_are_split_over_tp_as_megatron_does_by_default() -> None:
    """11.9 billion parameters of 18 bytes on 8 GPUs: an eighth on each, by tp or (but for attention) by ep."""
    layouts = {"tp8": ("8", "1", "1"), "ep8": ("1", "8", "8"), "tp2 ep4": ("2", "4", "4"), "tp2 ep8": ("2", "4", "8")}
    rows = [row(tp=tp, dp=dp, ep=ep, **MIXTRAL) for tp, dp, ep in layouts.values()]
    found = dict(zip(layouts, run_cases(rows, lambda what, share: None)))
    static = 18 * 11.9e9 / 8
    assert static < (found["tp8"].allocated_bytes or 0) < 1.2 * static
    gemm = {name: o.parts["gemm"] for name, o in found.items()}
    assert all(g == pytest.approx(gemm["ep8"], rel=0.25) for g in gemm.values()), gemm
    assert "ep all_to_all" not in found["tp8"].parts and found["tp8"].parts["tp reduce_scatter"] > 0
    # tokens of the experts cross the ranks of tp besides those of attention, where these share experts
    assert found["tp2 ep4"].parts["tp all_gather"] > 1.5 * found["tp2 ep8"].parts["tp all_gather"]
    assert any("split over tp = 8, as Megatron's default" in note for note in found["tp8"].notes)
    assert any("not split over tp = 2: ep = 8" in note for note in found["tp2 ep8"].notes)
    assert not any("tp" in note for note in found["ep8"].notes)
    odd = outcome_of(**MIXTRAL | {"tp": "8", "dp": "1", "moe_ffn": "14340"})
    assert "tp = 8 does not divide the width of an expert" in odd.reason


def test_a_shared_expert_is_split_over_tp_and_gathers_its_tokens() -> None:
    changes = MIXTRAL | {"tp": "4", "dp": "2", "ep": "2"}
    plain, shared = outcome_of(**changes), outcome_of(**changes, notes="shared-expert ffn 14336")
    grown = (shared.allocated_bytes or 0) - (plain.allocated_bytes or 0)
    assert 18 * 8 * 3 * 4096 * 14336 / 4 < grown < 1.5 * 18 * 8 * 3 * 4096 * 14336 / 4
    assert shared.parts["tp all_gather"] > plain.parts["tp all_gather"]


def test_tokens_that_cross_nodes_to_their_experts_are_named() -> None:
    changes = MIXTRAL | {"tp": "1", "ep": "8", "dp": "16", "num_gpus": "16", "global_batch": "16"}
    inside, across = outcome_of(**changes), outcome_of(**changes | {"ep": "16", "moe_experts": "16"})
    assert not any("spans nodes" in note for note in inside.notes)
    assert any("ep = 16 spans nodes: all moe_topk copies" in note for note in across.notes)


def outcome_of(**changes: str) -> Outcome:
    (found,) = run_cases([row(**changes)], lambda what, share: None)
    return found


def test_stages_of_zero_are_read_as_digits_too() -> None:
    words = {"0": "ddp", "1": "zero1", "2": "zero2", "2.0": "zero2", "3": "fsdp"}
    cases = {z: row(zero_fsdp=z, pp="1", dp="4") for z in words}
    assert {z: plan_of(case, software_of(case)).data_parallel for z, case in cases.items()} == words


def test_sequence_parallelism_may_be_a_degree() -> None:
    words = {"0": False, "": False, "no": False, "1": True, "2": True, "1.0": True, "yes": True}
    cases = {sp: row(sp=sp) for sp in words}
    assert {sp: plan_of(case, software_of(case)).sequence_parallel for sp, case in cases.items()} == words


def test_a_row_says_that_fsdp_in_a_pipeline_is_predicted_as_zero1() -> None:
    piped, alone = outcome_of(zero_fsdp="zero3"), outcome_of(zero_fsdp="zero3", pp="1", dp="4")
    (note,) = piped.notes
    assert note.startswith("zero3 in a pipeline is predicted as zero1: FSDP then keeps") and "zero1" in piped.plan
    assert alone.notes == () and "fsdp" in alone.plan


@pytest.mark.parametrize(
    ("gpu", "precision", "said"),
    [
        ("A100 SXM4 80GB", "fp8", ["A100 SXM4 80GB has no float8: products run in bfloat16"]),
        ("A100 SXM4 80GB", "bf16", []),
        ("H100 SXM5 80GB", "fp8", []),
        ("T4", "bf16", ["Tesla T4 has no bfloat16: products are priced as bfloat16 kernels of A100 SXM4 80GB "
                         "that reach float32's rate at most"]),
        ("T4", "fp16", []),
        ("Tesla P100 SXM2 16GB", "tf32", ["Tesla P100 SXM2 16GB has no tf32: products run at float32's rate"]),
        ("TPU v4", "fp32", ["TPU v4 (chip) has no float32: products run at 45.8 TFLOP/s"]),
        ("Tesla V100 SXM2 16GB", "fp8", [
            "Tesla V100 SXM2 16GB has no float8: products run in bfloat16",
            "Tesla V100 SXM2 16GB has no bfloat16: products are priced as bfloat16 kernels of A100 SXM4 80GB that "
            "reach float32's rate at most",
        ]),
    ],
)  # fmt: skip
def test_a_row_says_what_is_computed_where_a_device_lacks_its_type(gpu: str, precision: str, said: list[str]) -> None:
    case = row(gpu=gpu, precision=precision)
    assert [note for note in notes_of(case, cluster_of(case, {}).device) if "has no" in note] == said


@pytest.mark.parametrize("software", ["Megatron-LM 2022", "torchtitan"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_fewer_heads_of_keys_than_ranks_are_replicated(software: str, attention: str) -> None:
    changes = {"tp": "4", "dp": "1", "software": software, "attention": attention, "recompute": "none"}
    two, four = (outcome_of(kv_heads=n, **changes) for n in ("2", "4"))
    (note,) = two.notes
    assert note.startswith("2 kv_heads are replicated to 4, one for each tensor-parallel rank") and four.notes == ()
    assert two.predicted_seconds and two.predicted_seconds == four.predicted_seconds
    assert two.allocated_bytes == four.allocated_bytes
    inside = outcome_of(kv_heads="2", **{**changes, "tp": "2", "dp": "2"})
    assert inside.notes == () and inside.predicted_seconds


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [("8", "8", "3"), ("12", "4", "6"), ("12", "6", "4")])
def test_heads_that_do_not_divide_among_ranks_are_refused(heads: str, kv_heads: str, tp: str) -> None:
    ranks = {"tp": tp, "dp": "1", "pp": "1", "num_gpus": tp}
    found = outcome_of(hidden="768", heads=heads, kv_heads=kv_heads, **ranks)
    assert f"heads {heads} and kv_heads {kv_heads} do not divide among tp = {tp} ranks" in found.reason


def test_mlps_are_gated_as_the_family_has_them_where_the_row_does_not_say() -> None:
    experts = {"moe_experts": "4", "moe_topk": "2", "moe_ffn": "256", "tp": "1", "dp": "4"}
    for family, more in (("mixtral", experts), ("llama", {}), ("Mistral", {})):
        stated, left = outcome_of(family=family, gated_mlp="1", **more), outcome_of(family=family, gated_mlp="", **more)
        assert left.predicted_seconds and left.predicted_seconds == stated.predicted_seconds
        assert left.notes == stated.notes and left.allocated_bytes == stated.allocated_bytes
    assert family_of(row(family="mixtral", gated_mlp="")) == "llama"
    assert {activation_of(row(family=name, gated_mlp="")) for name in ("mixtral", "llama", "Qwen2.5")} == {"swiglu"}
    assert activation_of(row(family="gpt", gated_mlp="")) == "gelu" == activation_of(row(family="llama", gated_mlp="0"))
