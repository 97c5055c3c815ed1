"""Models whose code counts heads itself: what runs on a rank's parts is split, the rest is left whole with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, scaled_dot_product_attention

from costmodels.cluster import load_cluster
from opgraph.batch import trace_workload
from opgraph.models import load_workload
from opgraph.workload import Workload, adamw, mean_square
from planner.space import enumerate_plans
from planner.tensor_parallel import tp_shardings
from planner.tp_trial import forward_of, kinds, workable

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    def __init__(self, view: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.view = view

    def heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = {
            "any heads": (-1, WIDTH // HEADS), "all heads": (HEADS, WIDTH // HEADS), "narrow heads": (HEADS, -1)
        }[self.view]  # fmt: skip
        return x.view(batch, length, *shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, view: str) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(view), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(gelu(self.up(x)))


def workload(view: str) -> Workload:
    def batch(n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (torch.randn(n, 8, WIDTH),), (torch.randn(n, 8, WIDTH),)

    return Workload(view, lambda: nn.Sequential(Block(view), Block(view)), batch, mean_square, adamw, 4, ("0", "1"))


def test_code_that_asks_for_a_width_alone_is_split_whole() -> None:
    made = workload("any heads")
    found = tp_shardings(trace_workload(made), 2)
    assert workable(made, forward_of(made), found, 2) == (found, "")
    assert kinds(found) == "*.attention.o, *.down"


@pytest.mark.parametrize(
    ("view", "words"), [("all heads", "invalid for input of size"), ("narrow heads", "would compute")]
)
def test_code_that_counts_its_heads_keeps_them(view: str, words: str) -> None:
    made = workload(view)
    found = tp_shardings(trace_workload(made), 2)
    assert kinds(found) == "*.attention.o, *.down"  # by shapes alone both could be split
    kept, why = workable(made, forward_of(made), found, 2)
    assert kinds(kept) == "*.down" and words in why


class Crossed(nn.Module):
    """Two kinds of attention that count their heads, and two ways to the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention("all heads"), Attention("narrow heads")
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.gate, self.out = nn.Linear(WIDTH, 128), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(x) + self.cross(x)
        return x + self.down(gelu(self.up(x))) + self.out(glu(self.gate(x), -1))


def test_every_kind_of_pair_is_tried_alone() -> None:
    made = replace(workload("any heads"), build=lambda: nn.Sequential(Crossed(), Crossed()))
    found = tp_shardings(trace_workload(made), 2)
    assert "glu" not in kinds(found) and "out" not in kinds(found)  # halves of a dim are no halves of its parts
    kept, why = workable(made, forward_of(made), found, 2)
    assert kinds(kept) == "*.down" and "invalid for input of size" in why


def test_a_search_splits_what_runs_and_says_what_does_not() -> None:
    made = workload("all heads")
    space = enumerate_plans(made, trace_workload(made), load_cluster("dgx-h100"), 8, devices=2)
    split = [plan for plan in space.plans if plan.tp == 2]
    assert split and all(kinds(plan.shardings) == "*.down" for plan in split)
    (reason,) = {r.reason for r in space.rejected if r.label == "tp2 of all pairs"}
    assert reason.startswith("only the pairs of *.down are split") and "view" in reason


@pytest.mark.parametrize("spec", ["gpt2:layers=2,hidden=64,heads=4,seq=16",
                                  "bert-base:layers=2,hidden=64,heads=4,seq=16",
                                  "llama3-8b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=64,vocab=64,seq=16",
                                  "mixtral-8x7b:layers=1,hidden=64,heads=4,kv_heads=2,ffn=64,vocab=64,seq=16",
                                  "vit-b16:layers=2", "alexnet"])  # fmt: skip
def test_models_of_the_zoo_run_on_parts(spec: str) -> None:
    made = load_workload(spec)
    found = tp_shardings(trace_workload(made), 2)
    assert found and workable(made, forward_of(made), found, 2) == (found, "")
