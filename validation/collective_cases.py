"""Published sweeps of collectives: read from CSV or the catalogue, and turned into clusters that can be priced.

Columns (docs/cases.md): config_id, gpu, num_gpus, num_nodes, interconnect, collective, bytes, time_us, source,
notes. What links there are is read from the words of `interconnect` and `notes`; what those leave out is taken from the
usual machine of that device (`USUAL`), and a device without a family needs its links in words.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from costmodels import tomlfile as toml
from costmodels.cluster import Cluster, Fabric, Link
from costmodels.collectives import kind_named
from costmodels.device import CATALOGUE, Device, load_device
from costmodels.names import names, plain
from costmodels.nccl_fabric import REFERENCE_CROSSING, REFERENCE_HOP, Family, family_of, network_of
from validation.cases_cluster import published_device
from validation.link_words import about_network, cube_mesh, lanes_of, network_named, nics_of, of_a_node

SWEEPS = CATALOGUE / "collectives" / "nccl_sweeps.toml"
# Host time of a call that is inside a measurement by torch instead of nccl-tests: eager torch adds 20 to 40 us
# (shared/facts/communication.md A6); back-to-back calls hide part of it.
TORCH_HOST = 20e-6
# NICs of a node and bytes/s of each where a sweep names the platform only: provider's instance pages.
PLATFORMS = {
    "p5en": (16, 25e9), "p5.48": (32, 12.5e9), "p6-b200": (8, 50e9), "p4d": (4, 12.5e9), "p3dn": (1, 12.5e9),
    "g4dn.metal": (1, 12.5e9), "g4dn.12": (1, 6.25e9), "g5.48": (1, 12.5e9), "GPU.H100": (8, 50e9),
    "GPU.H200": (8, 50e9), "GPU.B4": (16, 12.5e9), "GPU4": (16, 12.5e9), "GPU.A100": (16, 12.5e9),
    "GPU.B200": (8, 50e9), "GPU.GB200": (4, 50e9), "GPU.MI300X": (8, 50e9), "a3-mega": (8, 25e9),
    "a3-ultra": (8, 50e9), "a4-high": (8, 50e9),
}  # fmt: skip
USUAL = {"volta": (1, 12.5e9), "ampere": (8, 25e9), "hopper": (8, 50e9), "hopper-h800": (8, 50e9),
         "blackwell": (8, 50e9), "blackwell-nvl72": (4, 50e9), "cdna": (8, 50e9), "cdna4": (8, 50e9)}  # fmt: skip
# A NIC that is the devices' PCIe switch has a port for each of them: NVIDIA's MGX board for RTX PRO and 6000D
# (ConnectX-8, 400 Gb/s a device; NCCL_IB_HCA names eight in published logs of such servers).
OWN_NICS = r"(?:CX-?8|ConnectX-8) as (?:the )?(?:PCIe )?switch"
# Rate of two host-staged devices on different sockets over that of two on one switch: 3.75 / 2.24 GB/s, RTX 4090,
# shared/facts/communication.md A1: EMPIRICAL
OWN_UPLINK = 1.67
MOST = 1_000_000  # devices or nodes of a configuration; more is a slip
STAGED = r"(?i)\b(no|without)[ -]+(p2p|peer)|(p2p|peer[ -]to[ -]peer|peer access)[ :=]+(off|disabled|no\b)|host|shm"
STATED = r"(?i)NV(?:Link|Switch)[\w/-]*,?\s*@?\s*(\d+(?:\.\d+)?)\s*GB/s"  # of both directions
NVLINK = {"1": 8e10, "2": 1.5e11, "3": 3e11, "4": 4.5e11, "5": 9e11}  # bytes/s of a device by NVLink generation


class Sweep(NamedTuple):
    """One configuration and its measured points, bytes and seconds."""

    config_id: str
    gpu: str
    num_gpus: int
    num_nodes: int
    interconnect: str
    collective: str
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str = ""
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is priced for a sweep. algorithm: forced, "" for NCCL's choice. host: seconds that the measurement adds."""

    cluster: Cluster
    kind: str
    ranks: tuple[int, ...]
    algorithm: str
    host: float


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, in any case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = [{k: v or "" for k, v in row.items() if k is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no CSV file; give one in the schema of nccl_cases.csv or tcp_cases.csv") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a CSV file with the columns of docs/cases.md") from None
    if not rows:
        raise ValueError(f"{path}: no rows; give a CSV file with the columns of docs/cases.md")
    return rows


def by_config(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows of each config_id, in the order of the file."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["config_id"].strip(), []).append(row)
    return found


def sweep_from(config_id: str, rows: list[dict[str, str]]) -> Sweep:
    """A sweep from its CSV rows, sorted by bytes; a ValueError says which cell is no number."""
    first = rows[0]
    points = sorted((number_of(r, "bytes"), number_of(r, "time_us") * 1e-6) for r in rows)
    gpus, nodes = whole_of(first, "num_gpus"), whole_of(first, "num_nodes")
    if min(p[1] for p in points) <= 0 or min(p[0] for p in points) <= 0:
        raise ValueError("bytes and time_us must be more than 0")
    words = [first.get(key) or "" for key in ("gpu", "interconnect", "collective", "source", "notes")]
    gpu, wires, what, source, notes = words
    sizes, times = tuple(p[0] for p in points), tuple(p[1] for p in points)
    return Sweep(config_id, gpu, gpus, nodes, wires, what, sizes, times, source, notes)


def number_of(row: dict[str, str], name: str) -> float:
    """A number of a row, 0 where it is not said; ValueError where the cell is none, negative or out of any range."""
    text = (row.get(name) or "").strip() or "0"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e18:
        raise ValueError(f"column {name} is '{text}'; a number, 0 or more, is needed")
    return value


def whole_of(row: dict[str, str], name: str, default: int = 0) -> int:
    """A whole number from 1; `default` where the cell is blank."""
    value = number_of(row, name) or default
    if not 1 <= value <= MOST or value != int(value):
        raise ValueError(f"column {name} is '{row.get(name) or ''}'; a whole number from 1 to {MOST:,} is needed")
    return int(value)


def catalogue_sweeps() -> list[Sweep]:
    """The sweeps that the shipped constants were fitted to."""
    rows = toml.tables(toml.read_toml(SWEEPS), "sweep", str(SWEEPS))
    return [Sweep._make(tuple(v) if isinstance(v := row[name], list) else v for name in Sweep._fields) for row in rows]


def sweeps_data(sweeps: Iterable[Sweep]) -> dict[str, Any]:
    """The content of nccl_sweeps.toml."""
    return {"sweep": [s._asdict() for s in sweeps]}


def setup_of(sweep: Sweep) -> Setup:
    """The cluster, group and algorithm of a sweep; ValueError with the reason where it cannot be priced."""
    kind = kind_named(sweep.collective)
    if kind == "barrier":
        raise ValueError("a barrier has no bytes to sweep; leave it out")
    if sweep.num_gpus < 2 or sweep.num_nodes < 1 or sweep.num_gpus % sweep.num_nodes:
        raise ValueError(f"{sweep.num_gpus} GPUs on {sweep.num_nodes} nodes: two or more, equally spread, are needed")
    text = f"{sweep.interconnect} {sweep.notes}"
    per_node = sweep.num_gpus // sweep.num_nodes
    family = family_of(sweep.gpu)
    intra, fabric = _intra(sweep, family, per_node)
    inter, devices = _inter(sweep, family, per_node) if sweep.num_nodes > 1 else (intra, per_node)
    wires = cube_mesh(sweep.interconnect, sweep.gpu) if fabric == "nvswitch" else ()
    if wires:
        fabric, devices = "cube-mesh", max(devices, len({w.a for w in wires if w.a.startswith("gpu")}))
    device = Device(sweep.gpu, "gpu", {"float32": 1e12}, 2**30, 1e12)
    cluster = Cluster(
        sweep.config_id, device, sweep.num_nodes, devices, intra, inter, "nccl", fabric=fabric, wires=wires
    )
    ranks = tuple(n * devices + i for n in range(sweep.num_nodes) for i in range(per_node))
    host = TORCH_HOST if "all_reduce_bench" in text or "torch" in text.lower().split("nccl-tests")[0] else 0.0
    return Setup(cluster, kind, ranks, _forced(text), host)


def _forced(text: str) -> str:
    found = re.search(r"(?:NCCL_ALGO\s*=\s*|algorithm\s+)(ring|tree|nvls|pat)", text, re.IGNORECASE)
    return found[1].lower() if found else ""


def _intra(sweep: Sweep, family: Family | None, per_node: int) -> tuple[Link, Fabric]:
    words = re.sub(r"(?i)\b(no|without) (nvlink|nvswitch)\b", "", sweep.interconnect)
    generation = re.search(r"(?i)NVLink[\s-]*(\d)(?![\d.])", words)
    device = _device_of(sweep.gpu)
    fabric: Fabric = "mesh" if re.search(r"xGMI|Infinity", words) else "nvswitch"
    wires = family.wires if family else "nvlink" if generation else "mesh" if fabric == "mesh" else "pci"
    if re.search(r"(?i)nvlink|\bnv[l-]?\s*bridge", words) and (_bridged(device) or "bridge" in words.lower()):
        if per_node <= 2 and device and _bridged(device):
            return Link("NVLink bridge", device.link_bandwidth, REFERENCE_HOP["nvlink"]), "nvswitch"
        if per_node > 2 or device:  # bridges join pairs, and not those of every device
            wires = "host" if wires == "host" else "pci"
    elif re.search(r"(?i)pcie", words) and not re.search(r"(?i)nvlink", words):
        wires = "host" if re.search(STAGED, words) else "pci"
    if family and family.wires == wires:
        rate = family.port
    elif generation and wires == "nvlink":
        rate = NVLINK.get(generation[1], 4.5e11)
    elif (found := re.search(r"(?i)PCIe\s*(?:gen)?\s*([3-6])", words)) or per_node == 1:
        rate = 1.6e10 * 2 ** (int(found[1]) - 3) if found else 3.2e10
    elif re.search(r"(?i)pcie|bridge", words) or wires == "host":
        rate = device.pcie_bandwidth if device and device.pcie_bandwidth else 3.2e10
    else:
        raise ValueError(f"'{sweep.gpu}' has no family and '{words}' does not say how its devices are joined")
    if wires in ("pci", "host"):
        rate *= lanes_of(words)
    if wires == "nvlink" and (stated := re.search(STATED, words)):
        ways = 1 if re.search(r"(?i)unidirectional|(per|each|one) (direction|way)", words) else 2
        rate = min(rate, float(stated[1]) * 1e9 / ways)
    if wires == "host" and _own_uplinks(sweep.notes, words):
        rate *= OWN_UPLINK  # devices of one switch share its way to the host; each of these has a way of its own
    name = {"nvlink": "NVLink", "mesh": "xGMI", "pci": "PCIe", "host": "PCIe through the host"}[wires]
    return Link(name, rate, REFERENCE_HOP[wires]), "pcie" if wires in ("pci", "host") else fabric


def _device_of(gpu: str) -> Device | None:
    """The catalogue's device of a sweep; a name without a size stands for all sizes, where their links are alike."""
    try:
        return published_device(gpu)
    except ValueError:
        begun = {file for name, file in names().items() if plain(gpu) and name.startswith(plain(gpu))}
        found = [load_device(file) for file in sorted(begun)]
        alike = len({(d.link, d.link_bandwidth, d.pcie_bandwidth) for d in found}) == 1
        return found[0] if alike else None


def _bridged(device: Device | None) -> bool:
    return device is not None and "bridge" in device.link.lower()


def _own_uplinks(notes: str, words: str) -> bool:
    """Whether two devices sit on different sides of a host, by their PCI buses or in words."""
    buses = [int(b, 16) for b in re.findall(r"0x([0-9a-fA-F]+)", notes)]
    far = len(buses) == 2 and abs(buses[0] - buses[1]) > 4
    return far or bool(re.search(r"cross.socket|different sockets|across sockets|\bSYS\b", f"{notes} {words}", re.I))


def _inter(sweep: Sweep, family: Family | None, per_node: int) -> tuple[Link, int]:
    """The link between nodes, and how many devices a whole node has (more than the sweep used, maybe)."""
    words = about_network(sweep.interconnect)
    cloud = re.search(r"\bOCI\b|\bGCP\b|GKE", f"{sweep.notes} {sweep.source}")  # their RDMA networks are Ethernet
    name = network_named(words) or ("RoCE" if cloud else "InfiniBand")
    nics, rate = _nics(sweep, family, per_node, name in ("TCP", "Ethernet"))
    devices = max(per_node, 8) if per_node == 1 and nics > 1 else per_node
    network = network_of(Link(name, rate, 0.0, ports=nics))
    return Link(name, rate, REFERENCE_CROSSING[network], ports=nics), devices


def _nics(sweep: Sweep, family: Family | None, per_node: int, sockets: bool) -> tuple[int, float]:
    """NICs of a node and bytes/s of each. The usual machine of a family has RDMA, so it says nothing of sockets."""
    words, notes = sweep.interconnect, sweep.notes.lower()
    usual = USUAL.get(family.name, (1, 12.5e9)) if family and not sockets else None
    if usual and family and family.tray:  # those of a tray
        usual = usual[0] * max(per_node // family.tray, 1), usual[1]
    usual = next((nics for platform, nics in PLATFORMS.items() if platform.lower() in notes), usual)
    if said := nics_of(about_network(words)):
        if not said.count and re.search(OWN_NICS, words, re.I):
            said = replace(said, whose="gpu")
        return of_a_node(said, per_node, usual)
    if usual is None:
        raise ValueError(f"'{words}' does not say how fast the network between the nodes is")
    return usual
