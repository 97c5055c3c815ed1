"""The link between a rank's device and its host, and the host's memory, as resources of the simulation."""

from __future__ import annotations

from costmodels.cluster import Cluster
from planner.offload import HOST_BANDWIDTH, HOST_ERROR, LINK_ERROR, link_bandwidth
from planner.script import Copy, HostUpdate
from simulator import ProgramBuilder


class HostLinks:
    """Makes the tasks of copies and of updates on the host. Every device has a link of its own, full duplex, on which
    copies of one direction follow each other; updates of a node's ranks share its memory's bandwidth.

    seconds: of all tasks of all ranks; deviation: of their sum.
    """

    def __init__(self, tasks: ProgramBuilder, ranks: int, cluster: Cluster) -> None:
        self.tasks, self.bandwidth = tasks, link_bandwidth(cluster)
        nodes = sorted({cluster.node_of(r) for r in range(ranks)})
        pools = {n: tasks.pool(f"node {n} memory", 1.0) for n in nodes}
        self.to = {
            way: [tasks.resource(f"rank {r} to {way}", rank=r, kind="link") for r in range(ranks)]
            for way in ("host", "device")
        }
        self.updates = [
            tasks.resource(f"rank {r} host update", pool=pools[cluster.node_of(r)], rank=r) for r in range(ranks)
        ]
        self.seconds = self.deviation = 0.0

    def copy(self, rank: int, item: Copy, before: tuple[int, ...]) -> int:
        """The task of a copy after the tasks `before`."""
        seconds = item.bytes / self.bandwidth
        self._count(seconds, LINK_ERROR)
        label, link = f"{item.key} {item.bytes} B", self.to[item.to][rank]
        return self.tasks.task(label, f"to_{item.to}", seconds, link, before, 0.0)

    def update(self, rank: int, item: HostUpdate, before: tuple[int, ...]) -> int:
        """The task of the optimizer's step; it takes this long where no other rank of the node updates beside it."""
        seconds = item.bytes / HOST_BANDWIDTH
        self._count(seconds, HOST_ERROR)
        return self.tasks.task("optimizer", "optimizer", seconds, self.updates[rank], before, 1.0)

    def _count(self, seconds: float, error: float) -> None:
        self.seconds += seconds
        self.deviation += seconds * error
