"""What a board's power limit leaves of the rate of its units, and what that says of another board of the same process.

A board that may draw less than its work would draw runs at a lower clock. Of one board the law is measured (`POWER`);
from one board to another the same law is read at what each may draw per FLOP of its peak: L40S has 0.97 W for each
TFLOP/s in 16 bits and reaches 0.54 of them in long products, RTX 4090 has 2.7 W and is not held back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from costmodels.relatives import has_tensor_cores, rate_per_clock, same_generation, vendor

if TYPE_CHECKING:
    from costmodels.device import Device

# Rate left under a limit of 0.6 to 0.9 of what the work would draw: limit ** POWER. Median over 165 pairs of power
# limits of training runs on V100, A40 and Quadro RTX 6000 (0.43, 0.36, 0.41; eight in ten between P10 and P90):
# `python -m validation.fit_power` on the Zeus project's traces.
POWER = 0.4
# Below, voltage is at its floor, and rate goes with power. ASSUMPTION for boards that were built for their limit: one
# and the same board limited to 0.35 to 0.6 loses faster (0.81 of the rate at 0.6, 0.6 at 0.5, 0.37 at 0.4 in the same
# traces), as its memory and fans go on drawing what they do.
FLOOR = 0.6
# Share of the peak that long products reach where nothing holds them back: A100 SXM 0.83, H100 SXM 0.75 by their
# sections at 10 ms. ASSUMPTION: what a lender lacks of this, its power limit took.
FREE_SHARE = 0.8
LONG = 2.0  # decades of duration (`gemm_law.THROTTLE_FROM`) at which shares are compared: 10 ms at the peak
# Draw of a FLOP in tensor cores (16 bits) over that of one in float32's units: L40S at 1.95 W per TFLOP/s and L4 at 8.2
# as their tables and limits say; both are Ada's. ASSUMPTION for other generations.
TENSOR_DRAW = 0.24
ALIKE = 2.5  # times as many FLOP per clock and unit, up to which boards are compared (RTX 4090 and L40S: 2)
BEST_SHARE = 0.9  # of the peak that a rate which a limit held back is raised to at most
DOUBT = 0.5  # of the log of a power ratio, which joins the error in squares. ASSUMPTION


def share_under(limit: float) -> float:
    """Share of the rate that is left where a board may draw `limit` of what the work would.

    >>> [round(share_under(x), 2) for x in (1.2, 1.0, 0.8, 0.6, 0.3)]
    [1.0, 1.0, 0.91, 0.82, 0.41]
    """
    if limit >= 1.0:
        return 1.0
    if limit >= FLOOR:
        return float(limit**POWER)
    return float(FLOOR**POWER * limit / FLOOR)


def limit_of(share: float) -> float:
    """The limit that leaves a share of the rate; 1 where nothing is lost.

    >>> round(limit_of(share_under(0.3)), 6), round(limit_of(share_under(0.7)), 6), limit_of(2.0)
    (0.3, 0.7, 1.0)
    """
    if share >= 1.0:
        return 1.0
    at_floor = FLOOR**POWER
    return float(share ** (1 / POWER)) if share >= at_floor else share / at_floor * FLOOR


def long_share(section: Mapping[str, Any]) -> float:
    """Share of the peak that long products reach by a section of constants of matrix products."""
    return float(section.get("compute", FREE_SHARE)) / (1.0 + LONG * float(section.get("throttle", 0.0)))


def held_to(device: Device, section: Mapping[str, Any]) -> float:
    """What a device may draw of what its long products would, by its section of constants; 1 where nothing tells: for
    other makers than NVIDIA and devices without tensor cores, whose long products lack of `FREE_SHARE` what their
    libraries do."""
    told = vendor(device) == "NVIDIA" and has_tensor_cores(device)
    return limit_of(long_share(section) / FREE_SHARE) if told else 1.0


def comparable(one: Device, other: Device, dtype: str) -> bool:
    """Whether watts per FLOP of two boards can be compared: of one generation, or of one maker, both with 8-bit floats,
    which stands for the process (NVIDIA's are all made in one), and with units of about the same kind. An L40S says
    nothing of an H100, whose units do four times as much per clock: 0.58 of the peak at 0.97 W per TFLOP/s, 0.75 at
    0.71."""
    if vendor(one) != vendor(other):
        return False
    if same_generation(one, other):
        return True
    rates = [rate_per_clock(d, dtype) for d in (one, other)]
    return all("float8_e4m3fn" in d.peak_flops for d in (one, other)) and max(rates) < ALIKE * min(rates)


def watts_per_flop(device: Device, dtype: str) -> float:
    """W for each FLOP/s of the peak; 0 where the device file states no limit."""
    from costmodels.ops import peak_of

    return device.tdp / peak_of(device, dtype)


def board_ratio(device: Device, lender: Device, dtype: str, section: Mapping[str, Any]) -> float:
    """Share of its peak that a device reaches in long products over that of the lender of `section`, by what both may
    draw; 1 where that is unknown."""
    own, lent = watts_per_flop(device, dtype), watts_per_flop(lender, dtype)
    if not own or not lent:
        return 1.0
    limit = held_to(lender, section)
    return share_under(limit * own / lent) / share_under(limit)


def own_ratio(device: Device, lender: Device, dtype: str, section: Mapping[str, Any]) -> float:
    """Share of its peak that a device reaches in 16 bits over that of the lender of `section`, by how far its own
    float32 products are held back; 1 where they are not, or were not measured.

    T4: float32 reaches 0.58 of its peak at 70 W, so 65 TFLOP/s in tensor cores would draw 250 W.
    """
    float32 = device.kernels.get("gemm", {}).get("float32")
    if float32 is None or not device.tdp or dtype not in ("float16", "bfloat16"):
        return 1.0
    limit = held_to(device, float32)
    if limit >= 1.0 or watts_per_flop(device, dtype) > 0.5 * watts_per_flop(device, "float32"):  # no tensor cores
        return 1.0
    draw = TENSOR_DRAW * watts_per_flop(device, "float32") / limit
    return share_under(watts_per_flop(device, dtype) / draw) / share_under(held_to(lender, section))
