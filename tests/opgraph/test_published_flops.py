"""Traced parameters and FLOP of every zoo model against published figures and closed forms."""

from __future__ import annotations

import pytest

from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.models import load_workload, zoo_names
from opgraph.zoo.names import ZOO
from opgraph.zoo.sizes import Bert, Gpt, Llama, Mixtral, Vit
from tests.opgraph.published import FORWARD_GMAC, PARAMETERS, ROUNDED_PARAMETERS

SEEN: dict[str, OpGraph] = {}


def graph_of(name: str) -> OpGraph:
    if name not in SEEN:
        SEEN[name] = trace_workload(load_workload(name))
    return SEEN[name]


@pytest.mark.parametrize("name", [n for n in zoo_names() if n in PARAMETERS or n in ROUNDED_PARAMETERS])
def test_parameters(name: str) -> None:
    count = graph_of(name).param_count
    if name in PARAMETERS:
        assert count == PARAMETERS[name][0]
    else:
        assert abs(count / 1e6 / ROUNDED_PARAMETERS[name][0] - 1) < 0.06


@pytest.mark.parametrize("name", FORWARD_GMAC)
def test_forward_macs_of_one_image(name: str) -> None:
    """To the printed digits, attention included."""
    macs, digits = FORWARD_GMAC[name]
    assert round(graph_of(name).at_batch(1).flops("forward") / 2e9, digits) == pytest.approx(macs, abs=1e-6)


def linear_weights(graph: OpGraph) -> int:
    """Weights of linear layers that every token meets."""
    return sum(
        t.numel for name, t in graph.parameters.items()
        if len(t.shape) == 2 and name.endswith(".weight") and "embed" not in name and "position" not in name
    )  # fmt: skip


DENSE = [n for n, s in ZOO.items() if isinstance(s, Gpt | Llama | Bert) and not isinstance(s, Mixtral)]


@pytest.mark.parametrize("name", DENSE)
def test_forward_flops_of_transformers(name: str) -> None:
    """2 x weights x tokens, and 4 x hidden x keys for each token of attention, causal or not."""
    sizes = ZOO[name]
    assert isinstance(sizes, Gpt | Llama | Bert)
    graph = graph_of(name)
    tokens = graph.batch * sizes.seq
    weights = linear_weights(graph)
    tied = not any(n.startswith(("head.", "lm_head.")) and n.endswith("weight") for n in graph.parameters)
    if isinstance(sizes, Gpt) or (isinstance(sizes, Llama) and sizes.tied) or (isinstance(sizes, Bert) and tied):
        weights += sizes.vocab * sizes.hidden
    heads = sizes.heads * (getattr(sizes, "head_dim", 0) or sizes.hidden // sizes.heads)
    attention = sizes.layers * tokens * 4 * heads * sizes.seq
    small = 0.002 if isinstance(sizes, Bert) else 1e-4  # rotary tables
    assert graph.flops("forward") == pytest.approx(2 * weights * tokens + attention, rel=small)
    assert graph.flops("backward") > 1.99 * graph.flops("forward") and graph.flops("recompute") == 0


def test_llama3_405b_closed_form() -> None:
    """Dubey et al. 2024, table 3: 126 layers, 16384 wide, 53248 in the MLP, 128 heads and 8 of keys and values."""
    h, ffn, vocab, layers, seq = 16384, 53248, 128256, 126, 8192
    graph = graph_of("llama3-405b").at_batch(1)
    block = 2 * h * h + 2 * h * (8 * 128) + 3 * h * ffn
    forward = 2 * seq * (layers * block + vocab * h) + layers * seq * 4 * h * seq
    assert graph.flops("forward") == pytest.approx(forward, rel=1e-3)
    backward = 2 * 2 * seq * (layers * block + vocab * h) + layers * seq * 10 * h * seq  # flash recomputes the scores
    assert graph.flops("backward") == pytest.approx(backward, rel=1e-3)
    assert graph.param_count == layers * (block + 2 * h) + 2 * vocab * h + h == 405_853_388_800
    assert graph.repeats and len(graph.repeats[0]) == 126


@pytest.mark.parametrize("name", [n for n, s in ZOO.items() if isinstance(s, Mixtral | Vit)])
def test_every_block_does_the_same_work(name: str) -> None:
    graph = graph_of(name)
    per_block: dict[str, int] = {}
    for op in graph.ops:
        if op.phase == "forward" and op.module.startswith("blocks."):
            key = ".".join(op.module.split(".")[:2])
            per_block[key] = per_block.get(key, 0) + op.flops
    assert len(set(per_block.values())) == 1 and len(per_block) == ZOO[name].layers  # type: ignore[attr-defined]
