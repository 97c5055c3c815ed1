"""How much kernels of a GPU are slowed while a collective of NCCL runs beside them: the forms of
`costmodels.contention` with numbers from the device, the group and the op.

Matrix products run in waves of tiles over the units that the collective's channels leave (one thread block, and so one
SM, a channel), with the tile that the library chose for a free device; on Hopper they take twice as long. Attention and
convolutions have many small blocks: they lose the share of units. All else is bound by memory and loses bandwidth.
Power is left out: no published table says what a collective draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Any

import numpy as np

from costmodels.cluster import Cluster
from costmodels.contention import MOST, memory_demand, memory_slowdown
from costmodels.device import Device, load_device
from costmodels.families import COMPUTE, FREE, family
from costmodels.features import touched
from costmodels.gemm import WIDTH, pricing_of, product_dims
from costmodels.gemm_law import slowdown
from costmodels.mixed_nodes import seen_by
from costmodels.nccl_fabric import Group, group_of
from costmodels.nccl_tuner import ring_rate
from costmodels.ops import ASSUMED_EFFICIENCY, OpShape
from costmodels.relatives import same_generation
from costmodels.topology_groups import ROUNDS

# bytes/s of one ring by generation (Volta, Ampere, Hopper, Blackwell): of the speeds that NCCL's graph search tries,
# the first that divides the links evenly (communication.md A1); twelve rings on eight A100, H100 or B200. NCCL then
# doubles the rings into channels: 12 on V100, 24 from A100 on, which is the 24 of the published example (A5).
RING_SPEED = (20e9, 20e9, 30e9, 60e9)
CHANNEL_BYTES = 512 * 64  # a channel less where each would carry less than threads x threshold of Simple: A1
# Of the generation (Hopper) whose cuBLAS products start one block a unit, each with its tiles dealt out beforehand:
# beside a kernel of NCCL all matmuls of an FSDP step on H100 took twice as long (pytorch issue 143988, by its profile;
# pull request 147966 and CUTLASS issue 2471 say the same of such kernels). Blackwell can deal tiles while it runs (the
# same CUTLASS issue); that its cuBLAS does is an ASSUMPTION.
STATIC = "h100-sxm"
MOST_CHANNELS = 32  # ASSUMPTION: NCCL's own limit is 64, of which no collective of the families priced here makes use


@dataclass(frozen=True, slots=True)
class Beside:
    """What runs beside the kernels: units (SMs) that its channels take, bytes/s of device memory that it uses. static:
    16- and 8-bit products of this device deal out their tiles before they start (see `STATIC`)."""

    units: int
    bandwidth: float
    static: bool = False


def channels(group: Group, nbytes: float) -> int:
    """Thread blocks that a ring of NCCL occupies on every device. ASSUMPTION by the rule at `RING_SPEED`; NVLS needs
    fewer, which is not counted."""
    inside = ring_rate(group)
    rate = min(inside, group.across) if group.domains > 1 else inside
    rings = max(round(rate / RING_SPEED[group.generation]), 1) if isfinite(rate) else 1
    return max(min(2 * rings, MOST_CHANNELS, ceil(nbytes / CHANNEL_BYTES)), 1)


def beside(cluster: Cluster, kind: str, nbytes: float, ranks: Sequence[int], seconds: float) -> Beside:
    """A collective that takes `seconds`; nothing on clusters whose devices have no units to share or move no messages
    themselves."""
    if cluster.backend != "nccl" or cluster.device.kind != "gpu" or len(ranks) < 2 or nbytes <= 0:
        return Beside(0, 0.0)
    sent = ROUNDS.get(kind, 1) * (len(ranks) - 1) / len(ranks) * nbytes
    seen, own, _ = seen_by(cluster, ranks)
    units = channels(group_of(seen, own), nbytes)
    return Beside(units, memory_demand(kind, sent, seconds), deals_tiles_beforehand(cluster.device))


def deals_tiles_beforehand(device: Device) -> bool:
    """Whether it is of the generation of `STATIC`; kept in the device's cache."""
    if "static" not in device.cache:
        device.cache["static"] = same_generation(device, load_device(STATIC))
    return bool(device.cache["static"])


def slowdowns(device: Device, shapes: Sequence[OpShape], seconds: Sequence[float], other: Beside) -> list[float]:
    """How many times longer each op takes while `other` runs all along (1 or more); seconds: its price alone.

    At most `MOST`, the most that was seen of whole steps, except for products whose waves say more.
    """
    found = [1.0] * len(shapes)
    if not other.units and not other.bandwidth:
        return found
    products: dict[tuple[str, bool], list[int]] = {}
    left = max(device.units - other.units, 1)
    reachable = device.memory_bandwidth * ASSUMED_EFFICIENCY["pointwise"]
    for i, (shape, alone) in enumerate(zip(shapes, seconds)):
        kind = family(shape.name)
        if kind in FREE or alone <= 0:
            continue
        moved = min(touched(shape) / alone, reachable)
        by_memory = memory_slowdown(moved, other.bandwidth, reachable)
        share = device.units / left if kind in COMPUTE and device.units > 1 else 1.0
        found[i] = min(max(by_memory, share), MOST)
        if kind == "gemm" and device.units > 1:
            products.setdefault((shape.dtype, product_dims(shape)[0] > 1), []).append(i)
    for (dtype, batched), members in products.items():
        if dtype not in WIDTH and not dtype.startswith("float8"):
            continue
        pricing = pricing_of(device, dtype, batched)
        if pricing is None:
            continue
        hardware, narrow = pricing.hardware, WIDTH.get(dtype, 1) <= 2
        fewer = replace(
            hardware,
            units=left,
            peak=hardware.peak * left / hardware.units,
            bandwidth=max(hardware.bandwidth - other.bandwidth, hardware.bandwidth / 2),
        )
        dims = np.array([product_dims(shapes[i]) for i in members], float)
        slower = slowdown(pricing.constants, hardware, fewer, pricing.menu, dims, other.static and narrow)
        for i, value in zip(members, slower.tolist()):
            found[i] = max(value, 1.0)
    return found


def contended(alone: float, slowed: float, queue: list[list[Any]]) -> float:
    """Seconds of work of `alone` seconds that takes `slowed` beside messages, of which `queue` ([name, seconds] in
    their order) is under way; takes what passes meanwhile from the queue.

    >>> queue = [["first", 1.0], ["second", 1.0]]
    >>> contended(1.0, 1.25, queue), queue  # all of it beside messages
    (1.25, [['second', 0.75]])
    >>> round(contended(1.0, 1.25, queue), 6), queue  # 0.6 of it done in 0.75 s, the rest alone
    (1.15, [])
    """
    under_way = sum(seconds for _, seconds in queue)
    if not queue or alone <= 0:
        return alone
    spent = min(slowed, alone + under_way * (1 - alone / slowed))
    passed = spent
    while queue and passed > 0:
        passed -= queue[0][1]
        if passed < 0:
            queue[0][1] = -passed
        else:
            queue.pop(0)
    return spent
