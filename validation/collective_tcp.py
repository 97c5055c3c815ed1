"""Sweeps of torch.distributed over shaped TCP, with the columns of docs/cases.md: backend, num_nodes, delay_ms,
bandwidth_gbps (0 where nothing was shaped), collective, bytes, time_us."""

from __future__ import annotations

from costmodels.cluster import Cluster, Link
from costmodels.collectives import collective_price
from costmodels.device import Device

# AWS p3.2xlarge without shaping: up to 10 Gbit/s, one flow 5 Gbit/s (both from the provider's pages); NCCL's rings
# reach 0.93 of the 10 (EMPIRICAL: 4 points of all_reduce on 8 nodes and reduce on 4).
PORT, FLOW, NCCL_SHARE = 1.25e9, 6.25e8, 0.93
WINDOW = 2.9e6  # bytes under way in one flow: EMPIRICAL, 4 points of gloo send at 5 and 10 ms without shaping
# Configurations of that campaign from whose rows a constant that prices them was taken, (backend, collective, nodes),
# and which constant: their errors say how well a law describes its own data. All others are out of sample: gloo's
# broadcast uses none of these constants, NCCL's exchanges of a step use what other configurations gave.
CAMPAIGN = ("tc_cluster_setting", "p3.2xlarge")  # words of its rows, in `source` or `hardware`
TAKEN_FROM = {
    ("gloo", "all_reduce", 4): "LATENCY_SHARE",
    ("gloo", "all_reduce", 16): "LATENCY_SHARE",
    ("gloo", "reduce", 8): "REDUCE_LATENCY_SHARE",
    ("gloo", "reduce", 16): "REDUCE_LATENCY_SHARE",
    ("gloo", "sendrecv", 2): "WINDOW",
    ("nccl", "all_reduce", 8): "SOCKET_SHARE, NCCL_SHARE",
    ("nccl", "broadcast", 16): "SOCKET_STARTS",
    ("nccl", "reduce", 4): "SOCKET_STARTS, NCCL_SHARE",
}
NCCL_FLOWS = 4  # sockets of a connection: shared/facts/communication.md A2, 5 to 8 MB of window together


def is_tcp(row: dict[str, str]) -> bool:
    return "bandwidth_gbps" in row and "delay_ms" in row


def in_sample(row: dict[str, str]) -> str:
    """The constants that came from the configuration of this row and price it; empty where none did."""
    words = f"{row.get('source') or ''} {row.get('hardware') or ''}"
    if not any(word in words for word in CAMPAIGN):
        return ""
    return TAKEN_FROM.get((row["backend"], row["collective"], int(float(row["num_nodes"]))), "")


Points = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[str, ...]]


def tcp_points(rows: list[dict[str, str]]) -> Points:
    """Bytes, measured and predicted seconds, and what was assumed, of all points of one configuration."""
    found = []
    for row in rows:
        size, seconds = float(row["bytes"]), float(row["time_us"]) * 1e-6
        predicted, way = _price(row, size)
        found.append((size, seconds, predicted, way))
    sizes, measured, predictions, ways = zip(*found, strict=True)
    return sizes, measured, predictions, ways


def cluster_of(row: dict[str, str]) -> Cluster:
    """Nodes of one device each on the link that the row describes."""
    backend, nodes = row["backend"], int(float(row["num_nodes"]))
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend '{backend}' has no model; gloo and nccl have")
    delay, shaped = float(row["delay_ms"] or 0) * 1e-3, float(row["bandwidth_gbps"] or 0) * 1.25e8
    nccl = backend == "nccl"
    rate = shaped or PORT * (NCCL_SHARE if nccl else 1.0)
    flow, window = (NCCL_FLOWS * FLOW, NCCL_FLOWS * WINDOW) if nccl else (FLOW, WINDOW)
    link = Link("TCP", rate, delay, flow_cap=min(flow, rate), window=window)
    device = Device(row.get("hardware") or "unknown", "gpu", {"float32": 1e12}, 2**30, 1e12)
    return Cluster("tcp", device, nodes, 1, link, link, "nccl" if nccl else "gloo")


def _price(row: dict[str, str], size: float) -> tuple[float, str]:
    """An exchange of gradients through one parameter server is a reduce and a broadcast; with a part of the parameters
    on every node, all nodes reduce and broadcast at once, which is a reduce_scatter and an all_gather."""
    cluster = cluster_of(row)
    ranks = tuple(range(cluster.nodes))
    kind = {"sendrecv": "send", "alltoall": "all_to_all", "all_reduce_step": "all_reduce"}.get(
        row["collective"], row["collective"]
    )
    if kind in ("ps_central", "ps_sharded"):
        steps = ("reduce", "broadcast") if kind == "ps_central" else ("reduce_scatter", "all_gather")
        return sum(collective_price(cluster, k, size, ranks).seconds for k in steps), ", ".join(steps)
    price = collective_price(cluster, kind, size, ranks)
    return price.seconds, f"{price.algorithm} {price.protocol}"
