"""What words say of a network: how many NICs of which rate, whose, and what kind; `parplan predict --cases` and
`parplan collectives --cases` read alike by this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

from costmodels.cluster import Wire, load_cluster

NODE_AT_MOST = 12.5e9  # bytes/s up to which a rate without more words is that of the one NIC of a node
NIC_AT_MOST = 50e9  # bytes/s up to which it is that of one of the usual NICs; more is what a node has in all
SCALE = {"t": 1e12, "g": 1e9, "m": 1e6}
# Gb/s of an InfiniBand port of four lanes; a number behind the name is the rate (HDR100: two lanes), but of FDR10.
GENERATION = {"QDR": 32, "FDR": 56, "EDR": 100, "HDR": 200, "NDR": 400, "XDR": 800, "OmniPath": 100, "Omni-Path": 100}
WORDS = {"one": 1, "single": 1, "two": 2, "dual": 2, "four": 4, "quad": 4, "eight": 8}
# Words that name links between the devices of a node.
LINKS = ("nvlink", "nvswitch", "xgmi", "infinity fabric", "infinityfabric", "ici", "neuronlink", "hccs", "xe link")
TIMES = r"\s*[x×*]\s*"
# "GB/s" and "MBps" are bytes; "Gb/s", "Gb", "Gbit", "gbps", "25GbE" and "100G" are bits; a bare "GB" is no rate.
RATE = (
    r"(?<![\d.])(?<!\s-)(?<!^-)(\d+(?:\.\d+)?)[\s-]?\s*(?:([TGMtgm])"
    r"(?:([Bb]ytes?/s(?:ec)?\b|B/s(?:ec)?\b|Bps\b)"
    r"|(?:[ie]ga)?[bB]its?(?:/s(?:ec)?|ps)?\b|[bB]ps\b|b/s(?:ec)?\b|b\b|ig[eE]\b|[bB]?[eE]\b|BASE-)"
    r"|([TGMg])\b(?!/s))"
)
PORT = rf"\b({'|'.join(GENERATION)})(?:[\s-]?(\d{{2,3}})\b(?!\.|\s*[TGMtgm]))?"
# What may stand between a number and what it counts: makers and types of NICs, but no other things that are counted.
_OTHERS = r"(?!(?i:gpus?|nodes?|hosts?|servers?|machines?|racks?|devices?|lanes?|nv\w+|pci\w*)\b|[A-Z]{1,2}\d{2,})"
_KIND = rf"(?:[\s(]+{_OTHERS}[A-Za-z][\w/.-]*)"
_COUNT = rf"(?<![\w.-])(\d{{1,2}}|{'|'.join(WORDS)})"
MANY = re.compile(rf"(\d{{1,2}}){TIMES}\(?(?:{_OTHERS}[A-Za-z][\w/.-]*[\s(]+){{0,4}}?(?=(?:{RATE})|(?:{PORT}))")
AFTER = re.compile(
    rf"(?:{_KIND}{{0,3}}?){TIMES}(\d{{1,2}})\b(?!\s*(?i:gpus?|nodes?|hosts?|servers?)\b)(?!\s*(?:{RATE}))"
)
_OWNER = r"(?i:(GPU|device|accelerator|node|host|server))"
NICS = tuple(  # by the general name, else by the type
    re.compile(
        rf"(?i:{_COUNT})(?!\s*[TGMtgm](?:\b|[bBi]))(?:{TIMES}|[\s-])\s*((?:{_OTHERS}[\w/.-]+\s+){{0,4}}?)"
        rf"(?i:{noun})(?i:s?)(?!\w)(?:\s*(?:per|/|an?|each|every)\s*{_OWNER})?"
    )
    for noun in ("NIC|HCA|port|rail|adapter|card", r"ConnectX-?\d|CX-?\d|BlueField-?\d")
)
JUST_BEFORE = re.compile(rf"(?i:\b({'|'.join(WORDS)}))[\s-](?:(?:port|rail)\s+)?$")
WHOSE = re.compile(  # "8 GPUs per node" says nothing of NICs, "1 GPU/node" does
    r"(?<![2-9]gpu)(?<![2-9]\sgpu)(?<![2-9]\sgpu\s)(?<!gpus)(?<!gpus\s)"
    rf"(?:\bper|/|\beach|\bevery|\ba)\s*{_OWNER}\b",
    re.IGNORECASE,
)
PARTS = r"[,;+]|\band\b"
_NETWORK = r"(?i)ethernet|infiniband|\bib\b|roce|\befa|\btcp\b|gbe\b|gige\b|rdma|\bnetwork|\bbetween nodes"
_LINK = r"(?i)\b(?:nv(?:link|switch)|pci(?:e|-e|express)?|xgmi|infinity fabric)[\w-]*"
_LINK_RATE = (
    rf"{_LINK}(?:\s+gen\s*[\d.]+|\s+[\d.]+(?![\d.]*\s*[TGMx×*]))?"
    r"(?:\s*x\s*(?:16|8|4)\b)?(?:\s*@?\s*[\d.]+\s*[GT]B/s)?"
)


@dataclass(frozen=True, slots=True)
class Nics:
    """count: 0 where it is not said. rate: bytes/s, one direction, 0 where it is not said. whose: "gpu", "node" or ""
    (not said): who has so many; without a count, whose rate it is."""

    count: int
    rate: float
    whose: str = ""


def divided(text: str) -> tuple[str, str]:
    """What a text about both says of the links inside a node, and of the network between nodes.

    >>> divided("PCIe inside the node, 10 Gb/s between nodes"), divided("25GbE"), divided("NVLink1 (DGX-1)")
    (('PCIe ', ', 10 Gb/s between nodes'), ('', '25GbE'), ('NVLink1 (DGX-1)', ''))
    >>> divided("NVLink3 600 GB/s + 8x200Gb HDR")
    ('NVLink3 600 GB/s ', ' 8x200Gb HDR')
    """
    near, told, far = text.partition("inside the node")
    if told:
        return near, far
    inside, between = [], []
    for part in re.split(PARTS, text):
        network, links = _is_network(part), any(word in part.lower() for word in (*LINKS, "pci"))
        if links or not network:
            inside.append(part)
        if network and (not links or about_network(part)):
            between.append(about_network(part) if links else part)
    return ",".join(inside), ",".join(between)


def _is_network(text: str) -> bool:
    """Whether a part names a network, or a rate as networks are quoted: in bits, without the name of a link."""
    if re.search(_NETWORK, text) or network_named(text):
        return True
    links = any(word in text.lower() for word in (*LINKS, "pci"))
    return not links and nics_of(text) is not None and not re.search(r"[GTM](B|[Bb]ytes?)/s", text)


def cube_mesh(text: str, gpu: str) -> tuple[Wire, ...]:
    """The wires of a hybrid cube mesh, where the words say that there is one: those of the catalogue's DGX-1 of this
    generation."""
    if not re.search(r"(?i)\bcube|\bDGX-?1\b", text) or not re.search(r"[VP]100", gpu):
        return ()
    return load_cluster("dgx1-p100" if "P100" in gpu else "dgx1-v100").wires


def lanes_of(words: str) -> float:
    """The share of sixteen lanes that a PCIe link has."""
    found = re.search(r"(?i)pci.*?\bx\s*(16|8|4)\b", words)
    return int(found[1]) / 16 if found else 1.0


def about_network(text: str) -> str:
    """The words that are not about links inside a node.

    >>> about_network("NVLink3 600 GB/s + PCIe Gen4 x16, 8x200Gb/s HDR"), about_network("NVLink4 100GbE")
    ('8x200Gb/s HDR', '100GbE')
    """
    kept = []
    for part in re.split(PARTS, text):
        if any(word in part.lower() for word in (*LINKS, "pci")):
            part = re.sub(_LINK_RATE, " ", part) if re.search(_NETWORK, part) or re.search(PORT, part) else ""
        kept.append(part.strip())
    return ", ".join(part for part in kept if part)


def nics_of(text: str) -> Nics | None:
    """What a text about a network says of its NICs; None where it says nothing.

    >>> nics_of("8x ConnectX-7 400Gb/s"), nics_of("25 Gb Ethernet"), nics_of("NDR 400Gb/s x8")
    (Nics(count=8, rate=50000000000.0, whose=''), Nics(count=0, rate=3125000000.0, whose=''), \
Nics(count=8, rate=50000000000.0, whose=''))
    >>> nics_of("100 Gb/s EDR, one NIC per node"), nics_of("4 NICs/node"), nics_of("1 GB/s per GPU")
    (Nics(count=1, rate=12500000000.0, whose='node'), Nics(count=4, rate=0.0, whose='node'), \
Nics(count=0, rate=1000000000.0, whose='gpu'))
    """
    said = NICS[0].search(text) or NICS[1].search(text)
    if said:  # the count and its owner leave the text, a rate between them stays
        text = f"{text[: said.start()]} {said[2]} {text[said.end() :]}"
    count, whose = (_number(said[1]), _owner(said[3])) if said else (0, "")
    rates = [r for r in _rates(text) if r.rate]
    if not rates:
        return Nics(count, 0.0, whose) if said else None
    found = next((r for r in rates if r.count), rates[0])
    if found.count:  # another rate may be the sum of these
        total = (r.whose for r in rates if r.whose and not r.count and r.rate == found.count * found.rate)
        return Nics(found.count, found.rate, found.whose or next(total, ""))
    if not count or (found.whose == "gpu" and whose != "gpu"):
        return found
    if found.whose == "node":  # what all of them have together
        return Nics(count, found.rate / count, "node")
    return Nics(count, found.rate, whose or found.whose)


def _rates(text: str) -> list[Nics]:
    """Every rate of a text, with its multiple and whose it is; names of InfiniBand where there is no other."""
    found = list(re.finditer(RATE, text)) or list(re.finditer(PORT, text))
    many = {m.end(): int(m[1]) for m in MANY.finditer(text)}
    names = {m.start(): many[m.start()] for m in re.finditer(PORT, text) if m.start() in many}
    result, last = [], 0
    for i, match in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        named = next((n for at, n in names.items() if last <= at < match.start()), 0)  # "8x NDR 400G"
        count = many.get(match.start(), 0) or named
        if not count and (after := AFTER.match(text, match.end())):
            count = int(after[1])
        if not count and (before := JUST_BEFORE.search(text, last, match.start())):
            count = WORDS[before[1].lower()]
        owner = WHOSE.search(text, match.end(), end) or (WHOSE.search(text, 0, match.start()) if i == 0 else None)
        result.append(Nics(count, _rate(match), _owner(owner[1]) if owner else ""))
        last = match.end()
    return result


def _rate(match: re.Match[str]) -> float:
    """bytes/s of a match of RATE or PORT."""
    if match[1] in GENERATION:
        number = int(match[2] or 0)
        gigabits = {0: GENERATION[match[1]], 10: 40, 14: 56}.get(number, number)
        return gigabits * 1.25e8
    scale = SCALE[(match[2] or match[4]).lower()]
    return float(match[1]) * scale / (1 if match[3] else 8)


def _number(text: str) -> int:
    return WORDS.get(text.lower()) or int(text)


def _owner(text: str | None) -> str:
    return "" if not text else "node" if text.lower() in ("node", "host", "server") else "gpu"


def of_a_node(said: Nics, devices: int, usual: tuple[int, float] | None) -> tuple[int, float]:
    """NICs of a node of so many devices and bytes/s of each. usual: those of the usual machine with such devices, None
    where there is none. A rate without more words is that of a NIC: the only one of the node up to NODE_AT_MOST, above
    it each of the usual ones."""
    count, rate = usual or (1, NODE_AT_MOST)
    if said.count:
        return said.count * (devices if said.whose == "gpu" else 1), said.rate or rate
    if said.whose == "gpu":
        return devices, said.rate
    if not said.whose and count > 1 and NODE_AT_MOST < said.rate <= max(NIC_AT_MOST, rate):
        return count, min(said.rate, rate)
    if said.rate <= NIC_AT_MOST:
        return 1, said.rate
    ports = max(count, ceil(said.rate / NIC_AT_MOST))  # no NIC has so much
    return ports, said.rate / ports


def network_named(text: str) -> str:
    """EFA, RoCE, InfiniBand, or TCP and Ethernet (both sockets); empty where the words name none.

    >>> [network_named(t) for t in ("100GbE", "RDMA over 100 Gb Ethernet", "HDR100", "400 Gb/s", "10 GigE, no RDMA")]
    ['Ethernet', 'RoCE', 'InfiniBand', '', 'Ethernet']
    """
    text = re.sub(r"(?i)\b(no|not|without|non)[\s-]+(rdma|roce|infiniband|ib)\b", " ", text)
    sockets = re.search(r"(?i)ethernet|\beth\b|\d\s*[GM]b?E\b|gb?e\b|gige\b|base-", text)
    if re.search(r"(?i)\befa", text):
        return "EFA"
    if re.search(r"(?i)roce|spectrum-?x", text) or (sockets and re.search(r"(?i)\brdma|gpudirect", text)):
        return "RoCE"
    if re.search(r"(?i)\bipoib\b|\btcp\b|\bsockets?\b", text):
        return "TCP"
    if re.search(r"(?i)infiniband|\bib\b", text) or re.search(PORT, text):
        return "InfiniBand"
    return "Ethernet" if sockets else ""
