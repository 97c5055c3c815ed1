"""A host thread that feeds a device: what a run of kernels takes when the host may be slower than the device.

The host issues kernel i at `issued_i` (the sum of its own work up to there), the device runs kernels in order:

    finish_i = max(finish_{i-1}, begin + issued_i) + seconds_i,     finish_{-1} = free

Unrolled, finish_n = max(free + K, begin + T) with K = sum of all seconds and T = max_i (issued_i + seconds of kernels
i to n). By induction, finish_i = max(free + K_i, begin + T_i) where K_i = K_{i-1} + s_i and T_i = max(T_{i-1},
issued_i) + s_i, because adding s_i distributes over max(free + K_{i-1}, begin + T_{i-1}, begin + issued_i). The host
itself is done at begin + H. So three numbers say everything about a run between two synchronisations, whatever its
length, and runs join: the pair (device free, host free) is mapped by a max-plus matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Run:
    """host: H, device: K, tail: T (see above), in seconds."""

    host: float
    device: float
    tail: float

    @property
    def alone(self) -> float:
        """Seconds until the device is done when host and device both begin idle."""
        return max(self.device, self.tail)


EMPTY = Run(0.0, 0.0, float("-inf"))


def run_of(host: Floats, device: Floats) -> Run:
    """The run of kernels with these seconds: of the host before each launch, of the device (0: nothing is launched)."""
    if not host.size:
        return EMPTY
    issued = np.cumsum(host)
    left = np.cumsum(device[::-1])[::-1]
    launched = device > 0
    tail = float((issued[launched] + left[launched]).max()) if launched.any() else float("-inf")
    return Run(float(issued[-1]), float(device.sum()), tail)


def joined(first: Run, second: Run) -> Run:
    """One run after the other on the same host and device."""
    tail = max(first.tail + second.device, first.host + second.tail)
    return Run(first.host + second.host, first.device + second.device, tail)


def repeated(run: Run, times: int) -> Run:
    """The same run several times over: each repetition begins one H later on the host, with all later K ahead of it."""
    if times <= 0:
        return EMPTY
    ends = (run.tail + (times - 1) * run.device, (times - 1) * run.host + run.tail)
    return Run(times * run.host, times * run.device, max(ends))
