"""Kernels that `planner.compiled` expects beside those that inductor makes: `python benchmarks/compiled.py [--json]`.

Counts inductor's scheduler nodes after fusion that are neither library calls nor views, of the forward pass alone
(under no_grad) and of a training step (forward and backward). Needs a C++ compiler, as inductor does on CPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._inductor import config, scheduler

from opgraph.batch import trace_workload
from opgraph.models import load_workload
from planner.compiled import is_fusible, kernel_count
from planner.inference_graph import trace_forward

MODELS = {
    "gpt2": "gpt2:layers=2,hidden=128,heads=4,seq=32,vocab=512,batch=4",
    "llama": "llama3-8b:layers=2,hidden=128,heads=4,kv_heads=2,ffn=256,seq=32,vocab=512,batch=4",
    "mlp": "mlp:layers=3,hidden=64,batch=8",
    "vit": "vit-b16:layers=2,hidden=128,heads=4,image=64,classes=10,batch=4",
    "bert": "bert-base:layers=2,hidden=128,heads=4,seq=32,vocab=512,batch=4",
}


class Counter:
    """Inductor's pass after fusion that only counts."""

    def __init__(self) -> None:
        self.kernels = 0

    def __call__(self, nodes: list[Any]) -> list[Any]:
        self.kernels += sum(not n.is_extern() and not isinstance(n, scheduler.NopKernelSchedulerNode) for n in nodes)
        return nodes


def inductor(spec: str, training: bool) -> int:
    """Kernels that inductor makes of a model."""
    torch._dynamo.reset()
    count = Counter()
    workload = load_workload(spec)
    torch.manual_seed(0)
    module = workload.build()
    inputs, targets = workload.batch(workload.batch_size)
    with config.patch(_post_fusion_custom_pass=count, force_disable_caches=True):
        if training:
            torch.compile(lambda *args: workload.loss(module(*args), *targets))(*inputs).backward()
        else:
            with torch.no_grad():
                torch.compile(module.eval())(*inputs)
    return count.kernels


def row(name: str, spec: str, training: bool) -> dict[str, Any]:
    workload = load_workload(spec)
    graph = trace_workload(workload) if training else trace_forward(workload, "fp32")
    phases = ("forward", "backward") if training else ("forward",)
    ops = sum(op.phase in phases and not op.is_view and is_fusible(op.name) for op in graph.ops)
    return {
        "model": name, "step": "training" if training else "forward", "eager_ops": ops,
        "predicted": kernel_count(graph, phases), "inductor": inductor(spec, training),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    rows = [row(name, MODELS[name], training) for name in arguments.models for training in (False, True)]
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    for r in rows:
        print(f"{r['model']:6} {r['step']:9} eager {r['eager_ops']:4}  predicted {r['predicted']:4}  "
              f"inductor {r['inductor']:4}")  # fmt: skip


if __name__ == "__main__":
    main()
