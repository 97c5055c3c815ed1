"""How many experts tokens choose, exactly and by drawing them; what decode reads of them; training reads all."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from costmodels.cluster import load_cluster
from opgraph.models import with_length
from opgraph.workload import Workload, adamw, mean_square
from planner.inference import infer, stages_of
from planner.inference_experts import chosen_experts, expected_experts
from planner.inference_graph import decode_items, trace_forward
from planner.plan import ParallelPlan
from planner.runtime import forward_script
from planner.script import Message, Work
from planner.tensor_parallel import tp_shardings

H100 = load_cluster("dgx-h100")
MIXTRAL = "mixtral-8x7b:layers=2,hidden=256,heads=4,kv_heads=2,ffn=512,vocab=512"


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 1), (8, 2, 4), (64, 6, 8), (16, 1, 30), (128, 8, 16)])
def test_the_expected_number_is_what_drawing_gives(experts, top_k, tokens):
    rng, rounds = np.random.default_rng(7), 4000
    drawn = rng.random((rounds, tokens, experts)).argsort(-1)[..., :top_k].reshape(rounds, -1)
    found = [len(set(row)) for row in drawn.tolist()]
    error = np.std(found) / rounds**0.5
    assert abs(np.mean(found) - expected_experts(experts, top_k, tokens)) <= 4 * error + 1e-9


def test_the_expected_number_at_its_ends():
    assert expected_experts(8, 2, 0) == 0 and expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert expected_experts(8, 2, 10**4) == pytest.approx(8) and expected_experts(8, 8, 1) == 8


@cache
def graphs(spec: str, prompt: int):
    return tuple(trace_forward(with_length(spec, n), "bf16") for n in (prompt, 1))


def experts_of(batch: int) -> tuple[list[Work], list[Work], tuple[str, ...]]:
    """Work of decode in experts: as traced, and as chosen."""
    (stage,) = stages_of(graphs(MIXTRAL, 64)[1], ParallelPlan(batch))
    items = decode_items(forward_script(stage), 96, stage.graph)
    changed, said = chosen_experts(items, stage.graph)
    sides = ([w for w in side if isinstance(w, Work) and ".experts." in w.module] for side in (items, changed))
    before, after = sides
    rest = ([w for w in side if not (isinstance(w, Work) and ".experts." in w.module)] for side in (items, changed))
    assert [*next(rest)] == [*next(rest)]
    return before, after, said


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_experts_send_the_sum_of_all_once_a_layer(batch):
    """`parallelize_module` would all-reduce every expert's output by itself; engines add them up first."""
    whole, token = graphs(MIXTRAL, 64)
    (stage,) = stages_of(token, ParallelPlan(batch, tp=2, shardings=tp_shardings(whole, 2)))
    items = decode_items(forward_script(stage), 96, stage.graph)
    changed, _ = chosen_experts(items, stage.graph)
    before, after = ([m for m in s if isinstance(m, Message) and ".experts." in m.module] for s in (items, changed))
    assert [m.bytes for m in before] == 2 * 8 * [batch * 256 * 2]
    assert [m.bytes for m in after] == 2 * [batch * 256 * 2]
    others = ([m for m in s if isinstance(m, Message) and ".experts." not in m.module] for s in (items, changed))
    assert next(others) == next(others) != []


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_decode_reads_the_experts_that_are_chosen(batch):
    before, after, said = experts_of(batch)
    read = expected_experts(8, 2, batch)
    assert len(before) == len(after) and all(w.share == pytest.approx(read / 8) for w in after)
    products = [w for w in after if w.shape.flops]
    assert len(products) == 2 * 8 * 3
    rows = -(-batch * 2 // read) if batch * 2 % read else batch * 2 / read
    assert {w.shape.in_shapes[-2][0] for w in products} == {int(rows)}
    weights = sum(w.share * w.shape.in_shapes[-1][0] * w.shape.in_shapes[-1][1] for w in products)
    assert weights == pytest.approx(2 * read * 3 * 256 * 512)
    least = 2 * (2 * batch * 2 * 3 * 256 * 512)  # 2 layers, 2 experts a token, 2 FLOP a weight
    counted = sum(w.share * w.shape.flops for w in products)
    assert counted == pytest.approx(least * rows * read / (2 * batch)) and counted >= least * (1 - 1e-9)
    assert said == (f"uniform routing: {batch} tokens choose {read:.3g} of 8 experts a layer",)


def test_many_tokens_read_all_experts_and_a_prompt_is_as_before():
    _, after, said = experts_of(64)
    assert said == () and all(w.share > 0.999 for w in after)
    whole, _ = graphs(MIXTRAL, 64)
    (stage,) = stages_of(whole, ParallelPlan(4))
    items = forward_script(stage)
    changed, said = chosen_experts(items, stage.graph)
    before, after = ([w.shape for w in side if isinstance(w, Work)] for side in (items, changed))
    assert said == () and before == after


def run(spec: str, batch: int, prompt: int = 64):
    whole, token = graphs(spec, prompt)
    return infer(whole, token, H100, batch=batch, prompt=prompt, generate=32, cuda_graphs=True)


def test_a_token_of_mixtral_takes_what_its_two_experts_take():
    """An expert has 352 MB of weights in bf16; what further ones take is their bytes."""
    spec, layers, expert = "mixtral-8x7b:layers=6", 6, 3 * 4096 * 14336 * 2
    one, some, many = (run(spec, batch) for batch in (1, 4, 32))
    bandwidth = H100.device.memory_bandwidth
    rest = one.parameter_bytes - layers * 8 * expert - 32000 * 4096 * 2  # without the embedding, rows of which are read
    assert one.decode.seconds > (rest + layers * 2 * expert) / bandwidth
    for found, batch in ((some, 4), (many, 32)):
        further = layers * (expected_experts(8, 2, batch) - 2) * expert / bandwidth
        assert further < found.decode.seconds - one.decode.seconds < 1.5 * further  # products reach 3/4 of it
    assert one.decode.flops < 2 * (rest + layers * 2 * expert) / 2 * 1.02 + 4 * layers * 32 * 128 * 100
    assert "uniform routing: 1 tokens choose 2 of 8 experts a layer" in one.assumed and many.assumed == ("CUDA graphs",)
    assert one.parameter_bytes == many.parameter_bytes and one.peak_bytes < many.peak_bytes


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 4)

    def forward(self, x):
        return self.score(x).topk(1, dim=-1)


class PackedExperts(nn.Module):
    """One product for all experts, whose router is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.weight = nn.Parameter(torch.empty(4, 32, 16))

    def forward(self, x):
        value, _ = self.router(x)
        return torch.bmm(x.expand(4, -1, -1), self.weight) * value.sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.dense = PackedExperts(), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.mix(x)
        for layer in self.dense:
            x = F.relu(layer(x))
        return x


def test_packed_experts_are_found_and_other_lists_are_not():
    workload = Workload("packed", Model, lambda n: ((torch.randn(n, 32),), ()), mean_square, adamw, 2)
    (stage,) = stages_of(trace_forward(workload, "bf16"), ParallelPlan(2))
    items = forward_script(stage)
    changed, said = chosen_experts(items, stage.graph)
    different = [(a, b) for a, b in zip(items, changed) if a != b]
    read = 4 * (1 - 0.75**2)
    assert len(different) == 1 and said == ("uniform routing: 2 tokens choose 1.75 of 4 experts a layer",)
    ((_, product),) = different
    assert product.shape.in_shapes == ((2, 2, 32), (2, 32, 16)) and product.shape.out_shapes == ((2, 2, 16),)
    assert product.share == pytest.approx(read / 2) and product.shape.flops == 2 * 2 * 2 * 32 * 16
