"""Workloads by name: the zoo, Hugging Face configurations, Python files; and what bad input is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from opgraph.batch import trace_workload
from opgraph.flops import NoFormulaError
from opgraph.models import load_workload, zoo_names
from opgraph.workload import Workload
from opgraph.zoo.factory import find_blocks

DATA = Path(__file__).parent / "data"
USER = f"{DATA}/user_models.py"


def shapes(workload: Workload) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in workload.build().named_parameters()}


def count(workload: Workload) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in workload.build().parameters())


def step(workload: Workload) -> float:
    """Runs one training step and returns its loss."""
    torch.manual_seed(0)
    model = workload.build()
    inputs, targets = workload.batch(2)
    loss = workload.loss(model(*inputs), *targets)
    loss.backward()
    workload.optimizer(model.parameters()).step()
    return loss.item()


def test_listing_the_zoo_needs_no_torch() -> None:
    code = "import sys, opgraph.models as m; print(len(m.zoo_names()), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[2])
    assert out.stdout.split() == [str(len(zoo_names())), "False"]


def test_a_zoo_name_with_overrides() -> None:
    workload = load_workload("gpt2:layers=4,hidden=256,heads=4,seq=128,batch=8,vocab=8192")
    assert workload.name == "gpt2:layers=4,hidden=256,heads=4,seq=128,batch=8,vocab=8192"
    assert workload.batch_size == 8 and workload.blocks == tuple(f"blocks.{i}" for i in range(4))
    inputs, targets = workload.batch(3)
    assert [t.shape for t in (*inputs, *targets)] == [(3, 128)] * 2
    assert shapes(workload)["embed.weight"] == (8192, 256)
    assert load_workload("gpt2").batch_size == load_workload("llama3-405b").batch_size == 2


def test_batches_follow_the_seed_and_stay_on_the_cpu() -> None:
    workload = load_workload("bert-base")
    drawn = []
    for device in ("cpu", "meta"):
        torch.manual_seed(5)
        with torch.device(device):
            drawn.append(workload.batch(2)[0][0])
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 500


@pytest.mark.parametrize("suffix", ["", "/config.json"])
def test_published_configurations_make_the_zoo_models(suffix: str) -> None:
    for directory, name in (("gpt2", "gpt2"), ("llama-3-8b", "llama3-8b")):
        read, own = load_workload(f"{DATA}/{directory}{suffix}"), load_workload(name)
        assert shapes(read) == shapes(own) and read.blocks == own.blocks
        assert read.batch(1)[0][0].shape == own.batch(1)[0][0].shape
    assert count(load_workload(f"{DATA}/llama-3-8b")) == 8_030_261_248


def test_small_configurations() -> None:
    gpt = load_workload(f"{DATA}/tiny-gpt2:batch=3")
    assert gpt.batch_size == 3 and shapes(gpt)["blocks.1.mlp.up.weight"] == (80, 32)
    assert shapes(gpt)["head.weight"] == (64, 32)  # untied
    llama = load_workload(f"{DATA}/tiny-llama:seq=12")
    assert shapes(llama)["blocks.2.attn.k.weight"] == (32, 48)
    assert "head.weight" not in shapes(llama) and llama.build().theta == 5000.0
    assert 0 < step(gpt) < 10 and 0 < step(llama) < 10
    assert shapes(load_workload(f"{DATA}/tiny-llama:layers=1,hidden=32"))["blocks.0.mlp.up.weight"] == (53, 32)
    assert load_workload(f"{DATA}/tiny-llama").batch(1)[0][0].shape == (1, 8192)


DECODER = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
           "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768}  # fmt: skip
ENCODER = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}


@pytest.mark.parametrize(
    ("config", "parameters", "seq", "like"),
    [
        (DECODER | {"model_type": "mistral", "sliding_window": 4096}, 7_241_732_096, 4096, ""),
        (DECODER | {"model_type": "mistral", "sliding_window": None}, 7_241_732_096, 8192, ""),
        (DECODER | {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
         46_702_792_704, 8192, "mixtral-8x7b"),
        # Qwen2-7B; its file has a window and says that it is not used.
        ({"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
          "num_hidden_layers": 28, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 131072,
          "sliding_window": 4096, "use_sliding_window": False}, 7_615_616_512, 8192, ""),
        (ENCODER | {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512}, 109_514_298, 512,
         "bert-base"),
        (ENCODER | {"model_type": "vit", "image_size": 224, "patch_size": 16}, 86_567_656, 224, "vit-b16"),
        (ENCODER | {"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}}, 86_567_656 - 998 * 769, 224, ""),
    ],
)  # fmt: skip
def test_configurations_have_the_published_parameters(
    tmp_path: Path, config: dict[str, object], parameters: int, seq: int, like: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = load_workload(str(tmp_path))
    assert count(read) == parameters and read.batch(1)[0][0].shape[-1] == seq
    assert not like or shapes(read) == shapes(load_workload(like))


def test_the_biases_of_qwen2_are_those_of_q_k_and_v(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DECODER | {"model_type": "qwen2"}))
    biased = {name.split(".", 2)[-1] for name in shapes(load_workload(f"{path}:layers=1")) if name.endswith("bias")}
    assert biased == {"attn.q.bias", "attn.k.bias", "attn.v.bias"}
    assert 0 < step(load_workload(f"{path}:layers=1,hidden=32,heads=2,ffn=48,vocab=64,seq=8")) < 10


def test_a_sequence_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DECODER | {"model_type": "mistral", "sliding_window": 4096}))
    with pytest.raises(ValueError, match=r"seq=8192 is longer than its sliding window.*window=8192"):
        load_workload(f"{path}:seq=8192")
    assert load_workload(f"{path}:seq=8192,window=8192").batch(1)[0][0].shape == (1, 8192)


def test_a_file_with_a_pair() -> None:
    workload = load_workload(f"{USER}:pair")
    assert workload.batch_size == 4 and workload.blocks == tuple(f"body.layers.{i}" for i in range(3))
    torch.manual_seed(1)
    (ids, scale), targets = workload.batch(64)
    assert ids.shape == scale.shape == (64, 6) and targets == ()
    assert ids.min() >= 10 and ids.max() < 20 and ids.unique().numel() > 5
    assert scale.std() > 0.5
    assert step(workload) > 0
    assert load_workload(f"{USER}:pair:batch=32").batch_size == 32
    assert all(p.is_meta for p in _meta(workload).parameters())


@pytest.mark.parametrize("name", ["few_of_many", "pair", "probabilities"])
def test_every_process_draws_the_same_batch(name: str) -> None:
    """The range of a factory's own integers is found anew in every rank, whose generators differ."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        workload = load_workload(f"{USER}:{name}")
        torch.manual_seed(0)
        drawn.append(workload.batch(16))
    torch.testing.assert_close(*drawn, rtol=0, atol=0)


def test_examples_between_zero_and_one_stay_there() -> None:
    workload = load_workload(f"{USER}:probabilities")
    (picture,), (same, signs, labels) = workload.batch(32)
    for drawn in (picture, same):
        assert 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() <= 1
    assert set(signs.unique().tolist()) == set(labels.unique().tolist()) == {0.0, 1.0}
    assert step(workload) > 0


def _meta(workload: Workload) -> nn.Module:
    with torch.device("meta"):
        return workload.build()


def test_loading_a_file_leaves_the_seed_alone() -> None:
    torch.manual_seed(2)
    expected = torch.randn(3)
    torch.manual_seed(2)
    workload = load_workload(f"{USER}:pair")
    assert torch.equal(torch.randn(3), expected)
    torch.manual_seed(2)
    first = workload.batch(2)  # calls the factory once more, for the range of its integers
    torch.manual_seed(2)
    assert torch.equal(first[0][0], workload.batch(2)[0][0])


def test_a_file_with_a_loss_of_its_own_and_a_full_dict() -> None:
    triple = load_workload(f"{USER}:triple")
    assert triple.blocks == () and triple.batch_size == 5 and step(triple) > 0
    full = load_workload(f"{USER}:full")
    assert full.batch_size == 16 and isinstance(full.optimizer(full.build().parameters()), torch.optim.SGD)
    (ids, scale), (targets,) = full.batch(3)
    assert (ids.shape, scale.dtype, targets.shape) == ((3, 6), torch.float32, (3, 6)) and targets.max() <= 3
    assert 0.5 < step(full) < 3


def test_a_file_with_a_workload() -> None:
    workload = load_workload(f"{USER}:workload:batch=6")
    assert workload.name == "own" and workload.batch_size == 6
    assert not workload.batch(2)[0][0].is_meta and load_workload(f"{USER}:workload").batch_size == 4


def test_factories_that_run_only_on_real_or_only_on_meta_devices() -> None:
    real = load_workload(f"{USER}:not_on_meta")
    assert real.batch(2)[0][0].shape == (2, 5)
    huge = load_workload(f"{USER}:huge")
    assert count(huge) == 10**12 + 10**6
    (ids, mask), _ = huge.batch(30)
    assert ids.shape == (30, 8) and 5 <= ids.min() < ids.max() <= 9
    assert mask.shape == (30, 8) and mask.dtype == torch.bool and mask.any() and not mask.all()


def test_blocks_are_the_lists_of_one_class() -> None:
    linear = [nn.Linear(2, 2) for _ in range(6)]
    assert find_blocks(nn.Sequential(*linear)) == tuple("012345")
    assert find_blocks(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))) == ()
    both = nn.ModuleDict({"a": nn.ModuleList(linear[:2]), "b": nn.Sequential(*linear[2:])})
    assert find_blocks(both) == ("a.0", "a.1", "b.0", "b.1", "b.2", "b.3")
    both["a"] = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))  # beside them the others are a detail
    assert find_blocks(both) == ("a.0", "a.1")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpt-2", "no model 'gpt-2' in the zoo: did you mean gpt2"),
        ("llama3-8", "did you mean llama3-8b"),
        ("qqqq", "known are mlp, lenet5"),
        ("gpt2:depth=3", "gpt2 has no dimension 'depth': give some of layers, hidden, heads"),
        ("gpt2:layers=three", "layers=three is not a whole number"),
        ("gpt2:layers=1.5", "layers=1.5 is not a whole number"),
        ("gpt2:layers=0", "layers=0 is not positive"),
        ("gpt2:layers", "'layers' in gpt2:layers is no override: write name=value"),
        ("gpt2:layers=2,layers=3", "gives layers twice"),
        ("gpt2:tied=maybe", "tied=maybe is neither true nor false"),
        ("gpt2:hidden=256", "heads=12 does not divide hidden=256: give a number of heads that does"),
        ("gpt2:seq=2048", "longer than its 1024 positions: give positions=2048"),
        ("bert-base:seq=513", "give positions=513"),
        ("gpt2:dropout=1.5", "dropout=1.5 is not a probability"),
        ("gpt2:eps=nan", "eps=nan is not positive"),
        ("llama3-8b:heads=12,hidden=128", "heads=12 does not divide hidden=128: give a number of heads that does, or"),
        ("llama3-8b:heads=12,head_dim=8,kv_heads=8", "kv_heads=8 does not divide heads=12"),
        ("llama3-8b:hidden=96", "head_dim=3 is odd"),
        ("mixtral-8x7b:top_k=9", "top_k=9 exceeds experts=8"),
        ("vit-b16:image=100", "image=100 is no multiple of patch=16"),
        ("vgg16:depth=12", "no VGG of depth 12"),
        ("resnet50:depth=18", "no bottleneck ResNet of depth 18"),
        ("resnet50:norm=layer", "norm=layer is neither of batch and group"),
        ("alexnet:image=32", "give image=63 or more"),
        ("nowhere/config.json", "there is no file nowhere/config.json"),
        ("nowhere/model", "there is no file nowhere/model"),
        (str(DATA), "is a directory without a config.json"),
        ("nowhere.py:factory", "there is no file nowhere.py"),
        (USER, "a file without the name of a function in it"),
        (f"{USER}:nothing", "has no function 'nothing': it has Layer, Net, pair, triple"),
        (f"{USER}:broken", "AttributeError: 'Linear' object has no attribute"),
        (f"{USER}:bare_module", "returned a Linear: return a Workload, (module, inputs)"),
        (f"{USER}:bad_key", "returned a dict with criterion: its keys can be module, inputs"),
        (f"{USER}:no_inputs", "returned no example inputs"),
        (f"{USER}:scalar_input", "returned inputs that are not tensors with a batch dim"),
        (f"{USER}:uneven", "returned examples with [3, 4] rows"),
        (f"{USER}:pair:seq=3", "has no dimension 'seq': a model from a file has only batch"),
        (f"{USER}:pair:batch=x", "batch=x is not a whole number above 0"),
    ],
)
def test_bad_specs_are_told_what_is_wrong(spec: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_workload(spec)
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 600


def test_the_line_of_a_failing_factory_is_told() -> None:
    line = next(i for i, text in enumerate(Path(USER).read_text().splitlines(), 1) if "no_such_method" in text)
    with pytest.raises(ValueError, match=f"user_models.py, line {line}: AttributeError"):
        load_workload(f"{USER}:broken")


def test_integers_without_values_are_told_so() -> None:
    with pytest.raises(ValueError, match="integer examples without values"):
        load_workload(f"{USER}:integers_on_meta").batch(2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "not readable as JSON"),
        ("[]", "has no model_type"),
        ({"model_type": "mamba"}, "'mamba': configurations of gpt2, llama, mistral, qwen2, mixtral, bert, vit"),
        ({"model_type": ["gpt2"]}, "configurations of gpt2"),
        ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "only absolute"),
        ({"model_type": "vit", "num_channels": 1}, "num_channels other than 3"),
        (DECODER | {"model_type": "mistral", "sliding_window": 0}, "sliding_window=0: give a whole number"),
        (DECODER | {"model_type": "mixtral", "num_experts_per_tok": 9}, "top_k=9 exceeds experts=8"),
        ({"model_type": "gpt2", "n_embd": 8}, "has no n_positions"),
        ({"model_type": "gpt2", "n_embd": "8"}, "n_embd='8': give a whole number"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function 'relu'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=true"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama", "hidden_size": 10, "num_attention_heads": 4}, "no multiple of num_attention_heads"),
    ],
)
def test_bad_configurations_are_told_what_is_wrong(tmp_path: Path, config: object, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError) as caught:
        load_workload(str(path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_does_not_parse_or_import_is_told_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def factory():\n    return (\n")
    with pytest.raises(ValueError, match="line 2: SyntaxError"):
        load_workload(f"{path}:factory")
    path.write_text("import torch\nimport no_such_package\n")
    with pytest.raises(ValueError, match="line 2: ModuleNotFoundError"):
        load_workload(f"{path}:factory")


CUSTOM = """
import logging
import torch
from torch import nn

@torch.library.custom_op("parplan_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, grad: grad * 2)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 4)
    def forward(self, x):
        return twice(self.a(x))

def without(): return Net(), torch.randn(4, 8)
def given(): return {"module": Net(), "inputs": torch.randn(4, 8),
                     "flops": {"parplan_test.twice.default": lambda ins, outs, args: 10 * ins[0][0] * ins[0][1]}}
class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LazyLinear(4), nn.LazyLinear(3)
    def forward(self, x):
        return self.b(self.a(x))

def lazy(): return Lazy(), torch.randn(4, 8)
def misfit(): return nn.Sequential(nn.Linear(5, 5), nn.LazyLinear(4)), torch.randn(4, 8)

def loud():
    print("a page")
    logging.getLogger("library").warning("another page")
    return nn.Linear(8, 4), torch.randn(4, 8)

def wrong(): return {"module": Net(), "inputs": torch.randn(4, 8), "flops": {"parplan_test.twice.default": 3}}
"""


def test_a_file_may_count_its_own_ops(tmp_path: Path) -> None:
    path = tmp_path / "custom.py"
    path.write_text(CUSTOM)
    with pytest.raises(NoFormulaError, match=r"or return that from file\.py:factory under the key flops"):
        trace_workload(load_workload(f"{path}:without"))
    graph = trace_workload(load_workload(f"{path}:given"))
    assert graph.flops("forward") == 2 * 4 * 8 * 4 + 10 * 4 * 4
    assert graph.at_batch(8).flops("forward") == 2 * graph.flops("forward")
    with pytest.raises(ValueError, match="returned flops that are no dict of op names and functions"):
        load_workload(f"{path}:wrong")


def test_lazy_modules_take_their_shapes_from_the_examples(tmp_path: Path) -> None:
    path = tmp_path / "lazy.py"
    path.write_text(CUSTOM)
    workload = load_workload(f"{path}:lazy")
    assert shapes(workload) == {"a.weight": (4, 8), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,)}
    assert trace_workload(workload).flops("forward") == 2 * 4 * (8 * 4 + 4 * 3) and step(workload) > 0
    with pytest.raises(RuntimeError, match=r"lazy\.py:misfit returned a module with lazy parameters \(1.weight\)"):
        load_workload(f"{path}:misfit")


def test_a_factory_speaks_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "loud.py"
    path.write_text(CUSTOM)
    workload = load_workload(f"{path}:loud")
    assert capsys.readouterr().out == "a page\n" and len(caplog.records) == 1
    workload.build()
    assert capsys.readouterr().out == "" and len(caplog.records) == 1
