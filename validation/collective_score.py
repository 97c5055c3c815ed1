"""How far the predicted times of collectives are from published ones: `parplan collectives --cases CSV`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.collectives import collective_price
from costmodels.nccl_fabric import group_of
from costmodels.nccl_law import BANDS, TUNER, Laws, class_of
from validation.collective_cases import Sweep, by_config, catalogue_sweeps, read_rows, setup_of, sweep_from
from validation.collective_tcp import in_sample, is_tcp, tcp_points

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Scored:
    """One configuration: its points (bytes, measured and predicted seconds), and the algorithm and protocol of each.

    constants: "left out" (the catalogue has it; the constants were fitted anew without it), "shipped" (the
    catalogue does not have it), "tuner" (nothing was fitted), "formula" (of TCP; its constants come from elsewhere),
    "in sample" (of TCP; a constant that prices this configuration comes from its own rows). related: of each point,
    whether the constants were fitted to another configuration of the same family, class of collective and network with
    a size within a factor of four."""

    config_id: str
    what: str
    bytes: tuple[float, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    ways: tuple[str, ...]
    constants: str
    related: tuple[bool, ...] = ()

    @property
    def errors(self) -> np.ndarray:
        """Signed relative errors, predicted / measured - 1."""
        return np.asarray(np.array(self.predicted) / np.array(self.measured) - 1)


def read_sweeps(path: Path) -> tuple[list[Sweep], dict[str, str]]:
    """The sweeps of a file, and the reasons why others cannot be priced."""
    sweeps, skipped = [], {}
    for config_id, rows in by_config(read_rows(path)).items():
        try:
            check_name(config_id)
            sweep = sweep_from(config_id, rows)
            setup_of(sweep)
            sweeps.append(sweep)
        except ValueError as error:
            skipped[config_id] = str(error)
    return sweeps, skipped


def check_name(config_id: str) -> None:
    """ValueError where rows say not to which configuration they belong."""
    if not config_id:
        raise ValueError("config_id is blank; give the rows of one configuration one name")


def score_file(
    path: Path, progress: Progress | None = None, plain: bool = False
) -> tuple[list[Scored], dict[str, str]]:
    """Every configuration of a file with the columns of docs/cases.md, and those that have no price.

    plain: NCCL's own constants alone, nothing fitted."""
    rows = read_rows(path)
    tcp = is_tcp(rows[0])
    own = {"backend"} if tcp else {"gpu", "num_gpus"}
    if missing := {"config_id", "collective", "bytes", "time_us", "num_nodes", *own} - set(rows[0]):
        raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing; docs/cases.md has all of them")
    if tcp:
        return score_tcp(rows)
    sweeps, skipped = read_sweeps(path)
    known = catalogue_sweeps()
    found = []
    for i, sweep in enumerate(sweeps):
        if progress:
            progress(f"pricing {sweep.config_id}", i / len(sweeps))
        if plain:
            found.append(replace(score(sweep, TUNER), constants="tuner", related=(False,) * len(sweep.bytes)))
            continue
        same = [s.config_id for s in known if is_same(s, sweep)]
        scored = score(sweep, without(known, same) if same else None)
        others = [s for s in known if s.config_id not in same and likeness(s) == likeness(sweep)]
        sizes = np.array([size for s in others for size in s.bytes])
        near = (bool(((sizes <= 4 * size) & (sizes >= size / 4)).any()) for size in sweep.bytes)
        found.append(replace(scored, related=tuple(near)))
    return found, skipped


def is_same(a: Sweep, b: Sweep) -> bool:
    """Whether two sweeps share points: the same name, or the same size and time on the same devices."""
    if a.config_id == b.config_id:
        return True
    if (a.gpu, a.num_gpus, a.num_nodes) != (b.gpu, b.num_gpus, b.num_nodes):
        return False
    times = dict(zip(a.bytes, a.seconds, strict=True))
    return any(size in times and abs(times[size] / t - 1) < 1e-4 for size, t in zip(b.bytes, b.seconds, strict=True))


def likeness(sweep: Sweep) -> tuple[str, str, str]:
    """What two sweeps must share so that one says much about the other: family, class of collective, network."""
    setup = setup_of(sweep)
    group = group_of(setup.cluster, setup.ranks)
    return group.family, class_of(setup.kind), group.network if group.hosts > 1 else "one node"


def without(known: Sequence[Sweep], names: Sequence[str]) -> Laws:
    """Constants fitted to all sweeps of the catalogue but these."""
    from validation.fit_collectives import fit, points_of

    points = points_of(known)
    keep = np.array([s.config_id not in names for s in known])[points.owner]
    return fit(points, keep)


def score(sweep: Sweep, laws: Laws | None = None) -> Scored:
    """Predicted and measured times of one sweep; laws: None for the shipped ones."""
    setup = setup_of(sweep)
    prices = [
        collective_price(setup.cluster, setup.kind, size, setup.ranks, setup.algorithm, laws) for size in sweep.bytes
    ]
    what = f"{setup.kind} on {sweep.num_gpus} {sweep.gpu}, {sweep.num_nodes} nodes"
    return Scored(
        sweep.config_id, what, sweep.bytes, sweep.seconds, tuple(p.seconds + setup.host for p in prices),
        tuple(f"{p.algorithm} {p.protocol}" for p in prices), "left out" if laws else "shipped",
    )  # fmt: skip


def left_out(points: Any) -> np.ndarray:
    """Signed errors of all points, each sweep predicted by constants that were fitted without it."""
    from validation.fit_collectives import fit

    errors = [score(s, fit(points, points.owner != i)).errors for i, s in enumerate(points.sweeps)]
    return np.concatenate(errors)


def score_tcp(rows: list[dict[str, str]]) -> tuple[list[Scored], dict[str, str]]:
    found, skipped = [], {}
    for config_id, mine in by_config(rows).items():
        try:
            check_name(config_id)
            points = tcp_points(mine)
        except ValueError as error:
            skipped[config_id] = str(error)
            continue
        first = mine[0]
        what = ", ".join(first[c].strip() for c in ("collective", "backend", "num_nodes")) + " nodes"
        found.append(Scored(config_id, what, *points, "in sample" if any(map(in_sample, mine)) else "formula"))
    return found, skipped


def bands_of(sizes: np.ndarray, errors: np.ndarray) -> dict[str, np.ndarray]:
    """Errors of each band of sizes."""
    places = np.digitize(sizes, (2.0**18, 2.0**24))
    return {band: errors[places == i] for i, band in enumerate(BANDS)}


def numbers(sizes: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    """n, mape (mean absolute error), bias and worst error of all, and n, mape and bias of each band with points."""
    bands = {band: {"n": len(e)} | _mean(e) for band, e in bands_of(sizes, errors).items() if len(e)}
    return {"n": len(errors)} | _mean(errors) | {"worst": float(errors[np.abs(errors).argmax()])} | bands


def _mean(errors: np.ndarray) -> dict[str, float]:
    return {"mape": float(np.abs(errors).mean()), "bias": float(errors.mean())}


def result(scored: Sequence[Scored], skipped: dict[str, str]) -> dict[str, Any]:
    """What `parplan collectives --cases` says, as JSON.

    summary: `mape` and the bands are over all points; mean_of_configs and median_of_configs give each configuration
    one vote; related and unrelated split the points by `Scored.related`, in_sample and out_of_sample those over TCP by
    whether a constant came from their own configuration."""
    configs: list[dict[str, Any]] = [
        {"config_id": s.config_id, "what": s.what, "constants": s.constants, "related": sum(s.related)}
        | numbers(np.array(s.bytes), s.errors)
        | {"algorithms": sorted(set(s.ways))}
        for s in scored
    ]
    if not scored:
        return {"configs": [], "skipped": _reasons(skipped), "summary": {"n": 0, "configs": 0}}
    sizes, errors = np.concatenate([s.bytes for s in scored]), np.concatenate([s.errors for s in scored])
    summary: dict[str, Any] = {"configs": len(configs)} | numbers(sizes, errors)
    summary |= {"left_out": sum(s.constants == "left out" for s in scored)}
    summary |= {"mean_of_configs": _votes(configs, False), "median_of_configs": _votes(configs, True)}
    summary |= {name: numbers(sizes[part], errors[part]) for name, part in _parts(scored).items() if part.any()}
    return {"configs": configs, "skipped": _reasons(skipped), "summary": summary}


def _parts(scored: Sequence[Scored]) -> dict[str, np.ndarray]:
    """Masks over all points of how far the constants know the configuration."""
    if any(s.constants in ("left out", "shipped") for s in scored):
        related = np.concatenate([s.related for s in scored])
        return {"related": related, "unrelated": ~related}
    if any(s.constants in ("in sample", "formula") for s in scored):
        seen = np.concatenate([np.full(len(s.bytes), s.constants == "in sample") for s in scored])
        return {"in_sample": seen, "out_of_sample": ~seen}
    return {}


def _votes(configs: Sequence[dict[str, Any]], median: bool) -> dict[str, Any]:
    """Mean or median over configurations of their mape, for all sizes and for each band."""
    middle = np.median if median else np.mean
    bands = {band: [c[band]["mape"] for c in configs if band in c] for band in BANDS}
    found: dict[str, Any] = {"mape": float(middle([c["mape"] for c in configs]))}
    return found | {band: {"mape": float(middle(values))} for band, values in bands.items() if values}


def _reasons(skipped: dict[str, str]) -> list[dict[str, str]]:
    return [{"config_id": config, "reason": reason} for config, reason in skipped.items()]
