"""Texts in the formats of `nvidia-smi topo -m` and of NCCL's and RCCL's topology files, as such machines print them."""

from __future__ import annotations

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def matrix(columns: list[str], rows: list[str], behind: list[str], titles: str = "CPU Affinity\tNUMA Affinity") -> str:
    """The text of a matrix: rows are the words above the diagonal ("NV12 SYS"), mirrored below it; behind: what stands
    behind each row's cells."""
    words = [["X"] * len(columns) for _ in columns]
    for i, row in enumerate(rows):
        for j, word in enumerate(row.split(), i + 1):
            words[i][j] = words[j][i] = word
    lines = ["\t" + "\t".join(columns) + (f"\t{titles}" if titles else "")]
    for name, row, after in zip(columns, words, behind + [""] * len(columns)):
        cells = "\t".join(f" {w} " if w == "X" else w for w in row)
        lines.append(f"{name}\t{cells}" + (f"\t{after}" if after else ""))
    return "\n".join(lines) + "\n" + LEGEND


def board(nvlinks: str, ports: list[list[str]], names: list[str], behind: list[str], titles: str) -> str:
    """GPUs that are all joined alike, and rows of words to the ports; ports among each other are NODE."""
    count = len(ports)
    gpus = [f"GPU{i}" for i in range(count)]
    rows = [" ".join([nvlinks] * (count - 1 - i) + ports[i]) for i in range(count)]
    rows += [" ".join(["NODE"] * (len(names) - 1 - i)) for i in range(len(names))]
    return matrix(gpus + names, rows, behind, titles)


def _nearest(gpu: int, close: list[int], same: range, count: int, word: str) -> list[str]:
    del gpu
    return [word if n in close else "NODE" if n in same else "SYS" for n in range(count)]


def dgx_a100() -> str:
    """Eight GPUs, ten ports: two a pair of GPUs behind PCIe switches, and two of a storage card on each CPU."""
    close = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3], 4: [6, 7], 5: [6, 7], 6: [8, 9], 7: [8, 9]}
    rows = [_nearest(g, close[g], range(5) if g < 4 else range(5, 10), 10, "PXB") for g in range(8)]
    behind = ["48-63,176-191\t3" if g < 4 else "112-127,240-255\t7" for g in range(8)]
    gpus = [f"GPU{i}" for i in range(8)]
    names = [f"mlx5_{i}" for i in range(10)]
    words = [" ".join(["NV12"] * (7 - g) + rows[g]) for g in range(8)]
    words += [" ".join(_port_words(i, 10, [[0, 1], [2, 3], [4], [5], [6, 7], [8, 9]], 5)) for i in range(10)]
    return matrix(gpus + names, words, behind)


def _port_words(port: int, count: int, groups: list[list[int]], half: int) -> list[str]:
    group = next(g for g in groups if port in g)
    return ["PXB" if n in group else "NODE" if (n < half) == (port < half) else "SYS" for n in range(port + 1, count)]


def bonded() -> str:
    """HGX A100 with four ports of which the outer two are bonds, two a CPU."""
    close = {0: [0], 1: [0], 2: [1], 3: [1], 4: [2], 5: [2], 6: [3], 7: [3]}
    rows = [_nearest(g, close[g], range(2) if g < 4 else range(2, 4), 4, "PXB") for g in range(8)]
    words = [" ".join(["NV12"] * (7 - g) + rows[g]) for g in range(8)]
    words += ["NODE SYS SYS", "SYS SYS", "NODE", ""]
    names = [f"GPU{i}" for i in range(8)] + ["mlx5_bond_0", "mlx5_1", "mlx5_2", "mlx5_bond_3"]
    return matrix(names, words, ["0-31\t0"] * 4 + ["32-63\t1"] * 4)


def dgx_h100() -> str:
    """Eight GPUs, a 400 Gb/s port each by one switch, NIC# with a legend, new columns."""
    rows = [["PIX" if n == g else "NODE" if n // 4 == g // 4 else "SYS" for n in range(8)] for g in range(8)]
    behind = [f"{'0-55' if g < 4 else '56-111'}\t{g // 4}\tN/A" for g in range(8)]
    words = [" ".join(["NV18"] * (7 - g) + rows[g]) for g in range(8)]
    words += [" ".join("NODE" if n // 4 == i // 4 else "SYS" for n in range(i + 1, 8)) for i in range(8)]
    names = [f"GPU{i}" for i in range(8)] + [f"NIC{i}" for i in range(8)]
    text = matrix(names, words, behind, "CPU Affinity\tNUMA Affinity\tGPU NUMA ID")
    return text + "\nNIC Legend:\n\n" + "".join(f"  NIC{i}: mlx5_{i + 2}\n" for i in range(8))


L40S = matrix(
    [f"GPU{i}" for i in range(8)] + ["NIC0", "NIC1"],
    [
        "PXB NODE NODE SYS SYS SYS SYS PXB SYS",
        "NODE NODE SYS SYS SYS SYS PXB SYS",
        "PXB SYS SYS SYS SYS NODE SYS",
        "SYS SYS SYS SYS NODE SYS",
        "PXB NODE NODE SYS PXB",
        "NODE NODE SYS PXB",
        "PXB SYS NODE",
        "SYS NODE",
        "SYS",
    ],
    ["0-31,64-95\t0\tN/A"] * 4 + ["32-63,96-127\t1\tN/A"] * 4,
    "CPU Affinity\tNUMA Affinity\tGPU NUMA ID",
)
RTX3090 = matrix(["GPU0", "GPU1"], ["NV4"], ["0-23\tN/A", "0-23\tN/A"])
A6000 = matrix([f"GPU{i}" for i in range(4)], ["NV4 SYS SYS", "SYS SYS", "NV4"], ["0-15\t0"] * 2 + ["16-31\t1"] * 2)
A100_PCIE = matrix(
    [f"GPU{i}" for i in range(8)] + ["ibp0s0"],
    [
        "NV12 NODE NODE SYS SYS SYS SYS NODE",
        "NODE NODE SYS SYS SYS SYS NODE",
        "NV12 SYS SYS SYS SYS NODE",
        "SYS SYS SYS SYS NODE",
        "NV12 NODE NODE SYS",
        "NODE NODE SYS",
        "NV12 SYS",
        "SYS",
    ],
    ["0-31\t0"] * 4 + ["32-63\t1"] * 4,
)
GB200 = matrix(
    [f"GPU{i}" for i in range(4)] + [f"NIC{i}" for i in range(4)],
    [
        "NV18 NV18 NV18 NODE NODE SYS SYS",
        "NV18 NV18 NODE NODE SYS SYS",
        "NV18 SYS SYS NODE NODE",
        "SYS SYS NODE NODE",
        "NODE SYS SYS",
        "SYS SYS",
        "NODE",
    ],
    ["0-71\t0,2-17\t2", "0-71\t0,2-17\t10", "72-143\t1,18-33\t18", "72-143\t1,18-33\t26"],
    "CPU Affinity\tNUMA Affinity\tGPU NUMA ID",
)


def rccl(links: bool = True) -> str:
    """Eight MI300X on two CPUs, each behind a switch with a port of its own, one xGMI link between any two."""
    bus = [f"0000:{n}:00.0" for n in ("05", "26", "46", "65", "85", "a6", "c6", "e5")]
    cpus = []
    for cpu in range(2):
        items = []
        for g in range(4 * cpu, 4 * cpu + 4):
            others = [b for b in bus if b != bus[g]] if links else []
            xgmi = "".join(f'<xgmi target="{b}" count="1" tclass="0x120000"/>' for b in others)
            items.append(
                f'<pci busid="0000:{g}0:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">'
                f'<pci busid="{bus[g].upper()}" class="0x120000" link_speed="32.0 GT/s PCIe" link_width="16">'
                f'<gpu dev="{g}" sm="94" gcn="gfx942" arch="38915" rank="{g}" gdr="1">{xgmi}</gpu></pci>'
                f'<pci busid="0000:{g}2:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16"><nic>'
                f'<net name="bnxt_re{g}" dev="{g}" speed="400000" port="1" latency="0.0" guid="0x{g}a" maxconn="1"'
                f' gdr="1"/></nic></pci></pci>'
            )
        items.append('<nic><net name="eth0" dev="8" speed="10000" port="0" guid="0x0" maxconn="65536"/></nic>')
        head = f'<cpu numaid="{cpu}" arch="x86_64" vendor="AuthenticAMD" familyid="175" modelid="17">'
        cpus.append(head + "".join(items) + "</cpu>")
    return '<system version="2">' + "".join(cpus) + "</system>"


def dump(capability: int, bridges: bool, count: int = 4, nets: str = "", arch: str = "x86_64") -> str:
    """GPUs of a compute capability, two a CPU, bare or with four NVLinks between those of a CPU."""
    bus = [f"0000:{g + 1:02x}:00.0" for g in range(count)]
    cpus = []
    for cpu in range(0, count, 2):
        items = []
        for g in (cpu, cpu + 1):
            link = f'<nvlink target="{bus[g ^ 1]}" count="4" tclass="0x030000"/>' if bridges else ""
            items.append(
                f'<pci busid="{bus[g]}" class="0x030000" link_speed="16.0 GT/s PCIe" link_width="16">'
                f'<gpu dev="{g}" sm="{capability}" rank="{g}" gdr="1">{link}</gpu></pci>'
            )
        cpus.append(
            f'<cpu numaid="{cpu // 2}" arch="{arch}" vendor="GenuineIntel">{"".join(items)}{"" if cpu else nets}</cpu>'
        )
    return '<system version="1">' + "".join(cpus) + "</system>"
