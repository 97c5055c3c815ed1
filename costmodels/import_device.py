"""Which device a topology file speaks of: by what it says of its GPUs, and by how NVLinks or xGMI join them.

No such file names a model. What is assumed, what else looks the same and how to say which it is stand in a note.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from math import log2

from costmodels.device import Device
from costmodels.names import catalogue_name, plain

# bytes/s of one NVLink in one direction by compute capability. Source: NVIDIA data sheets.
NVLINK = {60: 20e9, 70: 25e9, 75: 25e9, 80: 25e9, 86: 14.0625e9, 90: 25e9, 100: 50e9, 103: 50e9}
XGMI = {"908": 30.7e9, "90a": 50e9, "942": 64e9, "950": 76.5e9}  # the same by gfx number, AMD data sheets
GEN3 = 1.5754e10  # bytes/s of PCIe 3.0 x16 on data sheets
COUNTED = 1.2e10  # bytes/s of it in NCCL's table, doubling per generation
PORT = 1.25e10  # bytes/s of a network port of that time (EDR), doubling likewise: HDR, NDR, XDR

# By compute capability: device without NVLink, with NVLink among few, with NVLink among all; others that report it.
BY_CAPABILITY = {
    35: ("k40", "k40", "k40", "K20"),
    37: ("k80", "k80", "k80", ""),
    52: ("m40", "m40", "m40", "other Maxwell cards"),
    60: ("p100-pcie", "p100-sxm2", "p100-sxm2", "P100 PCIe and SXM2"),
    61: ("p40", "p40", "p40", "P4, GTX 10 series"),
    70: ("v100-pcie-32gb", "v100-sxm2-32gb", "v100-sxm2-32gb", "V100 of 16 GB, Titan V, Quadro GV100"),
    75: ("t4", "rtx-2080-ti", "rtx-2080-ti", "T4, RTX 20 series, Quadro RTX 6000"),
    80: ("a100-pcie-80gb", "a100-pcie-80gb", "a100-sxm-80gb", "A100 of 40 GB, A800, A30"),
    86: ("a10g", "a40", "a40", "A10, A40, RTX A6000, RTX 3090"),
    89: ("l40s", "l40s", "l40s", "L4, L40, RTX 6000 Ada, RTX 4090"),
    90: ("h100-pcie", "h100-nvl", "h100-sxm", "H200, H20, H800, GH200"),
    100: ("b200", "b200", "b200", "B100, GB200"),
    103: ("b300", "b300", "b300", "GB300"),
    120: ("rtx-5090", "rtx-5090", "rtx-5090", "RTX PRO 6000, RTX 6000D"),
    121: ("gb10", "gb10", "gb10", ""),
}
# Beside a Grace CPU, by what would stand beside another.
GRACE = {"h100-pcie": "gh200-96gb", "h100-nvl": "gh200-96gb", "h100-sxm": "gh200-96gb", "b200": "gb200"}
GRACE |= {"b300": "gb300"}
BY_GFX = {
    "908": ("mi100", ""),
    "90a": ("mi250-gcd", "MI250X (two such GPUs each), MI210"),
    "942": ("mi300x", "MI300A, MI325X"),
    "950": ("mi350x", "MI355X"),
}
# By PCI vendor and device, where the catalogue has that very model. Source: pci.ids of 2026-08.
BY_PCI = {
    "1002:738c": "mi100", "1002:740f": "mi210", "1002:74a0": "mi300a", "1002:74a1": "mi300x", "1002:74b5": "mi300x",
    "1002:74a5": "mi325x", "1002:74b9": "mi325x", "1002:75a0": "mi350x", "1002:75a3": "mi355x", "10de:102d": "k80",
    "10de:15f8": "p100-pcie", "10de:15f9": "p100-sxm2", "10de:17fd": "m40", "10de:1b38": "p40", "10de:1bb3": "p4",
    "10de:1d81": "titan-v", "10de:1db1": "v100-sxm2-16gb", "10de:1db5": "v100-sxm2-32gb", "10de:1db6": "v100-pcie-32gb",
    "10de:1e04": "rtx-2080-ti", "10de:1e07": "rtx-2080-ti", "10de:1eb8": "t4", "10de:20b0": "a100-sxm-40gb",
    "10de:20b1": "a100-pcie-40gb", "10de:20b2": "a100-sxm-80gb", "10de:20b5": "a100-pcie-80gb",
    "10de:20f1": "a100-pcie-40gb", "10de:2204": "rtx-3090", "10de:2230": "rtx-a6000", "10de:2235": "a40",
    "10de:2236": "a10", "10de:2237": "a10g", "10de:2321": "h100-nvl", "10de:2324": "h800", "10de:2329": "h20",
    "10de:2330": "h100-sxm", "10de:2331": "h100-pcie", "10de:2335": "h200", "10de:2338": "h100-sxm-96gb",
    "10de:2342": "gh200-96gb", "10de:2684": "rtx-4090", "10de:26b1": "rtx-6000-ada", "10de:26b5": "l40",
    "10de:26b9": "l40s", "10de:27b8": "l4", "10de:2901": "b200", "10de:2941": "gb200", "10de:2b85": "rtx-5090",
    "10de:2bb9": "rtx-6000d", "10de:2e12": "gb10", "10de:3182": "b300", "10de:31c2": "gb300", "10de:31c3": "gb300",
}  # fmt: skip
# Without any of these, by the most NVLinks of a GPU: to a switch, to all others, to some others (bridges).
BY_SWITCH = {6: "v100-sxm2-32gb", 8: "h800", 12: "a100-sxm-80gb", 18: "h100-sxm"}
BY_MESH = {6: "v100-sxm2-32gb", 12: "a100-sxm-80gb", 18: "h100-sxm"}
BY_BRIDGE = {2: "rtx-2080-ti", 3: "v100-sxm2-32gb", 4: "a40", 12: "a100-pcie-80gb", 18: "h200"}
LOOKALIKES = {
    "p100-sxm2": "V100 with one link a pair",
    "v100-sxm2-32gb": "V100 of 16 GB, P100",
    "h800": "A800",
    "a100-sxm-80gb": "A100 of 40 GB, GH200",
    "h100-sxm": "H200, H20, B200, B300",
    "rtx-2080-ti": "Quadro RTX 6000, a pair out of a V100 mesh",
    "a40": "RTX A6000, RTX 3090, A30",
    "a100-pcie-80gb": "H100 PCIe, H100 NVL, a pair out of A100 SXM4",
    "h200": "H200 NVL, which the catalogue lacks",
    "gb200": "GB300",
    "gh200-96gb": "other GPUs beside Grace",
    "l40s": "any GPU without NVLink",
}


@dataclass(frozen=True, slots=True)
class Joined:
    """How many GPUs, the links of every pair (lower index first), and of every GPU to switches."""

    gpus: int
    pairs: dict[tuple[int, int], int]
    switch: dict[int, int]

    @property
    def total(self) -> int:
        """The most links of one GPU."""
        sums = dict(self.switch)
        for pair, count in self.pairs.items():
            for gpu in pair:
                sums[gpu] = sums.get(gpu, 0) + count
        return max(sums.values(), default=0)

    @property
    def islands(self) -> list[set[int]]:
        """GPUs that links join, directly or over others."""
        groups = [{i} for i in range(self.gpus)]
        on_switch = sorted(self.switch)
        for a, b in (*self.pairs, *pairwise(on_switch)):
            first, second = (next(g for g in groups if x in g) for x in (a, b))
            if first is not second:
                first |= second
                groups.remove(second)
        return groups

    @property
    def meshed(self) -> bool:
        """Every pair by the same number of links."""
        return len(set(self.pairs.values())) == 1 and len(self.pairs) == self.gpus * (self.gpus - 1) // 2

    @property
    def whole(self) -> bool:
        """Links lead from every GPU to every other."""
        return self.total > 0 and len(self.islands) == 1


@dataclass(frozen=True, slots=True)
class Hint:
    """What the file says of the GPUs; 0 or empty where it does not. capability: 90 for 9.0. gfx: "942". pci: vendor and
    device ("10de:2330"). grace: the host is a Grace CPU (Arm beside NVLink-C2C)."""

    capability: int = 0
    gfx: str = ""
    pci: str = ""
    grace: bool = False


def guess(joined: Joined, hint: Hint) -> tuple[str, str]:
    """The device of the catalogue that fits, and a sentence that says why, what else would, and how to name it."""
    if hint.pci in BY_PCI:
        return BY_PCI[hint.pci], f"device {BY_PCI[hint.pci]}, by the PCI id {hint.pci} in the file"
    if hint.gfx in BY_GFX:
        device, others = BY_GFX[hint.gfx]
        why = f"gfx{hint.gfx}"
    elif hint.capability in BY_CAPABILITY:
        alone, few, all_, others = BY_CAPABILITY[hint.capability]
        few = "h200" if few == "h100-nvl" and joined.total > 12 else few  # a bridge of 18 links is H200 NVL's
        device = alone if not joined.total else all_ if _woven(joined) else few
        device = GRACE.get(device, device) if hint.grace else device
        why = _version(hint.capability)
    else:
        device = "mi100" if hint.gfx else _by_links(joined, hint.grace)
        others = LOOKALIKES.get(device, "")
        why = f"{joined.total} links a GPU" if joined.total else "GPUs without NVLink in the file"
        if hint.capability or hint.gfx:
            why = f"{why}, as {f'gfx{hint.gfx}' if hint.gfx else _version(hint.capability)} is not known here"
    alike = ", ".join(o for o in others.split(", ") if plain(o) != plain(device))
    also = f" ({alike} would look alike)" if alike else ""
    how = "name it by --device of `parplan clusters`, or by a line '# device: NAME' (XML: '<!-- device: NAME -->')"
    return device, f"device {device} was guessed from {why}{also}; {how}"


def _version(capability: int) -> str:
    return f"compute capability {capability // 10}.{capability % 10}"


def _woven(joined: Joined) -> bool:
    """NVLink among all GPUs as modules of a board have it; two cards by a bridge of up to 12 links are none."""
    return bool(joined.switch) or (joined.whole and (joined.gpus > 2 or joined.total > 12))


def _by_links(joined: Joined, grace: bool) -> str:
    total = joined.total
    if not total:
        return "gh200-96gb" if grace else "l40s"
    if joined.switch:
        return "gb200" if grace and total > 12 else _least(BY_SWITCH, total)
    if _woven(joined):
        if max(joined.pairs.values()) == 1 and total <= 4:
            return "p100-sxm2"
        return "gh200-96gb" if grace else _least(BY_MESH, total)
    most = max(map(len, joined.islands))
    return _least(BY_BRIDGE if most == 2 else {**BY_BRIDGE, 4: "v100-sxm2-32gb", 6: "v100-sxm2-32gb"}, total)


def _least(table: dict[int, str], count: int) -> str:
    """The entry of the least number that is not below `count`, or the last."""
    return table[min((n for n in table if n >= count), default=max(table))]


def lane_rate(device: Device, joined: Joined, hint: Hint) -> float:
    """bytes/s of one NVLink or xGMI link: the data sheet's sum over its links, or by what the file says of the GPU."""
    if device.links and device.link_bandwidth:
        return device.link_bandwidth / device.links
    if hint.gfx and device.link_bandwidth and joined.meshed:
        return device.link_bandwidth / joined.total  # all links of MI300A lead to its three peers
    known = XGMI.get(hint.gfx) or NVLINK.get(hint.capability)
    if known:
        return known
    return min(25e9, device.link_bandwidth / max(joined.total, 1) or 25e9)  # a bridge may leave links unused


def generation(device: Device) -> int:
    """The generation of PCIe that the data sheet's rate is of; 4 where there is none."""
    return max(1, 3 + round(log2(device.pcie_bandwidth / GEN3))) if device.pcie_bandwidth else 4


def pcie_rate(device: Device) -> float:
    """bytes/s of 16 lanes as NCCL counts them."""
    return float(COUNTED * 2.0 ** (generation(device) - 3))


def port_rate(device: Device) -> float:
    """bytes/s of the network port that machines of the device's time have beside it: 100 Gb/s for PCIe 3.0, 200 for
    4.0, 400 for 5.0, 800 for 6.0. Assumption."""
    return float(PORT * 2.0 ** (max(generation(device), 3) - 3))


def named(text: str) -> str:
    """The device that a comment of the file names, as the catalogue calls it."""
    match = re.search(r"^\s*(?:#|<!--)\s*device:\s*(.*?)\s*(?:-->)?\s*$", text, re.MULTILINE)
    return catalogue_name(match[1]) if match else ""
