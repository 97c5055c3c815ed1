"""Ways to agree on a gradient: all-reduce by ring, tree or in levels, and parameter servers. Seconds of one message.

Closed forms for P workers, S bytes, ports of B bytes/s and latency L; `tests/costmodels/test_schemes.py` holds those of
the servers to flows that share ports max-min fairly.

* "auto": what the backend chooses. "ring", "tree", "hierarchical": only this (NCCL's own algorithms as
  `costmodels.collectives` prices them; on gloo its ring, a binomial tree, and rings in levels).
* "ps": one server on a machine of its own that has the ports of one more node. All nodes push at once into its ports:
  P S / B for one worker a node, and as much to pull.
* "ps-sharded": every worker serves 1/P of the parameters: an all-to-all each way, 2 (P - 1) / P S / B, as a ring.
* "ps-hierarchical": the ranks of a node add theirs up first (a reduce-scatter inside), one sum a node goes to the
  server, and the reply is gathered inside: nodes S / B each way.

"gradients": servers reply with the sum, and every worker updates its parameters. "parameters": servers update theirs
and reply with parameters, whole. Adding up inside devices overlaps with receiving and is left out, as it is in rings;
a server machine adds in host memory, which can be slower than its ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, log2
from typing import Literal, get_args

from costmodels import hockney
from costmodels.cluster import Cluster
from costmodels.collectives import collective_price
from costmodels.compression import FLOAT, Compression, Shapes, elements, messages, payload, reply_bytes
from costmodels.gloo import SOCKET_SHARE
from costmodels.nccl_fabric import network_of
from costmodels.price import Source

Reduce = Literal["auto", "ring", "tree", "hierarchical"]
Server = Literal["ps", "ps-sharded", "ps-hierarchical"]
Exchange = Literal["gradients", "parameters"]
SERVER_MEMORY = 40e9  # bytes/s at which a server machine adds gradients up: ASSUMPTION (two sockets, 20 to 60)
UPDATE_PASSES = 5  # a server's update reads parameter, gradient, moment and writes two, on top of adding: ASSUMPTION
NETWORK_SHARE = 0.85  # of a port's rate that RDMA reaches: ASSUMPTION, .73 to .95 (shared/facts/communication.md A6)
NETWORK_LATENCY = 14e-6  # s that a message through a network costs on top of the link: NCCL's Simple hop (A1)
SERVER_ERROR = 0.3  # of closed forms on data-sheet rates: ASSUMPTION, as whole_step has it


@dataclass(frozen=True, slots=True)
class Scheme:
    """algorithm; exchange: what servers send back (all-reduces exchange gradients)."""

    algorithm: Reduce | Server
    exchange: Exchange = "gradients"

    @property
    def served(self) -> bool:
        return self.algorithm.startswith("ps")

    @property
    def name(self) -> str:
        return f"{self.algorithm}/{self.exchange}" if self.served else self.algorithm


SCHEMES = tuple(
    [Scheme(a) for a in get_args(Reduce)] + [Scheme(a, e) for a in get_args(Server) for e in get_args(Exchange)]
)


@dataclass(frozen=True, slots=True)
class SchemePrice:
    """Seconds of a bucket's messages in order. push: until all is at the servers (all-reduces: everything). update:
    of the server on the bucket's parameters. pull: the reply. demand: host cores kept busy per rank."""

    push: float
    update: float
    pull: float
    demand: float
    source: Source
    error: float

    @property
    def seconds(self) -> float:
        return self.push + self.update + self.pull


def scheme_from(name: str) -> Scheme:
    """auto, ring, tree, hierarchical, ps, ps-sharded, ps-hierarchical; of servers also ps/parameters and so on."""
    known = {s.name: s for s in SCHEMES} | {s.algorithm: s for s in SCHEMES if s.exchange == "gradients"}
    if name not in known:
        raise ValueError(f"'{name}' is no known scheme; use one of {', '.join(s.name for s in SCHEMES)}")
    return known[name]


def fits(scheme: Scheme, compression: Compression, cluster: Cluster, ranks: Sequence[int]) -> bool:
    """Whether the scheme is a different thing from its neighbours here: codes that cannot be added are gathered by the
    backend's all-gather whatever the all-reduce, PowerSGD needs two rounds (no server has them), and levels need
    several nodes of several ranks."""
    if scheme.served and compression.kind == "powersgd":
        return False
    if not scheme.served and not compression.summable and scheme.algorithm != "ring":
        return False
    if cluster.fabric == "torus" and scheme.algorithm in ("tree", "hierarchical"):
        return False  # its chips ring along the axes, whatever the hosts
    nodes = nodes_of(cluster, ranks)
    sockets = nodes > 1 and network_of(cluster.inter) == "ethernet"
    if scheme.algorithm == "auto":
        return cluster.backend == "nccl" and not sockets  # otherwise that is a ring
    if scheme.algorithm == "tree" and cluster.backend == "nccl":
        return not sockets  # no law of trees over sockets was measured
    if scheme.algorithm.endswith("hierarchical"):
        return 1 < nodes < len(ranks)
    return True


def nodes_of(cluster: Cluster, ranks: Sequence[int]) -> int:
    return len({cluster.node_of(r) for r in ranks})


def scheme_price(
    cluster: Cluster, scheme: Scheme, compression: Compression, shapes: Shapes, ranks: Sequence[int]
) -> SchemePrice:
    """The messages of one bucket when nothing else uses the links. ranks: of the group, two or more."""
    if len(ranks) < 2:
        return SchemePrice(0.0, 0.0, 0.0, 0.0, "measured", 0.0)
    if scheme.served:
        return _served(cluster, scheme, compression, shapes, ranks)
    total = demand = error = 0.0
    source: Source = "measured"
    for message in messages(compression, shapes, len(ranks)):
        if message.kind == "all_gather":
            cost = collective_price(cluster, "all_gather", message.bytes, ranks)
        elif scheme.algorithm == "ring" and cluster.backend == "gloo":
            cost = collective_price(cluster, "all_reduce", message.bytes, ranks)
        elif cluster.backend == "gloo":
            seconds = _gloo_levels(cluster, scheme.algorithm, message.bytes, ranks)
            ring = collective_price(cluster, "all_reduce", message.bytes, ranks)
            total, demand, source, error = total + seconds, ring.demand, "roofline", max(error, SERVER_ERROR)
            continue
        else:
            rings = "torus" if cluster.fabric == "torus" else "ring"  # a torus rings along its axes
            only = {"auto": "", "ring": rings}.get(scheme.algorithm, scheme.algorithm)
            cost = collective_price(cluster, "all_reduce", message.bytes, ranks, only)
        total, demand, source, error = total + cost.seconds, max(demand, cost.demand), cost.source, cost.error
    return SchemePrice(total, 0.0, 0.0, demand, source, error)


def _gloo_levels(cluster: Cluster, algorithm: str, nbytes: float, ranks: Sequence[int]) -> float:
    """gloo has neither: a binomial tree of whole messages up and down, or rings inside nodes and between them."""
    nodes = nodes_of(cluster, ranks)
    inside, net = ((link.latency, 1 / link.flow_rate()) for link in (cluster.intra, cluster.inter))
    if algorithm == "tree" and cluster.cores and cluster.tables and nodes == 1:
        return 2 * ceil(log2(len(ranks))) * collective_price(cluster, "send", nbytes, tuple(ranks)[:2]).seconds
    if algorithm == "tree":
        return tree(nbytes, len(ranks), *(inside if nodes == 1 else net))
    per_node = ceil(len(ranks) / nodes)
    return hockney.hierarchical(nbytes, nodes, per_node, inside, (net[0], net[1] * per_node))


def tree(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """All-reduce by a binomial reduce and broadcast of whole messages: 2 ceil(lg P) (L + S / B)."""
    return 2 * ceil(log2(ranks)) * (alpha + nbytes * beta)


def central(nbytes: float, senders: int, alpha: float, beta: float) -> float:
    """One way between one server and `senders` workers at once: its port carries all of them: L + P S / B."""
    return alpha + senders * nbytes * beta


def sharded(nbytes: float, ranks: int, alpha: float, beta: float) -> float:
    """One way between P workers that serve 1/P each: L + (P - 1) / P S / B."""
    return alpha + (ranks - 1) / ranks * nbytes * beta


def _served(
    cluster: Cluster, scheme: Scheme, compression: Compression, shapes: Shapes, ranks: Sequence[int]
) -> SchemePrice:
    up = payload(compression, shapes)
    whole = FLOAT * elements(shapes)
    down = reply_bytes(compression, shapes, len(ranks))
    update = 0.0
    if scheme.exchange == "parameters":
        down = whole
        memory = cluster.device.memory_bandwidth * len(ranks) if scheme.algorithm == "ps-sharded" else SERVER_MEMORY
        update = UPDATE_PASSES * whole / memory
    push = _one_way(cluster, scheme.algorithm, up, whole, ranks)
    pull = _one_way(cluster, scheme.algorithm, down, 0, ranks)
    demand = 1.0 if cluster.cores else 0.0
    return SchemePrice(push, update, pull, demand, "roofline", SERVER_ERROR)


def _one_way(cluster: Cluster, algorithm: str, nbytes: float, added: float, ranks: Sequence[int]) -> float:
    """Seconds to the servers or back; added: bytes that a server adds up for each sender (decoded gradients)."""
    nodes = nodes_of(cluster, ranks)
    if cluster.cores and cluster.tables and nodes == 1:  # ports are cores: message after message, as measured
        count, part = (len(ranks) - 1, nbytes / len(ranks)) if algorithm == "ps-sharded" else (len(ranks), nbytes)
        return count * collective_price(cluster, "send", part, tuple(ranks)[:2]).seconds
    if algorithm == "ps-sharded":
        if cluster.backend == "nccl":  # the law of all-to-alls has been fitted to measurements
            return collective_price(cluster, "all_to_all", nbytes, ranks).seconds
        alpha, rate, flow = _port(cluster, nodes > 1)
        return sharded(nbytes, len(ranks), alpha, 1 / min(rate, (len(ranks) - 1) * flow))
    alpha, rate, flow = _port(cluster, True)
    senders = nodes if algorithm == "ps-hierarchical" else len(ranks)
    # one flow may be capped below a port's rate; the server's ports are filled by many
    node_rate = min(rate * (cluster.inter.ports or cluster.devices_per_node), senders * flow)
    if algorithm == "ps":
        each = len(ranks) / nodes * nbytes / node_rate  # the fullest node sends no faster than its own ports
        return max(central(nbytes, len(ranks), alpha, 1 / node_rate), each, len(ranks) * added / SERVER_MEMORY)
    per_node = ceil(len(ranks) / nodes)
    local = tuple(r for r in ranks if cluster.node_of(r) == cluster.node_of(ranks[0]))
    inside = collective_price(cluster, "reduce_scatter" if added else "all_gather", nbytes, local).seconds
    outside = max(central(nbytes, nodes, alpha, 1 / node_rate), nodes * added / SERVER_MEMORY)
    return (inside if per_node > 1 else 0.0) + outside


def _port(cluster: Cluster, network: bool) -> tuple[float, float, float]:
    """Latency, bytes/s of one port, and bytes/s of one flow: of the network, or inside the node."""
    link = cluster.inter if network else cluster.intra
    if cluster.backend == "gloo":
        return link.latency, link.bandwidth, link.flow_rate()
    share = link.ecmp * (SOCKET_SHARE if network_of(link) == "ethernet" else NETWORK_SHARE)
    return link.latency + NETWORK_LATENCY, link.bandwidth * share, (link.flow_cap or inf) * share
