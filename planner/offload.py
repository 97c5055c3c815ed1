"""CPU offload in a step: what crosses the link to the host, when, and what the host does with it.

* "parameters" is `CPUOffloadPolicy` of `fully_shard` (torch 2.13, torch/distributed/fsdp/_fully_shard): the copy of a
  unit's shard runs on the stream of the gather's copies before the gather, in forward one unit ahead, in backward with
  the prefetched gather; the gradient's shard goes down after its reduce-scatter; the optimizer runs on the host after
  the last of them. Host memory of shards and gradients is pinned, that of the optimizer's state is not.
* "optimizer" is ZeRO-Offload (Ren et al. 2021): gradients go down, the host updates, parameters come up. Shards go as
  above; whole gradients go together when all are reduced.
* "activations": when a recomputed module begins, the activations that it reads go down on a stream of their own, each
  storage once; they come back while the module behind it is run again, one ahead.

Nothing crosses where host and device share one memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from costmodels.cluster import Cluster
from opgraph.graph import DTYPE_BYTES, Phase
from planner.plan import ParallelPlan
from planner.runtime_data import LocalParameter, Unit
from planner.runtime_stage import Stage
from planner.script import Copy, HostUpdate, Item, Wait, Work
from planner.stages import shared_parameters

# Share of a link's data sheet rate that copies from pinned memory reach: 55.6 of 63 GB/s on an H100 in NVIDIA's
# example output of nvbandwidth. ASSUMPTION for all other links.
LINK_REACHED = 0.88
LINK_ERROR = 0.10  # ASSUMPTION, as the share is
# bytes/s that an optimizer's step moves in the memory of a node: ZeRO-Offload's CPU-Adam (Ren et al. 2021, table 4)
# updates 10 billion parameters in 2.57 s on a DGX-2, at the 32 bytes that the traced op counts for each. ASSUMPTION for
# all hosts and optimizers, and read from memory: to be checked. Newer hosts have up to three times the memory's rate.
HOST_BANDWIDTH = 32 * 10e9 / 2.57
HOST_ERROR = 0.50  # ASSUMPTION, as the rate is


def is_apart(cluster: Cluster) -> bool:
    """Whether the host's memory is another one than the devices'."""
    return cluster.device.kind != "cpu" and not cluster.device.unified_memory


def link_bandwidth(cluster: Cluster) -> float:
    """bytes/s of a copy from or to pinned memory in one direction. ValueError where no data sheet states the link."""
    if not cluster.device.host_bandwidth:
        raise ValueError(
            f"{cluster.device.name} states no link to its host, so that offload cannot be timed; give its device file "
            "a pcie_bandwidth or c2c_bandwidth in bytes/s"
        )
    return LINK_REACHED * cluster.device.host_bandwidth


def check_offload(stages: Sequence[Stage], cuda_graphs: bool = False) -> None:
    """ValueError for what is not simulated."""
    plan = stages[0].plan
    if plan.offloads_optimizer and shared_parameters(stages[0].stages):
        raise ValueError(
            "the gradients of weights that several pipeline stages share cannot be summed once they are on the host; "
            "use pp = 1 or no offload"
        )
    if plan.offload and cuda_graphs:
        raise ValueError("a step that waits for copies to the host cannot be replayed from CUDA graphs; leave one out")


def offload_notes(plan: ParallelPlan, cluster: Cluster) -> tuple[str, ...]:
    """What a prediction rests on."""
    if not plan.offload:
        return ()
    if not is_apart(cluster):
        return (f"{cluster.device.name} shares its memory with the host: offload moves nothing and frees nothing",)
    update = f" and updates of {HOST_BANDWIDTH / 1e9:.0f} GB/s in the memory of a node" * plan.offloads_optimizer
    return (f"offload assumes copies at {link_bandwidth(cluster) / 1e9:.3g} GB/s in each direction{update}",)


def on_the_host(
    segments: Iterable[tuple[Item, ...]], plan: ParallelPlan, cluster: Cluster
) -> list[tuple[Item, ...]]:
    """The script as it runs on this cluster: without copies where the memory is one, and otherwise with the optimizer's
    ops as one update on the host."""
    if not plan.offload:
        return list(segments)
    apart, known = is_apart(cluster), dict[int, tuple[Item, ...]]()
    found = []
    for segment in segments:
        if id(segment) not in known:
            known[id(segment)] = tuple(_updated(segment, plan) if apart else _in_place(segment))
        found.append(known[id(segment)])
    return found


def _in_place(segment: tuple[Item, ...]) -> Iterator[Item]:
    yield from (item for item in segment if not isinstance(item, Copy))


def _updated(segment: tuple[Item, ...], plan: ParallelPlan) -> Iterator[Item]:
    update: list[Work] = []
    for item in segment:
        if plan.offloads_optimizer and isinstance(item, Work) and item.phase == "optimizer":
            update.append(item)
            continue
        if update:
            yield HostUpdate(sum(w.shape.bytes_read + w.shape.bytes_written for w in update))
            update = []
        yield item
    if update:
        yield HostUpdate(sum(w.shape.bytes_read + w.shape.bytes_written for w in update))


# -- parameters and gradients -------------------------------------------------------------------------------


def fetch(stage: Stage, unit: Unit, phase: Phase) -> Iterator[Item]:
    """A unit's shard comes to the device, unless it is on its way."""
    if "parameters" in stage.plan.offload and unit.parameters and unit.path not in stage.fetched:
        stage.fetched.add(unit.path)
        yield Copy("device", unit.gathered_bytes(stage.plan.dp) // stage.plan.dp, phase, f"fetch {unit.path}")


def down(stage: Stage, unit: Unit) -> Iterator[Item]:
    """A unit's shard of gradients goes to the host when it is reduced."""
    if stage.plan.offloads_optimizer:
        size, after = unit.gathered_bytes(stage.plan.dp) // stage.plan.dp, f"scatter {unit.path}"
        yield Copy("host", size, "backward", f"down {unit.path}", after)


def waits(stage: Stage) -> Iterator[Item]:
    """The optimizer reads gradients that are reduced, and on the host where it is there (FSDP's finalize_backward)."""
    for unit in stage.units:
        yield Wait(f"{'down' if stage.plan.offloads_optimizer else 'scatter'} {unit.path}")


def down_at_once(stage: Stage, mine: Iterable[LocalParameter]) -> Iterator[Item]:
    if stage.plan.offloads_optimizer and not stage.units and (size := sum(p.bytes for p in mine)):
        yield Copy("host", size, "optimizer", "down")
        yield Wait("down")


def up(stage: Stage, mine: Iterable[LocalParameter]) -> Iterator[Item]:
    """Parameters that rest on the device come up when they are updated."""
    if stage.plan.offloads_optimizer and "parameters" not in stage.plan.offload:
        size = sum(u.gathered_bytes(stage.plan.dp) // stage.plan.dp for u in stage.units)
        if size := size or sum(p.numel * DTYPE_BYTES[p.dtype] for p in mine):
            yield Copy("device", size, "optimizer", "up")
            yield Wait("up")
