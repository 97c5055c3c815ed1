"""What a program runs around and between the kernels of a traced network: passes over images, variables and gradients,
changes of layout, and the part that a rank has of a divided layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from costmodels.convolution import on_tensor_cores
from costmodels.device import Device
from costmodels.families import family
from costmodels.ops import OpShape
from opgraph.graph import DTYPE_BYTES, OpGraph
from planner.folded_kernels import Launch

PASSES_OF_A_KERNEL = 3  # it reads two tensors and writes one


@dataclass(frozen=True, slots=True)
class Around:
    """update_passes: of the optimizer over variables, gradients and moments. gradient_passes: over every gradient
    besides (weight decay, zeroing, summing, copies to and from buckets). apart: these are kernels of one variable each,
    else one of all. image_passes: over the samples before forward. channels_first: maps are laid out so, and kernels of
    tensor cores in 16 bits, which want channels last, find them turned around and turn their results back (for tf32
    there are kernels of both layouts, such as `sm80_xmma_fprop_implicit_gemm_tf32f32..nchwkcrs_nchw`)."""

    update_passes: int = 5
    gradient_passes: int = 0
    apart: bool = False
    image_passes: int = 0
    channels_first: bool = False


NOTHING = Around()


def passes(sizes: Iterable[float], count: int, apart: bool) -> list[OpShape]:
    """Kernels that pass so often over tensors of so many bytes (float32)."""
    sizes = [size for size in sizes if size > 0]
    if not count or not sizes:
        return []
    kernels = ceil(count / PASSES_OF_A_KERNEL) if apart else 1
    found = []
    for size in sizes if apart else [sum(sizes)]:
        moved, flat = count * size / kernels, ((ceil(size / 4),),)
        written = int(moved * (count * 2 // 5) / count)
        read = int(moved) - written
        found += [OpShape("aten._fused_sgd_.default", "optimizer", flat, flat, "float32", 0, read, written)] * kernels
    return found


def image_kernels(graph: OpGraph, count: int) -> list[OpShape]:
    """Kernels that pass so often over a micro-batch of samples, which each of them reads and writes."""
    images = [t for t in graph.tensors if t.role == "input" and "float" in t.dtype]
    if not images or not count:
        return []
    largest = max(images, key=lambda t: t.bytes)
    size = prod(largest.shape) * 4
    shape = OpShape("aten.mul.Tensor", "forward", (largest.shape,), (largest.shape,), "float32", 0, size, size)
    return [shape] * (count // 2)


def laid_out(launches: Sequence[Launch], device: Device) -> Iterator[Launch]:
    """The launches with those that turn maps around, before and after every convolution on tensor cores in 16 bits:
    forward its input and its result, backward the same for each of the two gradients (NVIDIA's guide to convolutional
    layers, "Tensor Layouts In Memory": cuDNN transposes what is not NHWC)."""
    for launch in launches:
        yield launch
        shape = launch.shape
        if shape is None or DTYPE_BYTES.get(shape.dtype) != 2 or not on_tensor_cores(device, shape.dtype):
            continue
        for turned in _turned(shape):
            size = prod(turned) * DTYPE_BYTES.get(shape.dtype, 4)
            copy = OpShape("aten.clone.default", shape.phase, (turned,), (turned,), shape.dtype, 0, size, size)
            yield Launch(0.0, copy, share=launch.share)


def _turned(shape: OpShape) -> list[tuple[int, ...]]:
    kind = family(shape.name)
    if kind == "conv" and len(shape.in_shapes) > 1:
        return [shape.in_shapes[0], shape.out_shapes[0]]
    if kind != "conv_backward" or len(shape.in_shapes) < 3:
        return []
    result, image, weight = shape.in_shapes[:3]
    return [result, image] * ((image in shape.out_shapes) + (weight in shape.out_shapes))


def of_rank(launch: Launch, weights: Iterable[tuple[int, ...]], ranks: int, sampled: float) -> Launch:
    """A launch of a layer whose outputs are divided over ranks, all of whose samples it sees: of passes over its weight
    a rank has its part, products and losses are as large as before, less the classes that are not sampled."""
    shape = launch.shape
    if shape is None:
        return launch
    weights, shapes = list(weights), (*shape.in_shapes, *shape.out_shapes)
    if family(shape.name) != "gemm" and any(weight in shapes for weight in weights):
        return replace(launch, share=launch.share * sampled / ranks)
    if any(weight[0] in s for weight in weights for s in shapes):
        return replace(launch, share=launch.share * sampled)
    return launch
