"""Model and plan of a published CNN run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from planner.plan import ParallelPlan
from planner.software import HOST, Software
from planner.whole_around import Around
from planner.whole_step import Sharing
from validation.cases import Case, CaseError
from validation.cases_transformer import precision_of

# PyTorch runs every op as a kernel; TensorFlow 2017 and cuda-convnet run a static graph.
TORCH = Software("torch DDP", HOST["torch-2021"], "none", fused_accumulation=False, main_grads=0, norm_clip=False,
                 optimizer="sgd", vocab_parallel=False)  # fmt: skip
STATIC = replace(TORCH, name="static graph", host=HOST["static graph"])
# torchgpipe's ResNet: ResNet-101 is 4 layers, 33 bottlenecks of 11 and 3 layers (370 in all).
LAYERS_BEFORE, LAYERS_OF_A_BLOCK, LAYERS_AFTER = 4, 11, 3
DEEP = {"resnet50": 16, "resnet101": 33, "resnet152": 50}  # blocks
PATH_IN_BLOCK = ("conv1", "conv1", "norm1", "norm1", "conv2", "norm2", "norm2", "conv3", "norm3", "norm3", "norm3")
SHARED = ("dp", "ddp", "horovod", "ps", "dp+mp_fc", "owt")  # kinds in which every GPU, or pipeline, has its samples


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
    from opgraph.zoo import faceresnet, inception, residual, tf_cnn

    if name.startswith("tf "):
        return tf_cnn.workload(name[3:], batch=2)
    if name == "face":
        return faceresnet.workload(batch=2)
    if name == "inception3":
        return inception.workload(batch=2)
    return residual.workload(name, batch=2) if name in residual.KINDS else load_workload(f"{name}:batch=2")


# How published names begin, without signs and spaces, and which model that is. Longer names of other models begin or
# end otherwise ("WideResNet-101", "ResNet-50-D"), so the whole name is matched but for versions and settings.
KNOWN = {
    "alexnet": "alexnet", "resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50",
    "resnet101": "resnet101", "resnet152": "resnet152", "vgg11": "vgg11", "vgg16": "vgg16", "vgg19": "vgg19",
    "googlenet": "googlenet", "inceptionv1": "googlenet", "inceptionv3": "inception3", "inception3": "inception3",
    "resnext50": "resnext50", "resnext101": "resnext101", "seresnext101": "seresnext101",
    "wideresnet50": "wideresnet50", "wideresnet101": "wideresnet101", "vitb16": "vit-b16",
    "vitl16": "vit-l16",
}  # fmt: skip


OF_TENSORFLOW = ("alexnet", "resnet50", "resnet101", "resnet152")  # that tf_cnn_benchmarks builds otherwise


def model_name(case: Case) -> str:
    """The name of a row's model among those that can be built."""
    if "face recognition" in case.text("model").lower():
        return "face"
    text = re.sub(r"\(.*?\)", "", case.text("model").lower())
    plain = re.sub(r"[^a-z0-9]", "", text)
    for begin in sorted(KNOWN, key=len, reverse=True):
        if plain.startswith(begin) and re.fullmatch(_settings(begin), plain[len(begin) :]):
            own = "tf_cnn_benchmarks" in case.text("software").lower() and KNOWN[begin] in OF_TENSORFLOW
            return f"tf {KNOWN[begin]}" if own else KNOWN[begin]
    there = ", ".join(sorted(set(KNOWN.values())))
    raise CaseError(f"the zoo has no {case.text('model')!r} that can be built; it has face, {there}")


def _settings(name: str) -> str:
    """What may follow a name and change nothing that is priced: versions, data, framework; of ResNeXt and wide nets the
    widths that they are built with."""
    return r"(v1(5|0)?|onetower|variant|imagenet|pytorch|tensorflow|torchvision)*" + (
        "|(32x4d)" if "next" in name else "|2" if "wide" in name else ""
    )


def software_of(case: Case) -> Software:
    name = case.text("software").lower()
    return STATIC if re.search(r"tensorflow|oneflow|convnet|mxnet|\b(jax|flax|xla)\b", name) else TORCH


def around_of(case: Case, plan: ParallelPlan) -> Around:
    """What the row's program runs around its network.

    tf_cnn_benchmarks at 9165a70: images are scaled, moved, scaled and turned around on the GPU; plain SGD; half the
    square of every variable is summed, its gradient made and added (weight decay of 4e-5). PyTorch before 2.0: SGD with
    weight decay and momentum is four kernels of a variable (torch/optim/sgd.py), gradients are zeroed and added to;
    DistributedDataParallel (and apex's) copies them into buckets and back.
    """
    name, said = case.text("software").lower(), f"{case.text('software')}; {case.text('notes')}".lower()
    first = not re.search(r"nhwc|channels[_ -]?last|\bjax\b|\bxla\b|mxnet", said)
    if "tf_cnn_benchmarks" in name:
        return Around(5 if "momentum" in said else 3, 6, True, 8, first)
    if software_of(case) is STATIC:  # one kernel updates a variable
        return Around(channels_first=first)
    copies = 4 if plan.dp > 1 else 0
    if re.search(r"torch[ =(v-]*2(\.|\b)", name):
        return Around(11, copies, channels_first=first)
    return Around(11, 4 + copies, True, channels_first=first)


def sharing_of(case: Case) -> Sharing:
    """How the replicas of a row agree."""
    kind, notes = case.word("parallelism"), case.text("notes").lower()
    if kind == "ps":
        return Sharing("copies" if "variables on the gpus" in notes else "server", barrier="distributed" in notes)
    if "without nccl" in notes:
        return Sharing("copies")
    if kind == "dp+mp_fc":
        return Sharing(divided=("head",), sampled=0.1 if "sample ratio 0.1" in notes else 1.0)
    if kind == "owt" and model_name(case).removeprefix("tf ") == "alexnet":
        return Sharing(divided=("blocks.5", "blocks.6", "head"))
    if kind in ("", "none", "dp", "ddp", "horovod", "single", "gpipe"):
        return Sharing()
    raise CaseError(f"{kind!r} of {case.text('model')} is not predicted; single, dp, ps, gpipe and dp+mp_fc are")


def plan_of(case: Case) -> ParallelPlan:
    """The plan of a row."""
    gpipe = case.word("parallelism") == "gpipe"
    if gpipe and not case.stated("chunks"):
        raise CaseError("column chunks is ''; gpipe needs the number of micro-batches")
    dp, pp, chunks = _replicas(case), case.degree("pp"), case.degree("chunks")
    each = case.number("per_gpu_batch")
    if each is not None and not case.stated("global_batch"):
        batch = case.whole("per_gpu_batch", least=1) * dp
    else:
        batch = case.whole("global_batch", least=1)
    if each is not None and each * dp != batch:
        raise CaseError(
            f"per_gpu_batch {case.text('per_gpu_batch')} x dp {dp} = {each * dp:g} differs from global_batch {batch}; "
            f"per_gpu_batch would be {batch / dp:g}, or global_batch {each * dp:g}"
        )
    if gpipe:  # parts of equal size but for the last, which is predicted as large as the others (`torch.chunk`)
        size = -(-batch // chunks)
        chunks = -(-batch // size)
        batch = size * chunks
    if batch % (dp * chunks):
        raise CaseError(f"global_batch {batch} is no multiple of dp x chunks = {dp} x {chunks}")
    try:
        return ParallelPlan(
            global_batch=batch, pp=pp, dp=dp, micro_batches=chunks, schedule="gpipe", cuts=_cuts(case, pp),
            recompute=("",) if gpipe else (), precision=_precision(case),
        )  # fmt: skip
    except ValueError as error:
        raise CaseError(str(error)) from None


def _replicas(case: Case) -> int:
    """The dp of a row; from the number of GPUs where it is not stated and the replicas share the work."""
    gpus, pp, kind = case.whole("num_gpus", least=1), case.degree("pp"), case.word("parallelism")
    if kind == "single" and (case.degree("dp"), pp, gpus) != (1, 1, 1):
        raise CaseError(
            f"parallelism single is one GPU, but dp is {case.degree('dp')}, pp is {pp} and num_gpus is {gpus}; "
            "all three must be 1, or parallelism dp, ps or gpipe"
        )
    if case.number("dp") is None and kind in SHARED and gpus % pp == 0:
        return gpus // pp
    dp = case.degree("dp")
    if dp * pp != gpus:
        right = f"dp would be {gpus // pp}" if gpus % pp == 0 else "num_gpus must be a multiple of pp"
        raise CaseError(f"dp x pp = {dp} x {pp} differs from num_gpus = {gpus}; {right}, or num_gpus {dp * pp}")
    return dp


def _precision(case: Case) -> Any:
    found = precision_of(case, "fp32")
    if found == "fp8":
        raise CaseError("convolutions in fp8 are not predicted; precision must be fp32, tf32, fp16 or bf16")
    return found


def _cuts(case: Case, pp: int) -> tuple[str, ...]:
    """Module paths at which partitions begin, from the numbers of layers per partition."""
    if pp == 1 and not case.word("balance").startswith("["):
        return ()
    try:
        balance = json.loads(case.text("balance"))
    except json.JSONDecodeError:
        raise CaseError(f"balance is {case.text('balance')!r}; a list of layers per partition is needed") from None
    if not isinstance(balance, list) or not all(type(n) is int and n > 0 for n in balance):
        raise CaseError(f"balance is {case.text('balance')!r}; a list of layers per partition is needed")
    if len(balance) != pp:
        raise CaseError(f"balance {balance} is a list of {len(balance)}, but pp is {pp}; every partition needs one")
    deep = DEEP.get(model_name(case).removeprefix("tf "), 0)
    layers = LAYERS_BEFORE + deep * LAYERS_OF_A_BLOCK + LAYERS_AFTER
    if deep and sum(balance) != layers:
        raise CaseError(
            f"balance {balance} sums to {sum(balance)}, but {case.text('model')} has {layers} sequential layers "
            f"({LAYERS_BEFORE} + {deep} blocks of {LAYERS_OF_A_BLOCK} + {LAYERS_AFTER}, as torchgpipe counts them)"
        )
    if pp == 1:
        return ()
    if not deep:
        raise CaseError(f"balance {balance} is not understood for {case.text('model')}; ResNet-50, -101 and -152 are")
    cuts = []
    at = 0
    for size in balance[:-1]:
        at += size
        block, layer = divmod(at - LAYERS_BEFORE, LAYERS_OF_A_BLOCK)
        if not 0 <= block < deep:
            end = layers - LAYERS_AFTER
            raise CaseError(f"balance {balance} cuts outside of the blocks, layers {LAYERS_BEFORE} to {end}")
        if layer == LAYERS_OF_A_BLOCK - 1 and block + 1 < deep:  # after the sum one tensor crosses; its ReLU is with it
            block, layer = block + 1, 0
        cuts.append(f"blocks.{block}.{PATH_IN_BLOCK[layer]}")
    return tuple(cuts)
