"""Ordinary modules, losses and tensor functions of torch trace without a word: no op of theirs lacks a FLOP formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._refs
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opgraph.flops import NoFormulaError, check_formula
from opgraph.trace import trace

ROWS, IMAGE = (2, 8, 16), (2, 8, 8, 8)

ACTIVATIONS = (
    nn.ReLU6(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(),
    nn.LeakyReLU(), nn.LogSigmoid(), nn.PReLU(), nn.RReLU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softshrink(),
    nn.Hardshrink(), nn.Softsign(), nn.Tanhshrink(), nn.Threshold(0.1, 0.5), nn.GLU(), nn.LogSoftmax(-1),
    nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.RMSNorm(16), nn.LayerNorm(16),
    nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.BatchNorm1d(8),
    nn.Upsample(scale_factor=2, mode="linear"), nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True),
    nn.RNN(16, 16, batch_first=True), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
)  # fmt: skip
PICTURES = (
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.LPPool2d(2, 2),
    nn.FractionalMaxPool2d(2, output_size=4), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8),
    nn.LocalResponseNorm(3), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(scale_factor=2, mode="bicubic"), nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.ReflectionPad2d(1),
    nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, groups=8),
    nn.Unfold(3), nn.Dropout2d(), nn.Softmax2d(),
)  # fmt: skip
LOSSES: tuple[Callable[..., Tensor], ...] = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.poisson_nll_loss,
    F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss,
)  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: F.bilinear(x, x, x[0, 0].expand(4, 16, 16)),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(x.detach())),
    "cross_entropy of pictures": lambda x: F.cross_entropy(x.unsqueeze(-1), torch.zeros(2, 16, 1, dtype=torch.long)),
    "label smoothing": lambda x: F.cross_entropy(x[:, 0], torch.zeros(2, dtype=torch.long), label_smoothing=0.1),
    "cosine_similarity": lambda x: F.cosine_similarity(x[0], x[1]),
    "triplet": lambda x: F.triplet_margin_loss(x[0], x[1], x[0] + 1),
    "grid_sample": lambda x: F.grid_sample(x.unsqueeze(1), torch.zeros(2, 4, 4, 2), align_corners=False),
    "norm": torch.linalg.norm,
    "std": torch.std,
    "cumprod": lambda x: x.cumprod(-1),
    "cdist": lambda x: torch.cdist(x, x),
    "kthvalue": lambda x: x.kthvalue(3)[0],
    "quantile": lambda x: x.quantile(0.5),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "diag_embed": torch.diag_embed,
    "stft": lambda x: torch.stft(x[0], 8, window=torch.ones(8), return_complex=True).abs(),
    "inverse": lambda x: torch.linalg.inv(x[:, :8, :8]),
    "solve": lambda x: torch.linalg.solve(x[:, :8, :8], x),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(8)),
    "qr": lambda x: torch.linalg.qr(x.mT)[0],
    "svd": lambda x: torch.linalg.svd(x)[1],
    "determinant": lambda x: torch.linalg.det(x[:, :8, :8]),
}


class Around(nn.Module):
    """A parameter before the module, so that gradients go through it."""

    def __init__(self, inner: Callable[[Tensor], Tensor] | nn.Module, channels: int) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(channels, 1)), inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x * self.weight if x.dim() == 3 else x * self.weight.unsqueeze(-1))
        return out[0] if isinstance(out, tuple) else out


def steps(inner: Callable[[Tensor], Tensor] | nn.Module, shape: tuple[int, ...]) -> None:
    graph = trace(Around(inner, 8), (torch.randn(shape),), (), loss=lambda y: y.float().square().sum())
    assert any(op.phase == "backward" for op in graph.ops)


@pytest.mark.parametrize("module", ACTIVATIONS, ids=lambda m: type(m).__name__)
def test_modules_on_rows(module: nn.Module) -> None:
    steps(module, ROWS)


@pytest.mark.parametrize("module", PICTURES, ids=lambda m: type(m).__name__)
def test_modules_on_pictures(module: nn.Module) -> None:
    steps(module, IMAGE)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses(loss: Callable[..., Tensor]) -> None:
    steps(lambda x: loss(x, torch.sigmoid(x.detach())), ROWS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    steps(FUNCTIONS[name], ROWS)


class Checks(TorchDispatchMode):
    """Notes the ops that nobody can count."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            check_formula(str(func), func.tags, "")
        except NoFormulaError:
            self.unknown.add(str(func))
        return func(*args, **kwargs or {})


def elementwise() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Functions of torch that make one value of each, or of each pair, known by the shape that they give."""
    x, y = torch.rand(2, 3, 1), torch.rand(5)
    for whole in (x, x.mul(9).long()):
        other = y.to(whole.dtype) + 1
        for name in sorted(n for n in torch._refs.__all__ if hasattr(torch, n)):
            for count, shape in ((1, whole.shape), (2, (2, 3, 5))):
                function = getattr(torch, name)
                try:
                    made = function(*(whole.clone(), other.clone())[:count])
                except Exception:  # takes something else
                    continue
                if isinstance(made, Tensor) and made.shape == shape and made.data_ptr() != whole.data_ptr():
                    yield f"{name} of {whole.dtype}", partial(function, *(whole, other)[:count])


def test_no_elementwise_function_of_torch_lacks_a_formula() -> None:
    found, unknown = set(), dict[str, set[str]]()
    for name, function in elementwise():
        found.add(name.partition(" ")[0])
        with Checks() as checks:
            function()
        if checks.unknown:
            unknown[name] = checks.unknown
    assert len(found) > 100 and {"floor_divide", "rsub", "exp", "add"} <= found
    assert not unknown
