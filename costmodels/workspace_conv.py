"""What convolutions of a CPU hold inside themselves: oneDNN's reordered copies, the columns of im2col.

Read from memory events of single ops: with plain inputs oneDNN (3.12) works on blocks of channels and copies all that
it reads and writes; with channels last it copies only weights. A transposed convolution is the gradient of an ordinary
one that leads back, so the same phases serve: forward, gradient of the input, gradient of the weight. One-dimensional
ones run as images of one row, after their tensors were made contiguous (aten/native/Convolution.cpp).
"""

from __future__ import annotations

from math import prod
from typing import Any

from costmodels.workspace_layout import PAGE, Shape, as_channels_last, channels_last, contiguous, up

BLOCK = 16  # channels of a oneDNN block of fp32 under AVX-512
ALIGN = 128  # oneDNN's scratchpad starts on a multiple of this
STRIDED_SCRATCH = 20504  # bytes that a strided backward-data convolution keeps for its batch of small products
STRIDED = 36888  # the same where channels are last or it serves a transposed one: 9 pages (9 to 17 were seen)
UNEVEN = 74008  # where a transposed one's stride does not divide its kernel (57,624 to 106,776 were seen)
UNSTRIDED, FORWARD = 8344, 8216  # with channels last and no stride: backward-data, forward
COLUMNS_AND_MORE = 256  # beside the columns of a depthwise gradient


def convolution(
    ins: tuple[Shape, ...], out: Shape, args: tuple[Any, ...], size: int, strides: tuple[Shape, ...]
) -> int:
    """Bytes inside a forward convolution. args: its last six are stride, padding, dilation, transposed, output padding,
    groups; strides: of the inputs, empty where all are contiguous."""
    stride, padding, dilation, transposed, _, groups = args[-6:]
    last = _last(ins[0], ins[1], strides)
    copied = _copied(ins[:1], last, strides) * size
    x, w, out = _image(ins[0]), _image(ins[1]), _image(out)
    biases = _bias(w[0], size) if len(ins) > 2 and not transposed else 0
    if not _by_onednn(x, w, stride, dilation, groups):
        held = _transposed_columns(x, w) if transposed else _columns(x, w, out, stride, padding)
        return copied + (held + _joined(groups, out)) * size
    plain, strided = prod(out) * size, max(stride) > 1
    if last:
        scratch = 0 if groups > 1 else (STRIDED + ALIGN if strided else UNSTRIDED) if transposed else FORWARD
        return copied + _weights_copied(w, size) + _last_weights(w, groups, size, data=transposed) + scratch
    if transposed:
        scratch = _transposed_scratch(out, w, stride, len(ins) > 2, size)
        return copied + _data(x, out, w, groups, size, scratch, strided) - plain
    inside = _read(x, groups, size) + _weights(w, groups, size) + biases
    inside += _unit_stride(x, w, out, stride, padding, size)
    return copied + max(inside + _blocked(out, size), _blocked(out, size) + plain) - plain


def convolution_backward(ins: tuple[Shape, ...], args: tuple[Any, ...], size: int, strides: tuple[Shape, ...]) -> int:
    """The same of its gradients. args: of its last seven the first six as in `convolution`, then which are wanted."""
    stride, padding, dilation, transposed, _, groups, wanted = args[-7:]
    last = _last(ins[1], ins[2], strides[1:])
    copied = _copied(ins[:2], last, strides) * size
    gradient, x, w = (_image(t) for t in ins[:3])
    channels = gradient[1]
    plain_x, plain_w = (prod(t) * size if want else 0 for t, want in zip((x, w), wanted))
    bias = channels * size if wanted[2] else 0
    if not _by_onednn(x, w, stride, dilation, groups):
        joined = _joined(groups, x, w, (channels,) if bias else (0,))
        return copied + joined * size + _slow_backward(gradient, x, w, stride, padding, transposed, wanted, size)
    strided = max(stride) > 1
    if last:
        weights = _last_weights(w, groups, size, data=not transposed)
        scratch = 0 if groups > 1 else STRIDED if strided and not transposed else UNSTRIDED
        peaks = [plain_x + weights + scratch if wanted[0] else 0]
        if wanted[1]:
            peaks.append(plain_x + _last_gradient(w, groups, size) + 2 * bias + 2 * plain_w)
        return copied + _weights_copied(w, size) + max(0, max(peaks) - plain_x - plain_w - bias)
    peaks = [0]
    if wanted[0] and transposed:
        peaks += [_read(gradient, groups, size) + _weights(w, groups, size) + _blocked(x, size)]
        peaks += [_blocked(x, size) + plain_x]
    elif wanted[0]:
        scratch = STRIDED_SCRATCH + up(2 * x[1] * prod(x[2:]), PAGE) if strided else 0
        peaks.append(_data(gradient, x, w, groups, size, scratch, strided))
    if not wanted[1]:  # frozen
        return copied + max(0, max(peaks) - plain_x)
    read, made = (gradient, x) if transposed else (x, gradient)  # of the convolution whose weight it is
    blocked_w = _weights(w, groups, size, narrow=True)
    if _depthwise(w, groups) and max(w[2:]) != 3:  # a product with columns, four gradients beside each other
        inside = 5 * plain_w + prod(w[2:]) * prod(gradient[2:]) * size + COLUMNS_AND_MORE
    else:
        by = 8 if groups == 1 and 4 <= read[1] <= 8 else BLOCK  # few channels in: blocks of 8 on both sides
        inside = _blocked(made, size, by) + _narrow_input(read, groups, size) + blocked_w
        inside += _bias(w[0], size) if bias else 0
        inside += 0 if transposed else _unit_stride(read, w, made, stride, padding, size)
    peaks += [plain_x + inside + bias, plain_x + blocked_w + plain_w + 2 * bias]
    return copied + max(0, max(peaks) - plain_x - plain_w - bias)


def _data(gradient: Shape, x: Shape, w: Shape, groups: int, size: int, scratch: int, strided: bool) -> int:
    """Most bytes in the gradient of an input x, itself included. Strided ones keep channels last, unpadded."""
    plain = prod(x) * size
    unpadded = strided and not _depthwise(w, groups)
    inside = plain if unpadded else _blocked(x, size)
    scratch = 0 if _depthwise(w, groups) else scratch
    weights = _weights(w, groups, size, both=True)
    return max(_blocked(gradient, size) + weights + inside + scratch, inside + plain + (plain if unpadded else 0))


def _transposed_scratch(out: Shape, w: Shape, stride: Shape, bias: bool, size: int) -> int:
    """What a transposed convolution keeps beside its copies: without a stride its result once more, for the bias; with
    one its small products, and the result where the stride does not divide the kernel (sizes read from single ops)."""
    if max(stride) == 1:
        return _blocked(out, size) + ALIGN if bias else 0
    even = all(k % s == 0 for k, s in zip(w[-len(stride) :], stride))
    return STRIDED + ALIGN if even else prod(out) * size + UNEVEN


def _joined(groups: int, *made: Shape) -> int:
    """Elements of what torch's own kernels make group by group and then join."""
    return sum(prod(t) for t in made) if groups > 1 else 0


def _slow_backward(gradient: Shape, x: Shape, w: Shape, stride: Shape, padding: Shape, transposed: bool,
                   wanted: Any, size: int) -> int:  # fmt: skip
    """torch's own kernels: columns; volumes also make those of a 1x1x1 kernel, for the input's gradient."""
    if transposed:
        return _transposed_columns(x, w) * size if max(w[2:]) > 1 else 0
    if len(x) == 5 and wanted[0] and max(w[2:]) == 1:
        return max(0, prod(x) - prod(w)) * size
    return _columns(x, w, gradient, stride, padding) * size


def _by_onednn(x: Shape, w: Shape, stride: Shape, dilation: Shape, groups: int) -> bool:
    """Whether torch gives an fp32 convolution to oneDNN: aten/native/Convolution.cpp `use_mkldnn`, one thread."""
    unusual = max(stride) > 1 or max(dilation) > 1
    worth = unusual or x[0] >= 16 or w[-1] != 1 or w[-2] != 1
    return worth and (groups > 1 or min(w[-2:]) > 3 or x[0] > 1 or prod(x) > 20480)


def _image(t: Shape) -> Shape:
    """One-dimensional tensors as images of one row."""
    return (*t[:2], 1, t[2]) if len(t) == 3 else t


def _last(x: Shape, w: Shape, strides: tuple[Shape, ...]) -> bool:
    """Whether the convolution works with channels last: its input or its weight has them (aten ConvUtils.h)."""
    return bool(strides) and len(x) > 3 and (channels_last(x, strides[0]) or channels_last(w, strides[1]))


def _copied(read: tuple[Shape, ...], last: bool, strides: tuple[Shape, ...]) -> int:
    """Elements of the copies of inputs that do not lie as the convolution wants them."""
    order = as_channels_last if last else tuple
    return sum(prod(t) for t, s in zip(read, strides) if not contiguous(order(t), order(s)))


def _columns(x: Shape, w: Shape, out: Shape, stride: Shape, padding: Shape) -> int:
    """Elements of the matrix that im2col makes; a 1x1 convolution reads its input as it is."""
    if max(w[2:]) == 1 and max(stride) == 1 and max(padding) == 0:
        return 0
    return x[0] * prod(w[1:]) * prod(out[2:])


def _transposed_columns(x: Shape, w: Shape) -> int:
    return x[0] * prod(w[1:]) * prod(x[2:])


def _depthwise(w: Shape, groups: int) -> bool:
    return groups > 1 and w[0] == groups and w[1] == 1


def _blocked(t: Shape, size: int, by: int = BLOCK) -> int:
    """An activation in blocks of channels."""
    return t[0] * up(t[1], by) * prod(t[2:]) * size


def _read(x: Shape, groups: int, size: int) -> int:
    """The input of a forward convolution; few channels are read as they are."""
    return 0 if x[1] // groups < BLOCK and groups == 1 else _blocked(x, size)


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
        return up(w[0], BLOCK) * prod(w[1:]) * size
    channels = w[1]
    if both or channels >= BLOCK or (narrow and channels > 8):
        channels = up(channels, BLOCK)
    elif narrow and channels >= 4:
        channels = 8
    return groups * up(w[0] // groups, BLOCK) * channels * prod(w[2:]) * size


def _bias(channels: int, size: int) -> int:
    """A padded copy of the bias, where its channels do not fill the last block."""
    return up(channels, BLOCK) * size + ALIGN if channels % BLOCK else 0


def _unit_stride(x: Shape, w: Shape, out: Shape, stride: Shape, padding: Shape, size: int) -> int:
    """A strided 1x1 convolution gathers the pixels that it reads of one image."""
    if len(x) == 5 or w[1] == 1 or max(w[2:]) > 1 or max(stride) == 1 or max(padding) > 0:
        return 0
    return up(x[1], BLOCK) * prod(out[2:]) * size + ALIGN


# -- channels last ------------------------------------------------------------------------------------------


def _weights_copied(w: Shape, size: int) -> int:
    """torch gives oneDNN the weight with channels last; one of 1x1 or of one input channel lies so already."""
    return prod(w) * size if prod(w[2:]) > 1 and w[1] > 1 else 0


def _last_weights(w: Shape, groups: int, size: int, data: bool) -> int:
    """Weights as a convolution with channels last wants them: what it makes padded, what it reads as it is; groups
    full blocks, unless depthwise. data: backward-data makes the input's channels."""
    if _depthwise(w, groups):
        return up(w[0], BLOCK) * prod(w[2:]) * size
    if groups > 1:
        return _full_groups(w, groups, size)
    made, read = (w[1], w[0]) if data else (w[0], w[1])
    return up(made, BLOCK) * read * prod(w[2:]) * size


def _last_gradient(w: Shape, groups: int, size: int) -> int:
    """The gradient of the weight in blocks; only depthwise kernels of 3 have one of their own."""
    if _depthwise(w, groups) and max(w[2:]) == 3:
        return up(w[0], BLOCK) * prod(w[2:]) * size
    if groups > 1:
        return _full_groups(w, groups, size)
    return up(w[0], BLOCK) * (w[1] if w[1] < BLOCK else up(w[1], BLOCK)) * prod(w[2:]) * size


def _full_groups(w: Shape, groups: int, size: int) -> int:
    return groups * up(w[0] // groups, BLOCK) * up(w[1], BLOCK) * prod(w[2:]) * size
