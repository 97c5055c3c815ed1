"""Memory that ops of this CPU take inside themselves, beyond their inputs and outputs: no graph shows it.

Read from the profiler's memory events of single ops (torch 2.13, oneDNN 3.12, AVX-512, one thread per rank) and from
what oneDNN documents of its blocked layouts: channels in blocks of 16, page-aligned parts of an RNN's workspace.
`tests/costmodels/test_workspace.py` holds the formulas to real ops of shapes that they were not read from.
Machines without AVX-512 block by 8 and differ a little; GPUs have other libraries, and nothing here is about them.
"""

from __future__ import annotations

from math import prod
from typing import Any

from costmodels.families import base_name
from costmodels.workspace_conv import convolution, convolution_backward
from costmodels.workspace_layout import PAGE, Shape, channels_last, contiguous, up

RNN_SCRATCH = 4664  # bytes that oneDNN keeps for its small products in an RNN layer
REDUCED = 12  # a mean over a CPU tensor: its counter and its sum


def workspace_bytes(name: str, ins: tuple[Shape, ...], outs: tuple[Shape, ...], args: tuple[Any, ...],
                    itemsize: int = 4, strides: tuple[Shape, ...] = ()) -> int:  # fmt: skip
    """Bytes that an op holds at its worst moment beyond what its inputs and outputs take; 0 for most ops.

    `ins` and `outs` are the shapes of its tensors, `args` its arguments as the graph records them, `strides` those of
    its inputs in elements (empty: all contiguous).
    """
    copies = _copies(name, ins, args, strides) * itemsize
    match base_name(name):
        case "convolution":
            return convolution(ins, outs[0], args, itemsize, strides)
        case "convolution_backward":
            return convolution_backward(ins, args, itemsize, strides)
        case "mkldnn_rnn_layer":
            return _rnn(ins, itemsize)
        case "mkldnn_rnn_layer_backward":
            return _rnn_backward(ins, itemsize)
        case "native_batch_norm_backward":
            return prod(ins[1]) * itemsize  # a term of the input's gradient, channel by channel
        case "native_group_norm_backward":
            return 2 * prod(ins[1][:2]) * itemsize  # sums of every sample and channel
        case "upsample_bilinear2d" | "upsample_nearest2d" if not (strides and channels_last(ins[0], strides[0])):
            return (prod(ins[0]) + prod(outs[0])) * itemsize if _upsamples_vectors(name, ins[0], outs[0]) else 0
        case "_safe_softmax":
            return prod(ins[0]) + prod(ins[0][:-1]) + itemsize  # masked entries and rows, and a zero
        case "mse_loss" | "smooth_l1_loss" | "huber_loss" if not outs[0]:
            return prod(ins[0]) * itemsize + (REDUCED if args[2:3] != (2,) else 0)  # element by element
        case "_scaled_dot_product_flash_attention_for_cpu":
            return _attention(ins, itemsize)
        case "_scaled_dot_product_flash_attention_for_cpu_backward":
            rows, keys = _attention_blocks(ins[1], ins[2])
            return 4 * (2 * rows * keys + rows) + copies
        case "native_layer_norm_backward":
            return 2 * prod(ins[-1]) * 4 + copies  # one sum per thread of both parameters' gradients
    return copies


def _upsamples_vectors(name: str, x: Shape, out: Shape) -> bool:
    """Whether images are enlarged with channels last, copied there and back: small ones, and bilinear ones of three
    channels (aten/native/cpu/UpSampleKernel.cpp; the bound was read from single ops). One channel lies so already."""
    return x[1] > 1 and (sum(out[2:]) <= 128 or (x[1] == 3 and "bilinear" in name))


def _copies(name: str, ins: tuple[Shape, ...], args: tuple[Any, ...], strides: tuple[Shape, ...]) -> int:
    """Elements of the contiguous copies that an op makes of inputs that are not contiguous (`.contiguous()` in the
    kernels of aten/native, read from torch 2.13)."""
    match base_name(name):
        case "native_layer_norm" | "_softmax" | "_log_softmax" | "embedding_dense_backward":
            read = [0]
        case "native_layer_norm_backward":
            read = [0, 1]
        case "roll" if len(args[2]) > 1:  # one dim after the other
            return prod(ins[0])
        case "_scaled_dot_product_flash_attention_for_cpu_backward" if strides:  # heads inside, as models make them
            (b, heads, length, width), (s0, s1, s2, s3) = ins[0], strides[0]
            return 0 if contiguous((b, length, heads, width), (s0, s2, s1, s3)) else prod(ins[0])
        case _:
            read = []
    return sum(prod(ins[i]) for i in read if strides and not contiguous(ins[i], strides[i]))


def reserve_bytes(name: str, output: int, ins: tuple[Shape, ...], itemsize: int = 4) -> int:
    """Bytes of an output whose size fake tensors do not know: the workspace that an RNN layer keeps for backward, and
    losses whose mean lies in the block of their elements (aten/native/Loss.cpp reduces them in place; not huber's).

    oneDNN 3.12, rnn_utils `set_workspace_sizes`: gates, layer, iteration and cell states, hidden states, each from a
    page on, rows padded to 64 bytes (and once more where they would share cache sets).
    """
    if base_name(name) in ("mse_loss", "smooth_l1_loss", "binary_cross_entropy"):
        return prod(ins[0]) * itemsize
    if base_name(name) != "mkldnn_rnn_layer" or output != 3:
        return 0
    steps, batch, features = ins[0]
    hidden = ins[2][1]
    states = 2 * (steps + 1) * batch * itemsize
    parts = [steps * batch * _row(4 * hidden) * itemsize, steps * batch * _row(hidden) * itemsize]
    parts += 3 * [states * _row(max(features, hidden))] + 2 * [states * hidden]
    return sum(_pages(p) for p in parts)


# -- recurrent layers and attention -------------------------------------------------------------------------


def _row(n: int) -> int:
    """Elements from one row to the next: full cache lines, one more where rows would fall into the same cache sets."""
    padded = up(n, 16)
    return padded + 16 if padded % 256 == 0 else padded


def _pages(n: int) -> int:
    return up(n, PAGE)


def _rnn_scratch(ins: tuple[Shape, ...], size: int) -> int:
    steps, batch, _ = ins[0]
    hidden = ins[2][1]
    gates, state = steps * batch * _row(4 * hidden) * size, batch * _row(hidden) * size
    return _pages(gates) + 2 * _pages(state) + RNN_SCRATCH


def _rnn(ins: tuple[Shape, ...], size: int) -> int:
    """The sum of both biases, both weights reordered, the scratchpad."""
    rows, hidden = ins[2]
    return (ins[0][2] + hidden) * _row(rows) * size + rows * size + _rnn_scratch(ins, size)


def _rnn_backward(ins: tuple[Shape, ...], size: int) -> int:
    """Weights (where their rows are not padded already) and their gradients reordered, the scratchpad, the incoming
    gradient made contiguous (it comes transposed from a model that puts the batch first), gradients of the states."""
    rows, hidden = ins[2]
    steps, batch, features = ins[0]
    reordered = rows * sum(_row(n) for n in (features, hidden) if _row(n) != n) + (features + hidden) * _row(rows)
    return (reordered + rows + steps * batch * hidden + 2 * batch * hidden) * size + _rnn_scratch(ins, size)


def _attention_blocks(query: Shape, key: Shape) -> tuple[int, int]:
    """Rows of queries and of keys that are worked on at once: aten/native/cpu/FlashAttentionKernel.cpp, torch 2.13."""
    queries, keys = query[2], key[2]
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(rows, queries), min(512, keys)


def _attention(ins: tuple[Shape, ...], size: int) -> int:
    rows, keys = _attention_blocks(ins[0], ins[1])
    return 4 * (rows * keys + 2 * rows + rows * ins[0][3])
