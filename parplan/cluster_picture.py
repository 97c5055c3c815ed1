"""A cluster as a picture: devices in a row a node, what joins them around it, the switches of the network above."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from parplan.console import number

if TYPE_CHECKING:
    from costmodels.topology import Topology

MOST_NODES = 4
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#8C510A")
FACES = {"device": "#DCEBF7", "nic": "#FBE3D0", "host": "#E4E4E4", "switch": "#D9F0E5"}
Places = dict[str, tuple[float, float]]


def draw(topology: Topology, path: Path) -> None:
    """Writes the picture; of a large cluster the first nodes and the last, which the title says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cluster = topology.cluster
    places = _grid(topology) if cluster.fabric == "torus" else _rows(topology)
    wide = max(x for x, _ in places.values()) - min(x for x, _ in places.values())
    high = max(y for _, y in places.values()) - min(y for _, y in places.values())
    figure = Figure(figsize=(min(4 + 0.5 * wide, 22), min(2.2 + 0.85 * high, 14)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    _edges(axes, topology, places)
    size = 5.5 if len(places) > 90 else 7
    for name, (x, y) in places.items():
        kind = topology.graph.nodes[name]["kind"]
        box = {"boxstyle": "round,pad=0.28", "facecolor": FACES[kind], "edgecolor": "#777777", "linewidth": 0.6}
        text = str(topology.rank(name)) if cluster.fabric == "torus" else _label(name)
        axes.text(x, y, text, ha="center", va="center", fontsize=size, bbox=box, zorder=3)
    shown = sum(topology.graph.nodes[n]["kind"] == "device" for n in places)
    part = "" if shown == cluster.size else f"; shown: {shown} of {cluster.size} devices"
    part += " (links around the edges not drawn)" if cluster.fabric == "torus" else ""
    axes.set_title(f"{cluster.name}: {cluster.size} x {cluster.device.name}{part}", loc="left", fontweight="bold")
    axes.margins(0.06, 0.12)
    axes.set_axis_off()
    if topology.graph.number_of_edges():
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.01), fontsize=7, frameon=False, ncols=2)
    figure.savefig(path)


def _label(name: str) -> str:
    return name.rpartition("/")[2]


def _edges(axes: Any, topology: Topology, places: Places) -> None:
    """Lines as wide as they are fast; links between devices of one row as arcs below it."""
    colours: dict[tuple[str, float], str] = {}
    torus = topology.cluster.fabric == "torus"
    for a, b, edge in topology.graph.edges(data=True):
        if a not in places or b not in places:
            continue
        (x, y), (u, v) = places[a], places[b]
        if torus and abs(u - x) + abs(v - y) > 2:
            continue  # wraparound: lines across the picture would hide the rest; the title says so
        key = (edge["link"].name, edge["bandwidth"])
        new = key not in colours
        colour = colours.setdefault(key, COLOURS[len(colours) % len(COLOURS)])
        label = f"{key[0]}: {number(key[1], 'B/s')} each way, {1e6 * edge['link'].latency:.3g} us" if new else None
        width = min(max(0.5, (edge["bandwidth"] / 1e10) ** 0.4), 5.0)
        arc = not torus and y == v == 0.0
        axes.plot(
            *_curve(x, y, u, v, 0.22 * abs(u - x) + 0.35 if arc else 0.0),
            color=colour, linewidth=width, alpha=0.8, label=label, zorder=1,
        )  # fmt: skip


def _curve(x: float, y: float, u: float, v: float, bend: float) -> tuple[list[float], list[float]]:
    steps = [i / 24 for i in range(25)] if bend else [0.0, 1.0]
    return [x + (u - x) * t for t in steps], [y + (v - y) * t - 4 * bend * t * (1 - t) for t in steps]


def _rows(topology: Topology) -> Places:
    """Devices at height 0, PCIe switches and hosts above, ports, then the tiers of the network."""
    cluster, graph = topology.cluster, topology.graph
    nodes = list(range(cluster.nodes))
    if len(nodes) > MOST_NODES:
        nodes = [*nodes[: MOST_NODES - 1], nodes[-1]]
    places: Places = {}
    left = 0.0
    for node in nodes:
        count = min(cluster.part_of(node).devices_per_node, 16)
        members = [n for n in graph.nodes if graph.nodes[n]["node"] == node]
        devices = [n for n in members if graph.nodes[n]["kind"] == "device"][:count]
        places |= {name: (left + 1.3 * i, 0.0) for i, name in enumerate(devices)}
        heights = {"nvswitch": -1.3, "plx": 1.0, "cpu": 2.0, "nic": 3.2}
        for prefix, height in sorted(heights.items(), key=lambda item: item[1]):
            for name in (m for m in members if _label(m).startswith(prefix)):
                near = [places[x][0] for x in graph.neighbors(name) if x in places and places[x][1] >= 0]
                if near:
                    places[name] = (fmean(near), height)
        left += 1.3 * count + 1.5
    _spread(places, 3.2)
    tiers: dict[str, int] = {n: graph.nodes[n]["tier"] for n in graph.nodes if "tier" in graph.nodes[n]}
    for level in sorted(set(tiers.values())):
        for name in (n for n in tiers if tiers[n] == level):
            near = [places[x][0] for x in graph.neighbors(name) if x in places and tiers.get(x, -1) < level]
            if near:
                places[name] = (fmean(near), 4.8 + 1.6 * level)
        _spread(places, 4.8 + 1.6 * level)
    return places


def _spread(places: Places, height: float) -> None:
    """Moves names of one height apart that would cover each other."""
    row = sorted((x, name) for name, (x, y) in places.items() if y == height)
    last = float("-inf")
    for x, name in row:
        last = max(x, last + (2.0 if len(_label(name)) > 8 else 1.3))
        places[name] = (last, height)


def _grid(topology: Topology) -> Places:
    """A torus: two dims as a grid, a third as layers behind it."""
    import numpy as np

    dims = topology.cluster.dims
    places = {}
    for rank in range(topology.cluster.size):
        *rest, row, column = (0, 0, *map(int, np.unravel_index(rank, dims)))
        layer = rest[-1] if len(dims) > 2 else 0
        places[topology.device(rank)] = (1.6 * column + 0.5 * layer, 1.6 * row + 0.42 * layer)
    return places
