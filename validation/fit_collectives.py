"""Fits the constants of `costmodels.nccl_law` to published sweeps: `python -m validation.fit_collectives CSV`.

A maximum a posteriori fit in logarithms: every multiplier has a prior (`PRIORS`, mostly 1 with the given spread), so
that what few points say stays near NCCL's own constants and what they do not say stays there. A Cauchy loss keeps
single odd points from bending everything; one sweep counts as `SWEEP_POINTS` points at most. What then is left of each
family is smoothed by a Gaussian process over log2 bytes into a curve of factors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from costmodels import tomlfile as toml
from costmodels.nccl_fabric import Group, group_of
from costmodels.nccl_law import (
    BANDS,
    OTHER,
    WHERE,
    Laws,
    class_of,
    combine,
    keys,
    laws_data,
    scope_of,
    shipped_tables,
    table_curve,
    terms,
)
from costmodels.nccl_tuner import Candidate, candidates, chosen
from validation.collective_cases import SWEEPS, Setup, Sweep, setup_of, sweeps_data

NOISE = 0.15  # expected spread of ln(measured / predicted) of one point
SWEEP_POINTS = 10
# Share of a prior's spread that is left where tables of 92 sweeps say the value: of 1, 0.5 and 0.25 the best on sweeps
# left out one by one. Rates keep their spread: machines of one family differ in them.
TABLE_TRUST = 0.25
# (mean, spread) of ln(multiplier): the longest key that begins the name counts. Means that are not 0 are ASSUMPTIONS
# from shared/facts/communication.md: small messages take 10 to 25 us on one node and 30 to 75 us on two (A6: base, hop,
# crossing), NICs give .92 of their rate less headers, much alike on all networks (across; spreads of .05 and .08 let
# single installations bend them), Simple's hops overlap (protocol.Simple), LL has no chunks to fill (ramp).
# What networks have in common is learned from all of them: chunks (common.ramp_between) and, of EFA's generations,
# which share a transport, the crossing (network.srd). all_to_all starts at the NICs' full rate, as NCCL's authors state
# it (github NVIDIA/nccl-tests, issue 130).
PRIORS = {
    "common.base": (0.1, 0.2), "common.hop": (0.4, 0.4), "common.ramp": (-0.3, 0.5), "common.nvls": (log(0.65), 0.1),
    "common.crossing": (log(12e-6), 0.3), "common.across": (log(0.92), 0.03),
    "family.*.base": (0.0, 0.15), "family.*.hop": (0.0, 0.15), "family.*.ramp": (0.0, 0.2), "family.*.nvls": (0.0, 0.1),
    "family.*.inside": (0.0, 0.06), "network.*.crossing": (0.0, 0.5), "network.*.ramp": (0.0, 0.15),
    "network.*.across": (0.0, 0.03), "common.ramp_between": (0.3, 0.15), "kind.all_reduce": (0.0, 0.01),
    "kind.gather": (0.0, 0.2), "kind.all_to_all": (0.0, 0.35), "kind.send": (0.0, 0.3),
    "protocol.LL.latency": (0.0, 0.01), "protocol.LL.ramp": (log(0.2), 0.2), "protocol.LL128.latency": (-0.1, 0.3),
    "protocol.LL128.ramp": (log(0.8), 0.3), "protocol.Simple.latency": (-0.3, 0.3), "protocol.Simple.ramp": (0.0, 0.01),
    "protocol.nvls.latency": (0.0, 0.3), "protocol.nvls.ramp": (0.0, 0.4), "protocol.pairs": (0.0, 0.01),
    "all_to_all": (0.0, 0.25),
}  # fmt: skip
# Wires whose rate is less certain: staging through the host, and families with a share of their own.
LOOSE = {"geforce-host": 0.7, "cdna": 0.12, "cdna4": 0.12, "rtx-pcie5": 0.12, "volta": 0.12, "pci": 0.3, "host": 0.7}
# Gaussian process of what is left: spread, length in log2 bytes, likeness of kinds of collectives and (between hosts
# alone: on one node tables speak) of families, and the spread of a sweep as a whole (not passed on to other sweeps).
LEFT = {"spread": 0.1, "length": 1.5, "kinds": 0.6, "families": 0.5, "sweep": 0.1, "slope": 0.05, "noise": 0.05}
KNOTS = np.arange(3.0, 36.0)
CLASSES = ("all_reduce", "gather", "all_to_all", "send")


@dataclass(frozen=True, slots=True)
class Points:
    """All points of some sweeps, and for each all ways to run it. ways: (9, points, ways) of `nccl_law.terms`;
    products: which parameters each multiplier that occurs is a product of (a row of zeros and ones each); names:
    (6, points, ways) rows of `products`; allowed: which ways NCCL may take there. base: what tables say already, and
    table: ln of the factor of each point that it gives."""

    sweeps: tuple[Sweep, ...]
    setups: tuple[Setup, ...]
    groups: tuple[Group, ...]
    owner: np.ndarray
    sizes: np.ndarray
    seconds: np.ndarray
    host: np.ndarray
    parameters: tuple[str, ...]
    ways: np.ndarray
    products: np.ndarray
    names: np.ndarray
    allowed: np.ndarray
    base: Laws
    table: np.ndarray


def points_of(sweeps: Sequence[Sweep], base: Laws | None = None) -> Points:
    """The points of all sweeps that can be priced. base: laws to start from; by default those of the shipped tables."""
    base = shipped_tables() if base is None else base
    setups = tuple(setup_of(s) for s in sweeps)
    groups = tuple(group_of(s.cluster, s.ranks) for s in setups)
    ways = [_ways(g, s) for g, s in zip(groups, setups, strict=True)]
    named = [[keys(g, s.kind, w) for w in found] for g, s, found in zip(groups, setups, ways, strict=True)]
    parameters = tuple(sorted({name for sweep in named for way in sweep for term in way for name in term}))
    products = list(dict.fromkeys(term for sweep in named for way in sweep for term in way))
    place = {term: i for i, term in enumerate(products)}
    most = max(map(len, ways))
    rows = [[*map(terms, w), *[(0.0,) * 9] * (most - len(w))] for w in ways]
    names = [[*([place[t] for t in w] for w in sweep), *[[0] * 6] * (most - len(sweep))] for sweep in named]
    allowed = [_chosen(x.kind, w, s, most) for x, w, s in zip(setups, ways, sweeps, strict=True)]
    owner = np.repeat(np.arange(len(sweeps)), [len(s.bytes) for s in sweeps])
    tables = [
        np.zeros(len(w.bytes)) if s.algorithm else table_curve(base, g, s.kind, np.array(w.bytes))
        for g, s, w in zip(groups, setups, sweeps, strict=True)
    ]
    return Points(
        tuple(sweeps), setups, groups, owner,
        np.array([b for s in sweeps for b in s.bytes]), np.array([t for s in sweeps for t in s.seconds]),
        np.array([s.host for s in setups])[owner], parameters, np.moveaxis(np.array(rows)[owner], 2, 0),
        np.array([[name in term for name in parameters] for term in products], float),
        np.moveaxis(np.array(names)[owner], 2, 0), np.concatenate(allowed), base, np.concatenate(tables),
    )  # fmt: skip


def _ways(group: Group, setup: Setup) -> list[Candidate]:
    from costmodels.nccl import _allowed

    return _allowed(candidates(group, setup.kind), setup.algorithm)


def _chosen(kind: str, ways: list[Candidate], sweep: Sweep, most: int) -> np.ndarray:
    """(points, most ways): what NCCL may take."""
    found = np.zeros((len(sweep.bytes), most), bool)
    found[:, : len(ways)] = chosen(kind, ways, np.array(sweep.bytes)).T
    return found


def prior(name: str) -> tuple[float, float]:
    """(mean, spread) of the logarithm of a value."""
    section, middle, *rest = name.split(".")
    if section == "family" and rest == ["inside"] and middle in LOOSE:
        return 0.0, LOOSE[middle]
    for key in (name, ".".join([section, "*", *rest]), f"{section}.{middle}", section):
        if key in PRIORS:
            return PRIORS[key]
    raise AssertionError(name)


def predict(points: Points, values: np.ndarray) -> np.ndarray:
    """ln(seconds) of every point by the best way, host time of the measurement included."""
    by = np.exp(points.products @ values)[points.names]
    times = combine(points.sizes[:, None], points.ways, by, 0.0)
    best = np.where(points.allowed, times, np.inf).min(1)
    return np.asarray(np.log(best * np.exp(points.table) + points.host))


def fit(points: Points, use: np.ndarray) -> Laws:
    """The laws that `use` (a mask of points) says."""
    part = subset(points, use)
    found = solve(part, np.array([start(name, points.base) for name in points.parameters]))
    values = {name: float(np.exp(v)) for name, v in zip(points.parameters, found, strict=True)}
    curves = _curves(part, np.log(part.seconds) - predict(part, found))
    return Laws(values, curves, rows=int(use.sum()), tables=points.base.tables)


def start(name: str, base: Laws) -> tuple[float, float]:
    """`prior`, moved to what the tables say, which a sweep moves less (`TABLE_TRUST`)."""
    mean, spread = prior(name)
    if name not in base.values:
        return mean, spread
    return log(base.values[name]), spread * (1.0 if name.endswith(".inside") else TABLE_TRUST)


def solve(part: Points, priors: np.ndarray) -> np.ndarray:
    """The logarithms of the most likely parameters. priors: (parameters, 2), mean and spread of each."""
    measured = np.log(part.seconds)
    count = np.bincount(part.owner)[part.owner]
    weight = np.sqrt(np.minimum(1.0, SWEEP_POINTS / count))

    def residuals(values: np.ndarray) -> np.ndarray:
        off = (predict(part, values) - measured) / NOISE
        off = np.sign(off) * 2 * np.sqrt(np.log1p(off * off / 4))
        return np.concatenate([weight * off, (values - priors[:, 0]) / priors[:, 1]])

    found = least_squares(residuals, priors[:, 0], x_scale=priors[:, 1], max_nfev=40, ftol=1e-4, xtol=1e-5)
    return np.asarray(found.x)


def subset(points: Points, use: np.ndarray) -> Points:
    return replace(
        points, owner=points.owner[use], sizes=points.sizes[use], seconds=points.seconds[use], host=points.host[use],
        ways=points.ways[:, use], names=points.names[:, use], allowed=points.allowed[use], table=points.table[use],
    )  # fmt: skip


def _curves(points: Points, left: np.ndarray) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Curves of the factors that are left, for every family and scope with points, and of OTHER families between hosts.
    What families share there is learned from all of them."""
    where = [(g.family, scope_of(g)) for g in points.groups]
    family, scope = np.array(where)[points.owner].T
    kind = np.array([CLASSES.index(class_of(s.kind)) for s in points.setups])[points.owner]
    x = np.log2(points.sizes)
    found = {}
    places = dict.fromkeys(where[i] for i in np.unique(points.owner).tolist())
    for place in (*places, *(((OTHER, "many"),) if any(p[1] == "many" for p in places) else ())):
        mine = (scope == place[1]) & ((place[1] == "many") | (family == place[0]))
        xs, kinds, owner, families = x[mine], kind[mine], points.owner[mine], family[mine]
        same = owner[:, None] == owner[None]
        distance = xs[:, None] - xs[None]
        noise = same * (LEFT["sweep"] ** 2 + LEFT["slope"] ** 2 * np.exp(-((distance / 4) ** 2) / 2))
        near = _likeness(distance, kinds[:, None] == kinds[None], families[:, None] == families[None])
        weights = np.linalg.solve(near + noise + LEFT["noise"] ** 2 * np.eye(len(xs)), np.clip(left[mine], -0.4, 0.4))
        for i, name in enumerate(CLASSES):
            smooth = _likeness(KNOTS[:, None] - xs[None], (kinds == i)[None], (families == place[0])[None]) @ weights
            found[(*place, name)] = (KNOTS, smooth)
    return found


def _likeness(distance: np.ndarray, same_kind: np.ndarray, same_family: np.ndarray) -> np.ndarray:
    near = np.exp(-((distance / LEFT["length"]) ** 2) / 2)
    alike = np.where(same_kind, 1.0, LEFT["kinds"]) * np.where(same_family, 1.0, LEFT["families"])
    return np.asarray(LEFT["spread"] ** 2 * near * alike)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads sweeps, scores them left out one by one, fits all, writes nccl.toml and nccl_sweeps.toml."""
    from validation.collective_score import bands_of, left_out, read_sweeps

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("cases", type=Path, help="CSV file with the NCCL columns of docs/cases.md")
    sweeps, skipped = read_sweeps(parser.parse_args(arguments).cases)
    for config, reason in skipped.items():
        print(f"skipped {config}: {reason}")
    points = points_of(sweeps)
    scores = left_out(points)
    laws = fit(points, np.ones(len(points.sizes), bool))
    errors = {OTHER: tuple(np.mean([abs(e) for e in band]) for band in bands_of(points.sizes, scores).values())}
    for place in dict.fromkeys((g.family, scope_of(g)) for g in points.groups):
        mine = np.array([(g.family, scope_of(g)) == place for g in points.groups])[points.owner]
        found = bands_of(points.sizes[mine], scores[mine]).values()
        known = [float(np.mean(np.abs(band))) if len(band) else other for band, other in zip(found, errors[OTHER])]
        errors[".".join(place)] = tuple(known)
    toml.write_toml(SWEEPS, sweeps_data(sweeps))
    toml.write_toml(WHERE, laws_data(Laws(laws.values, laws.curves, errors, laws.rows)))
    print(f"{len(points.sizes)} points of {len(sweeps)} configurations; each predicted without its own:")
    print(", ".join(f"{band} {error:.1%}" for band, error in zip(BANDS, errors[OTHER], strict=True)))


if __name__ == "__main__":
    main()
