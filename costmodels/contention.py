"""What communication costs the compute that it overlaps with: units, memory bandwidth, power.

Sources: shared/facts/communication.md A5 (NVIDIA forum 337991 for the second wave; arXiv 2507.03114: compute is slowed
by 18.9 % on average and 40 % at most). Pure functions; a slowdown of 1 is none.
"""

from __future__ import annotations

from math import ceil

MOST = 1.40  # the most that was seen there of whole steps
# Bytes of device memory that a collective reads and writes per byte that a device sends: read to send, and of what
# comes in written, or read and written where it is added. Range 2 to 3: communication.md A5.
MEMORY_PASSES = {"all_gather": 2.0, "broadcast": 2.0, "send": 2.0, "all_to_all": 2.0, "reduce_scatter": 3.0}
MEMORY_PASSES |= {"all_reduce": 2.5, "reduce": 3.0, "barrier": 0.0}


def waves(blocks: int, units: int, per_unit: int = 1) -> int:
    """Rounds in which `units` that run `per_unit` thread blocks each get through `blocks`."""
    if units < 1 or per_unit < 1:
        raise ValueError(f"{units} units with {per_unit} blocks each cannot run anything; both must be 1 or more")
    return ceil(blocks / (units * per_unit))


def wave_slowdown(blocks: int, units: int, taken: int, per_unit: int = 1) -> float:
    """Slowdown of a kernel of `blocks` equal thread blocks when communication occupies `taken` of the `units`.

    Waves are quantised anew: 132 blocks on 132 units run in one wave, and in two as soon as one unit is taken.

    >>> wave_slowdown(132, 132, 24), wave_slowdown(100, 132, 24)
    (2.0, 1.0)
    """
    if blocks < 1:
        return 1.0
    left = max(units - taken, 1)
    return waves(blocks, left, per_unit) / waves(blocks, units, per_unit)


def memory_demand(kind: str, sent: float, seconds: float) -> float:
    """bytes/s of device memory that a collective uses; sent: bytes that the device sends in these seconds."""
    if kind not in MEMORY_PASSES:
        raise ValueError(f"'{kind}' is no known collective; use one of {', '.join(MEMORY_PASSES)}")
    return MEMORY_PASSES[kind] * sent / seconds if seconds > 0 else 0.0


def memory_slowdown(kernel: float, communication: float, bandwidth: float) -> float:
    """Slowdown of a kernel that alone moves `kernel` bytes/s beside communication that moves `communication`.

    Memory of `bandwidth` bytes/s is shared max-min fairly: nobody is slowed while all fits, communication keeps its
    demand up to half, and a kernel that asks for little keeps what it asks for.

    >>> memory_slowdown(3e12, 0.3e12, 3.0e12)
    1.1111111111111112
    """
    if bandwidth <= 0 or kernel <= 0 or kernel + communication <= bandwidth:
        return 1.0
    granted = max(bandwidth - communication, min(kernel, bandwidth / 2))
    return max(kernel / granted, 1.0)


def power_slowdown(kernel: float, communication: float, limit: float) -> float:
    """Slowdown when compute (watts alone, above idle) and communication share a power limit: clocks give way. Dynamic
    power goes about as the clock cubed at the voltage that goes with it, so the clock falls by the cube root."""
    budget = limit - communication
    if kernel <= 0 or kernel <= budget:
        return 1.0
    return float((kernel / max(budget, 0.05 * kernel)) ** (1 / 3))


def overlap_slowdown(
    blocks: int, units: int, taken: int, kernel_bandwidth: float, collective_bandwidth: float, bandwidth: float
) -> float:
    """Units and memory together: whichever slows the kernel more, as one that waits for units asks memory for less."""
    by_waves = wave_slowdown(blocks, units, taken)
    return max(by_waves, memory_slowdown(kernel_bandwidth / by_waves, collective_bandwidth, bandwidth) * by_waves)


def overlapped(compute: float, communication: float, slowdown: float) -> tuple[float, float]:
    """(seconds until both are through, seconds of communication that stay exposed) when they start together.

    Compute runs slower only while communication lasts: of `compute` seconds, communication / slowdown are done by then.
    """
    if slowdown < 1:
        raise ValueError(f"a slowdown of {slowdown:g} would be a speed-up; it must be 1 or more")
    if compute * slowdown <= communication:
        return communication, communication - compute * slowdown
    return compute + communication * (1 - 1 / slowdown), 0.0


def waited(compute: float, communication: float, slowdown: float) -> float:
    """Seconds until both are through when they start together and the kernel dealt out its work beforehand: the blocks
    that find no unit start when communication is through, or when the first blocks are, and then take as long as these.
    `slowdown`: of the kernel while communication lasts all along, 2 for one that fills the device.

    >>> waited(3.0, 1.0, 2.0), waited(1.0, 1.5, 2.0), waited(1.0, 4.0, 2.0)
    (4.0, 2.0, 4.0)
    """
    return max(communication, compute + (slowdown - 1) * min(communication, compute))
