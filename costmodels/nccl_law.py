"""What measured sweeps add to NCCL's tuner: a few multipliers, and a smooth curve over sizes for each family.

    seconds = base + H + crossings * (net + x) + T + ramp * sqrt(H * T)

H are the hops inside hosts, x the cost of a network crossing beyond NCCL's constant, T the bytes over the busiest
port. The square root is what a pipeline costs that cuts its message into chunks: the best chunk balances the hops of
the first chunk against the number of chunks, 2 * sqrt(H * T). (Hops between hosts in H made unseen sweeps worse.)
Every multiplier is positive and T is linear in bytes, so the time grows with bytes and with latencies and falls with
bandwidth. The curve is a factor on top, of the size alone.

A multiplier is the product of a common value and of what the family, the network, the kind of collective and the
protocol say; what was never measured says 1. Fitted by `validation.fit_collectives`, marked there with their data.
Families of which whole tables were measured on one node have a second curve for each number of ranks (`Laws.tables`,
fitted by `validation.fit_nccl_tables`): what NCCL's choice of protocol and channels costs at that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from costmodels import tomlfile as toml
from costmodels.device import CATALOGUE
from costmodels.nccl_fabric import Group
from costmodels.nccl_tuner import Candidate

WHERE = CATALOGUE / "collectives" / "nccl.toml"
TABLES = CATALOGUE / "collectives" / "nccl_tables.toml"
Line = tuple[np.ndarray, np.ndarray]  # log2 of bytes, ln of the factor
BANDS = ("under_256KiB", "256KiB_16MiB", "over_16MiB")
TERMS = ("base", "hop", "crossing", "inside", "across", "ramp")
OTHER = "other"  # stands for families without sweeps in `Laws.curves` and `Laws.errors`
CROSSING = 12e-6  # seconds of one network crossing beyond NCCL's own constant, before anything is fitted: ASSUMPTION


@dataclass(frozen=True, slots=True)
class Laws:
    """values: "family.hopper.ramp" -> multiplier (common.crossing: seconds). curves: family, scope and class of
    collective -> (log2 of bytes, ln of the factor). errors: "family.scope" -> mean absolute relative error by band
    of configurations that the fit did not see; "other" for families that were never measured. rows: points fitted.
    tables: family and class of collective on one node -> number of ranks -> a curve that is multiplied on top."""

    values: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[tuple[str, str, str], Line] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rows: int = 0
    tables: Mapping[tuple[str, str], Mapping[int, Line]] = field(default_factory=dict)


TUNER = Laws({"common.ramp": 0.0, "common.crossing": 0.0})  # NCCL's own constants alone


def class_of(kind: str) -> str:
    """Kinds that share multipliers: all_reduce (and barrier), gather, all_to_all, send."""
    if kind in ("all_reduce", "barrier"):
        return "all_reduce"
    return kind if kind in ("all_to_all", "send") else "gather"


def scope_of(group: Group) -> str:
    return "one" if group.hosts == 1 else "many"


def keys(group: Group, kind: str, way: Candidate) -> tuple[tuple[str, ...], ...]:
    """For each of TERMS the names of the values that multiply it."""
    family, network, what = f"family.{group.family}", f"network.{group.network}", f"kind.{class_of(kind)}"
    nvls = way.algorithm.startswith("nvls")
    protocol = f"protocol.{'nvls' if nvls else way.protocol if way.algorithm not in ('pairwise', 'p2p') else 'pairs'}"
    latency = (f"{what}.latency", f"{protocol}.latency")
    many = group.hosts > 1
    across: tuple[str, ...] = ("common.across", f"{network}.across")
    if kind == "all_to_all":
        across = (*across, f"all_to_all.{'amd' if group.wires == 'mesh' else 'nvidia'}")
    between = ("common.ramp_between", f"{network}.ramp") if many else ()
    return (
        ("common.base", f"{family}.base", *latency),
        ("common.hop", f"{family}.hop", *latency),
        ("common.crossing", f"{network}.crossing", *(("network.srd.crossing",) if "efa" in group.network else ())),
        ("common.nvls", f"{family}.nvls") if nvls else (f"{family}.inside",),
        across,
        ("common.ramp", f"{family}.ramp", f"{what}.ramp", f"{protocol}.ramp", *between),
    )


def factors(laws: Laws, group: Group, kind: str, way: Candidate) -> tuple[float, ...]:
    """The multiplier of each of TERMS (of "crossing": seconds)."""
    found = []
    for term, names in zip(TERMS, keys(group, kind, way), strict=True):
        product = CROSSING if term == "crossing" and "common.crossing" not in laws.values else 1.0
        for name in names:
            product *= laws.values.get(name, 1.0)
        found.append(product)
    return tuple(found)


def combine(sizes: Any, way: Any, by: Any, extra: Any) -> Any:
    """Seconds for arrays (or numbers) of equal shape. way: base, hops, net, crossings, inside, across, slow, cap, paced
    (1 where a ramp applies); by: the multipliers of TERMS; extra: seconds added to every crossing."""
    base, hops, net, crossings, inside, across, slow, cap, paced = way
    m_base, m_hop, crossing, m_inside, m_across, ramp = by
    chain = hops * m_hop
    moved = np.maximum(sizes * inside, np.minimum(sizes * slow, cap)) / m_inside
    moved = np.maximum(moved, sizes * across / m_across)
    return base * m_base + chain + net + crossings * (crossing + extra) + moved + paced * ramp * np.sqrt(chain * moved)


def terms(way: Candidate) -> tuple[float, ...]:
    """The `way` of `combine`. Messages between pairs are not passed on by other ranks: no pipeline, no ramp."""
    paced = 0.0 if way.algorithm in ("p2p", "pairwise") else 1.0
    return way.base, way.hops, way.net, way.crossings, way.inside, way.across, way.slow, way.cap, paced


def curve(laws: Laws, group: Group, kind: str, sizes: np.ndarray, algorithm: str = "") -> np.ndarray:
    """The factor of the size: log-log between knots, level beyond them. Families that were never measured between hosts
    take what the others share there. algorithm: the one that is forced; tables hold what NCCL chose, and say nothing
    of others."""
    scope, what = scope_of(group), class_of(kind)
    known = laws.curves.get((group.family, scope, what)) or laws.curves.get((OTHER, scope, what))
    total = np.zeros(len(sizes)) if algorithm else table_curve(laws, group, kind, sizes)
    return np.exp(total if known is None else total + np.interp(np.log2(sizes), *known))


def table_curve(laws: Laws, group: Group, kind: str, sizes: np.ndarray) -> np.ndarray:
    """ln of the factor that tables of one node say: linear in log2 of the ranks between two tables, level beyond."""
    known = laws.tables.get((group.family, class_of(kind)), {}) if group.hosts == 1 else {}
    if not known:
        return np.zeros(len(sizes))
    counts = sorted(known)
    below = max((n for n in counts if n <= group.ranks), default=counts[0])
    above = min((n for n in counts if n >= group.ranks), default=counts[-1])
    share = 0.0 if below == above else np.log2(group.ranks / below) / np.log2(above / below)
    low, high = (np.interp(np.log2(sizes), *known[n]) for n in (below, above))
    return np.asarray(low + share * (high - low))


def error_of(laws: Laws, group: Group, nbytes: float) -> float:
    """The expected relative error: what unseen configurations of the same family and scope had at such sizes."""
    band = 0 if nbytes < 2**18 else 1 if nbytes < 2**24 else 2
    known = laws.errors.get(f"{group.family}.{scope_of(group)}") or laws.errors.get(OTHER)
    return known[band] if known else 0.3


@cache
def shipped() -> Laws:
    """The laws of the catalogue, fitted to all its sweeps."""
    laws = laws_from(toml.read_toml(WHERE)) if WHERE.is_file() else Laws()
    return replace(laws, tables=shipped_tables().tables)


@cache
def shipped_tables() -> Laws:
    """What tables of one node say alone (nccl_tables.toml): values to start from, and the curves of `Laws.tables`."""
    return laws_from(toml.read_toml(TABLES)) if TABLES.is_file() else Laws()


def laws_from(data: Mapping[str, Any]) -> Laws:
    """Laws from the content of nccl.toml or nccl_tables.toml."""
    values: dict[str, float] = {}
    for section in ("common", "family", "network", "kind", "protocol", "all_to_all"):
        for key, value in data.get(section, {}).items():
            inner = value.items() if isinstance(value, dict) else ((None, value),)
            values |= {".".join(filter(None, (section, key, name))): float(number) for name, number in inner}
    curves = {
        (row["family"], row["scope"], row["collective"]): (np.array(row["log2_bytes"]), np.log(row["factor"]))
        for row in data.get("curve", [])
    }
    errors = {row["where"]: tuple(row["error"]) for row in data.get("error", [])}
    tables: dict[tuple[str, str], dict[int, Line]] = {}
    for row in data.get("table", []):
        knots = row["first"] + np.arange(len(row["factor"]))
        tables.setdefault((row["family"], row["collective"]), {})[row["ranks"]] = knots, np.log(row["factor"])
    return Laws(values, curves, errors, int(data.get("rows", 0)), tables)


def laws_data(laws: Laws) -> dict[str, Any]:
    """The content of nccl.toml."""
    data: dict[str, Any] = {"data": "nccl_sweeps.toml, by validation.fit_collectives; all EMPIRICAL", "rows": laws.rows}
    for name, value in laws.values.items():
        section, key, *rest = name.split(".")
        table = data.setdefault(section, {})
        if rest:
            table.setdefault(key, {})[rest[0]] = round(value, 5)
        else:
            table[key] = value if name == "common.crossing" else round(value, 5)
    data["error"] = [{"where": k, "error": [round(e, 4) for e in v]} for k, v in laws.errors.items()]
    data["curve"] = [
        {"family": f, "scope": s, "collective": c, "log2_bytes": x.tolist(), "factor": np.exp(y).round(4).tolist()}
        for (f, s, c), (x, y) in laws.curves.items()
    ]
    return data
