"""Grouped products under fake tensors: torch's own shape function takes bfloat16 alone, its CPU kernel any float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNED = 16  # bytes: rows of the result begin at multiples of it (ATen's create_grouped_gemm_output_tensor)


class GroupedProducts(TorchDispatchMode):
    """Answers `aten._grouped_mm` of fake tensors that are not bfloat16; goes inside of a FakeTensorMode."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default or not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        if args[0].dtype == torch.bfloat16:
            return func(*args, **kwargs)
        return _result(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))


def _result(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    rows, columns = a.shape[-2], b.shape[-1]
    step = max(1, ALIGNED // a.element_size())
    pitch = -(-columns // step) * step
    if a.dim() != b.dim():  # one side is ragged: its groups lie side by side in the result
        return torch.empty_strided((rows, columns), (pitch, 1), dtype=a.dtype, device=a.device)
    groups = a.shape[0] if offsets is None else offsets.shape[0]
    return torch.empty_strided((groups, rows, columns), (rows * pitch, pitch, 1), dtype=a.dtype, device=a.device)
