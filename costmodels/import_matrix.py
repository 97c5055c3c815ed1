"""A node from the matrix that `nvidia-smi topo -m` prints: NV# are that many NVLinks, other words ways over PCIe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from costmodels.cluster import Cluster, Link, Wire
from costmodels.device import load_device
from costmodels.import_device import Hint, Joined, generation, guess, named, pcie_rate
from costmodels.import_node import HOP, SOCKETS, Found, Port, node_of
from costmodels.names import catalogue_name

RANKS = ("PIX", "PXB", "PHB", "NODE", "SYS")  # nvidia-smi's words for ways over PCIe, near to far
WORD = re.compile(rf"X|NV\d+|{'|'.join(RANKS)}|SOC")  # SOC: old drivers' SYS
AFTER = re.compile(r"\s(?:CPU|NUMA)\s+Affinity|\sGPU\s+NUMA\s+ID")  # columns that are no devices
MOST = 18  # NVLinks of a GPU; more are counted several times, so that a switch joins all
WHOLE = "give the whole output of nvidia-smi topo -m"


@dataclass(frozen=True, slots=True)
class Matrix:
    """columns: devices, GPUs first. cells: the word of every two. affinity: what stands behind a row's cells."""

    columns: tuple[str, ...]
    cells: dict[tuple[str, str], str]
    affinity: dict[str, tuple[str, ...]]
    titles: str
    called: dict[str, str]

    @property
    def gpus(self) -> list[str]:
        return [c for c in self.columns if re.fullmatch(r"GPU\d+", c)]

    @property
    def nics(self) -> list[str]:
        return [c for c in self.columns if not re.fullmatch(r"GPU\d+", c)]


def from_matrix(text: str, where: str, device: str = "") -> Cluster:
    """The node of a matrix; device: a name that goes before the file's own."""
    matrix = parse(text, where)
    gpus, nics = matrix.gpus, matrix.nics
    hint = Hint(grace=_grace(matrix))
    joined = _joined(matrix)
    given = catalogue_name(device) if device else named(text)
    assumed, note = guess(joined, hint)
    chosen = load_device(given or assumed)
    names = {c: f"gpu{i}" for i, c in enumerate(gpus)} | {c: c for c in nics}
    wires, above = _bridges(matrix, names, Link("PCIe", pcie_rate(chosen), HOP / 2, _assumed(generation(chosen))))
    ports = tuple(Port(matrix.called.get(n, n), 0.0, above[n]) for n in nics)
    near = tuple(tuple(_far(matrix.cells[g, n]) for n in nics) for g in gpus)
    found = Found(where, "nvidia-smi topo -m", joined, tuple(wires), ports, near, hint)
    return node_of(found, chosen, () if given else (note,))


def parse(text: str, where: str) -> Matrix:
    """The matrix of the text, or a ValueError that says which row is wrong."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)  # some versions underline the header
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if re.match(r"\s*GPU\d+\b(?!.*\sX(\s|$))", line)), None)
    if at is None:
        raise ValueError(f"{where}: no header line that begins with GPU0; {WHOLE}")
    cut = AFTER.search(lines[at])
    columns = tuple(lines[at][: cut.start() if cut else None].split())
    if double := [c for c in dict.fromkeys(columns) if columns.count(c) > 1]:
        raise ValueError(f"{where}: the header names {double[0]} more than once; {WHOLE} of one machine")
    rows: dict[str, list[str]] = {}
    for line in lines[at + 1 :]:
        words = line.split()
        if words and words[0] in columns:
            if words[0] in rows:
                raise ValueError(f"{where}: row {words[0]} is there more than once; {WHOLE} of one machine")
            rows[words[0]] = words[1:]
        elif words and re.fullmatch(r"GPU\d+", words[0]):
            raise ValueError(f"{where}: row {words[0]} has no column in the header; {WHOLE}")
    matrix = Matrix(columns, {}, {}, lines[at][cut.start() :] if cut else "", _legend(text))
    if missing := [g for g in matrix.gpus if g not in rows]:
        raise ValueError(f"{where}: no row for {', '.join(missing)}; {WHOLE}")
    for name, words in rows.items():
        _check_row(name, words, columns, where)
        matrix.cells.update({(name, column): word for column, word in zip(columns, words)})
        matrix.affinity[name] = tuple(words[len(columns) :])
    for a in matrix.gpus:
        for b in matrix.gpus:
            if matrix.cells[a, b] != matrix.cells[b, a]:
                one, other = matrix.cells[a, b], matrix.cells[b, a]
                raise ValueError(f"{where}: {a} to {b} is {one}, but {b} to {a} is {other}; {WHOLE}")
    return matrix


def _check_row(name: str, words: Sequence[str], columns: Sequence[str], where: str) -> None:
    count = next((i for i, w in enumerate(words) if not WORD.fullmatch(w)), len(words))
    if count < len(words) and count < len(columns) and not re.fullmatch(r"[\d,-]+|N/A", words[count]):
        raise ValueError(
            f"{where}: '{words[count]}' in row {name} is no word of nvidia-smi topo -m; use X, NV#, {', '.join(RANKS)}"
        )
    if count != len(columns):
        raise ValueError(f"{where}: row {name} has {count} cells, the header {len(columns)} devices; {WHOLE}")
    own = [c for c, w in zip(columns, words) if w == "X"]
    if own != [name]:
        raise ValueError(f"{where}: row {name} has its X under {' and '.join(own) or 'no device'}; {WHOLE}")


def _legend(text: str) -> dict[str, str]:
    """Names of ports that a legend gives: "NIC0: mlx5_0"."""
    return dict(re.findall(r"^\s*(\S+):[ \t]+(\S+)\s*$", text.partition("NIC Legend")[2], re.MULTILINE))


def _grace(matrix: Matrix) -> bool:
    """GPU memory that is a NUMA node of the host, as beside Grace CPUs: the last column says which."""
    last = [matrix.affinity[g][-1:] for g in matrix.gpus]
    return bool(re.search(r"GPU\s+NUMA\s+ID", matrix.titles)) and any(w and w[0].isdigit() for w in last)


def _joined(matrix: Matrix) -> Joined:
    gpus = matrix.gpus
    words = {(i, j): matrix.cells[a, b] for i, a in enumerate(gpus) for j, b in enumerate(gpus) if i < j}
    pairs = {pair: int(word[2:]) for pair, word in words.items() if word.startswith("NV")}
    if len(pairs) == len(words) and len(set(pairs.values())) == 1:
        count = next(iter(pairs.values()))
        if count * (len(gpus) - 1) > MOST:
            return Joined(len(gpus), {}, dict.fromkeys(range(len(gpus)), count))
    return Joined(len(gpus), pairs, {})


def _far(word: str) -> int:
    return RANKS.index(word) if word in RANKS else len(RANKS) - 1


def _assumed(generation: int) -> str:
    return f"assumed PCIe {generation}.0 x16, as the device's data sheet says"


def _bridges(matrix: Matrix, names: dict[str, str], link: Link) -> tuple[list[Wire], dict[str, str]]:
    """PCIe switches and CPUs: who is at most PXB apart shares a switch, who is at most NODE apart a CPU. Wires without
    ports, and what every device hangs on."""
    columns = matrix.columns
    near = _components(columns, [p for p, word in matrix.cells.items() if word in ("PIX", "PXB")])
    close = [p for p, word in matrix.cells.items() if word in ("PIX", "PXB", "PHB", "NODE")]
    homes = _components(columns, close + _same_cpu(matrix))
    wires: list[Wire] = []
    above: dict[str, str] = {}
    switches = 0
    for group in near:
        home = top = f"cpu{next(i for i, h in enumerate(homes) if group[0] in h)}"
        if len(group) > 1:
            top = f"plx{switches}"
            switches += 1
            wires.append(Wire(top, home, link))
        above |= dict.fromkeys(group, top)
        wires += [Wire(names[m], top, link) for m in group if names[m].startswith("gpu")]
    between = Link("link between CPUs", SOCKETS, HOP, "assumed")
    return wires + [Wire("cpu0", f"cpu{i}", between) for i in range(1, len(homes))], above


def _same_cpu(matrix: Matrix) -> list[tuple[str, str]]:
    """Pairs whose NVLinks hide their way over PCIe, where affinity says that they share a CPU, or nothing says that
    they do not."""
    told = {g for g in matrix.gpus for c in matrix.columns if c != g and not matrix.cells[g, c].startswith("NV")}
    pairs = []
    for (a, b), word in matrix.cells.items():
        if word.startswith("NV"):
            one, other = matrix.affinity.get(a, ())[:1], matrix.affinity.get(b, ())[:1]
            known = bool(one and other) and "N/A" not in (*one, *other)
            if one == other if known else not told & {a, b}:
                pairs.append((a, b))
    return pairs


def _components(members: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Groups of members that pairs join. GPUs joined by NVLink hide their PCIe way; their ports tell it."""
    groups = [{m} for m in members]
    for a, b in pairs:
        first, second = (next(g for g in groups if x in g) for x in (a, b))
        if first is not second:
            first |= second
            groups.remove(second)
    return [sorted(g, key=list(members).index) for g in groups]
