"""Lavin and Gray's measurements of Winograd F(2x2,3x3) on a Titan X, and the law's prediction from instruction counts.

Rows: Fast Algorithms for Convolutional Neural Networks (CVPR 2016), the tables of the VGG-E network with fp32 and fp16
data, batch sizes 1 to 64, all 3x3 layers summed. They were written down FROM MEMORY; what can be checked of them is
that time times rate is the network's work, 39.0 GFLOP an image, and `tests/validation/test_fit_kernels.py` does.

    python -m validation.lavin_gray
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from costmodels.conv_shapes import Conv, rows_of
from costmodels.convolution import hardware_of
from costmodels.convolution_law import FUSED, LAUNCH, kernel_seconds, packed
from costmodels.device import Device

# Titan X (Maxwell) at its base clock of 1 GHz: 24 SMs of 128 lanes, 336.5 GB/s (from memory).
TITAN_X = Device(
    "GeForce GTX Titan X (Maxwell)", "gpu", {"float32": 6.144e12}, 12 * 2**30, 336.5e9, units=24, l2_bytes=3 * 2**20
)
# VGG-E: input channels, filters, edge of the map, how often. All 3x3, stride 1, padding 1.
LAYERS = (
    (3, 64, 224, 1), (64, 64, 224, 1), (64, 128, 112, 1), (128, 128, 112, 1), (128, 256, 56, 1), (256, 256, 56, 3),
    (256, 512, 28, 1), (512, 512, 28, 3), (512, 512, 14, 4),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """bytes: of an element of the data (arithmetic is fp32). seconds and effective FLOP/s as printed."""

    batch: int
    bytes: int
    seconds: float
    rate: float


ROWS = (
    Row(1, 4, 5.55e-3, 7.03e12), Row(2, 4, 9.89e-3, 7.89e12), Row(4, 4, 17.72e-3, 8.81e12),
    Row(8, 4, 33.11e-3, 9.43e12), Row(16, 4, 65.79e-3, 9.49e12), Row(32, 4, 132.36e-3, 9.43e12),
    Row(64, 4, 266.48e-3, 9.37e12), Row(1, 2, 5.53e-3, 7.06e12), Row(2, 2, 9.83e-3, 7.94e12),
    Row(4, 2, 17.50e-3, 8.92e12), Row(8, 2, 32.61e-3, 9.57e12), Row(16, 2, 62.93e-3, 9.92e12),
    Row(32, 2, 123.12e-3, 10.14e12), Row(64, 2, 242.98e-3, 10.28e12),
)  # fmt: skip

# Instructions of a thread for eight channels (256 threads; a block has 32 tiles and 32 filters). Multiplications:
# 16 x 32 x 32 x 8 / 256. Image: one tile of one channel each, 16 loads, 32 additions, 16 stores, about 10 for addresses
# and bounds. Filters: 9 loads, 28 operations, 16 stores, about 5. Operands: 16 values a channel in four 16-byte loads.
# About 10 for the loop. Outputs, once a block: four inverse transforms of 60 and about 100 around them.
MULTIPLY, IMAGE, FILTERS, OPERANDS, LOOP, OUTPUT = 512, 74, 58, 32, 10, 340
A_STEP = MULTIPLY + IMAGE + FILTERS + OPERANDS + LOOP
CONSTANTS = {
    "fused_rate": MULTIPLY / A_STEP, "fused_smooth": 0.0, "fused_narrow": 1.0, "fused_depth": 8 * OUTPUT / A_STEP,
    "fused_stream": 0.80,
}  # fmt: skip


def work(batch: int) -> float:
    """FLOP of the network's convolutions, computed directly."""
    return sum(18.0 * batch * c * k * edge**2 * times for c, k, edge, times in LAYERS)


def predicted(row: Row) -> float:
    """Seconds of all layers by the law of fused Winograd kernels: counts of instructions, and nothing fitted."""
    law = packed(CONSTANTS, replace(hardware_of(TITAN_X, "float32"), size=row.bytes))
    convs = [_layer(row.batch, c, k, edge) for c, k, edge, times in LAYERS for _ in range(times)]
    return float(kernel_seconds(law, FUSED, rows_of(convs)).sum()) + LAUNCH * len(convs)


def _layer(batch: int, channels: int, filters: int, edge: int) -> Conv:
    return Conv(batch, channels, filters, 1, edge**2, edge**2, 9, 3, edge, edge, True, True)


def main() -> int:
    """Prints the rows, predicted over measured, and the mean error. Returns the exit code."""
    print("data  batch  measured ms  predicted ms  predicted/measured")
    ratios = [predicted(row) / row.seconds for row in ROWS]
    for row, ratio in zip(ROWS, ratios):
        measured = row.seconds * 1e3
        print(f"fp{8 * row.bytes:<4}{row.batch:5}{measured:13.2f}{measured * ratio:14.2f}{ratio:20.3f}")
    errors = [abs(ratio - 1) for ratio in ratios]
    print(f"mean error {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}, of {len(ROWS)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
