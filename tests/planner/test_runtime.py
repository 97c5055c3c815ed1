"""What torch's runtimes add to a script: counts of saved tensors and of sharded Linears against torch itself."""

from __future__ import annotations

import pytest
import torch

from opgraph.batch import trace_workload
from opgraph.models import load_workload
from planner.lower import prepared_graph
from planner.plan import ParallelPlan
from planner.runtime import stage_script
from planner.runtime_stage import prepare
from planner.script import Host
from planner.stages import saved_tensors, within
from planner.tensor_parallel import tp_shardings

GPT = "gpt2:layers=2,hidden=64,heads=4,ffn=128,vocab=128,seq=16"
LLAMA = "llama3-8b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=128,vocab=128,seq=16"
ALEXNET = "alexnet:image=64,hidden=128,classes=10,dropout=0"


@pytest.mark.parametrize("spec", [GPT, LLAMA, ALEXNET, "resnet50:image=32,classes=10"])
def test_saved_tensors_are_those_that_autograd_packs(spec):
    workload = load_workload(spec)
    graph, module, inside, packed = trace_workload(workload), workload.build(), [], dict.fromkeys(workload.blocks, 0)
    for path in workload.blocks:
        block = module.get_submodule(path)
        block.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
        block.register_forward_hook(lambda *_: inside.clear())

    def pack(tensor):
        if inside:
            packed[inside[-1]] += 1
        return tensor

    inputs, targets = workload.batch(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        workload.loss(module(*inputs), *targets)
    saves = saved_tensors(graph)
    found = {p: sum(n for op, n in saves.items() if within(graph.ops[op].module, p)) for p in workload.blocks}
    assert found == packed and min(packed.values()) > 0


def _hosts(spec: str, **options) -> dict[str, float]:
    """Counts of host work in one step, by kind."""
    workload = load_workload(spec)
    graph = trace_workload(workload)
    if options.get("tp", 1) > 1:
        options["shardings"] = tp_shardings(graph, 2)
    if options.pop("again", False):
        options["recompute"] = tuple(workload.blocks)
    plan = ParallelPlan(4, **options)
    step, layout, stages = prepared_graph(graph.run_by("cpu"), plan)
    found: dict[str, float] = {}
    for item in stage_script(prepare(step, plan, layout, stages, 0)):
        if isinstance(item, Host):
            found[item.kind] = found.get(item.kind, 0) + item.count
    return found


def test_a_checkpoint_pays_for_every_tensor_that_it_saves():
    found = _hosts(GPT, again=True)
    assert found["checkpoint_forward"] == found["checkpoint_backward"] == 2
    assert found["checkpoint_saved_forward"] == found["checkpoint_saved_backward"] == 2 * 28
    twice = _hosts(GPT, again=True, micro_batches=2)
    assert twice["checkpoint_saved_backward"] == 4 * 28
    assert not any("checkpoint" in kind for kind in _hosts(GPT))


def test_linears_of_transformers_view_their_inputs_and_those_of_classifiers_do_not():
    deep, flat = _hosts(GPT, tp=2), _hosts(ALEXNET, tp=2)
    for phase in ("forward", "backward"):
        assert deep[f"dtensor_linear_{phase}"] == deep[f"dtensor_view_{phase}"] == 2 * 6
        assert flat[f"dtensor_linear_{phase}"] == 2 and flat[f"dtensor_view_{phase}"] == 0
