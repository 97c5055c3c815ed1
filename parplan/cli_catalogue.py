"""`parplan clusters`: what is in the catalogue, with sources."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parplan.arguments import Json
from parplan.console import emit, number, seconds, show, table

Name = Annotated[str | None, typer.Argument(help="One of them, in detail.", show_default=False)]


def clusters(name: Name = None, json: Json = False) -> None:
    """List the clusters of the catalogue, or show one with its sources.

    Example: parplan clusters "8x dgx-h100"
    """
    from costmodels.cluster import list_clusters, load_cluster

    found = {n: cluster_entry(load_cluster(n)) for n in ([name] if name else list_clusters())}
    if json:
        emit({"clusters": [{"name": n, **entry} for n, entry in found.items()]})
    elif name:
        _details(name, found[name])
    else:
        rows = [
            (n, c["device"], f"{c['nodes']} x {c['devices_per_node']}", _link(c["intra"]), _link(c["inter"]))
            for n, c in found.items()
        ]
        columns = ("name", "device", "nodes x devices", "link in the node", "link between nodes")
        show(table("Clusters", columns, rows, left=5))
        show("More nodes: '8x dgx-h100'. `parplan clusters NAME` shows details and sources.")


def cluster_entry(cluster: Any) -> dict[str, Any]:
    links = {
        key: {name: getattr(link, name) for name in ("name", "bandwidth", "latency", "ports", "source")}
        for key, link in (("intra", cluster.intra), ("inter", cluster.inter))
    }
    return {
        "device": cluster.device.name,
        "nodes": cluster.nodes,
        "devices_per_node": cluster.devices_per_node,
        "size": cluster.size,
        "backend": cluster.backend,
        "cores": cluster.cores,
        **links,
        "collective_tables": len(cluster.tables),
        "calibrated": cluster.device.calibrated,
        "sources": cluster.sources,
        "notes": cluster.notes,
    }


def _link(link: dict[str, Any]) -> str:
    return f"{link['name']}: {number(link['bandwidth'], 'B/s')}, {seconds(link['latency'])}"


def _details(name: str, entry: dict[str, Any]) -> None:
    rows = []
    for key, value in entry.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{k}", _plain(k if k in ("bandwidth", "latency") else key, v)) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            rows += [(key if i == 0 else "", str(line)) for i, line in enumerate(value)]
        else:
            rows.append((key, _plain(key, value)))
    show(table(name, ("", ""), rows, left=2))


def _plain(key: str, value: Any) -> str:
    match key:
        case "bandwidth":
            return number(value, "B/s")
        case "latency":
            return seconds(value)
    return str(value)
