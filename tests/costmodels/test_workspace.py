"""What ops take inside themselves, against the profiler's memory events of real ops on this CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from costmodels.workspace import reserve_bytes, workspace_bytes
from validation.allocations import recorded_allocations

aten = torch.ops.aten
blocked_by_16 = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="the layouts were read with AVX-512"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ops(TorchDispatchMode):
    """Marks every op for the profiler and notes its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(f"call {len(self.calls)}"):
            result = func(*args, **(kwargs or {}))
        with record_function("returned"):
            pass
        self.calls.append((func, args, result))
        return result


def scratch(run: Callable[[], Any], name: str) -> list[tuple[Any, Any, Any, int]]:
    """Ops of that name in `run`, with the bytes that each held inside beyond what was left after it."""
    run()
    with recorded_allocations() as allocations, Ops() as ops:
        run()
    found: list[tuple[Any, Any, Any, int]] = []
    call, running, peak = -1, 0, 0
    for _, mark, size in allocations:
        if mark.startswith("call "):
            call, running, peak = int(mark[5:]), 0, 0
        elif mark == "returned":
            if ops.calls[call][0].name().split(".")[0] == f"aten::{name}":
                found.append((*ops.calls[call], peak - running))
        else:
            running += size
            peak = max(peak, running)
    return found


def predicted(func: Any, args: Any, result: Any) -> int:
    shapes = [[tuple(t.shape) for t in tree_leaves(ts) if isinstance(t, torch.Tensor)] for ts in (args, result)]
    strides = tuple(tuple(t.stride()) for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    plain = tuple(tuple(a) if isinstance(a, list) else a for a in args)
    return workspace_bytes(f"aten.{func.name()[6:]}", tuple(shapes[0]), tuple(shapes[1]), plain, 4, strides)


def with_gradient(y: torch.Tensor, of: Any) -> Any:
    """Backward of a gradient that lies as the output does, as in a step (that of a sum is expanded: ops copy it)."""
    return torch.autograd.grad(y, of, torch.randn_like(y))


def convolutions(count: int) -> list[tuple[int, ...]]:
    """Shapes that nobody chose: batch, channels in and out, size, kernel, stride, padding."""
    draw = random.Random(20)
    found = []
    while len(found) < count:
        n, size, k = draw.choice((1, 2, 5, 16)), draw.choice((7, 14, 28, 56)), draw.choice((1, 3, 5, 7))
        c, o = (draw.choice((3, 6, 16, 20, 48, 64, 96, 192)) for _ in range(2))
        stride, padding = draw.choice((1, 1, 2)), draw.choice((0, k // 2))
        if n * max(c, o) * size * size < 4e6 and size + 2 * padding >= k:
            found.append((n, c, o, size, k, stride, padding))
    return found


@blocked_by_16
def test_convolutions_hold_reordered_copies() -> None:
    """Over 60 random shapes, forward and backward: right within 2 % of what the op touches, in nine of ten."""
    errors = []
    for n, c, o, size, k, stride, padding in convolutions(60):
        layer = torch.nn.Conv2d(c, o, k, stride, padding)
        x = torch.randn(n, c, size, size, requires_grad=True)
        run = lambda layer=layer, x=x: with_gradient(layer(x), [x, *layer.parameters()])  # noqa: E731
        for name in ("convolution", "convolution_backward"):
            for func, args, result, held in scratch(run, name):
                touched = 4 * sum(t.numel() for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor))
                errors.append((abs(predicted(func, args, result) - held) / touched, name, (n, c, o, size, k, stride)))
    wrong = sorted(e for e in errors if e[0] > 0.02)
    assert len(errors) == 120 and len(wrong) <= 12, wrong


def layers(kind: str, count: int) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    """Layers of a kind with inputs, of shapes that nobody chose."""
    draw = random.Random(kind)
    for _ in range(count):
        n, size, k, stride = (
            draw.choice((2, 4, 7)),
            draw.choice((8, 12, 20)),
            draw.choice((1, 2, 3, 5)),
            draw.choice((1, 2)),
        )
        c, o = (draw.choice((3, 6, 16, 20, 48, 64)) for _ in range(2))
        if kind == "1d":
            yield torch.nn.Conv1d(c, o, k, stride, k // 2), torch.randn(n, c, size * size)
        elif kind == "3d":
            yield torch.nn.Conv3d(c, o, k, stride, k // 2), torch.randn(n, c, 6, 9, size)
        elif kind == "transposed":
            yield torch.nn.ConvTranspose2d(c, o, k, stride), torch.randn(n, c, 2 * size, 2 * size)
        elif kind == "depthwise":
            yield torch.nn.Conv2d(c, c, 2 * (k // 2) + 1, stride, k // 2, groups=c), torch.randn(n, c, size, size)
        elif kind == "depthwise, channels last":
            x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last)
            yield torch.nn.Conv2d(c, c, 2 * (k // 2) + 1, stride, k // 2, groups=c), x
        else:
            x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last)
            yield torch.nn.Conv2d(c, o, k, stride, k // 2), x


@blocked_by_16
@pytest.mark.parametrize("kind", ["1d", "3d", "transposed", "depthwise", "channels last", "depthwise, channels last"])
def test_unusual_convolutions(kind: str) -> None:
    """Over 20 random layers: right within 2 % of what the op touches, in nine of ten."""
    errors = []
    for layer, x in layers(kind, 20):
        x.requires_grad_()
        run = lambda layer=layer, x=x: with_gradient(layer(x), [x, *layer.parameters()])  # noqa: E731
        for name in ("convolution", "convolution_backward"):
            for func, args, result, held in scratch(run, name):
                touched = 4 * sum(t.numel() for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor))
                errors.append(((predicted(func, args, result) - held) / touched, held, name, layer, x.shape))
    wrong = [e for e in errors if abs(e[0]) > 0.02]
    assert len(errors) == 40 and len(wrong) <= 4, wrong


def test_convolutions_copy_what_lies_otherwise() -> None:
    """A transposed sequence, and a gradient with channels last for a plain input."""
    x = torch.randn(4, 20, 48).transpose(1, 2).requires_grad_()
    layer = torch.nn.Conv1d(48, 96, 1)
    for name in ("convolution", "convolution_backward"):
        ((func, args, result, held),) = scratch(lambda: with_gradient(layer(x), [x, *layer.parameters()]), name)
        assert predicted(func, args, result) == held == x.numel() * 4
    image, conv = torch.randn(8, 3, 64, 64, requires_grad=True), torch.nn.Conv2d(3, 32, 4, 4)
    up = torch.randn(8, 32, 16, 16)
    found = {}
    for form in (torch.contiguous_format, torch.channels_last):
        run = lambda form=form: torch.autograd.grad(conv(image), [image], up.to(memory_format=form))  # noqa: E731
        ((_, args, _, found[form]),) = scratch(run, "convolution_backward")
    assert found[torch.channels_last] - found[torch.contiguous_format] == up.nbytes
    # beside the copy, what the channels-last case is predicted to hold is what the plain one is
    shapes = tuple(tuple(t.shape) for t in args[:3])
    plain = tuple(tuple(a) if isinstance(a, list) else a for a in args)
    last = tuple(tuple(t.stride()) for t in args[:3])
    held = [workspace_bytes("aten.convolution_backward.default", shapes, (), plain, 4, s) for s in (last, ())]
    assert held[0] - held[1] == up.nbytes


@blocked_by_16
def test_frozen_convolutions_make_no_gradient_of_the_weight() -> None:
    x, layer = torch.randn(8, 16, 16, 16, requires_grad=True), torch.nn.Conv2d(16, 32, 3, 1, 1).requires_grad_(False)
    for form in (torch.contiguous_format, torch.channels_last):
        run = lambda form=form: with_gradient(layer(x.to(memory_format=form)), [x])  # noqa: E731
        ((func, args, result, held),) = scratch(run, "convolution_backward")
        assert predicted(func, args, result) == held > 0


@pytest.mark.parametrize(("size", "channels", "mode"), [
    (16, 32, "bilinear"), (40, 32, "bilinear"), (64, 3, "bilinear"), (31, 5, "nearest"), (16, 1, "nearest"),
])  # fmt: skip
def test_enlarged_images(size: int, channels: int, mode: str) -> None:
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, channels, size, size).to(memory_format=form)
        run = lambda x=x: torch.nn.functional.interpolate(x, scale_factor=2, mode=mode)  # noqa: E731
        ((func, args, result, held),) = scratch(run, f"upsample_{mode}2d")
        assert predicted(func, args, result) == pytest.approx(held, abs=0.02 * result.nbytes)


def test_losses_keep_their_elements() -> None:
    x, y = torch.randn(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    for kind in ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"):
        for reduction in ("mean", "sum", "none"):
            loss = getattr(torch.nn.functional, kind)
            run = lambda loss=loss, reduction=reduction: loss(x.sigmoid(), y, reduction=reduction)  # noqa: E731
            ((func, args, result, held),) = scratch(run, kind)
            shapes = (tuple(x.shape), tuple(y.shape))
            kept = reserve_bytes(f"aten.{kind}.default", 0, shapes) or result.nbytes
            assert kept == result.untyped_storage().nbytes()
            assert predicted(func, args, result) == pytest.approx(held, abs=32)


@pytest.mark.parametrize("name", ["native_layer_norm", "_softmax", "_log_softmax", "roll", "embedding_dense_backward"])
def test_copies_of_strided_inputs(name: str) -> None:
    def run(x: torch.Tensor) -> Any:
        norm, table, where = torch.nn.LayerNorm(32), torch.nn.Embedding(9, 32), torch.randint(0, 9, (4, 9))
        return {
            "native_layer_norm": lambda: norm(x),
            "_softmax": lambda: x.softmax(-1),
            "_log_softmax": lambda: x.log_softmax(-1),
            "roll": lambda: torch.roll(x, (1, 2), (0, 1)),
            "embedding_dense_backward": lambda: torch.autograd.grad(table(where), [table.weight], x),
        }[name]()

    for x in (torch.randn(4, 9, 32), torch.randn(4, 32, 9).transpose(1, 2)):
        ((func, args, result, held),) = scratch(lambda x=x: run(x), name)
        assert predicted(func, args, result) == held
        assert held == x.nbytes or x.is_contiguous()


def test_attention_and_normalisation_copy_strided_gradients() -> None:
    q = torch.randn(2, 40, 3, 16, requires_grad=True)
    heads = q.transpose(1, 2)
    up = torch.randn(2, 3, 40, 16)
    run = lambda: torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*[heads] * 3), q, up)  # noqa: E731
    ((func, args, result, held),) = scratch(run, "_scaled_dot_product_flash_attention_for_cpu_backward")
    assert predicted(func, args, result) == held
    x, norm = torch.randn(4, 32, 9).transpose(1, 2).requires_grad_(), torch.nn.LayerNorm(32)
    run = lambda: torch.autograd.grad(norm(x), [x, *norm.parameters()], torch.randn(4, 32, 9).transpose(1, 2))  # noqa: E731
    ((func, args, result, held),) = scratch(run, "native_layer_norm_backward")
    assert predicted(func, args, result) == held > 2 * x.nbytes
    run = lambda: torch.ops.aten._safe_softmax(torch.randn(4, 1, 20, 30), -1)  # noqa: E731
    ((func, args, result, held),) = scratch(run, "_safe_softmax")
    assert predicted(func, args, result) == held


@blocked_by_16
@pytest.mark.parametrize(
    ("steps", "batch", "features", "hidden"), [(20, 4, 64, 64), (7, 3, 100, 250), (33, 8, 256, 48)]
)
def test_recurrent_layers(steps: int, batch: int, features: int, hidden: int) -> None:
    layer, x = torch.nn.LSTM(features, hidden), torch.randn(steps, batch, features, requires_grad=True)

    def run() -> Any:
        y = layer(x)[0]
        return torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(batch, steps, hidden).transpose(0, 1))

    ((func, args, result, held),) = scratch(run, "mkldnn_rnn_layer")
    assert predicted(func, args, result) == held
    shapes = tuple(tuple(t.shape) for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    assert reserve_bytes("aten.mkldnn_rnn_layer.default", 3, shapes) == result[3].numel()
    assert reserve_bytes("aten.mkldnn_rnn_layer.default", 0, shapes) == 0
    ((func, args, result, held),) = scratch(run, "mkldnn_rnn_layer_backward")
    touched = result[0].nbytes + 2 * result[1].nbytes
    assert predicted(func, args, result) == pytest.approx(held, abs=0.01 * touched)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (64, 64), (200, 200), (1000, 700)])
def test_attention_works_on_blocks(queries: int, keys: int) -> None:
    q, k, v = (torch.randn(2, n, 3, 16, requires_grad=True) for n in (queries, keys, keys))

    def run() -> Any:
        heads = (t.transpose(1, 2) for t in (q, k, v))  # as models make them
        return with_gradient(torch.nn.functional.scaled_dot_product_attention(*heads), [q, k, v])

    for suffix in ("", "_backward"):
        ((func, args, result, held),) = scratch(run, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")
        assert predicted(func, args, result) == pytest.approx(held, rel=0.05)


def test_normalisations() -> None:
    x = torch.randn(4, 16, 9, 9, requires_grad=True)
    norms = {"batch": torch.nn.BatchNorm2d(16), "layer": torch.nn.LayerNorm((9, 9)), "group": torch.nn.GroupNorm(4, 16)}
    up = torch.randn(4, 16, 9, 9)
    for kind, norm in norms.items():
        name = f"native_{kind}_norm_backward"
        run = lambda norm=norm: torch.autograd.grad(norm(x), [x, *norm.parameters()], up)  # noqa: E731
        ((func, args, result, held),) = scratch(run, name)
        assert predicted(func, args, result) == held > 0


def test_other_ops_hold_nothing() -> None:
    assert workspace_bytes("aten.mm.default", ((4, 8), (8, 4)), ((4, 4),), ()) == 0
