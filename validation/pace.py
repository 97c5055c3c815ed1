"""How fast this machine is right now, sampled by the anchor benchmark, and the cluster at that pace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from costmodels.cluster import Cluster
from costmodels.device import Device, rescale
from validation.anchor import NEVER, Anchors, Beat, joined, over

NEAR = 8  # samples that make the pace: one alone (half a second) scatters by 5 % on a shared machine
BRIEF = 40


def usual(samples: Sequence[float]) -> float:
    """The lower quartile: the pace between the bursts of other tenants, which slow everything 1.2 to 1.6 times for
    seconds. Steps that fall into such a burst are not counted either (`validation.measure.undisturbed`)."""
    return float(np.quantile(samples, 0.25))


def usual_beat(samples: Sequence[Beat]) -> Beat:
    """The same of every part."""
    return joined(usual, samples)


def since_calibration(device: Device, now: Beat) -> tuple[float, dict[str, float]]:
    """How many times as long as in its calibration the anchor takes inside a rank: all of it (0 where either was not
    measured), and by part (none in files of before November 2026)."""
    whole = device.host.get("anchor_in_rank", 0.0)
    if not whole or now == NEVER:
        return 0.0, {}
    then = Beat(*(device.host.get(f"anchor_{part}", 0.0) for part in Beat._fields))
    return now.whole / whole, over(now, then)._asdict() if min(then) > 0 else {}


@dataclass(slots=True)
class Pace:
    """Ratios of the anchor's time to that of the calibration, in the order in which they were sampled.

    No anchors: nothing is known about the machine's pace (no calibration, or torchrun, where all ranks must predict
    the same) and the ratio is 1.
    """

    cluster: Cluster
    anchors: Anchors | None
    ratios: list[float] = field(default_factory=list)

    def sample(self, repeats: int = BRIEF) -> float:
        """Samples once, and returns what is usual among the last few samples."""
        if self.anchors is None:
            return 1.0
        self.ratios.append(self.anchors.seconds(repeats) / self.cluster.device.anchor_seconds)
        return usual(self.ratios[-NEAR:])

    def at(self, ratio: float, parts: Mapping[str, float] | None = None, slowest: bool = False) -> Cluster:
        """The cluster when everything takes `ratio` times as long as at its calibration, and what goes by a part of the
        anchor as many times as `parts` say; messages too, where the cores that compute also move them. `slowest`: the
        ratios are of the slowest of the ranks at every moment, so that nothing is left of how cores differ."""
        if self.anchors is None:
            return self.cluster
        tables = self.cluster.tables
        if self.cluster.cores:
            tables = tuple(replace(t, seconds=tuple(s * ratio for s in t.seconds)) for t in tables)
        device = rescale(self.cluster.device, ratio, parts)
        if slowest:
            device = replace(device, host=device.host | {"skew": 0.0}, cache={})
        return replace(self.cluster, device=device, tables=tables, cache={})


@contextmanager
def pace_of(cluster: Cluster) -> Iterator[Pace]:
    """The pace of this machine; its anchor processes wait in between and end with the block."""
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torchrun or not cluster.device.anchor_seconds:
        yield Pace(cluster, None)
        return
    with Anchors(cluster.cores) as anchors:
        yield Pace(cluster, anchors)
