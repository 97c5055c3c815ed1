"""What programs run around their networks, in bytes and kernels."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from costmodels.device import load_device
from costmodels.ops import OpShape
from opgraph.graph import OpGraph
from opgraph.trace import trace
from planner.folded_kernels import Launch
from planner.plan import ParallelPlan
from planner.whole_around import NOTHING, Around, image_kernels, laid_out, of_rank, passes
from validation.cases import Case
from validation.cases_vision import around_of, model_name, plan_of

IMAGE, WEIGHT, RESULT = (8, 64, 28, 28), (128, 64, 3, 3), (8, 128, 28, 28)
FORWARD = OpShape("aten.convolution.default", "forward", (IMAGE, WEIGHT), (RESULT,), "float16", 1, 1, 1)
BACKWARD = OpShape(
    "aten.convolution_backward.default", "backward", (RESULT, IMAGE, WEIGHT), (IMAGE, WEIGHT), "float16", 1, 1, 1
)


def picture(**changes: str) -> Case:
    base = {"case_id": "v", "set": "s", "model": "ResNet-50", "gpu": "Tesla V100 SXM2 16GB", "num_gpus": "4",
            "dp": "4", "parallelism": "dp", "global_batch": "128", "precision": "fp32"}  # fmt: skip
    return Case("vision", base | changes)


def around(**changes: str) -> Around:
    case = picture(**changes)
    return around_of(case, plan_of(case))


@pytest.mark.parametrize("count", [3, 4, 5, 6, 11])
@pytest.mark.parametrize("apart", [True, False])
def test_passes_move_so_many_bytes_of_every_tensor(count: int, apart: bool) -> None:
    sizes = [4096.0, 1048576.0, 0.0]
    found = passes(sizes, count, apart)
    assert len(found) == (2 * -(-count // 3) if apart else 1)
    assert sum(s.bytes_read + s.bytes_written for s in found) == pytest.approx(count * sum(sizes), rel=1e-3)
    assert all(s.bytes_read > s.bytes_written for s in found)
    assert not passes(sizes, 0, apart) and not passes([], count, apart)


def test_images_are_read_and_written_by_each_of_their_kernels() -> None:
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), (torch.randn(4, 3, 8, 8),), loss=lambda y: y.sum())
    found = image_kernels(graph, 8)
    assert len(found) == 4 and all(s.bytes_read == s.bytes_written == 4 * 4 * 192 for s in found)
    assert not image_kernels(graph, 0)


def test_maps_in_16_bits_are_turned_around_each_convolution_on_tensor_cores() -> None:
    """Forward two maps, backward four; nothing without tensor cores, in 32 bits, or around other kernels."""
    launches = [Launch(0.0, FORWARD), Launch(0.0, BACKWARD), Launch(0.0, replace(FORWARD, name="aten.relu.default"))]
    turned = [x.shape for x in laid_out(launches, load_device("v100-sxm2-16gb")) if x not in launches]
    assert [s.in_shapes[0] for s in turned if s] == [IMAGE, RESULT, RESULT, IMAGE, RESULT, IMAGE]
    assert all(s.bytes_read == s.bytes_written == 2 * prod(s.in_shapes[0]) for s in turned if s)
    assert list(laid_out(launches, load_device("p100-sxm2"))) == launches
    single = [replace(x, shape=replace(x.shape, dtype="float32")) for x in launches if x.shape]
    assert list(laid_out(single, load_device("v100-sxm2-16gb"))) == single
    half = replace(BACKWARD, out_shapes=(WEIGHT,))
    assert len(list(laid_out([Launch(0.0, half)], load_device("v100-sxm2-16gb")))) == 3


def test_a_rank_has_its_part_of_passes_over_a_divided_weight() -> None:
    weight = (1000, 64)
    norm = Launch(0.0, OpShape("aten.mul.Tensor", "forward", (weight,), (weight,), "float32", 0, 1, 1))
    factors, made = ((32, 64), (64, 1000)), ((32, 1000),)
    product = Launch(0.0, OpShape("aten.mm.default", "forward", factors, made, "float32", 1, 1, 1))
    other = Launch(0.0, OpShape("aten.relu.default", "forward", ((32, 64),), ((32, 64),), "float32", 0, 1, 1))
    assert of_rank(norm, [weight], 8, 1.0).share == pytest.approx(1 / 8)
    assert of_rank(norm, [weight], 8, 0.1).share == pytest.approx(0.1 / 8)
    assert of_rank(product, [weight], 8, 1.0) == product and of_rank(product, [weight], 8, 0.1).share == 0.1
    several = [(4096, 9216), weight]
    assert of_rank(norm, several, 4, 1.0).share == pytest.approx(1 / 4)
    assert of_rank(other, [weight], 8, 0.1) == other


def test_programs_run_what_their_sources_say() -> None:
    tensorflow = {"software": "TensorFlow b1e174e, tf_cnn_benchmarks 9165a70"}
    assert around(**tensorflow) == Around(3, 6, True, 8, True)
    assert around(software="PyTorch 1.6 DDP") == Around(11, 8, True, channels_first=True)
    assert around(software="PyTorch 1.6", num_gpus="1", dp="1", global_batch="32") == Around(
        11, 4, True, channels_first=True
    )
    assert around(software="PyTorch 2.4", notes="channels_last") == Around(11, 4)
    assert around(software="PyTorch (2.1)") == around(software="torch==2.1") == Around(11, 4, channels_first=True)
    assert around(software="JAX") == NOTHING == around(software="MXNet 1.6, NHWC")
    assert around(software="OneFlow 0.3.4") == replace(NOTHING, channels_first=True)
    assert model_name(picture(**tensorflow)) == "tf resnet50" and model_name(picture()) == "resnet50"
    assert model_name(picture(model="Inception v3", **tensorflow)) == "inception3"


@pytest.mark.parametrize(
    ("batch", "chunks", "size", "parts"), [(1499, 100, 15, 100), (25000, 1667, 15, 1667), (7, 4, 2, 4)]
)
def test_parts_of_a_batch_are_as_large_as_torch_cuts_them(batch: int, chunks: int, size: int, parts: int) -> None:
    """`torch.chunk`: the last part may be smaller, and is predicted like the others."""
    assert [len(x) for x in torch.arange(batch).chunk(chunks)][:-1] == [size] * (parts - 1)
    plan: ParallelPlan = plan_of(
        picture(model="ResNet-101", parallelism="gpipe", num_gpus="2", dp="1", pp="2", balance="[180, 190]",
                global_batch=str(batch), chunks=str(chunks))
    )  # fmt: skip
    assert (plan.micro_batch, plan.micro_batches) == (size, parts)


def test_networks_of_tf_cnn_benchmarks_are_its_own() -> None:
    """Multiply-adds: AlexNet 839 million (714 of torchvision's), ResNet-50 of the first version 3.8 billion (4.1)."""
    from opgraph.batch import trace_workload
    from opgraph.zoo import tf_cnn

    def macs(graph: OpGraph) -> float:
        return sum(op.flops for op in graph.ops if op.phase == "forward") / graph.batch / 2

    assert macs(trace_workload(tf_cnn.workload("alexnet", 2))) == pytest.approx(839e6, rel=2e-3)
    assert macs(trace_workload(tf_cnn.workload("resnet50", 2))) == pytest.approx(3.83e9, rel=5e-3)
