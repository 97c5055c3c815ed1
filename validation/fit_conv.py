"""Fit the convolution law to NeuSight's fp32 table (3x3, stride 1, cuDNN 8.9); which algorithm it took is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from costmodels.conv_shapes import Conv, rows_of
from costmodels.convolution import hardware_of, seconds_by_algorithm
from costmodels.convolution_law import ALGORITHMS, Algorithm, chosen, kernel_seconds, packed
from costmodels.device import Device, load_device
from validation.fit_common import Array, Constant, Fitted, Flags, fit_constants, held_out

DATA = "conv_fp32 (NeuSight, ASPLOS 2025: torch 2.1, cuDNN 8.9, fp32, 3x3, stride 1, eager)"
STEM_OF = {
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb", "Tesla P100-PCIE-16GB": "p100-pcie", "Tesla P4": "p4",
    "Tesla T4": "t4", "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
}  # fmt: skip
# Time of launching and waiting, by kind of kernel: the table cannot tell it from a fixed cost on the device, and the
# fastest rows (60 to 150 us for next to no work) say that most of it is the host's. No price contains it.
HOST = {"implicit_gemm": "implicit_host", "winograd": "winograd_host", "winograd_fused": "fused_host"}
NAMED = {"winograd": "winograd", "winograd_fused": "winograd", "implicit_gemm": "implicit_gemm", "fft": "fft"}

IMPLICIT = (
    Constant("implicit_rate", 0.8), Constant("implicit_smooth", 0.5, True), Constant("implicit_depth", 8.0),
    Constant("implicit_in", 0.6, True), Constant("implicit_out", 0.6, True), Constant("implicit_weight", 0.4, True),
    *(Constant(f"implicit_tiles{i}", s, True) for i, s in enumerate((0.85, 0.75, 0.7))),
    Constant("implicit_host", 1.5e-4),
)  # fmt: skip
WINOGRAD = (
    Constant("product_rate", 0.7), Constant("product_smooth", 0.5, True), Constant("product_depth", 4.0),
    Constant("tile_in", 0.6, True), Constant("tile_out", 0.6, True), Constant("tile_weight", 0.4, True),
    *(Constant(f"product_tiles{i}", s, True) for i, s in enumerate((0.85, 0.75, 0.5))),
    Constant("fused_rate", 0.5), Constant("fused_smooth", 0.5, True), Constant("fused_narrow", 0.8, True),
    Constant("fused_depth", 4.0), Constant("fused_stream", 0.6, True),
    Constant("winograd_host", 2e-4), Constant("fused_host", 1e-4),
)  # fmt: skip
STARTS: tuple[dict[str, float], ...] = ({}, {"fused_rate": 0.25, "product_rate": 0.8}, {"product_rate": 0.45})


def fit_convolutions(ops: Path) -> tuple[list[Fitted], pd.DataFrame]:
    """The law of every device of the table, and for each device how often the predicted algorithm is cuDNN's."""
    table = pd.read_csv(ops / "conv_fp32.csv.gz")
    fits, algorithms = [], []
    for name, rows in table.groupby("device"):
        fit, agreement = _fit_device(load_device(STEM_OF[str(name)]), STEM_OF[str(name)], rows)
        fits.append(fit)
        algorithms.append({"device": fit.device, **agreement})
    return fits, pd.DataFrame(algorithms)


def _fit_device(device: Device, stem: str, rows: pd.DataFrame) -> tuple[Fitted, dict[str, float]]:
    scored = held_out(*(rows[c] for c in ("batch", "in_channels", "out_channels", "input_size")))
    measured = rows.latency_ms.to_numpy() * 1e-3
    taken = rows.algorithm.to_numpy().astype(str)
    constants = algorithm_constants(device, convs(rows), taken, measured, ~scored)
    host = np.array([[constants[HOST.get(a, "winograd_host")]] for a in ALGORITHMS])

    def again(lent: Mapping[str, Any]) -> Array:
        times = host + seconds_by_algorithm(lent, device, "float32", convs(rows[scored]))
        return times[chosen(times), np.arange(times.shape[1])]

    times = host + seconds_by_algorithm(constants, device, "float32", convs(rows))
    index = chosen(times)
    algorithm, predicted = np.array([NAMED.get(a, a) for a in ALGORITHMS])[index], times[index, np.arange(len(rows))]
    fit = Fitted(stem, "conv", "float32", constants, DATA, len(rows), predicted[scored], measured[scored],
                 taken[scored], again)  # fmt: skip
    given = _of_taken(times, taken)[scored] / measured[scored] - 1
    agreement = {
        "n": int(scored.sum()), "right": float((algorithm[scored] == taken[scored]).mean()),
        "always_winograd": float((taken[scored] == "winograd").mean()),
        "error_predicted": float(np.abs(fit.errors).mean()), "error_given": float(np.abs(given).mean()),
        "above_peak_measured": _above_peak(device, rows[scored], measured[scored]),
        "above_peak_predicted": _above_peak(device, rows[scored], predicted[scored]),
    }  # fmt: skip
    return fit, agreement


def algorithm_constants(
    device: Device, some: Array, taken: NDArray[np.str_], measured: Array, fitting: Flags, least: int = 1
) -> dict[str, Any]:
    """Constants of each algorithm, from the rows of the fitting half for which cuDNN took it, if there are `least` of
    them. Both Winograd kernels have one name in the table, so the faster of the two is compared. FFT has none of its
    own."""
    constants: dict[str, Any] = {}
    for algorithm, names in (("implicit_gemm", IMPLICIT), ("winograd", WINOGRAD)):
        mine = fitting & (taken == algorithm)
        if mine.sum() < least:
            continue
        law = _law(algorithm, device, some[mine])
        starts = STARTS if algorithm == "winograd" else ({},)
        constants |= _tiles_joined(fit_constants(names, law, measured[mine], starts, relative=True))
    return constants


def _law(algorithm: str, device: Device, some: Array) -> Callable[[dict[str, float]], Array]:
    hardware = hardware_of(device, "float32")

    def seconds(x: dict[str, float], name: Algorithm) -> Array:
        return x[HOST[name]] + kernel_seconds(packed(_tiles_joined(x), hardware), ALGORITHMS.index(name), some)

    def implicit(x: dict[str, float]) -> Array:
        return seconds(x, "implicit_gemm")

    def winograd(x: dict[str, float]) -> Array:
        faster: Array = np.minimum(seconds(x, "winograd"), seconds(x, "winograd_fused"))
        return faster

    law: Callable[[dict[str, float]], Array] = implicit if algorithm == "implicit_gemm" else winograd
    return law


def _tiles_joined(x: dict[str, float]) -> dict[str, Any]:
    """`implicit_tiles0`, `implicit_tiles1`, ... as one list, as the law reads them."""
    lists = {n: [v for k, v in x.items() if k.startswith(n)] for n in ("implicit_tiles", "product_tiles")}
    plain = {k: v for k, v in x.items() if not k[-1].isdigit()}
    return plain | {n: v for n, v in lists.items() if v}


def _of_taken(times: Array, taken: NDArray[np.str_]) -> Array:
    """The predicted time of the algorithm that cuDNN took: what is left of the error if the choice is given."""
    rows = {name: [i for i, a in enumerate(ALGORITHMS) if NAMED.get(a) == name] for name in set(NAMED.values())}
    return np.array([times[rows[name], i].min() for i, name in enumerate(taken)])


def _above_peak(device: Device, rows: pd.DataFrame, seconds: Array) -> float:
    """Share of rows whose effective rate, in FLOP of a direct convolution, is above the data sheet's peak."""
    flops = 18.0 * rows.batch * rows.in_channels * rows.out_channels * rows.input_size**2
    return float((flops.to_numpy() > device.peak_flops["float32"] * np.maximum(seconds, 1e-9)).mean())


def convs(rows: pd.DataFrame) -> Array:
    """The table's rows as the law takes them: square images, 3x3, stride 1, padding 1."""
    columns = rows[["batch", "in_channels", "out_channels", "input_size"]].to_numpy().tolist()
    return rows_of([Conv(b, c, f, 1, edge**2, edge**2, 9, 3, edge, edge, True, True) for b, c, f, edge in columns])
