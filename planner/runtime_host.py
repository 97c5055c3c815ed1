"""Seconds of calls into torch's runtimes (checkpoints, DDP, FSDP, DTensor, pipelines) by what ran since the last one.

Their code and data share the caches with the ops: a Linear under DTensor costs a core of an EPYC 0.38 ms where other
layers have moved 16 MiB since the last one, and 0.17 in a pass that moves next to nothing. Calibration measures both
ends; in between, a Xeon went with the logarithm (2.4 to 2.9 ms after 4 MiB, 2.5 to 3.3 after 8, 3.4 to 3.7 after 16).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log2

import numpy as np
from numpy.typing import NDArray

from costmodels.features import MIB, touched
from planner.script import Host, Item, Work

Floats = NDArray[np.float64]

FULL = 16.0  # MiB between two calls in calibration
WARM = "_warm"  # after a key of `Device.host`: the same in full caches
# Calls of a runtime, each once for a layer, block or parameter: what moves between two of them is a pass's bytes over
# their number. A parameter of DDP is half a call: calibration has two between its sweeps.
CALLS = {
    "checkpoint_forward": 1.0, "checkpoint_backward": 1.0, "dtensor_linear_forward": 1.0,
    "dtensor_linear_backward": 1.0, "fsdp_unit_forward": 1.0, "fsdp_unit_backward": 1.0, "ddp_step": 1.0,
    "ddp_param": 0.5, "pp_action": 1.0,
}  # fmt: skip


def call_seconds(host: Mapping[str, float], kind: str, between: float) -> float:
    """Seconds of one call where `between` bytes are moved from one to the next; one number where there is only one."""
    cold = host.get(kind, 0.0)
    warm = min(host.get(kind + WARM, cold), cold)
    return warm + (cold - warm) * min(log2(1 + between / MIB) / log2(1 + FULL), 1.0)


def calls_seconds(host: Mapping[str, float], kind: str, between: Floats) -> Floats:
    """`call_seconds` of many."""
    return np.array([call_seconds(host, kind, x) for x in between.tolist()])


def least_seconds(host: Mapping[str, float], kind: str) -> float:
    """Seconds of a call in full caches."""
    return call_seconds(host, kind, 0.0)


def host_seconds(items: Sequence[Item], host: Mapping[str, float]) -> list[float]:
    """Seconds of every `Host` item of a pass, in order."""
    found = [item for item in items if isinstance(item, Host)]
    if not any(key.endswith(WARM) for key in host):
        return [host.get(item.kind, 0.0) * item.count for item in found]
    moved = float(sum(touched(item.shape) for item in items if isinstance(item, Work) and not item.is_view))
    calls = _calls(found)
    return [
        call_seconds(host, item.kind, moved / max(calls.get(_runtime(item.kind), 1.0), 1.0)) * item.count
        for item in found
    ]


def _calls(items: Iterable[Host]) -> dict[str, float]:
    calls: dict[str, float] = {}
    for item in items:
        calls[_runtime(item.kind)] = calls.get(_runtime(item.kind), 0.0) + CALLS.get(item.kind, 0.0) * item.count
    return calls


def _runtime(kind: str) -> str:
    return kind.partition("_")[0]
