"""Collectives on a torus of chips (TPU pods), where every chip passes on what its neighbours send.

Rings run in both directions of every axis that the group spans, all at once, so gathering and scattering are bound by
the links of one chip, whatever the size of the grid (Jouppi et al. 2023, "TPU v4", arXiv:2304.01433, sections 2 and 7;
bucket algorithms of Chan et al. 2007). An all-to-all is bound by the cut through the middle of the longest axis. The
links stay inside the pod: hosts and their network take no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from costmodels.cluster import Cluster

REACHED = 0.8  # of a link's rate: ASSUMPTION (0.7 to 0.95), no sweep of a TPU is known to us
START = 5e-6  # seconds before the first hop: ASSUMPTION, as for a kernel of an accelerator's runtime
ERROR = 0.3  # of the two together: ASSUMPTION
PHASES = {"all_reduce": 2, "barrier": 2}  # scatter, then gather; all others once


@dataclass(frozen=True, slots=True)
class Axis:
    """What a group has of one axis: places it has members at (two or more), chips from one to the next, and whether it
    closes around the grid."""

    places: int
    stride: int
    closed: bool

    @property
    def lanes(self) -> int:
        """Links of a chip that rings along this axis keep busy in one direction: one each way where they close (both
        links of a ring of two join the same pair), one where the ends have no neighbour."""
        return 2 if self.closed else 1

    @property
    def hops(self) -> int:
        """Links that the farthest message passes."""
        whole = self.places * self.stride
        return max(whole // 2, 1) if self.closed else whole - self.stride

    @property
    def crossing(self) -> float:
        """Of what every chip sends to all, how many times as much passes the busiest link in one direction."""
        half = (self.places // 2) * (self.places - self.places // 2) / self.places
        return half / 2 if self.closed else half


def seconds(cluster: Cluster, kind: str, nbytes: float, ranks: Sequence[int], shared: bool = False) -> float:
    """Time of a collective among `ranks` (row-major in the grid). nbytes: as `costmodels.collectives` counts them.
    shared: groups between this one's places do the same at the same time, and use the same links."""
    axes = axes_of(cluster.dims, ranks, cluster.wraps)
    n = len(set(ranks))
    link = REACHED * cluster.intra.bandwidth / (2 * max(len(cluster.dims), 1))
    slower = max(a.stride for a in axes) if shared else 1
    start = START + PHASES.get(kind, 1) * cluster.intra.latency * sum(a.hops for a in axes)
    if kind == "barrier":
        return start
    if kind == "send":
        return start + nbytes * slower / link
    if kind == "all_to_all":
        return start + nbytes * slower * max(a.crossing for a in axes) / link
    lanes = sum(a.lanes for a in axes)
    share = 1.0 if kind in ("broadcast", "reduce") else PHASES.get(kind, 1) * (n - 1) / n
    return start + share * nbytes * slower / (lanes * link)


def axes_of(dims: Sequence[int], ranks: Sequence[int], wraps: Sequence[bool] = ()) -> tuple[Axis, ...]:
    """The axes along which a group of two or more lies. wraps: which axes of the grid close (none given: all)."""
    places = np.unravel_index(np.unique(np.asarray(ranks, np.int64)), tuple(dims))
    found = []
    for length, coordinates, wrap in zip(dims, places, wraps or (True,) * len(dims)):
        own = np.unique(coordinates)
        if len(own) > 1:
            stride = max(int(own[-1] - own[0]) // (len(own) - 1), 1)
            found.append(Axis(len(own), stride, wrap and len(own) * stride >= length))
    return tuple(found)
