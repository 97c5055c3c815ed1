"""Model and plan of a published CNN run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from planner.plan import ParallelPlan
from planner.software import HOST, Software
from planner.whole_step import Sharing
from validation.cases import Case, CaseError
from validation.cases_transformer import precision_of

# PyTorch runs every op as a kernel; TensorFlow 2017 and cuda-convnet run a static graph.
TORCH = Software("torch DDP", HOST["torch-2021"], "none", fused_accumulation=False, main_grads=0, norm_clip=False,
                 optimizer="sgd", vocab_parallel=False)  # fmt: skip
STATIC = replace(TORCH, name="static graph", host=HOST["static graph"])
LAYERS_OF_A_BLOCK = 11  # torchgpipe's ResNet: 4 layers before 33 bottlenecks of 11, 3 after (370 in all)
PATH_IN_BLOCK = ("conv1", "conv1", "norm1", "norm1", "conv2", "norm2", "norm2", "conv3", "norm3", "norm3", "norm3")


@dataclass(slots=True)
class Traces:
    """Traced CNNs by name and precision."""

    known: dict[tuple[str, str], Any] = field(default_factory=dict)

    def graph(self, name: str, precision: str, batch: int) -> Any:
        from opgraph.batch import trace_workload

        if (name, precision) not in self.known:
            self.known[name, precision] = trace_workload(_workload(name), precision=precision)
        return self.known[name, precision].at_batch(batch)


def _workload(name: str) -> Any:
    from opgraph.models import load_workload
    from opgraph.zoo.faceresnet import workload as face

    return face(batch=2) if name == "face" else load_workload(f"{name}:batch=2")


def model_name(case: Case) -> str:
    """The zoo's name of a row's model."""
    text = case.text("model").lower()
    known = {"face recognition": "face", "alexnet": "alexnet", "resnet-50": "resnet50", "resnet-101": "resnet101",
             "resnet-152": "resnet152", "vgg-11": "vgg11", "vgg-16": "vgg16", "vgg-19": "vgg19",
             "googlenet": "googlenet", "inception v1": "googlenet"}  # fmt: skip
    for part, name in known.items():
        if part in text or part.replace("-", "") in text:
            return name
    raise CaseError(f"the zoo has no {case.text('model')}; it has {', '.join(sorted(set(known.values())))}")


def software_of(case: Case) -> Software:
    name = case.text("software").lower()
    return STATIC if any(w in name for w in ("tensorflow", "oneflow", "convnet")) else TORCH


def sharing_of(case: Case) -> Sharing:
    """How the replicas of a row agree."""
    kind, notes = case.word("parallelism"), case.text("notes").lower()
    if kind == "ps":
        return Sharing("copies" if "variables on the gpus" in notes else "server", barrier="distributed" in notes)
    if "without nccl" in notes:
        return Sharing("copies")
    if kind == "dp+mp_fc":
        return Sharing(divided=("head",), sampled=0.1 if "sample ratio 0.1" in notes else 1.0)
    if kind == "owt" and model_name(case) == "alexnet":
        return Sharing(divided=("blocks.5", "blocks.6", "head"))
    if kind in ("", "none", "dp", "ddp", "horovod", "single", "gpipe"):
        return Sharing()
    raise CaseError(f"{kind!r} of {case.text('model')} is not predicted; single, dp, ps, gpipe and dp+mp_fc are")


def plan_of(case: Case) -> ParallelPlan:
    """The plan of a row."""
    dp, pp, chunks = (case.degree(name) for name in ("dp", "pp", "chunks"))
    batch = case.whole("global_batch", least=1)
    if dp * pp > case.whole("num_gpus"):
        raise CaseError(f"dp x pp = {dp * pp} is more than num_gpus = {case.whole('num_gpus')}")
    gpipe = case.word("parallelism") == "gpipe"
    if gpipe and batch // chunks * chunks != batch:
        batch = batch // chunks * chunks
    if batch % (dp * chunks):
        raise CaseError(f"global_batch {batch} is no multiple of dp x chunks = {dp} x {chunks}")
    try:
        return ParallelPlan(
            global_batch=batch, pp=pp, dp=dp, micro_batches=chunks, schedule="gpipe", cuts=_cuts(case, pp),
            recompute=("",) if gpipe else (), precision=_precision(case),
        )  # fmt: skip
    except ValueError as error:
        raise CaseError(str(error)) from None


def _precision(case: Case) -> Any:
    found = precision_of(case)
    if found == "fp8":
        raise CaseError("convolutions in fp8 are not predicted; precision must be fp32, tf32, fp16 or bf16")
    return found


def _cuts(case: Case, pp: int) -> tuple[str, ...]:
    """Module paths at which partitions begin, from the numbers of layers per partition."""
    if pp == 1:
        return ()
    try:
        balance = json.loads(case.text("balance"))
    except json.JSONDecodeError:
        raise CaseError(f"balance is {case.text('balance')!r}; a list of layers per partition is needed") from None
    if len(balance) != pp or not model_name(case).startswith("resnet"):
        raise CaseError(f"balance {balance} is not understood for {case.text('model')} on {pp} partitions")
    cuts = []
    at = 0
    for size in balance[:-1]:
        at += size
        block, layer = divmod(at - 4, LAYERS_OF_A_BLOCK)
        cuts.append(f"blocks.{block}.{PATH_IN_BLOCK[layer]}")
    return tuple(cuts)
