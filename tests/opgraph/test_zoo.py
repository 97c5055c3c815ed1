"""The zoo: sizes against published figures, FLOPs, one training step of a small variant of every family."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from opgraph.models import load_workload, zoo_names
from opgraph.workload import Workload
from opgraph.zoo.layers import Attention, SwiGlu, rotate, rotation_tables
from opgraph.zoo.mixtral import Experts, places
from opgraph.zoo.names import ZOO
from opgraph.zoo.sizes import Gpt, Mixtral
from tests.opgraph.published import FORWARD_GMAC, PARAMETERS, ROUNDED_PARAMETERS

TINY = "layers=2,hidden=32,heads=4,seq=16,vocab=64"
SMALL = (
    "mlp:layers=2,hidden=32",
    "lenet5:batch=2",
    "alexnet:width=8,hidden=64,image=64,classes=10,dropout=0",
    "vgg16:width=4,hidden=32,image=32,classes=10,dropout=0",
    "resnet50:width=8,image=32,classes=10",
    "resnet50:width=8,image=32,classes=10,norm=group",
    "googlenet:image=32,classes=10",
    "lstm-medium:hidden=32,vocab=64,seq=8",
    "lstm-medium:hidden=32,vocab=64,seq=8,tied=1",
    f"gpt2:{TINY}",
    f"gpt2:{TINY},tied=0,dropout=0.1",
    f"gpt3-125m:{TINY}",
    f"llama2-7b:{TINY}",
    "llama3-8b:layers=2,hidden=64,heads=8,seq=16,vocab=64",
    f"mixtral-8x7b:{TINY}",
    f"bert-base:{TINY}",
    "vit-b16:layers=2,hidden=32,heads=4,image=32,classes=10",
)


def on_meta(workload: Workload) -> nn.Module:
    with torch.device("meta"):
        return workload.build()


def parameters(spec: str) -> int:
    return sum(p.numel() for p in on_meta(load_workload(spec)).parameters())


def forward_macs(workload: Workload) -> dict[str, int]:
    """Multiply-accumulates of one forward pass of one row, from the shapes that modules see."""
    macs = {"linear": 0, "conv": 0, "attention": 0, "lstm": 0}

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        match module:
            case nn.Linear():
                macs["linear"] += out.numel() * module.in_features
            case nn.Conv2d():
                macs["conv"] += out.numel() * module.weight[0].numel()
            case nn.LSTM():
                macs["lstm"] += args[0].shape[1] * (module.weight_ih_l0.numel() + module.weight_hh_l0.numel())
            case Attention():
                # scores and their product with v, all pairs (also those that a causal mask hides)
                macs["attention"] += 2 * args[0].shape[1] ** 2 * module.o.in_features

    model = on_meta(workload)
    for module in model.modules():
        module.register_forward_hook(count)
    inputs, _ = workload.batch(1)
    model(*(i.to("meta") for i in inputs))
    return macs


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert parameters(name) == PARAMETERS[name][0]


@pytest.mark.parametrize("name", ROUNDED_PARAMETERS)
def test_parameters_agree_with_rounded_figures(name: str) -> None:
    assert parameters(name) / 1e6 == pytest.approx(ROUNDED_PARAMETERS[name][0], rel=0.02)


def test_every_model_has_a_published_figure_or_a_formula() -> None:
    assert set(zoo_names()) == {*PARAMETERS, *ROUNDED_PARAMETERS, "mlp"}
    pair = 1024 * 4096 * 2 + 1024 + 4096
    assert parameters("mlp") == 784 * 1024 + 1024 + 4 * pair + 1024 * 10 + 10


def test_bert_without_its_head_and_with_a_pooler_is_the_published_encoder() -> None:
    model = on_meta(load_workload("bert-base"))
    own = sum(p.numel() for p in (*model.transform.parameters(), model.head.bias))
    assert sum(p.numel() for p in model.parameters()) - own + 768 * 769 == 109_482_240


def test_gpt_parameters_follow_the_closed_form_of_megatron() -> None:
    """Narayanan et al. 2021, equation 2, plus the final norm that it leaves out."""
    for name, s in ZOO.items():
        if isinstance(s, Gpt):
            closed = 12 * s.layers * s.hidden**2 + 13 * s.layers * s.hidden + (s.vocab + s.positions) * s.hidden
            assert parameters(name) == closed + 2 * s.hidden, name


@pytest.mark.parametrize("name", FORWARD_GMAC)
def test_forward_macs_are_the_published_ones(name: str) -> None:
    published, decimals = FORWARD_GMAC[name]
    assert round(sum(forward_macs(load_workload(name)).values()) / 1e9, decimals) == published


@pytest.mark.parametrize("name", ["gpt2", "llama2-7b", "llama3-8b", "llama3-70b", "bert-base"])
def test_transformer_macs_follow_the_closed_form(name: str) -> None:
    """Every weight of a matrix product is used once per token (so 2 FLOP per parameter and token)."""
    workload = load_workload(f"{name}:seq=256")
    sizes = ZOO[name]
    weights = {id(m.weight): m.weight.numel() for m in on_meta(workload).modules() if isinstance(m, nn.Linear)}
    macs = forward_macs(workload)
    assert macs["linear"] == 256 * sum(weights.values())
    assert macs["attention"] == 2 * 256**2 * sizes.hidden * sizes.layers  # type: ignore[union-attr]


def test_mixtral_does_the_work_of_its_active_experts() -> None:
    workload = load_workload("mixtral-8x7b:layers=1,seq=256")
    h, f, v, n = 4096, 14336, 32000, 256
    attention = 2 * h * h + 2 * h * 1024
    assert forward_macs(workload)["linear"] == n * (attention + 8 * h + 2 * 3 * h * f + v * h)


def test_lstm_macs() -> None:
    macs = forward_macs(load_workload("lstm-medium"))
    assert macs["lstm"] == 35 * 2 * 8 * 650**2
    assert macs["linear"] == 35 * 650 * 10000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", SMALL)
def test_a_small_variant_trains(spec: str, precision: str) -> None:
    workload = load_workload(spec)
    torch.manual_seed(0)
    model = workload.build()
    inputs, targets = workload.batch(3)
    optimizer = workload.optimizer(model.parameters())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = workload.loss(model(*inputs), *targets)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert all(0 < x < 10 for x in losses)
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("spec", SMALL)
def test_a_small_variant_runs_under_fake_tensors_at_any_batch(spec: str) -> None:
    workload = load_workload(spec)
    batches = {n: workload.batch(n) for n in (1, 2, 3)}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = workload.build()
        for n, (inputs, targets) in batches.items():
            fake = [[mode.from_tensor(t) for t in part] for part in (inputs, targets)]
            if n == 1 and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                continue  # there is nothing to normalise over in one pixel of one image
            output = model(*fake[0])
            assert output.shape[0] == n
            workload.loss(output, *fake[1]).backward()


@pytest.mark.parametrize("spec", SMALL)
def test_the_same_seed_makes_the_same_model_and_blocks_are_modules(spec: str) -> None:
    workload = load_workload(spec)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(workload.build())
    for (name, a), (_, b) in zip(models[0].state_dict().items(), models[1].state_dict().items()):
        assert torch.equal(a, b), name
    paths = [name for name, _ in models[0].named_modules() if name in workload.blocks]
    assert tuple(paths) == workload.blocks and len(paths) >= 2


@pytest.mark.parametrize("name", zoo_names())
def test_blocks_of_the_full_models_exist_and_are_all_there_are(name: str) -> None:
    workload = load_workload(name)
    model = on_meta(workload)
    assert tuple(f"blocks.{path}" for path, _ in model.blocks.named_children()) == workload.blocks
    inputs, targets = workload.batch(2)
    assert all(t.shape[0] == 2 and t.device.type == "cpu" for t in (*inputs, *targets))


@pytest.mark.parametrize("spec", [f"gpt2:{TINY}", f"bert-base:{TINY}", f"llama3-1b:{TINY}"])
def test_a_tied_head_is_one_tensor(spec: str) -> None:
    model = load_workload(spec).build()
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    assert model.head.weight is embedding.weight
    untied = load_workload(f"{spec},tied=0").build()
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
    assert extra == 64 * 32


@pytest.mark.parametrize(
    "spec", [f"gpt2:{TINY}", "llama3-8b:layers=2,hidden=64,heads=8,seq=16,vocab=64", f"mixtral-8x7b:{TINY}",
             "resnet50:width=8,image=32,classes=10,norm=group"]
)  # fmt: skip
def test_the_mean_of_the_parts_is_the_whole(spec: str) -> None:
    """Data parallelism and micro-batches compute the same step (in float64: the deep nets amplify rounding)."""
    workload = load_workload(spec)
    torch.manual_seed(0)
    model = workload.build().double()
    inputs, targets = workload.batch(4)
    inputs = tuple(i.double() if i.is_floating_point() else i for i in inputs)
    whole = torch.autograd.grad(workload.loss(model(*inputs), *targets), list(model.parameters()))
    parts = [
        torch.autograd.grad(
            workload.loss(model(*(i[r : r + 2] for i in inputs)), *(t[r : r + 2] for t in targets)),
            list(model.parameters()),
        )
        for r in (0, 2)
    ]
    for a, b, c in zip(whole, *parts):
        torch.testing.assert_close(a, (b + c) / 2, rtol=1e-4, atol=1e-6)


def test_half_of_the_projections_attends_with_half_of_the_heads() -> None:
    """What tensor parallelism relies on: column shards of q, k, v and row shards of o add up to the layer."""
    torch.manual_seed(0)
    whole = Attention(64, 8, causal=True, bias=False, kv_heads=4)
    x = torch.randn(2, 10, 64)
    rotation = rotation_tables(10, 8, 1e4, x)
    total = torch.zeros_like(x)
    for half in (0, 1):
        part = Attention(64, 8, causal=True, bias=False, kv_heads=4)
        for name in "qkvo":
            weight = getattr(whole, name).weight.chunk(2, dim=1 if name == "o" else 0)[half]
            getattr(part, name).weight = nn.Parameter(weight.detach().clone())
        total = total + part(x, rotation)
    torch.testing.assert_close(total, whole(x, rotation))


def test_grouped_attention_is_attention_with_repeated_keys_and_values() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, requires_grad=True) for heads in (8, 2, 2))
    grouped = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wide = [t.repeat_interleave(4, dim=1) for t in (k, v)]
    repeated = F.scaled_dot_product_attention(q, *wide, is_causal=True)
    torch.testing.assert_close(grouped, repeated)
    weight = torch.randn_like(grouped)
    for a, b in zip(
        torch.autograd.grad((grouped * weight).sum(), (q, k, v)),
        torch.autograd.grad((repeated * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(a, b)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    tables = rotation_tables(20, 16, 1e4, q)
    turned = [rotate(t.expand(1, 1, 20, 16), tables)[0, 0] for t in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(20))
    scores = turned[0] @ turned[1].T
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def tiny_experts(capacity: float, hidden: int = 16) -> Experts:
    torch.manual_seed(0)
    sizes = Mixtral(layers=1, hidden=hidden, heads=2, kv_heads=2, ffn=32, vocab=8, seq=8, experts=4, capacity=capacity)
    return Experts(sizes)


def test_experts_with_room_for_all_are_the_dense_mixture() -> None:
    layer = tiny_experts(capacity=2)
    x = torch.randn(3, 8, 16, requires_grad=True)
    score, choice = layer.router(x).topk(2, dim=-1)
    weight = score.softmax(-1)
    dense = torch.zeros_like(x)
    for i, expert in enumerate(layer.experts):
        assert isinstance(expert, SwiGlu)
        dense = dense + expert(x) * (weight * (choice == i)).sum(-1, keepdim=True)
    out = layer(x)
    torch.testing.assert_close(out, dense)
    seed = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad((out * seed).sum(), wanted), torch.autograd.grad((dense * seed).sum(), wanted)):
        torch.testing.assert_close(a, b)


def test_full_experts_drop_later_tokens() -> None:
    choice = torch.tensor([[0, 1, 0, 2, 0, 1], [2, 2, 2, 2, 0, 1]])
    assert places(choice, experts=3).tolist() == [[0, 0, 1, 0, 2, 1], [0, 1, 2, 3, 0, 0]]
    layer = tiny_experts(capacity=1)
    nn.init.zeros_(layer.router.weight)  # all tokens to the same two experts, which take half of them
    x = torch.randn(2, 8, 16)
    out = layer(x)
    assert (out[:, :4].abs().amax(-1) > 0).all() and (out[:, 4:] == 0).all()


def test_overrides_change_what_follows_from_them() -> None:
    def sizes(spec: str) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in on_meta(load_workload(spec)).named_parameters()}

    assert sizes("gpt2:hidden=256,heads=4")["blocks.0.mlp.up.weight"] == (1024, 256)
    assert sizes("gpt2:seq=128")["positions.weight"] == (1024, 768)
    llama = sizes("llama3-8b:hidden=512,heads=8")
    assert llama["blocks.0.attn.k.weight"] == (128, 512)
    assert llama["blocks.0.mlp.gate.weight"] == (1792, 512)
    assert sizes("llama3-8b:hidden=512,heads=8,kv_heads=4,ffn=100")["blocks.0.mlp.gate.weight"] == (100, 512)


def test_published_dropout_can_be_switched_off() -> None:
    for name in ("alexnet", "vgg16"):
        drops = [m for m in on_meta(load_workload(name)).modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in drops] == [0.5, 0.5]
        off = on_meta(load_workload(f"{name}:dropout=0"))
        assert not any(isinstance(m, nn.Dropout) for m in off.modules())
