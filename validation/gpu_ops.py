"""The ops of the GPU suite's sweeps as torch calls, with the shape by which they are priced.

Every case is built in copies that rotate (`validation.gpu_time`). The price's shape is read off the tensors themselves,
so that measured and priced are the same op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from costmodels.ops import OpShape
from validation.gpu_shapes import Case
from validation.gpu_time import Call, copies_of

Make = Callable[[], tuple[Callable[[], Any], Sequence[Any]]]  # a call, and the tensors that it reads
SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH", "cudnn": "CUDNN_ATTENTION"}
ATEN_SDPA = {
    "flash": "_scaled_dot_product_flash_attention", "efficient": "_scaled_dot_product_efficient_attention",
    "math": "_scaled_dot_product_attention_math", "cudnn": "_scaled_dot_product_cudnn_attention",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Built:
    """call(i) runs the op on the copy of its inputs that is next; shape: what prices it."""

    call: Call
    shape: OpShape
    copies: int


def build(case: Case, device: str, cache: int) -> Built:
    """A case on a device ("cuda", "cpu") with `cache` bytes of last cache. Raises what torch raises for an op that it
    does not have there."""
    makers = {"gemm": _product, "attention": _attention, "conv": _convolution, "rowwise": _rowwise}
    make, name, flops = makers[case.group](case, device)
    first, inputs = make()
    results = first()
    outputs = [t for t in (results if isinstance(results, (tuple, list)) else [results]) if _is_tensor(t)]
    shape = shape_from(case, name, inputs, outputs, flops)
    count = copies_of(shape.bytes_read + shape.bytes_written, cache)
    calls = [first, *(make()[0] for _ in range(count - 1))]
    return Built(lambda i: calls[i % count](), shape, count)


def shape_from(case: Case, name: str, inputs: Sequence[Any], outputs: Sequence[Any], flops: int) -> OpShape:
    """The op's shape from its tensors; an op that returns nothing has written what it read."""
    ins, outs = ([tuple(int(d) for d in t.shape) for t in tensors] for tensors in (inputs, outputs))
    read, written = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (inputs, outputs or inputs))
    backward = name.endswith(("_backward", "_backward_data"))
    causal = case.group == "attention" and bool(case.dims[5])
    phase = "optimizer" if case.op == "adamw" else "backward" if backward else "forward"
    return OpShape(f"aten.{name}.default", phase, tuple(ins), tuple(outs), case.dtype, flops, read, written, causal)


@contextmanager
def precision(dtype: str, device: str) -> Iterator[None]:
    """float32 products and convolutions in full precision, or (dtype "tf32") in tf32. torch's older switches: its
    compiler reads them, and mixing them with the newer ones is an error (torch 2.9 and later)."""
    import torch

    if device == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _random(shape: Sequence[int], dtype: str, device: str) -> Any:
    """Normal numbers: products of zeros run faster (less power), so they would not be like training."""
    import torch

    plain = {"tf32": "float32", "float8_e4m3fn": "bfloat16"}.get(dtype, dtype)
    made = torch.randn(tuple(shape), dtype=getattr(torch, plain), device=device)
    return made.to(torch.float8_e4m3fn) if dtype == "float8_e4m3fn" else made


def _product(case: Case, device: str) -> tuple[Make, str, int]:
    import torch

    b, m, n, k = case.dims
    flops = 2 * b * m * n * k

    def make() -> tuple[Callable[[], Any], Sequence[Any]]:
        if case.dtype == "float8_e4m3fn":  # the right operand by columns, as cuBLASLt wants it
            left, right = _random((m, k), case.dtype, device), _random((n, k), case.dtype, device).t()
            one = torch.ones((), device=device)
            eight: Any = torch._scaled_mm
            return lambda: eight(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), (left, right)
        if b > 1:
            left, right = _random((b, m, k), case.dtype, device), _random((b, k, n), case.dtype, device)
            return lambda: torch.bmm(left, right), (left, right)
        # a Linear's product: its weight lies as (n, k)
        left, right = _random((m, k), case.dtype, device), _random((n, k), case.dtype, device).t()
        return lambda: torch.mm(left, right), (left, right)

    return make, {"float8_e4m3fn": "_scaled_mm"}.get(case.dtype, "mm" if b == 1 else "bmm"), flops


def _attention(case: Case, device: str) -> tuple[Make, str, int]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, kv_heads, tokens, width, causal, backward = case.dims
    pairs = batch * heads * tokens * tokens
    backend = getattr(SDPBackend, SDPA[case.op])

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=bool(causal), enable_gqa=heads != kv_heads)

    def make() -> tuple[Callable[[], Any], Sequence[Any]]:
        counts = (heads, kv_heads, kv_heads)
        q, k, v = (_random((batch, h, tokens, width), case.dtype, device) for h in counts)
        if not backward:
            return lambda: attend(q, k, v), (q, k, v)
        grown = [t.requires_grad_() for t in (q, k, v)]
        out = attend(*grown)
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, grown, gradient, retain_graph=True), (gradient, q, k, v)

    name = ATEN_SDPA[case.op] + ("_for_cpu" if case.op == "flash" and device == "cpu" else "")
    return make, name + "_backward" * backward, int(4 * pairs * width * (2.5 if backward else 1))


def _convolution(case: Case, device: str) -> tuple[Make, str, int]:
    import torch

    batch, channels, filters, edge, side, stride, groups, backward = case.dims
    padding = side // 2 if stride < side else 0
    out_edge = (edge + 2 * padding - side) // stride + 1
    flops = 2 * batch * filters * out_edge**2 * channels // groups * side**2
    ops: Any = torch.ops.aten
    where = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)

    def make() -> tuple[Callable[[], Any], Sequence[Any]]:
        image = _random((batch, channels, edge, edge), case.dtype, device)
        weight = _random((filters, channels // groups, side, side), case.dtype, device)
        if not backward:
            return lambda: ops.convolution(image, weight, None, *where), (image, weight)
        gradient = _random((batch, filters, out_edge, out_edge), case.dtype, device)
        mask = [True, True, False]
        return lambda: ops.convolution_backward(gradient, image, weight, None, *where, mask), (gradient, image, weight)

    return make, "convolution" + "_backward" * backward, flops * (1 + backward)


def _layer_norm_backward(gradient: Any, x: Any, w: Any) -> tuple[Callable[[], Any], Sequence[Any]]:
    import torch

    ops: Any = torch.ops.aten
    width, mask = [x.shape[-1]], [True, True, True]
    _, mean, rstd = ops.native_layer_norm(x, width, w, w, 1e-5)
    read = (gradient, x, mean, rstd, w, w)
    return lambda: ops.native_layer_norm_backward(gradient, x, width, mean, rstd, w, w, mask), read


def _batch_norm(x: Any) -> tuple[Callable[[], Any], Sequence[Any]]:
    import torch

    ops: Any = torch.ops.aten
    w = torch.ones(x.shape[1], device=x.device)
    return lambda: ops.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5), (x, w, w)


def _adamw(*tensors: Any) -> tuple[Callable[[], Any], Sequence[Any]]:
    """An update of one tensor: itself, its gradient and its two moments."""
    import torch

    ops: Any = torch.ops.aten
    lists = [[t] for t in tensors]
    lists[3][0].abs_()
    steps = [torch.ones((), device=tensors[0].device)]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    more = {"amsgrad": False, "maximize": False}
    return lambda: ops._fused_adamw_(*lists, [], steps, **options, **more), [t for one in lists for t in one]


def _rowwise(case: Case, device: str) -> tuple[Make, str, int]:
    import torch

    rows, columns = case.dims
    ops: Any = torch.ops.aten

    def full(*shape: int) -> Any:
        return _random(shape or (rows, columns), case.dtype, device)

    def index(high: int) -> Any:
        return torch.randint(high, (rows,), device=device)

    def image() -> Any:  # rows x columns elements as maps of 16 channels
        edge = max(int((columns / 16) ** 0.5), 1)
        return full(rows, 16, edge, edge)

    def plain(op: Callable[..., Any], *inputs: Any) -> tuple[Callable[[], Any], Sequence[Any]]:
        return lambda: op(*inputs), [t for t in inputs if _is_tensor(t)]

    makers: dict[str, tuple[str, Make]] = {
        "add": ("add", lambda: plain(ops.add.Tensor, full(), full())),
        "mul": ("mul", lambda: plain(ops.mul.Tensor, full(), full())),
        "gelu": ("gelu", lambda: plain(ops.gelu, full())),
        "relu": ("relu", lambda: plain(ops.relu, full())),
        "cast": ("_to_copy", lambda: plain(lambda x: x.to(torch.bfloat16), full())),
        "layer_norm": ("native_layer_norm",
                       lambda: plain(ops.native_layer_norm, full(), [columns], full(columns), full(columns), 1e-5)),
        "layer_norm_backward": ("native_layer_norm_backward",
                                lambda: _layer_norm_backward(full(), full(), full(columns))),
        "softmax": ("_softmax", lambda: plain(ops._softmax, full(), -1, False)),
        "log_softmax": ("_log_softmax", lambda: plain(ops._log_softmax, full(), -1, False)),
        "sum": ("sum", lambda: plain(lambda x: x.sum(0), full())),
        "embedding": ("embedding", lambda: plain(ops.embedding, full(32000, columns), index(32000))),
        "embedding_backward": ("embedding_dense_backward", lambda: plain(
            lambda g, i: ops.embedding_dense_backward(g, i, 32000, -1, False), full(), index(32000))),
        "cat": ("cat", lambda: plain(lambda a, b: torch.cat((a, b)), full(), full())),
        "batch_norm": ("native_batch_norm", lambda: _batch_norm(image())),
        "max_pool": ("max_pool2d_with_indices", lambda: plain(ops.max_pool2d_with_indices, image(), [2, 2])),
        "adamw": ("_fused_adamw_", lambda: _adamw(full(), full(), full(), full())),
        "nll_loss": ("nll_loss_forward", lambda: plain(
            lambda x, t: ops.nll_loss_forward(x, t, None, 1, -100), full(), index(columns))),
    }  # fmt: skip
    name, make = makers[case.op]
    return make, name, 0


def out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def kernel_names(call: Call, device: str) -> list[str]:
    """Names of the kernels that one call launches on a GPU; empty on a CPU or where the profiler is not there."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cpu":
        return []
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call(0)
            torch.cuda.synchronize()
        return [e.key for e in seen.key_averages()]
    except RuntimeError:
        return []


def algorithm_of(names: Sequence[str]) -> str:
    """cuDNN's algorithm by its kernels' names, as the convolution law names them.

    >>> algorithm_of(["void cudnn::winograd_nonfused::winogradForwardData4x4"]), algorithm_of(["fft2d_r2c_32x32"])
    ('winograd', 'fft')
    """
    joined = " ".join(names).lower()
    return next((a for a in ("winograd", "fft") if a in joined), "implicit_gemm")
