"""Small zoo models, traced once for all tests of the planner."""

from functools import cache
from itertools import accumulate

import pytest
import torch

from costmodels.cluster import local_cluster
from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.models import load_workload
from opgraph.workload import Workload
from validation.allocations import recorded_allocations

GPT = "gpt2:layers=2,hidden=128,heads=4,seq=32,vocab=512,batch=8"
LLAMA = "llama3-8b:layers=2,hidden=128,heads=4,kv_heads=2,ffn=256,seq=32,vocab=512,batch=8"
ALEXNET = "alexnet:width=16,hidden=256,classes=40,dropout=0,batch=8"
VIT = "vit-b16:layers=2,hidden=128,heads=4,image=64,classes=10,batch=8"
MLP = "mlp:layers=3,hidden=64,batch=8"


@cache
def model(spec: str) -> tuple[Workload, OpGraph]:
    workload = load_workload(spec)
    return workload, trace_workload(workload)


def forward_peak(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Most bytes that a forward pass holds under no_grad, weights and inputs among them, by torch's profiler."""
    with torch.no_grad():
        module(*inputs)
        with recorded_allocations() as allocations:
            module(*inputs)
    changes = [size for _, _, size in allocations]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *inputs)}
    return sum(held.values()) + max(accumulate(changes))


@pytest.fixture(scope="session")
def uncalibrated(tmp_path_factory):
    """This machine as a cluster, whatever calibration lies on it."""
    return local_cluster(tmp_path_factory.mktemp("none") / "none.toml")
