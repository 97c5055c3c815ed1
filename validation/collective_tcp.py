"""Sweeps of torch.distributed over shaped TCP, with the columns of docs/cases.md: backend, hardware, num_nodes,
gpus_per_node (1 where it is not said), delay_ms, bandwidth_gbps (0 where nothing was shaped), collective, bytes,
time_us."""

from __future__ import annotations

import re

from costmodels.cluster import LOOPBACK, Cluster, Fabric, Link
from costmodels.collectives import collective_price, kind_named
from costmodels.device import Device
from costmodels.nccl_fabric import REFERENCE_HOP, family_of
from validation.collective_cases import number_of, whole_of
from validation.link_words import about_network, network_named, nics_of, of_a_node

# AWS p3.2xlarge without shaping: up to 10 Gbit/s, one flow 5 Gbit/s (both from the provider's pages); NCCL's rings
# reach 0.93 of the 10 (EMPIRICAL: 4 points of all_reduce on 8 nodes and reduce on 4). Other machines whose words say
# no rate are taken to have 10 Gbit/s, too (ASSUMPTION), which one flow can fill.
PORT, FLOW, NCCL_SHARE = 1.25e9, 6.25e8, 0.93
# Bytes under way in one flow: EMPIRICAL, 4 points of gloo send at 5 and 10 ms without shaping. It is the kernel's and
# not the provider's: about half of the 6 MiB to which Linux lets a receive buffer grow by default (tcp_rmem).
WINDOW = 2.9e6
AMAZON = r"(?i)\b(?:aws|amazon|ec2)\b|\b[a-z]+\d+[a-z]*\.(?:\d*x?large|metal)\b|tc_cluster_setting"
# Configurations of that campaign from whose rows a constant that prices them was taken, (backend, collective, nodes),
# and which constant: their errors say how well a law describes its own data. All others are out of sample: gloo's
# broadcast uses none of these constants, NCCL's exchanges of a step use what other configurations gave.
CAMPAIGN = ("tc_cluster_setting", "p3.2xlarge")  # words of its rows, in `source` or `hardware`
TAKEN_FROM = {
    ("gloo", "all_reduce", 4): "LATENCY_SHARE",
    ("gloo", "all_reduce", 16): "LATENCY_SHARE",
    ("gloo", "reduce", 8): "REDUCE_LATENCY_SHARE",
    ("gloo", "reduce", 16): "REDUCE_LATENCY_SHARE",
    ("gloo", "send", 2): "WINDOW",
    ("nccl", "all_reduce", 8): "SOCKET_SHARE, NCCL_SHARE",
    ("nccl", "broadcast", 16): "SOCKET_STARTS",
    ("nccl", "reduce", 4): "SOCKET_STARTS, NCCL_SHARE",
}


def is_tcp(row: dict[str, str]) -> bool:
    return bool({"bandwidth_gbps", "delay_ms"} & row.keys()) or ("backend" in row and "interconnect" not in row)


def in_sample(row: dict[str, str]) -> str:
    """The constants that came from the configuration of this row and price it; empty where none did."""
    words = f"{row.get('source') or ''} {row.get('hardware') or ''}"
    if not any(word in words for word in CAMPAIGN):
        return ""
    where = ((row.get("backend") or "").strip().lower(), exchange_of(row), whole_of(row, "num_nodes", 1))
    return TAKEN_FROM.get(where, "") if whole_of(row, "gpus_per_node", 1) == 1 else ""


# Of a step: NCCL's all_reduce, and what goes to a parameter server and back.
EXCHANGES = ("all_reduce_step", "ps_central", "ps_sharded")
Points = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[str, ...]]


def tcp_points(rows: list[dict[str, str]]) -> Points:
    """Bytes, measured and predicted seconds, and what was assumed, of all points of one configuration."""
    found = []
    for row in rows:
        size, seconds = number_of(row, "bytes"), number_of(row, "time_us") * 1e-6
        if not size or not seconds:
            raise ValueError("bytes and time_us must be more than 0")
        predicted, way = _price(row, size)
        found.append((size, seconds, predicted, way))
    sizes, measured, predictions, ways = zip(*found, strict=True)
    return sizes, measured, predictions, ways


def cluster_of(row: dict[str, str]) -> Cluster:
    """Nodes on the link that the row describes; the devices of a node share its port."""
    backend = (row.get("backend") or "").strip().lower()
    nodes, each = whole_of(row, "num_nodes"), whole_of(row, "gpus_per_node", 1)
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend '{backend}' has no model; gloo and nccl have")
    delay, shaped = number_of(row, "delay_ms") * 1e-3, number_of(row, "bandwidth_gbps") * 1.25e8
    nccl, (port, _) = backend == "nccl", port_of(row)
    amazon = is_amazon(row)
    rate = shaped or port * (NCCL_SHARE if nccl and amazon else 1.0)
    cap = min(FLOW, rate) if amazon else rate
    link = Link("TCP", rate, delay, ports=int(each > 1), flow_cap=cap, window=WINDOW)
    device = Device(row.get("hardware") or "unknown", "gpu", {"float32": 1e12}, 2**30, 1e12)
    inside, fabric = _inside(device.name, nccl) if each > 1 else (link, "nvswitch")
    return Cluster("tcp", device, nodes, each, inside, link, "nccl" if nccl else "gloo", fabric=fabric)


def is_amazon(row: dict[str, str]) -> bool:
    """Whether a row is of AWS, whose flows end at 5 Gbit/s. One that names neither hardware nor source and was not
    shaped is taken for the campaign that the schema was made for."""
    words = f"{row.get('hardware') or ''} {row.get('source') or ''}".strip()
    return bool(re.search(AMAZON, words)) or not (words or number_of(row, "bandwidth_gbps"))


def port_of(row: dict[str, str]) -> tuple[float, bool]:
    """bytes/s of a node's port where nothing was shaped, and whether they are assumed: what the words say, or PORT."""
    words = about_network(row.get("hardware") or "")
    said = nics_of(words) if network_named(words) or re.search(r"(?i)b(?:it)?s?/s|bps", words) else None  # not memory
    if said is None or not said.rate:
        return PORT, not is_amazon(row)
    count, rate = of_a_node(said, whole_of(row, "gpus_per_node", 1), None)
    return count * rate, False


def _inside(hardware: str, nccl: bool) -> tuple[Link, Fabric]:
    """How the devices of a node are joined: NCCL uses the wires of their family, gloo the memory of the host."""
    if not nccl:
        return LOOPBACK, "loopback"
    family = family_of(hardware)
    if family is None or family.wires not in ("nvlink", "mesh"):
        return Link("PCIe", family.port if family else 1.6e10, REFERENCE_HOP["pci"]), "pcie"
    name = "NVLink" if family.wires == "nvlink" else "xGMI"
    return Link(name, family.port, REFERENCE_HOP[family.wires]), "nvswitch" if name == "NVLink" else "mesh"


def exchange_of(row: dict[str, str]) -> str:
    """A kind of collective, or an exchange of the gradients of a step."""
    text = re.sub(r"[\s-]+", "_", row["collective"].strip().lower())
    if text in EXCHANGES:
        return text
    if (kind := kind_named(text)) == "barrier":
        raise ValueError("a barrier has no bytes to sweep; leave it out")
    return kind


def _price(row: dict[str, str], size: float) -> tuple[float, str]:
    """An exchange of gradients through one parameter server is a reduce and a broadcast; with a part of the parameters
    on every node, all nodes reduce and broadcast at once, which is a reduce_scatter and an all_gather."""
    cluster = cluster_of(row)
    ranks = tuple(range(cluster.size))
    if len(ranks) < 2:
        raise ValueError("one node with one device sends nothing; two ranks or more are needed")
    assumed = "" if number_of(row, "bandwidth_gbps") or not port_of(row)[1] else " (10 Gb/s assumed)"
    kind = exchange_of(row).removesuffix("_step")
    if kind in EXCHANGES:
        steps = ("reduce", "broadcast") if kind == "ps_central" else ("reduce_scatter", "all_gather")
        return sum(collective_price(cluster, k, size, ranks).seconds for k in steps), ", ".join(steps) + assumed
    price = collective_price(cluster, kind, size, ranks)
    return price.seconds, f"{price.algorithm} {price.protocol}{assumed}"
