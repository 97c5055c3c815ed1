"""The time of one op on one device: measured, interpolated, extrapolated, or a roofline where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from operator import le, mul
from typing import TYPE_CHECKING, Any

from costmodels.context import Layout, is_stream, runs_of
from costmodels.conv_cpu import way
from costmodels.device import Device, Law
from costmodels.families import COMPUTE, FREE, base_name, family
from costmodels.features import CONTEXT, FORMS, extent, features, form_of, touched
from costmodels.kernels import kernel_price, kernel_prices
from costmodels.neighbours import Neighbours
from costmodels.price import Price, Source
from costmodels.signature import SCALAR, Signature
from opgraph.eight_bits import EIGHT_BIT, MARK

if TYPE_CHECKING:
    from opgraph.graph import Op, OpGraph

# Shares of the data-sheet peak where nothing was measured: ASSUMPTIONS.
# gemm, conv: plateau of NeuSight's fp32 linears (A100 .84-.93, H100 .77) and best measured bf16 (stas00, .80-.87).
# attention: FlashAttention-2 on A100 50-73 %; backward at .75-.85 of the forward's share.
# the others: share of the data-sheet bandwidth in NeuSight (elementwise A100 .87, softmax .42-.79, layer norm .5-.64).
# All from shared/facts/compute.md B1-B4.
ASSUMED_EFFICIENCY = {
    "gemm": 0.80, "conv": 0.60, "conv_backward": 0.55, "attention": 0.60, "attention_backward": 0.48, "rnn": 0.30,
    "rnn_backward": 0.30, "norm": 0.57, "norm_backward": 0.50, "softmax": 0.60, "pointwise": 0.85, "copy": 0.85,
    "optimizer": 0.80, "reduction": 0.70,
}  # fmt: skip
ASSUMED_OTHER = 0.60
ROOFLINE_ERROR = 0.30  # mean error of a roofline with assumed shares: shared/facts/compute.md B1 (28-35 % on linears)
EIGHT = ("fp8 cast", "fp8")  # variants of products in 8 bits: with and without the cast of their activations
CAST = "aten._to_copy.default"
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
ARITHMETIC = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
SLOWED = COMPUTE - {"rnn", "rnn_backward"}
# Features of what ran before, by form: they stand beside each other.
AFTER = {form: slice(1, 1 + sum(name in CONTEXT for name in names)) for form, names in FORMS.items()}
# How many times slower an accelerator computes floats that its data sheet does not list than those of half the width.
# ASSUMPTIONS. float32: six of the nine products of three bfloat16 pieces each, as XLA's highest precision makes them on
# TPUs (from memory); data sheets that list both have 4 (Trainium, Ascend 910B) to 15 (TPU v2), Gaudi 3 has 7. float64:
# what GPUs for games have (1/32 to 1/64 of float32; catalogue, Turing to Blackwell); emulation would cost no less.
PASSES = {"float32": 6.0, "float64": 64.0}
CPU_PASSES = 2.0  # float64 on a CPU: a vector register holds half as many
STAND_IN_ERROR = 0.9  # expected relative error of such a price: the data sheets' factors span 4 to 15
EXTRAPOLATION_FACTOR = 2.0  # an extrapolated law is taken to be twice as wrong as on its held-out half


@dataclass(frozen=True, slots=True)
class OpShape:
    """What a price depends on: an op's name, its phase, the shapes of its tensor arguments and results, dtype, FLOP
    (an FMA is two), bytes read and bytes written (outputs and mutated inputs), whether an attention is causal (its
    FLOP are those of all pairs either way, as torch counts), which of an op's kernels its arguments ask for
    (`variant_of`; empty for most), in how many stretches its operands lie (`context.inner_runs`), and what ran before
    it (`context.in_context`: `swept` and `since`, bytes; 0 where caches hold what it needs)."""

    name: str
    phase: str
    in_shapes: tuple[tuple[int, ...], ...]
    out_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    flops: int
    bytes_read: int
    bytes_written: int
    causal: bool = False
    variant: str = ""
    runs: int = 1
    swept: int = 0
    since: int = 0

    def __hash__(self) -> int:  # of what tells nearly all ops apart: of all fields it takes twice as long
        return hash((self.name, self.in_shapes, self.swept, self.since))


def shape_of(graph: OpGraph, op: Op) -> OpShape:
    """The OpShape of an op of a graph."""
    ins = tuple(graph.tensors[i].shape for i in op.inputs)
    outs = tuple(graph.tensors[i].shape for i in op.outputs)
    # Integer inputs (indices, targets) do not name the dtype that an op computes in.
    dtypes = [graph.tensors[i].dtype for i in (*op.outputs, *op.inputs, *op.mutates)]
    dtype = next((d for d in dtypes if "float" in d), dtypes[0] if dtypes else "float32")
    read, written = graph.bytes_read(op), graph.bytes_written(op)
    operands = [graph.tensors[i].dtype for i in op.inputs if graph.tensors[i].shape]
    layouts: list[list[Layout]] = [[], []]
    if layout_counts(op.name):
        layouts = [[(graph.tensors[i].shape, graph.tensors[i].strides) for i in ids] for ids in (op.outputs, op.inputs)]
    variant = variant_of(op.name, op.args, op.kwargs, operands, layouts[1])
    runs = runs_of(*layouts) if is_stream(op.name) else 1
    return OpShape(op.name, op.phase, ins, outs, dtype, op.flops, read, written, is_causal(op), variant, runs)


def is_causal(op: Op) -> bool:
    """Whether an attention op (forward or backward) was called with a causal mask: in every fused attention of torch
    this is the first flag after the probability of dropout."""
    if "attention" not in op.name:
        return False
    if dict(op.kwargs).get("is_causal") is True:
        return True
    dropout = next((i for i, a in enumerate(op.args) if isinstance(a, float)), len(op.args))
    return next((a for a in op.args[dropout:] if isinstance(a, bool)), False)


def layout_counts(name: str) -> bool:
    """Whether the price of an op depends on how its operands lie in memory."""
    return base_name(name) in PRODUCTS or is_stream(name)


def variant_of(
    name: str,
    args: Iterable[Any],
    kwargs: Iterable[tuple[str, Any]],
    dtypes: Iterable[str] = (),
    layouts: Iterable[Layout] = (),
) -> str:
    """What the arguments of an op say about its kernel that shapes do not: "tanh" of a gelu that approximates, the
    window of a pooling ("3x3"), "cast" of arithmetic on operands of several dtypes (`dtypes`: of those with dims), one
    of which is converted first, "fp8" of a product in 8 bits (`opgraph.eight_bits`), "tn" of one whose left factor is
    transposed in memory and whose right one is not (`layouts`: of the operands). Laws of a CPU are fitted by
    variant where calibration saw it.

    >>> variant_of("aten.gelu.default", (), (("approximate", "tanh"),))
    'tanh'
    >>> variant_of("aten.mul.Tensor", (), (), ("float32", "bool"))
    'cast'
    >>> variant_of("aten.mm.default", (), (), (), [((8, 4), (1, 8)), ((4, 6), (6, 1))])
    'tn'
    """
    base = base_name(name)
    if base in PRODUCTS:
        if mark := dict(kwargs).get(MARK):
            return EIGHT[mark == "found"]
        return "".join("nt"[strides[-1] != 1 != shape[-1]] for shape, strides in layouts if len(shape) > 1)
    if base in ARITHMETIC:
        return "cast" if len(set(dtypes)) > 1 else ""
    if base in ("gelu", "gelu_backward"):
        chosen = dict(kwargs).get("approximate") or next((a for a in args if isinstance(a, str)), "none")
        return "" if chosen == "none" else str(chosen)
    if base in ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward"):
        window = next((a for a in args if isinstance(a, tuple | list) and a and isinstance(a[0], int)), ())
        return "x".join(map(str, window))
    return ""


def kernel_key(shape: OpShape) -> str:
    """The key of the law that an op of this kind and dtype has of its own: "mm/float32", "gelu.tanh/float32",
    "convolution.native/float32"."""
    return _key(shape.name, shape.variant or way(shape), shape.dtype)


@lru_cache(maxsize=4096)
def _key(name: str, variant: str, dtype: str) -> str:
    return f"{base_name(name)}{'.' if variant else ''}{variant}/{dtype}"


def signature(shape: OpShape, kernel: str = "") -> Signature:
    """What equal ops share: `kernel_key` (`kernel`, where that is known), shapes of the operands and of the results."""
    return kernel or kernel_key(shape), shape.in_shapes or SCALAR, shape.out_shapes or SCALAR


def price(device: Device, shape: OpShape) -> Price:
    """The time of one op; cached on the device."""
    found: Price | None = device.cache.get(shape)
    if found is not None:
        return found
    if shape.variant in EIGHT:
        device.cache[shape] = found = _in_eight_bits(device, shape)
        return found
    if device.laws:
        found = _measured_here(device, shape)
    elif device.in_tf32:
        found = _faster([_by_law(device, run) for run in _formats(device, shape)])
    else:
        found = _by_law(device, shape)
    return _keep(device, shape, found)


def _by_law(device: Device, shape: OpShape) -> Price:
    """The price of an op on an accelerator, in the format that it has."""
    return _known(device, shape, None, "") or kernel_price(device, shape) or _roofline(device, shape)


def _in_eight_bits(device: Device, shape: OpShape) -> Price:
    """A product in 8 bits after the pass that casts its activations as they are and transposed, with the search for
    their largest magnitude; one in 16 bits where the device has none of 8."""
    plain = replace(shape, variant="")
    if EIGHT_BIT not in device.peak_flops:
        return price(device, plain)
    product = price(device, replace(plain, dtype=EIGHT_BIT, bytes_read=shape.bytes_read // 2))
    if shape.variant != EIGHT[0]:
        return product
    given = next(s for s in shape.in_shapes if len(s) >= 2)
    size = prod(given)
    cast = price(device, OpShape(CAST, shape.phase, (given,), (given,), shape.dtype, 0, 2 * size, 2 * size))
    return replace(product, seconds=product.seconds + cast.seconds)


def _formats(device: Device, shape: OpShape) -> tuple[OpShape, ...]:
    """The op in the formats that its device may compute it in. Where cuDNN may round a convolution it need not: its
    ways in float32 (Winograd) stay open."""
    if not device.in_tf32 or shape.dtype != "float32" or (kind := family(shape.name)) not in device.in_tf32:
        return (shape,)
    rounded = replace(shape, dtype="tf32")
    return (rounded, shape) if kind.startswith("conv") else (rounded,)


def _faster(prices: Iterable[Price]) -> Price:
    return min(prices, key=lambda price: price.seconds)


def _measured_here(device: Device, shape: OpShape) -> Price:
    """The price of an op on a calibrated machine."""
    kernel = kernel_key(shape)
    law = law_among(device.laws, shape, kernel)
    if (known := _known(device, shape, law, kernel)) is not None:
        return known
    return _roofline(device, shape) if law is None else _by_neighbours(device.neighbours, law, kernel, shape)


def price_many(device: Device, shapes: Sequence[OpShape]) -> list[Price]:
    """`[price(device, s) for s in shapes]`, with the kernels of all ops of one kind evaluated at once."""
    if device.laws:
        return [price(device, shape) for shape in shapes]
    first: dict[OpShape, OpShape] = {}
    ops = [first.setdefault(shape, shape) for shape in shapes]  # equal ones are one: identity spares comparing fields
    for shape in first:
        if shape.variant in EIGHT:
            price(device, shape)
    unknown = {shape: _formats(device, shape) for shape in first if shape not in device.cache}
    runs = [run for formats in unknown.values() for run in formats]
    known = [_known(device, run, None, "") for run in runs]
    priced = iter(kernel_prices(device, [run for run, found in zip(runs, known) if found is None]))
    prices = iter([found or next(priced) or _roofline(device, run) for run, found in zip(runs, known)])
    for shape, formats in unknown.items():
        _keep(device, shape, _faster([next(prices) for _ in formats]))
    return [device.cache[shape] for shape in ops]


def _keep(device: Device, shape: OpShape, found: Price) -> Price:
    """Remembers a price at the pace of this device; layers of recurrent cells are made of products that have it."""
    if family(shape.name) in COMPUTE and (note := stand_in(device, shape.dtype)):
        source: Source = "roofline" if found.source == "roofline" else "extrapolated"
        found = replace(found, source=source, error=max(found.error, STAND_IN_ERROR), note=note)
    if device.slowest != 1.0 and family(shape.name) in SLOWED:
        found = replace(found, seconds=found.seconds * device.slowest)
    device.cache[shape] = found
    return found


def law_of(device: Device, shape: OpShape) -> Law | None:
    """The law of this op, variant and dtype, else of the op and dtype, else the pooled law of its family and dtype,
    else none."""
    return law_among(device.laws, shape)


def law_among(laws: Mapping[str, Law], shape: OpShape, kernel: str = "") -> Law | None:
    """The same, among these laws. `kernel` is the op's `kernel_key`, where that is known."""
    if not laws:  # an accelerator's
        return None
    if law := laws.get(kernel or kernel_key(shape)):
        return law
    return laws.get(f"{base_name(shape.name)}/{shape.dtype}") or laws.get(f"{family(shape.name)}:{shape.dtype}")


def _known(device: Device, shape: OpShape, law: Law | None, kernel: str) -> Price | None:
    """The price of an op that does nothing, or that was measured itself; of its law the error is asked."""
    if family(shape.name) in FREE:
        return Price(0.0, "measured" if device.calibrated else "roofline", 0.0)
    if device.samples and (seen := device.samples.get(signature(shape, kernel))) is not None:
        return Price(seen, "measured", min(0.05, law.error) if law else 0.05)
    return None


def law_second(neighbours: Neighbours, law: Law, kernel: str, shape: OpShape) -> float:
    """Seconds of an op of a `kernel_key` by a law and by what the nearest measured ops say of it. An op never takes
    less time after others have emptied the caches than in full ones, whatever its neighbours took: lower bounds rest on
    that."""
    weights, values, after = law.coefficients, features(shape, law.form), AFTER[law.form]
    here = full = sum(map(mul, weights, values))
    if shape.swept or shape.since:
        full -= sum(map(mul, weights[after], values[after]))
    if not neighbours.ratios:
        return here
    ratio, settled = neighbours.factor(kernel, shape)
    return max(here * ratio, full * settled)


def _roofline(device: Device, shape: OpShape) -> Price:
    return Price(roofline_seconds(device, shape), "roofline", ROOFLINE_ERROR)


def _by_neighbours(neighbours: Neighbours, law: Law, kernel: str, shape: OpShape) -> Price:
    seconds, reached = law_second(neighbours, law, kernel, shape), extent(shape, law.form)
    if all(map(le, law.low, reached)) and all(map(le, reached, law.high)) and ":" not in law.key:
        return Price(seconds, "interpolated", law.error)
    return Price(seconds, "extrapolated", EXTRAPOLATION_FACTOR * law.error)


def roofline_seconds(device: Device, shape: OpShape) -> float:
    """floor + max(FLOP / reachable FLOP/s, bytes / reachable bytes/s) (Williams et al. 2009)."""
    kind = family(shape.name)
    share = device.efficiency.get(kind, ASSUMED_EFFICIENCY.get(kind, ASSUMED_OTHER))
    streaming = device.efficiency.get("pointwise", ASSUMED_EFFICIENCY["pointwise"])
    compute = shape.flops / (peak_of(device, shape.dtype) * (share if kind in COMPUTE else 1.0))
    memory = touched(shape) / (device.memory_bandwidth * (streaming if kind in COMPUTE else share))
    return device.floor_seconds + max(compute, memory)


def peak_of(device: Device, dtype: str) -> float:
    """Dense FLOP/s of a dtype; what the data sheet leaves out runs as libraries run it.

    All float8 share a rate, or the 16-bit one (A100); 8-bit integers that are not listed take theirs (ASSUMPTION).
    Accelerators compute 16-bit floats in float32 where that is faster (bfloat16 on V100, float16 on P40); a CPU's rates
    are measured, so they stand. Wider floats that are not listed are `PASSES` times slower than the narrower ones. The
    rest takes float32's rate. "tf32" must be asked for.
    """
    peaks = device.peak_flops
    listed = peaks.get(dtype, 0.0)
    if dtype in ("float16", "bfloat16") and device.kind != "cpu":
        halves = peaks.get("float16") or peaks.get("bfloat16") or min(peaks.values())
        return max(listed, peaks.get("float32") or halves)
    if (dtype.startswith("float8") or (dtype == "int8" and device.kind != "cpu")) and not listed:
        return peaks.get("float8_e4m3fn") or max(peak_of(device, d) for d in ("bfloat16", "float16"))
    if listed:
        return listed
    cpu = device.kind == "cpu"
    single = peaks.get("float32") or min(peaks.values()) / (1.0 if cpu else PASSES["float32"])
    return single / (CPU_PASSES if cpu else PASSES["float64"]) if dtype == "float64" else single


def stand_in(device: Device, dtype: str) -> str:
    """What is said of the rate of a float that is that of narrower ones over `PASSES`; empty where that is not so."""
    if dtype not in PASSES or device.kind == "cpu" or dtype in device.peak_flops:
        return ""
    narrow = "float32" if dtype == "float64" else "16-bit floats"
    return f"the data sheet of {device.name} lists no {dtype}: at {narrow}'s rate / {PASSES[dtype]:.0f}, an assumption"


def total(prices: Iterable[Price]) -> float:
    """Seconds of ops that run one after the other."""
    return sum(p.seconds for p in prices)


__all__ = [
    "OpShape", "Price", "form_of", "is_causal", "kernel_key", "law_among", "law_of", "law_second", "peak_of", "price",
    "price_many", "roofline_seconds", "shape_of", "signature", "stand_in", "total", "variant_of",
]  # fmt: skip
