"""`parplan clusters`: what is in the catalogue or in a file, with sources, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from parplan.arguments import Json, check_file
from parplan.console import emit, number, seconds, show, table

Name = Annotated[
    str | None,
    typer.Argument(
        help="One in detail: a name, '8x NAME', 'A + B', a TOML file, `nvidia-smi topo -m` (.txt), NCCL XML (.xml).",
        show_default=False,
    ),
]
Picture = Annotated[Path | None, typer.Option("--out", help="Draw NAME as a graph into this PNG.", show_default=False)]
DeviceName = Annotated[
    str,
    typer.Option("--device", help="The GPUs of a .txt or .xml, which does not name their model.", show_default=False),
]


def clusters(name: Name = None, out: Picture = None, device: DeviceName = "", json: Json = False) -> None:
    """List the clusters of the catalogue, or show one with its sources and its graph.

    Example: parplan clusters "2x dgx1-v100" --out dgx1.png
    """
    from costmodels.cluster import list_clusters, load_cluster

    if out and not name:
        raise ValueError("--out draws one cluster; name it, as in: parplan clusters dgx-h100 --out x.png")
    if device and not name:
        raise ValueError(
            "--device says what GPUs a file has; name the file, as in: parplan clusters x.txt --device a40"
        )
    if out and out.suffix != ".png":
        raise ValueError(f"{out}: --out writes a PNG; give a name that ends in .png")
    check_file("--out", out)
    if name and out:
        from costmodels.topology import expand
        from parplan.cluster_picture import draw

        draw(expand(load_cluster(name, device)), out)
    found = {n: cluster_entry(load_cluster(n, device)) for n in ([name] if name else list_clusters())}
    if json:
        emit({"clusters": [{"name": n, **entry} for n, entry in found.items()]})
    elif name:
        _details(name, found[name])
    else:
        rows = [
            (n, c["device"], _shape(c), c["fabric"], _link(c["intra"]), _link(c["inter"]), _tiers(c))
            for n, c in found.items()
        ]
        columns = ("name", "device", "devices", "fabric", "link in the node", "link between nodes", "switch tiers")
        show(table("Clusters", columns, rows, left=7))
        show("More nodes: '8x dgx-h100'. `parplan clusters NAME` shows details and sources, `--out x.png` draws it.")


def cluster_entry(cluster: Any) -> dict[str, Any]:
    links = {
        key: {name: getattr(link, name) for name in link.__slots__}
        for key, link in (("intra", cluster.intra), ("inter", cluster.inter))
    }
    return {
        "device": cluster.device.name,
        "nodes": cluster.nodes,
        "devices_per_node": cluster.devices_per_node,
        "size": cluster.size,
        "backend": cluster.backend,
        "cores": cluster.cores,
        "fabric": cluster.fabric,
        "dims": cluster.dims,
        **links,
        "tiers": [{name: getattr(tier, name) for name in tier.__slots__} for tier in cluster.tiers],
        "wires": [{"a": w.a, "b": w.b, "name": w.link.name, "bandwidth": w.link.bandwidth} for w in cluster.wires],
        "groups": [{"nodes": g.nodes, "device": g.part.device.name} for g in cluster.groups],
        "collective_tables": len(cluster.tables),
        "calibrated": cluster.device.calibrated,
        "sources": cluster.sources,
        "notes": cluster.notes,
    }


def _shape(c: dict[str, Any]) -> str:
    return " x ".join(map(str, c["dims"])) if c["dims"] else f"{c['nodes']} x {c['devices_per_node']}"


def _tiers(c: dict[str, Any]) -> str:
    return ", ".join(
        f"{t['name']} of {t['nodes']}{' rails' if t['rails'] else ''} 1:{t['oversubscription']:g}" for t in c["tiers"]
    )


def _link(link: dict[str, Any]) -> str:
    return f"{link['name']}: {number(link['bandwidth'], 'B/s')}, {seconds(link['latency'])}"


def _details(name: str, entry: dict[str, Any]) -> None:
    rows = []
    for key, value in entry.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{k}", _plain(k if k in ("bandwidth", "latency") else key, v)) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            rows += [(key if i == 0 else "", _line(line)) for i, line in enumerate(value)]
        else:
            rows.append((key, _plain(key, value)))
    show(table(name, ("", ""), rows, left=2))


def _line(value: Any) -> str:
    return ", ".join(f"{k} {_plain(k, v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _plain(key: str, value: Any) -> str:
    match key:
        case "bandwidth" | "flow_cap" if value:
            return number(value, "B/s")
        case "latency":
            return seconds(value)
    return str(value)
