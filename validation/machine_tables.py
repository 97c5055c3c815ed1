"""Attention and collectives of one machine from a system file of SimuMax: rows as its micro-benchmarks timed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from costmodels.attention import BACKWARD
from costmodels.attention_law import FIELDS, calls_from, flash_seconds
from costmodels.device import Device
from validation.fit_common import Array, Constant, Flags, fit_constants, held_out

DTYPE = "bfloat16"
SIZES = tuple(float(2**k) for k in range(20, 33))  # 1 MiB to 4 GiB: the sizes of its sweeps
KINDS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
         "all2all": "all_to_all"}  # fmt: skip
GROUPS = (2, 4, 8)  # numbers of ranks whose fixed part was measured
GIB = 2**30
FITTED = (Constant("launch", 2e-5), Constant("tile", 2e-6), Constant("join", 1.0))


def collectives(config: dict[str, Any]) -> list[dict[str, Any]]:
    """[[collectives]] of a machine's file, from the fits of its nccl-tests sweeps (1 MiB up, 8 ranks, bfloat16) and
    of the part of a call that does not depend on the size, as a profiler saw it in torch at 32 MiB (2, 4, 8 ranks):

        seconds = bytes scale (n - 1) / n / bandwidth + scale (n - 1) latency + fixed(n)

    Below 1 MiB the time of 1 MiB stands (tables do not fall off below their first size)."""
    inside = config["networks"]["high_intra_node"]
    found = []
    for name, kind in KINDS.items():
        op = inside["op"][name]
        rate = float(inside["bandwidth"]["gbps"]) * GIB * float(op["efficient_factor"])
        for n in GROUPS:
            parts = op["scale"] * (n - 1)
            fixed = (op.get("fixed_latency_us_by_comm_num") or {}).get(str(n), op["fixed_latency_us"])
            start = (parts * float(op["latency_us"]) + float(fixed)) * 1e-6
            seconds = [round(start + size * parts / n / rate, 9) for size in SIZES]
            found.append({"kind": kind, "ranks": n, "bytes": list(SIZES), "seconds": seconds,
                          "demand": [0.0] * len(SIZES), "error": 0.1})  # fmt: skip
    return found


def attention(config: dict[str, Any], device: Device) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Sections for forward and backward passes, and the mean error of each on the half that was not fitted.

    The device's own law with launch, tile, join and the rate of each head dim fitted anew to half of the shapes. The
    file's efficiency counts products of whole matrices under a causal mask: 2 for the forward, 5 for the backward."""
    own = device.kernels["attention"][DTYPE]
    sections, errors = {}, {}
    for op, products, backward in (("sdp_fwd", 2.0, False), ("sdp_bwd", 5.0, True)):
        calls, seconds = _rows(config["accelerator"]["op"][op], products, backward)
        scored = held_out(*(calls[:, FIELDS.index(name)] for name in ("heads", "kv_heads", "queries", "width")))
        constants = _fit(own, device, calls, seconds, ~scored)
        error = flash_seconds({**own, **constants}, device, DTYPE, calls[scored]) / seconds[scored] - 1
        name = DTYPE + (BACKWARD if backward else "")
        errors[name] = float(abs(error).mean())
        about = {"data": f"SimuMax 1.2: {op}", "rows": int((~scored).sum()), "held_out": int(scored.sum()),
                 "error": errors[name]}  # fmt: skip
        sections[name] = {**own, **about, **constants}
    return sections, errors


def _rows(op: dict[str, Any], products: float, backward: bool) -> tuple[Array, Array]:
    """One row a shape: the median of its layouts' times."""
    found: dict[tuple[int, ...], list[float]] = {}
    for key, share in op["accurate_efficient_factor"].items():
        part = dict(p.split("=") for p in key.split(", "))
        names = ("batch", "seq_len", "head_num", "kv_head_num", "qk_head_dim", "v_head_dim")
        b, s, h, kv, width, value = dims = tuple(int(part[n]) for n in names)
        flops = products * b * s * s * max(h, kv) * (width + value)
        found.setdefault(dims, []).append(flops / (float(share) * float(op["tflops"]) * 1e12))
    batch, tokens, heads, kv_heads, widths, values = np.array(list(found), float).T
    calls = calls_from(batch, heads, kv_heads, tokens, tokens, widths, values, True, backward)
    return calls, np.array([float(np.median(s)) for s in found.values()])


def _fit(own: Mapping[str, Any], device: Device, calls: Array, seconds: Array, mask: Flags) -> dict[str, Any]:
    widths = sorted({int(w) for w in calls[:, FIELDS.index("width")]})
    wanted = (*FITTED, *(Constant(f"rate{w}", 0.6, True) for w in widths))
    part = calls[mask]

    def section(x: dict[str, float]) -> dict[str, Any]:
        rates = [x[f"rate{w}"] for w in widths]
        return {**own, "launch": x["launch"], "tile": x["tile"], "join": 1 + x["join"], "head_dims": widths,
                "rates": rates}  # fmt: skip

    starts: tuple[dict[str, float], ...] = ({}, {"launch": 6e-5}, {"tile": 2e-5}, {"join": 0.1})
    x = fit_constants(wanted, lambda x: flash_seconds(section(x), device, DTYPE, part), seconds[mask], starts)
    return {k: v for k, v in section(x).items() if k in ("launch", "tile", "join", "head_dims", "rates")}
