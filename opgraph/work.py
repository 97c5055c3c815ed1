"""Work and depth of single operators in closed form, average parallelism, and Brent's bounds.

Source of the forms: T. Ben-Nun and T. Hoefler, "Demystifying Parallel and Distributed Deep Learning" (ACM Computing
Surveys 52:4, 2019), sections 4.2 to 4.4 and the table of asymptotic work and depth of layers. Theirs are orders of
magnitude; here constants are counted: an addition, a multiplication and a comparison are one operation each (so that
work equals FLOP, an FMA being two), a sum or maximum over n terms takes ceil(log2 n) steps, all products at once one.
The machine has as many processors as it likes. Tests hold direct forms to traced graphs and to counting by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

Pass = Literal["forward", "input_gradient", "weight_gradient"]


@dataclass(frozen=True, slots=True)
class WorkDepth:
    """work: operations in total. depth: steps of the longest chain of operations that wait for each other."""

    work: float
    depth: float

    @property
    def parallelism(self) -> float:
        """Average parallelism W / D: processors that can be kept busy on average."""
        return self.work / self.depth if self.depth else 0.0

    def then(self, other: WorkDepth) -> WorkDepth:
        """One after the other."""
        return WorkDepth(self.work + other.work, self.depth + other.depth)

    def beside(self, other: WorkDepth) -> WorkDepth:
        """Both at once."""
        return WorkDepth(self.work + other.work, max(self.depth, other.depth))

    def repeated(self, count: float) -> WorkDepth:
        """`count` independent copies at once."""
        return WorkDepth(self.work * count, self.depth)


def brent_bounds(work: float, depth: float, processors: float) -> tuple[float, float]:
    """Steps on p processors: at least max(W / p, D), at most W / p + D for any greedy schedule.

    Source: R. P. Brent, "The parallel evaluation of general arithmetic expressions", JACM 21:2, 1974, in the form of
    Graham's bound; with W / p + D (p - 1) / p <= W / p + D.
    """
    if processors < 1:
        raise ValueError(f"{processors} processors are too few; give 1 or more")
    return max(work / processors, depth), work / processors + depth * (processors - 1) / processors


def tree(terms: float) -> int:
    """Steps in which a tree adds up so many terms."""
    return ceil(log2(terms)) if terms > 1 else 0


def dot_products(count: float, terms: int) -> WorkDepth:
    """`count` independent sums of `terms` products: 2 operations a term as FLOP counts it, one step and a tree."""
    return WorkDepth(2.0 * count * terms, tree(terms) + 1)


def fully_connected(batch: int, inputs: int, outputs: int, which: Pass = "forward") -> WorkDepth:
    """y = W x: work 2 N C_in C_out in each of the three passes, depth log2 of what is summed: the inputs, for the
    input's gradient the outputs, for the weight's the batch."""
    summed = {"forward": inputs, "input_gradient": outputs, "weight_gradient": batch}[which]
    return dot_products(batch * inputs * outputs / summed, summed)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A 2-D convolution: batch, channels in and out, output size, kernel size, stride 1 unless `stride` says more."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    stride: int = 1

    @property
    def input_height(self) -> int:
        return (self.height - 1) * self.stride + self.kernel_height

    @property
    def input_width(self) -> int:
        return (self.width - 1) * self.stride + self.kernel_width


def direct(c: Convolution, which: Pass = "forward") -> WorkDepth:
    """Work 2 N C_out C_in H W K_y K_x in each pass; depth log2 of what is summed: C_in K_y K_x in forward, about
    C_out K_y K_x / stride^2 for the input's gradient, N H W for the weight's."""
    total = c.batch * c.outputs * c.inputs * c.height * c.width * c.kernel_height * c.kernel_width
    taps = -(-c.kernel_height // c.stride) * -(-c.kernel_width // c.stride)  # of the kernel that meet one input pixel
    summed = {
        "forward": c.inputs * c.kernel_height * c.kernel_width,
        "input_gradient": c.outputs * taps,
        "weight_gradient": c.batch * c.height * c.width,
    }[which]
    return WorkDepth(2.0 * total, tree(summed) + 1)


def im2col(c: Convolution) -> WorkDepth:
    """One copy of every input of every output (one step), then the product of the direct form. The copies are work of
    their own: N H W C_in K_y K_x."""
    copies = c.batch * c.height * c.width * c.inputs * c.kernel_height * c.kernel_width
    return WorkDepth(float(copies), 1).then(direct(c))


def fft_1d(length: int) -> WorkDepth:
    """A complex transform of a power of two: 5 n log2 n operations (n/2 log2 n butterflies of a complex product, 6, and
    two complex additions, 4), 3 steps a level: the products, their two sums, the addition."""
    levels = tree(length)
    return WorkDepth(5.0 * 2**levels * levels, 3 * levels)


def fft_2d(height: int, width: int) -> WorkDepth:
    """Rows, then columns, padded to powers of two."""
    h, w = 2 ** tree(height), 2 ** tree(width)
    return fft_1d(w).repeated(h).then(fft_1d(h).repeated(w))


def fft_convolution(c: Convolution) -> WorkDepth:
    """Transforms of inputs (N C_in) and kernels (C_in C_out) at once, sums over C_in of complex products (8 operations
    a term) at every frequency, N C_out inverse transforms. Work O(H W log(H W) (N C_in + C_in C_out + N C_out) +
    H W N C_in C_out), depth O(log H W + log C_in). Stride 1 (larger ones compute it and drop)."""
    h, w = 2 ** tree(c.input_height), 2 ** tree(c.input_width)
    one = fft_2d(h, w)
    there = one.repeated(c.batch * c.inputs).beside(one.repeated(c.inputs * c.outputs))
    products = WorkDepth(8.0 * h * w * c.batch * c.inputs * c.outputs, 2 + tree(c.inputs))
    return there.then(products).then(one.repeated(c.batch * c.outputs))


def winograd(c: Convolution, tile: int = 2) -> WorkDepth:
    """F(m x m, r x r): tiles of a = m + r - 1 inputs overlap by r - 1; a^2 products stand for m^2 r^2.

    Transforms are counted as products with dense a x a (input), a x r (kernel) and m x a (output) matrices from both
    sides, an upper bound: real ones have many zeros. Work O(a^2 N P C_in C_out) with P = H W / m^2 tiles; depth
    2 log2 a for each transform, log2 C_in for the sum. ValueError unless the kernel is square and the stride 1.
    """
    if c.kernel_height != c.kernel_width or c.stride != 1:
        raise ValueError("Winograd's algorithm needs a square kernel and stride 1; use direct, im2col or FFT")
    r = c.kernel_height
    a = tile + r - 1
    tiles = c.batch * -(-c.height // tile) * -(-c.width // tile)
    inputs = dot_products(2.0 * a * a, a).work * tiles * c.inputs
    kernels = (dot_products(a * r, r).work + dot_products(a * a, r).work) * c.inputs * c.outputs
    there = WorkDepth(inputs, 2 * (tree(a) + 1)).beside(WorkDepth(kernels, 2 * (tree(r) + 1)))
    products = dot_products(float(a * a * tiles * c.outputs), c.inputs)
    back = WorkDepth((dot_products(tile * a, a).work + dot_products(tile * tile, a).work) * tiles * c.outputs,
                     2 * (tree(a) + 1))  # fmt: skip
    return there.then(products).then(back)


def pooling(batch: int, channels: int, height: int, width: int, kernel: int) -> WorkDepth:
    """Maximum or sum over kernel^2 inputs of every output: work N C H W (K^2 - 1), depth log2 K^2."""
    return WorkDepth(float(batch * channels * height * width * (kernel * kernel - 1)), tree(kernel * kernel))


def batch_norm(batch: int, channels: int, height: int, width: int) -> WorkDepth:
    """Mean, then variance, over N H W values of each channel, then (x - mean) * scale + shift.

    Work per value: 1 for the sum, 3 for differences, squares and their sum, 3 to normalise (times 1/sigma, times gamma,
    plus beta); per channel two divisions, an epsilon, a root, an inverse. Depth: a tree and a division; a subtraction,
    a square, a tree, a division; an epsilon, a root, an inverse; the last three.
    """
    values = batch * height * width
    work = channels * (7.0 * values + 5)
    return WorkDepth(work, 2 * (tree(values) + 1) + 2 + 3 + 3)


def activation(elements: float, operations: int = 1) -> WorkDepth:
    """A function of each element, counted as `operations` in a row (ReLU 1)."""
    return WorkDepth(elements * operations, operations)


def rnn_cell(batch: int, inputs: int, hidden: int, gates: int = 1) -> WorkDepth:
    """One step: the products of [x, h] with the weights, biases, the gates' functions, and how they combine.

    gates: 1 plain (h = tanh), 3 GRU, 4 LSTM (c = f c + i g, h = o tanh c). Work 2 N G H (I + H) + O(N G H).
    """
    units = float(batch * hidden)
    product = dot_products(units * gates, inputs + hidden)
    functions = activation(units * gates, 2)  # bias, then the function
    mixed = {1: WorkDepth(0, 0), 3: WorkDepth(5 * units, 4), 4: WorkDepth(5 * units, 4)}
    if gates not in mixed:
        raise ValueError(f"there is no cell of {gates} gates; give 1 (plain), 3 (GRU) or 4 (LSTM)")
    return product.then(functions).then(mixed[gates])


def recurrent(batch: int, inputs: int, hidden: int, steps: int, layers: int = 1, gates: int = 1) -> WorkDepth:
    """Layers over steps. A cell waits for the step before and the layer below, so the longest chain passes
    steps + layers - 1 cells (a wavefront): all steps in the first layer or in a later one, whichever is deeper."""
    first = rnn_cell(batch, inputs, hidden, gates)
    others = rnn_cell(batch, hidden, hidden, gates)
    work = steps * (first.work + (layers - 1) * others.work)
    along_first = steps * first.depth + (layers - 1) * others.depth
    along_later = first.depth + (steps + layers - 2) * others.depth
    return WorkDepth(work, along_first if layers == 1 else max(along_first, along_later))
