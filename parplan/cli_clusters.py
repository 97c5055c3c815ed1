"""`parplan clusters`: what is in the catalogue or in a file, with sources, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
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
    return f"{link['name']}: {_rate(link['bandwidth'])}, {seconds(link['latency'])}"


def _rate(value: float) -> str:
    return number(value, "B/s")


FABRICS = {
    "nvswitch": "all to one switch (nvswitch)", "mesh": "every pair by its share of a device's links (mesh)",
    "cube-mesh": "by the wires below (cube-mesh)", "pcie": "PCIe: by the wires below, or all to one host bridge",
    "torus": "grid with wraparound over the whole cluster (torus)", "loopback": "processes of one machine (loopback)",
}  # fmt: skip


def _details(name: str, entry: dict[str, Any]) -> None:
    """What is set, with units; zeros that mean "none" or "no limit" are left out."""
    nodes, each = entry["nodes"], entry["devices_per_node"]
    rows = [
        ("device", entry["device"]),
        ("devices", f"{entry['size']:,}: {nodes:,} {'nodes' if nodes > 1 else 'node'} of {each}"),
        ("grid", " x ".join(map(str, entry["dims"]))),
        ("messages by", entry["backend"]),
        ("host cores", f"{entry['cores']} a node, shared by its ranks" if entry["cores"] else ""),
        ("joined in the node", FABRICS[entry["fabric"]]),
        *_link_rows("link in the node", entry["intra"]),
        *_link_rows("link between nodes", entry["inter"]),
        *_listed("switch tiers", [_tier(t) for t in entry["tiers"]]),
        *_listed("wires", [f"{w['a']} - {w['b']}: {w['name']}, {_rate(w['bandwidth'])}" for w in entry["wires"]]),
        *_listed("groups of nodes", [f"{g['nodes']} of {g['device']}" for g in entry["groups"]]),
        ("measured", f"{n} tables of collectives" if (n := entry["collective_tables"]) else ""),
        ("calibrated", "yes, `parplan calibrate`" if entry["calibrated"] else ""),
        *_listed("sources", entry["sources"]),
        *_listed("notes", entry["notes"]),
    ]
    show(table(name, ("", ""), [row for row in rows if row[1]], left=2))
    if any("shared/" in value for _, value in rows):
        show("Paths in shared/ are the project's own notes of its sources, which are not shipped.")


def _listed(title: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    return [(title if i == 0 else "", line) for i, line in enumerate(lines)]


def _link_rows(title: str, link: dict[str, Any]) -> list[tuple[str, str]]:
    said = (
        ("bandwidth", f"{_rate(link['bandwidth'])} a direction, of a port"),
        ("latency", f"{seconds(link['latency'])} one way, of an empty message"),
        ("ports", f"{link['ports']} a node, shared by its devices" if link["ports"] else "one for each device"),
        ("one flow", f"at most {_rate(link['flow_cap'])}" if link["flow_cap"] else ""),
        ("window", f"at most {number(link['window'], 'B')} of a flow under way" if link["window"] else ""),
        ("collisions", f"leave {link['ecmp']:.0%} of it to flows over parallel links" if link["ecmp"] < 1 else ""),
        ("source", link["source"]),
    )
    return [(title, link["name"]), *((f"  {key}", value) for key, value in said)]


def _tier(tier: dict[str, Any]) -> str:
    words = [f"{tier['name']}: {tier['nodes']:,} nodes below a switch"]
    words += [f"oversubscribed 1:{tier['oversubscription']:g}"] * (tier["oversubscription"] != 1)
    words += ["a switch for each port index (rails)"] * tier["rails"]
    words += [f"collisions leave {tier['ecmp']:.0%}"] * (tier["ecmp"] < 1)
    words += [f"{seconds(tier['latency'])} more"] * bool(tier["latency"])
    return ", ".join(words)
