"""Kernel laws of GPUs: time of an op from a device's data sheet and a handful of fitted constants.

One module per family holds the law (`costmodels/gemm.py`, ...); this one asks the right one. Constants stand in the
device file under `[kernels."family/dtype"]`; a device without them is priced by the roofline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from costmodels.device import Device
    from costmodels.ops import OpShape

Found = tuple[float, Literal["interpolated", "extrapolated"], float]


def kernel_price(device: Device, shape: OpShape) -> Found | None:
    """Seconds, kind of price and expected relative error of an op, or None where no kernel law covers it."""
    return None
