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

Shape = tuple[int, ...]
BLOCK = 16  # channels of a oneDNN block of fp32 under AVX-512
PAGE = 4096
ALIGN = 128  # oneDNN's scratchpad starts on a multiple of this
STRIDED_SCRATCH = 20504  # bytes that a strided backward-data convolution keeps for its batch of small products
RNN_SCRATCH = 4664  # the same for an RNN layer


def workspace_bytes(name: str, ins: tuple[Shape, ...], outs: tuple[Shape, ...], args: tuple[Any, ...],
                    itemsize: int = 4) -> int:  # fmt: skip
    """Bytes that an op holds at its worst moment beyond what its inputs and outputs take; 0 for most ops.

    `ins` and `outs` are the shapes of its tensors, `args` its arguments as the graph records them.
    """
    match base_name(name):
        case "convolution":
            return _convolution(ins, outs[0], args, itemsize)
        case "convolution_backward":
            return _convolution_backward(ins, args, itemsize)
        case "mkldnn_rnn_layer":
            return _rnn(ins, itemsize)
        case "mkldnn_rnn_layer_backward":
            return _rnn_backward(ins, itemsize)
        case "native_batch_norm_backward":
            return prod(ins[1]) * itemsize  # a term of the input's gradient, channel by channel
        case "native_group_norm_backward":
            return 2 * prod(ins[1][:2]) * itemsize  # sums of every sample and channel
        case "_scaled_dot_product_flash_attention_for_cpu":
            return _attention(ins, itemsize)
        case "_scaled_dot_product_flash_attention_for_cpu_backward":
            rows, keys = _attention_blocks(ins[1], ins[2])
            return 4 * (2 * rows * keys + rows)
        case "native_layer_norm_backward":
            return 2 * prod(ins[-1]) * 4  # one sum per thread of both parameters' gradients
    return 0


def reserve_bytes(name: str, output: int, ins: tuple[Shape, ...], itemsize: int = 4) -> int:
    """Bytes of an output whose size fake tensors do not know: the workspace that an RNN layer keeps for backward.

    oneDNN 3.12, rnn_utils `set_workspace_sizes`: gates, layer, iteration and cell states, hidden states, each from a
    page on, rows padded to 64 bytes (and once more where they would share cache sets).
    """
    if base_name(name) != "mkldnn_rnn_layer" or output != 3:
        return 0
    steps, batch, features = ins[0]
    hidden = ins[2][1]
    states = 2 * (steps + 1) * batch * itemsize
    parts = [steps * batch * _row(4 * hidden) * itemsize, steps * batch * _row(hidden) * itemsize]
    parts += 3 * [states * _row(max(features, hidden))] + 2 * [states * hidden]
    return sum(_pages(p) for p in parts)


# -- convolution --------------------------------------------------------------------------------------------


def _convolution(ins: tuple[Shape, ...], out: Shape, args: tuple[Any, ...], size: int) -> int:
    x, w = ins[0], ins[1]
    stride, padding, dilation, transposed, _, groups = args[-6:]
    if transposed or len(x) != 4:
        return 0  # not measured
    if not _by_onednn(x, w, stride, dilation, groups):
        return _columns(x, w, out, stride, padding) * size
    biases = _bias(w[0], size) if len(ins) > 2 else 0
    inside = 0 if x[1] // groups < BLOCK and groups == 1 else _blocked(x, size)
    inside += _weights(w, groups, size) + biases + _unit_stride(x, w, out, stride, padding, size)
    blocked, plain = _blocked(out, size), prod(out) * size
    return max(inside + blocked, blocked + plain) - plain


def _convolution_backward(ins: tuple[Shape, ...], args: tuple[Any, ...], size: int) -> int:
    gradient, x, w = ins[:3]
    stride, padding, dilation, transposed, _, groups, wanted = args[-7:]
    if transposed or len(x) != 4:
        return 0
    if not _by_onednn(x, w, stride, dilation, groups):
        return _columns(x, w, gradient, stride, padding) * size
    plain_x, plain_w = (prod(x) * size if wanted[0] else 0), prod(w) * size
    bias = w[0] * size if wanted[2] else 0
    outgoing = _blocked(gradient, size)
    peaks = [0]
    if wanted[0]:
        strided = max(stride) > 1
        inside = plain_x if strided else _blocked(x, size)  # strided ones keep channels last, unpadded
        scratch = STRIDED_SCRATCH + _pages(2 * x[1] * x[2] * x[3]) if strided else 0
        weights = _weights(w, groups, size, both=True)
        peaks += [outgoing + weights + inside + scratch, inside + plain_x + (plain_x if strided else 0)]
    blocked_w = _weights(w, groups, size, narrow=True)
    scratch = (_bias(w[0], size) if bias else 0) + _unit_stride(x, w, gradient, stride, padding, size)
    peaks.append(plain_x + outgoing + _narrow_input(x, groups, size) + blocked_w + scratch + bias)
    peaks.append(plain_x + blocked_w + plain_w + 2 * bias)
    return max(0, max(peaks) - plain_x - plain_w - bias)


def _by_onednn(x: Shape, w: Shape, stride: Shape, dilation: Shape, groups: int) -> bool:
    """Whether torch gives an fp32 convolution to oneDNN: aten/native/Convolution.cpp `use_mkldnn`, one thread."""
    unusual = max(stride) > 1 or max(dilation) > 1
    worth = unusual or x[0] >= 16 or w[-1] != 1 or w[-2] != 1
    return worth and (groups > 1 or min(w[-2:]) > 3 or x[0] > 1 or prod(x) > 20480)


def _columns(x: Shape, w: Shape, out: Shape, stride: Shape, padding: Shape) -> int:
    """Elements of the matrix that im2col makes; a 1x1 convolution reads its input as it is."""
    if max(w[2:]) == 1 and max(stride) == 1 and max(padding) == 0:
        return 0
    return x[0] * prod(w[1:]) * prod(out[2:])


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _blocked(t: Shape, size: int) -> int:
    """An activation in blocks of channels."""
    return t[0] * _up(t[1], BLOCK) * prod(t[2:]) * size


def _narrow_input(x: Shape, groups: int, size: int) -> int:
    """The input as backward-weights wants it: up to 3 channels as they are, up to 8 in a block of 8."""
    if groups > 1 or x[1] > 8:
        return _blocked(x, size)
    return 0 if x[1] < 4 else x[0] * 8 * prod(x[2:]) * size


def _weights(w: Shape, groups: int, size: int, both: bool = False, narrow: bool = False) -> int:
    """Weights in blocks: output channels padded, input channels too where there are at least a block of them.

    both: also fewer input channels (backward-data). narrow: 4 to 8 of them in a block of 8 (backward-weights).
    """
    if groups > 1 and w[1] == 1:
        return _up(w[0], BLOCK) * prod(w[1:]) * size
    channels = w[1]
    if both or channels >= BLOCK or (narrow and channels > 8):
        channels = _up(channels, BLOCK)
    elif narrow and channels >= 4:
        channels = 8
    return groups * _up(w[0] // groups, BLOCK) * channels * prod(w[2:]) * size


def _bias(channels: int, size: int) -> int:
    """A padded copy of the bias, where its channels do not fill the last block."""
    return _up(channels, BLOCK) * size + ALIGN if channels % BLOCK else 0


def _unit_stride(x: Shape, w: Shape, out: Shape, stride: Shape, padding: Shape, size: int) -> int:
    """A strided 1x1 convolution gathers the pixels that it reads of one image."""
    if max(w[2:]) > 1 or max(stride) == 1 or max(padding) > 0:
        return 0
    return _up(x[1], BLOCK) * prod(out[2:]) * size + ALIGN


# -- recurrent layers and attention -------------------------------------------------------------------------


def _row(n: int) -> int:
    """Elements from one row to the next: full cache lines, one more where rows would fall into the same cache sets."""
    padded = _up(n, 16)
    return padded + 16 if padded % 256 == 0 else padded


def _pages(n: int) -> int:
    return _up(n, PAGE)


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
