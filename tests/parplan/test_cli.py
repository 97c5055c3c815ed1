"""Every verb: its JSON keys, its tables, and its one sentence for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parplan.cli import app, main
from planner.plan import ParallelPlan

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models.py"
MLP = "mlp:layers=2,hidden=32,ffn=64,features=16"
VERBS = tuple(command.callback.__name__ for command in app.registered_commands if command.callback)


def lines(text: str) -> list[str]:
    """stderr without progress."""
    return [line for line in text.splitlines() if line and not line.startswith("[")]


# -- help ------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    """What makes it answer at once (0.3 s: benchmarks/pricing.py)."""
    code = "import sys; from parplan.cli import main; c = main(['--help']); import parplan; dir(parplan)\n"
    code += "bad = {'torch', 'numpy', 'scipy', 'matplotlib', 'numba'} & set(sys.modules); sys.exit(c or len(bad))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_the_callers_own_handler_is_back_afterwards(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--help"]) == 0 and main(["nonsense"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_verbs_are_all_of_the_command():
    """What is tested below for every verb cannot leave one out."""
    assert {"trace", "calibrate", "search", "simulate", "validate", "predict", "devices", "clusters", "collectives",
            "demo"} <= set(VERBS)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(parplan, verb):
    result = parplan(verb, "--help")
    assert result.code == 0 and f"Example: parplan {verb}" in result.out and "--json" in result.out


def test_no_arguments_print_the_help(parplan):
    assert "Usage: parplan" in parplan().out


# -- keys and tables -------------------------------------------------------------------------------------------


def test_trace(parplan):
    result = parplan("trace", MLP, "--json", "--batch", 6)
    assert result.code == 0
    assert {"params", "ops", "flops", "activation_bytes", "work", "depth", "seconds"} <= set(result.data)
    assert {"forward", "backward"} <= set(result.data["flops"])
    assert result.data["params"] == 16 * 32 + 32 + 2 * (32 * 64 + 64 + 64 * 32 + 32) + 32 * 10 + 10
    assert result.data["batch"] == 6
    table = parplan("trace", MLP)
    assert table.code == 0 and "parameters" in table.out and "Brent" in table.out


def test_trace_bounds_the_steps_on_processors(parplan):
    data = parplan("trace", MLP, "--json").data
    counts = [row["processors"] for row in data["brent"]]
    assert counts[:3] == [1, 8, 64] and counts[-2] * data["depth"] < data["work"] <= counts[-1] * data["depth"]
    assert data["brent"][0]["least"] == data["brent"][0]["most"] == data["work"]
    for row in data["brent"]:
        assert max(data["work"] / row["processors"], data["depth"]) == pytest.approx(row["least"])
        assert row["least"] <= row["most"] <= data["work"] / row["processors"] + data["depth"]
    (one,) = parplan("trace", MLP, "--processors", 40, "--json").data["brent"]
    assert one["processors"] == 40 and one["most"] < data["brent"][1]["most"]
    refused = parplan("trace", MLP, "--processors", 0)
    assert refused.code == 2 and "--processors is 0" in refused.err


def test_what_a_model_prints_does_not_spoil_the_json(parplan, tmp_path):
    (tmp_path / "loud.py").write_text(
        "import torch\nfrom torch import nn\nprint('hello')\ndef f():\n    return nn.Linear(4, 4), torch.randn(2, 4)\n"
    )
    result = parplan("trace", f"{tmp_path}/loud.py:f", "--json")
    assert result.code == 0 and result.data["params"] == 20 and "hello" in result.err


def test_search(parplan, planner, tmp_path):
    words = ("search", MLP, "--cluster", "dgx-h100", "--global-batch", 8, "--devices", 2, "--top", 2)
    result = parplan(*words, "--out", tmp_path / "plans", "--json")
    assert result.code == 0
    assert {"plans", "considered", "infeasible", "seconds", "rejected", "offload", "offload_reason"} <= set(result.data)
    keys = {
        "plan", "step_seconds", "interval", "peak_bytes", "mfu", "bound_seconds", "gap", "host_bytes",
        "host_pinned_bytes",
    }  # fmt: skip
    assert len(result.data["plans"]) == 2 and all(keys <= set(p) for p in result.data["plans"])
    files = sorted(p.name for p in (tmp_path / "plans").iterdir())
    assert files == ["01-dp2-ddp.json", "02-dp2-zero1.json", "plans.json"]
    assert json.loads((tmp_path / "plans" / files[0]).read_text()) == result.data["plans"][0]["plan"]
    table = parplan(*words)
    for word in ("dp2 zero1", "20 ms", "25.0%", "nothing to split", "1 MiB"):
        assert word in table.out


def test_simulate_a_file_and_degrees(parplan, planner, tmp_path):
    ParallelPlan(global_batch=8, dp=2).save(tmp_path / "plan.json")
    trace, picture = tmp_path / "t.json", tmp_path / "t.png"
    result = parplan("simulate", MLP, "--plan", tmp_path / "plan.json", "--cluster", "dgx-h100", "--json",
                     "--trace-file", trace, "--plot", picture)  # fmt: skip
    assert result.code == 0
    assert {"step_seconds", "breakdown", "peak_bytes", "tasks", "seconds"} <= set(result.data)
    assert sum(result.data["breakdown"].values()) == pytest.approx(result.data["step_seconds"])
    assert json.loads(trace.read_text())["traceEvents"] and picture.read_bytes().startswith(b"\x89PNG")
    result = parplan("simulate", MLP, "--plan", "dp2 fsdp mb2", "--cluster", "dgx-h100", "-b", 8, "--json")
    assert result.data["label"] == "dp2 fsdp mb2" and result.data["plan"]["fsdp_units"]
    result = parplan("simulate", MLP, "--plan", "tp2", "--cluster", "dgx-h100", "-b", 8)
    assert result.code == 0 and "tp2 on dgx-h100" in result.out and "exposed communication" in result.out


def test_devices_and_clusters(parplan):
    for verb, name in (("devices", "h100-sxm"), ("clusters", "8x dgx-h100")):
        listed = parplan(verb, "--json").data[verb]
        assert len(listed) > 5 and all(entry["sources"] for entry in listed if entry["name"] != "local")
        assert parplan(verb).code == 0
        (entry,) = parplan(verb, name, "--json").data[verb]
        assert entry["name"] == name and entry["sources"][0] in parplan(verb, name).out


@pytest.mark.executed
def test_validate_runs_plans_and_writes_a_report(parplan, planner, tmp_path):
    result = parplan("validate", MLP, "-b", 8, "--ranks", "2", "--plans", 2, "--out", tmp_path, "--name", "n", "--json")
    assert result.code == 0, result.err
    keys = {"plan", "predicted_seconds", "measured_seconds", "error", "predicted_peak_bytes", "measured_peak_bytes"}
    assert len(result.data["runs"]) == 2 and all(keys <= set(run) for run in result.data["runs"])
    assert all(run["gradient_error"] < 1e-4 and run["steps"] >= 20 for run in result.data["runs"])
    assert {"median_error", "worst_error", "spearman", "top1_regret"} <= set(result.data["summary"])
    names = {"results.json", "results.csv", "predicted_vs_measured.png", "report.md", "predictions-mlp.json"}
    assert {p.name for p in (tmp_path / "n").iterdir()} == names
    kept = json.loads((tmp_path / "n" / "predictions-mlp.json").read_text())
    assert [k["step_seconds"] for k in kept] == [run["predicted_seconds"] for run in result.data["runs"]]
    study = result.data["studies"][0]
    assert study["predicted_at"] <= study["executed_at"]


# -- bad input -------------------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    (folder / "broken.toml").write_text("name = [")
    (folder / "broken.json").write_text("{")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    ParallelPlan(global_batch=64, dp=16).save(folder / "dp16.json")
    ParallelPlan(global_batch=8, dp=2).save(folder / "dp2.json")
    on = ("--cluster", "dgx-h100")
    simulate = ("simulate", MLP, *on, "--plan")
    return {
        "model": (("trace", "gpt22"), "did you mean"),
        "factory": (("trace", f"{MODELS}:nothing"), "no function 'nothing'"),
        "untraceable": (("trace", f"{MODELS}:untraceable"), "my own mistake"),
        "cluster": (("search", MLP, "--cluster", "nope", "-b", 8), "no known cluster: known are"),
        "near cluster": (("search", MLP, "--cluster", "8x dgx-h10", "-b", 8), "did you mean dgx-h100"),
        "toml": (("search", MLP, "--cluster", folder / "broken.toml", "-b", 8), "not valid TOML"),
        "no toml": (("search", MLP, "--cluster", folder / "none.toml", "-b", 8), "no such file"),
        "device": (("devices", "nope"), "no known device"),
        "too many": (("search", MLP, *on, "-b", 8, "--devices", 9), "9 devices are asked for, but dgx-h100 takes"),
        "memory": (("search", "mlp:layers=2,hidden=31", *on, "-b", 8), "use more devices"),
        "plan size": ((*simulate, folder / "dp16.json"), "16 devices are asked for, but dgx-h100 takes 1 to 8"),
        "degrees size": ((*simulate, "dp16", "-b", 16), "16 devices are asked for, but dgx-h100 takes 1 to 8"),
        "plan file": ((*simulate, folder / "none.json"), "cannot be read"),
        "plan json": ((*simulate, folder / "broken.json"), "is not JSON"),
        "degree": ((*simulate, "dp2,zp3", "-b", 8), "'zp3'"),
        "no batch": ((*simulate, "dp2"), "--global-batch"),
        "divisible": ((*simulate, "dp2,mb3", "-b", 8), "use a multiple of 6"),
        "divisible file": ((*simulate, folder / "dp2.json", "-b", 7), "use a multiple of 2"),
        "illegal": ((*simulate, "pp4 1f1b mb2", "-b", 8), "needs as many micro-batches as stages"),
        "no folder": ((*simulate, "dp2", "-b", 8, "--plot", folder / "no" / "x.png"), "no folder"),
        "batch": (("search", MLP, *on, "-b", 0), "--global-batch is 0"),
        "word": (("search", MLP, *on, "-b", "many"), "--global-batch"),
        "missing": (("search", MLP, *on), "Missing option '--global-batch'"),
        "verb": (("serach", MLP), "No such command 'serach'"),
        "ranks": (("validate", MLP, "-b", 8, "--ranks", "2,x"), "--ranks is '2,x'"),
        "precision": (("search", MLP, *on, "-b", 8, "--precision", "int8"), "give fp32, tf32, bf16, fp16 or fp8"),
        "elsewhere": (("validate", MLP, "-b", 8, *on), "validate on --cluster local"),
        "folder": (("search", MLP, *on, "-b", 8, "--out", folder / "mine"), "holds other files"),
        "report": (("validate", MLP, "-b", 8, "--out", folder, "--name", "mine"), "holds other files"),
        "budget": (("calibrate", "--budget", 0), "--budget is 0"),
        "suffix": (("calibrate", "--out", folder / "device.json"), "ends in .toml"),
        "no name": (("trace", ""), "names no model"),
        "class": (("trace", f"{ROOT / 'examples' / 'own_model.py'}:Mixer"), "own_model.py: TypeError"),
        "twice": ((*simulate, "dp2 dp4", "-b", 8), "gives dp twice"),
        "alone": ((*simulate, "fsdp", "-b", 8), "no data-parallel ranks"),
        "alone 2": ((*simulate, "tp2 zero2", "-b", 8), "no data-parallel ranks"),
        "keeps": ((*simulate, "dp2 keep-products", "-b", 8), "recomputes nothing"),
        "no pipeline": ((*simulate, "dp2 gpipe", "-b", 8), "has gpipe but no pipeline"),
        "two formats": ((*simulate, "dp2 tf32 bf16", "-b", 8), "says tf32 and bf16; a plan is one of them"),
        "two kinds": ((*simulate, "dp2 ddp fsdp", "-b", 8), "says ddp and fsdp; a plan is one of them"),
        "two orders": ((*simulate, "pp2 mb2 1f1b gpipe", "-b", 8), "says 1f1b and gpipe"),
        "two amounts": ((*simulate, "recompute recompute1", "-b", 8), "says recompute and recompute1"),
        "not single": ((*simulate, "single dp2", "-b", 8), "is single and splits the step"),
        "optimizer twice": ((*simulate, "dp2 fsdp offload offload-optimizer", "-b", 8), "write one of them"),
        "no graphs": ((*simulate, "dp2", "-b", 8, "-c", "local", "--cuda-graphs"), "is no GPU"),
        "no graphs 2": (("search", MLP, "-c", "local", "-b", 8, "--cuda-graphs"), "is no GPU"),
        "offload": (("search", MLP, *on, "-b", 8, "--offload", "maybe"), "give auto, never or always"),
        "plain": (("collectives", *on, "--plain"), "--plain changes nothing here"),
        "op": (("collectives", "--cases", folder / "none.csv", "--op", "send"), "--op changes nothing here"),
        "ranks and algorithm": (
            ("collectives", "--cases", folder / "none.csv", "--ranks", 4, "--algorithm", "ring"),
            "--ranks and --algorithm change nothing here",
        ),
        "backend": (("calibrate", "--backend", "gloo"), "an option of --cluster"),
        "length": (("calibrate", *on, "--budget", 5, "--out", folder / "d.toml"), "--budget changes nothing here"),
        "only lossless": (
            ("gradients", MLP, *on, "--ranks", 2, "--compressions", "none,fp16", "--lossy"),
            "--lossy changes nothing here",
        ),
        "picture": ((*simulate, "dp2", "-b", 8, "--plot", folder / "x.docx"), "ends in none of .png"),
        "a folder": ((*simulate, "dp2", "-b", 8, "--trace-file", folder), "is a folder"),
        "endless": (("calibrate", "--budget", "nan"), "--budget is nan"),
        "never": (("validate", MLP, "-b", 8, "--timeout", "nan"), "--timeout is nan"),
        "calibrate there": (("calibrate", "--out", folder / "none" / "d.toml"), "no folder"),
        "under a file": (("search", MLP, *on, "-b", 8, "--out", folder / "broken.toml" / "plans"), "is a file"),
        "collectives out": (("collectives", *on, "--out", folder / "x.docx"), "neither a .png nor a folder"),
        "predict out": (("predict", "--cases", folder / "none.csv", "--out", folder / "dp2.json"), "is a file"),
        "topology": (("clusters", folder / "none.txt"), "cannot be read (No such file or directory)"),
    }  # fmt: skip


def test_bad_input_gives_one_sentence_and_code_2(parplan, planner, tmp_path):
    for case, (words, expected) in bad_inputs(tmp_path).items():
        result = parplan(*words)
        said = lines(result.err)
        assert result.code == 2, f"{case}: {result.code} {result.err}"
        assert len(said) == 1 and said[0].startswith("parplan: ") and expected in said[0], f"{case}: {said}"
        assert "Traceback" not in result.err and result.out == "", case
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_slip_in_the_name_of_a_model_is_told_before_torch_is_loaded():
    on = ["-c", "dgx-h100", "-b", "2"]
    verbs = (["trace"], ["simulate", "-p", "dp2", *on], ["search", *on], ["validate", "-b", "2"])
    specs = ("gpt22", "no/config.json", "no.py:factory", str(ROOT), "gpt2:layrs=3")
    code = "import sys; from parplan.cli import main\n"
    code += f"print({{main([*verb, spec]) for verb in {verbs} for spec in {specs}}}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "{2} False", done.stderr


@pytest.mark.executed
@pytest.mark.parametrize(
    "how, words", [("dies", "rank 1 died (exit code 7)"), ("raises", "no luck"), ("hangs", "did not finish within")]
)
def test_a_rank_that_fails_is_reported(parplan, planner, tmp_path, how, words):
    limit = 12 if how == "hangs" else 120  # a rank that fails ends the run long before
    options = ("-b", 8, "--ranks", 2, "--plans", 1, "--timeout", limit, "--out", tmp_path, "--name", how, "--json")
    result = parplan("validate", f"{MODELS}:{how}", *options)
    assert result.code == 2 and "1 of 1 plans failed" in lines(result.err)[-1] and words in lines(result.err)[-1]
    assert result.data["runs"][0]["status"] == "failed" and result.data["summary"]["failed"] == 1
    assert words in (tmp_path / how / "report.md").read_text()


# -- with the real planner -------------------------------------------------------------------------------------


def test_a_typed_label_is_the_plan_that_the_search_shows(parplan):
    found = parplan("search", MLP, "--cluster", "dgx-h100", "-b", 8, "--devices", 4, "--top", 50, "--json").data
    assert found["plans"] and found["considered"] >= len(found["plans"])
    for wanted in ("pp2", "tp2", "zero1", "recompute"):
        entry = next(p for p in found["plans"] if wanted in p["label"])
        typed = parplan("simulate", MLP, "--plan", entry["label"], "--cluster", "dgx-h100", "-b", 8, "--json").data
        assert typed["plan"] == entry["plan"] and typed["step_seconds"] == pytest.approx(entry["step_seconds"])


def test_a_typed_plan_that_the_search_does_not_know(parplan):
    for label in ("dp2 zero2 mb2", "pp2 1f1b mb2 recompute1/0 keep-products", "dp2 fsdp recompute1 keep-attention",
                  "dp2 fsdp offload", "dp2 ddp recompute offload-optimizer offload-activations"):
        small = "gpt2:layers=2,hidden=32,heads=2,seq=16,vocab=64"
        found = parplan("simulate", small, "--plan", label, "--cluster", "dgx-h100", "-b", 8, "--json").data
        assert found["label"] == label
        assert found["step_seconds"] > 0


def test_a_pipeline_has_as_many_micro_batches_as_stages_where_none_are_typed(parplan):
    for typed, label in (("pp2", "pp2 1f1b mb2"), ("pp2 gpipe", "pp2 gpipe"), ("pp2 mb4", "pp2 1f1b mb4")):
        found = parplan("simulate", MLP, "--plan", typed, "--cluster", "dgx-h100", "-b", 8, "--json").data
        assert found["label"] == label
    refused = parplan("simulate", MLP, "--plan", "pp2", "--cluster", "dgx-h100", "-b", 7)
    assert refused.code == 2 and "plan 'pp2' (1 x 2); use a multiple of 2" in refused.err


def test_what_the_planner_refuses_is_one_sentence(parplan, tmp_path):
    ParallelPlan(global_batch=8, pp=2, cuts=("nowhere",), micro_batches=2).save(tmp_path / "cut.json")
    (tmp_path / "tiny.toml").write_text(
        'name = "tiny"\ndevice = "tiny-device.toml"\nnodes = 1\ndevices_per_node = 2\n'
        '[intra]\nname = "wire"\nbandwidth = 1e9\nlatency = 1e-6\n'
    )
    (tmp_path / "tiny-device.toml").write_text(
        'name = "tiny"\nkind = "gpu"\nmemory_bytes = 1000\nmemory_bandwidth = 1e9\n[peak_flops]\nfloat32 = 1e12\n'
    )
    tiny = ("--cluster", tmp_path / "tiny.toml")
    for words, expected in (
        (("simulate", MLP, "--plan", tmp_path / "cut.json", "--cluster", "dgx-h100"), "nowhere"),
        (("simulate", MLP, "--plan", "tp7", "--cluster", "dgx-h100", "-b", 7), "tp = 7"),
        (("simulate", MLP, "--plan", "pp8 gpipe mb8", "--cluster", "dgx-h100", "-b", 8), "pp = 8 needs 7 cuts"),
        (("search", MLP, *tiny, "-b", 8), "use more devices"),
        (("search", MLP, *tiny, "-b", 8, "--offload", "always"), "states no link to its host"),
        (("simulate", MLP, "--plan", "recompute5", "--cluster", "dgx-h100", "-b", 8), "recompute names 2 modules"),
        (("simulate", MLP, "--plan", "recompute0", "--cluster", "dgx-h100", "-b", 8), "recomputes none of the modules"),
        (("simulate", MLP, "--plan", "pp2 mb2 recompute2/0", "--cluster", "dgx-h100", "-b", 8), "stage 0, which has 1"),
        (("simulate", MLP, "--plan", "pp2 mb2 recompute2", "--cluster", "dgx-h100", "-b", 8), "no stage has so many"),
    ):
        result = parplan(*words)
        assert result.code == 2 and len(lines(result.err)) == 1 and expected in result.err, result.err


# -- interruption ----------------------------------------------------------------------------------------------


@pytest.mark.executed
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_leave_nothing(tmp_path, number, code):
    words = ["validate", f"{MODELS}:hangs", "-b", "8", "--ranks", "2", "--out", str(tmp_path / "reports")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.parplan.standin", *words], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    said = ""
    while "executing" not in said:
        said = process.stderr.readline()
        assert said, "it ended before it executed anything"
    time.sleep(1.0)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 2
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err and out == ""
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert list((tmp_path / "reports").iterdir()) == []
