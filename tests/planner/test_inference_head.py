"""Logits of the last token alone, and vocabularies split over tensor-parallel ranks: shapes, bytes, executed memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from costmodels.cluster import load_cluster
from costmodels.device import load_device
from opgraph.models import load_workload, with_length
from opgraph.workload import Workload, adamw, mean_square
from planner.inference import infer, stages_of
from planner.inference_graph import ALL_LOGITS, trace_forward, trace_inference
from planner.inference_head import gathered, head_of, head_shardings, with_gathered
from planner.plan import ParallelPlan
from planner.runtime import forward_script
from planner.script import Message, Work
from planner.tensor_parallel import tp_shardings
from tests.planner.conftest import forward_peak

H100 = load_cluster("dgx-h100")
GPT = "gpt2:layers=2,hidden=64,heads=4,vocab=512,seq=64,positions=128"
LLAMA = "llama3-8b:layers=2,hidden=64,heads=8,kv_heads=4,ffn=128,vocab=512,seq=64"
PROMPT, GENERATE = 48, 16


@cache
def graphs(spec: str):
    return trace_inference(lambda n: with_length(spec, n), PROMPT, GENERATE, "bf16")


@pytest.mark.parametrize(("spec", "module", "owner"), [(GPT, "head", "embed"), (LLAMA, "head", "head")])
def test_the_head_is_found_without_its_name(spec, module, owner):
    head = head_of(trace_forward(with_length(spec, PROMPT), "bf16"))
    assert head is not None and head.vocabulary == 512 and head.tokens == 1
    assert (head.module, head.owner) == (module, owner)


@pytest.mark.parametrize("spec", ["mlp:layers=2,hidden=32", "resnet50:image=64", "vit-b16:layers=1"])
def test_what_is_no_language_model_has_no_head(spec):
    assert head_of(trace_forward(load_workload(spec), "fp32")) is None


@pytest.mark.parametrize("spec", [GPT, LLAMA])
def test_a_prompt_has_the_logits_of_its_last_token(spec):
    whole, token = graphs(spec)
    every = trace_forward(with_length(spec, PROMPT), "bf16")
    assert whole.tensors[whole.ops[-1].outputs[0]].shape[1:] == (1, 512)
    assert every.tensors[every.ops[-1].outputs[0]].shape[1:] == (PROMPT, 512)
    less = 2 * every.batch * (PROMPT - 1) * 64 * 512
    assert every.flops() - whole.flops() == less and token is not None
    alone, nothing = trace_inference(lambda n: with_length(spec, n), PROMPT, 0, "bf16")
    assert alone.flops() == whole.flops() and nothing is None


class Reshapes(torch.nn.Module):
    """Needs the logits of all tokens."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(32, 16)
        self.out = torch.nn.Linear(16, 32)

    def forward(self, ids):
        x = self.table(ids).unsqueeze(1)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        return self.out(x).view(ids.shape[0], ids.shape[1], 32)


def test_a_model_that_needs_all_logits_keeps_them():
    def of(length: int) -> Workload:
        return Workload(
            "reshapes", Reshapes, lambda n: ((torch.zeros(n, length, dtype=torch.long),), ()), mean_square, adamw, 4
        )

    whole, token = trace_inference(of, 8, 4, "fp32")
    assert token is not None and whole.tensors[whole.ops[-1].outputs[0]].shape[1:] == (8, 32)
    assert ALL_LOGITS in whole.notes and ALL_LOGITS not in graphs(GPT)[0].notes


class OwnTable(Reshapes):
    """Multiplies with its embedding itself, so that no module's input is what the logits are made of."""

    def forward(self, ids):
        x = self.table(ids).unsqueeze(1)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        return torch.nn.functional.linear(self.out(self.table(ids) + x) @ self.table.weight, self.table.weight)


def test_a_head_in_the_models_own_forward_is_not_shortened():
    def of(length: int) -> Workload:
        return Workload(
            "own table", OwnTable, lambda n: ((torch.zeros(n, length, dtype=torch.long),), ()), mean_square, adamw, 4
        )

    whole, _ = trace_inference(of, 8, 4, "fp32")
    head = head_of(whole)
    assert head is None or head.tokens == -1
    assert whole.flops() == trace_forward(of(8), "fp32").flops()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("spec", [GPT, LLAMA])
def test_ranks_share_the_vocabulary(spec, tp):
    whole, token = graphs(spec)
    plan = ParallelPlan(8, tp=tp, shardings=head_shardings(whole, tp, tp_shardings(whole, tp)))
    (stage,), (alone,) = stages_of(whole, plan), stages_of(whole, ParallelPlan(8))
    tables = [n for n, t in whole.parameters.items() if t.shape == (512, 64)]
    assert len(tables) == (2 if spec is LLAMA else 1)
    for name in tables:
        assert stage.parameters[name].bytes * tp == alone.parameters[name].bytes
    items = with_gathered(forward_script(stage), stage)
    sums = [i for i in items if isinstance(i, Message)]
    first, last = sums[0], sums[-1]
    assert (first.kind, first.bytes) == ("all_reduce", 8 * PROMPT * 64 * 2)  # of the embeddings
    assert (last.kind, last.bytes) == ("all_gather", 8 * 512 * 2) and gathered(stage)[0] == last.bytes
    products = [i for i in items if isinstance(i, Work) and i.shape.name == "aten.mm.default"]
    assert products[-1].shape.in_shapes[1] == (64, 512 // tp)
    one, many = (infer(whole, token, H100, batch=8, prompt=PROMPT, generate=GENERATE, tp=n) for n in (1, tp))
    assert many.parameter_bytes < 1.1 * one.parameter_bytes / tp + (128 * 64 * 2 if spec is GPT else 0)


def test_a_vocabulary_that_does_not_divide_stays_whole_and_says_so():
    spec = GPT.replace("512", "511")
    whole, token = graphs(spec)
    assert head_shardings(whole, 2, tp_shardings(whole, 2)) == tp_shardings(whole, 2)
    found = infer(whole, token, H100, batch=2, prompt=PROMPT, generate=GENERATE, tp=2)
    assert any("511 tokens do not divide by tp = 2" in note for note in found.notes)
    assert not any("do not divide" in n for n in infer(whole, token, H100, batch=2, prompt=PROMPT, generate=8).notes)


def test_attention_that_no_rank_has_a_part_of_is_said():
    whole, token = graphs(LLAMA)  # four heads of keys
    notes = {tp: infer(whole, token, H100, batch=2, prompt=PROMPT, generate=8, tp=tp).notes for tp in (2, 4, 8)}
    said = {tp: any("attention is whole on every rank" in n for n in found) for tp, found in notes.items()}
    assert said == {2: False, 4: False, 8: True}
    whole, token = graphs("mixtral-8x7b:layers=1,hidden=64,heads=4,kv_heads=2,ffn=64,vocab=64,seq=64")
    notes = infer(whole, token, H100, batch=2, prompt=PROMPT, generate=8, tp=2).notes  # its router is whole
    assert not any("attention is whole" in n for n in notes)


def test_formats_that_a_device_lacks_are_said():
    t4 = replace(H100, device=load_device("t4"), cache={})
    whole, token = graphs(LLAMA)
    assert any("no bfloat16" in n for n in infer(whole, token, t4, batch=2, prompt=PROMPT, generate=8).notes)
    assert not any("bfloat16" in n for n in infer(whole, token, H100, batch=2, prompt=PROMPT, generate=8).notes)


def test_stages_gather_logits_at_the_end_only():
    whole, token = graphs(LLAMA)
    found = infer(whole, token, H100, batch=8, prompt=PROMPT, generate=GENERATE, tp=2, pp=2)
    first, last = stages_of(whole, found.plan)
    assert gathered(first) == (0, "") and gathered(last)[0] > 0


@pytest.mark.parametrize("spec", [GPT, LLAMA])
def test_the_last_tokens_pass_holds_what_a_real_one_allocates(spec, uncalibrated):
    """By torch's profiler, with the same hook that engines' code amounts to: to the byte, without the cache."""
    workload = with_length(spec, PROMPT)
    head = head_of(trace_forward(workload, "fp32"))
    found = infer(trace_forward(workload, "fp32", last=head), None, uncalibrated, batch=4, prompt=PROMPT, generate=0)
    torch.manual_seed(0)
    module, (inputs, _) = workload.build().eval(), workload.batch(4)
    module.get_submodule(head.module).register_forward_pre_hook(lambda _, x: (x[0][:, -1:].contiguous(),))
    assert found.peak_bytes - found.cache_per_rank == pytest.approx(forward_peak(module, inputs), rel=0.002)
