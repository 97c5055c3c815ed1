"""Fitting the tile law and its correction to the calibration half of a table, and scoring them on the other half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.sparse.linalg import cg

from costmodels.device import load_device
from costmodels.gemm import REGIONS, WIDTH
from costmodels.gemm_correction import Correction, corners, correction_from, factors, section_of
from costmodels.gemm_law import Constants, Hardware, Menu, hardware_of, law_seconds, menu
from validation.tables_gemm import Table

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Start, least and largest value of each constant. `stream` and `split_floor` stay near what kernel times give (0.72 to
# 0.85, 2 us), and so does `in_flight` with eager tables: they hide small products behind the launch.
RANGES = {
    "compute": (0.9, 0.1, 1.0), "area": (0.2, 0.0, 1.0), "prologue": (100, 1, 800), "smooth": (0.6, 0.0, 1.0),
    "stream": (0.85, 0.5, 1.0), "in_flight": (60, 10, 256), "reread": (0.3, 0.0, 5.0), "overlap": (4, 1.1, 12),
    "floor": (2.5e-6, 2e-7, 2e-5), "split_floor": (2e-6, 0.0, 5e-6), "split_bytes": (0.1, 0.0, 5.0),
    "throttle": (0.03, 0.0, 0.5), "odd": (0.03, 0.0, 1.0), "resident": (0.15, 0.01, 1.0), "hot": (1.5, 1.0, 8.0),
    "host": (4e-5, 0.0, 3e-4), "alone": (1.0, 0.2, 6.0),
}  # fmt: skip
# float32's SIMT kernels (maxwell_, volta_, ampere_sgemm) start fast and load 8 elements of k at once.
EAGER_RANGES = {"in_flight": (60, 10, 100), "prologue": (8, 0, 200), "host": (2e-5, 0.0, 3e-4)}
EAGER_K_STEP = 8.0
LONGEST_ISSUE = 3e-4  # seconds; the module calls of the tables take 30 to 70 us
ISSUE_JOIN = 16.0  # exponent of the norm of issue and kernel in eager times; fitted freely: 13 to 40
TENSOR_TILES = [
    "16x64", "16x128", "32x64", "32x128", "64x32", "64x64", "64x128", "64x256", "128x32", "128x64", "128x128",
    "128x256", "256x64", "256x128",
]  # fmt: skip
SPLITS = [1, 2, 4, 8]
EAGER_FLOOR = 3e-6  # a kernel's own floor cannot be told from its launch in eager times: bfloat16's on A100 and H100
ROWS = 2000  # sampled rows of the calibration half to which the constants are fitted
# Candidates for the correction: most nodes along batches, m, n, k, and stiffness; chosen on a quarter of the
# calibration half, to which the candidates are not fitted.
NODES = ((6, 30, 16, 12), (5, 12, 12, 10))
STIFFNESS = (0.01, 0.03, 0.1, 0.3)
# Where tables name tiles, one candidate more has nodes along m and n on both sides of the tiles' edges, where the
# number of tiles, and so the library's choice among them, jumps; most nodes along batches and k, and its stiffness.
EDGES = (32, 64, 96, 128, 192, 256)
EDGE_NODES, EDGE_STIFFNESS = (8, 6), (0.003, 0.01, 0.03)
LEAST_GAP = 0.15  # ln units: what a slope counts as its width at least, so that the table may jump at an edge
RARE = 0.01  # a tile is on the menu if it has this share of the calibration half


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted table. host, issue: seconds of the launch in an eager table (`in_table`), no part of the law."""

    constants: Constants
    hardware: Hardware
    menu: Menu
    tiles: list[str]
    splits: list[int]
    host: float
    issue: float
    correction: Correction


def calibration_half(dims: Array, by_pair: bool = False) -> Mask:
    """Which rows calibrate, by a hash of (batches, m, n, k); `by_pair` by (n, k) alone, so that a held-out product has
    no neighbour in m.

    >>> half = calibration_half(np.array([[1.0, m, 64, 64] for m in range(1, 1001)]))
    >>> 0.4 < half.mean() < 0.6
    True
    """
    mixed = np.zeros(len(dims), np.uint64)
    for column in (2, 3) if by_pair else (0, 1, 2, 3):
        mixed += dims[:, column].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
    half: Mask = ((mixed >> np.uint64(40)) & np.uint64(1)).astype(bool)
    return half


def fit(table: Table, mask: Mask, rows: int = ROWS) -> Fit:
    """Fit constants, then the correction, to the rows of `mask`."""
    tiles, splits = _menu_of(table, mask)
    device = load_device(table.device)
    dtype = table.section.removesuffix("_batched")
    hardware = hardware_of(device, dtype, WIDTH.get(dtype, 1))
    dims, seconds = table.dims[mask], table.seconds[mask]
    candidates = menu(tiles, splits)
    # What a kind of table cannot show is not fitted to it.
    eager = {"floor": EAGER_FLOOR, "resident": 0.0, "hot": 1.0, "k_step": EAGER_K_STEP}
    fixed = eager if table.eager else {"odd": 0.0, "host": 0.0, "issue": 0.0, "alone": 0.0}
    if table.eager and not (dims[:, 2:] % 4).any():  # aligned all (16 bytes): `odd` would drift anywhere
        fixed = {**fixed, "odd": RANGES["odd"][0]}
    constants, host, issue = _fit_constants(hardware, candidates, dims, seconds, fixed, rows)
    kernel = law_seconds(constants, hardware, candidates, dims)
    left, share = _left(kernel, host, issue, seconds)
    correction = _choose_correction(dims, left, share**2, table.eager)
    return Fit(constants, hardware, candidates, tiles, splits, host, issue, correction)


def in_table(kernel: Array, host: float, issue: float) -> Array:
    """Seconds that a table shows for a kernel. Eager tables time between two events that the host issues around the
    op: between them pass the launch and the kernel (`host` + kernel), but no less than the host takes to issue the op
    (`issue`), which runs beside them. V100: 28 us and 48 us, so that kernels of up to 20 us do not show at all."""
    both = host + kernel
    larger, smaller = np.maximum(both, issue), np.minimum(both, issue)
    seconds: Array = larger * (1.0 + (smaller / larger) ** ISSUE_JOIN) ** (1.0 / ISSUE_JOIN)
    return seconds


def _left(kernel: Array, host: float, issue: float, seconds: Array) -> tuple[Array, Array]:
    """ln(measured / law) of the kernels, and the kernel's share of each measured time: where the launch or the host is
    most of it, the rest tells little of the kernel."""
    shown = in_table(kernel, host, issue)
    share = ((host + kernel) / shown) ** ISSUE_JOIN * kernel / (host + kernel)
    left: Array = np.clip(np.log(seconds / shown) / np.maximum(share, 0.05), -1.0, 1.0)
    return left, share


def _menu_of(table: Table, mask: Mask) -> tuple[list[str], list[int]]:
    """Tiles that the calibration half's kernels have, where the table names kernels; else those of tensor cores."""
    named = Counter(t for t, inside in zip(table.tiles, mask) if inside and t)
    if not named:
        return TENSOR_TILES, SPLITS
    enough = RARE * sum(named.values())
    tiles = sorted((t for t, n in named.items() if n >= enough), key=lambda t: [int(x) for x in t.split("x")])
    return tiles, SPLITS if not table.section.endswith("_batched") else [1]


def _fit_constants(
    hw: Hardware,
    candidates: Menu,
    dims: Array,
    seconds: Array,
    fixed: dict[str, float],
    rows: int,
) -> tuple[Constants, float, float]:
    """Least squares of ln(law / measured), large errors counted linearly; coarse, then fine steps, because minima and
    waves make the law jump. Returns the constants, and launch and issue in the times (`in_table`)."""
    pick = np.random.default_rng(0).permutation(len(dims))[:rows]
    dims, seconds = dims[pick], seconds[pick]
    least = min(float(np.quantile(seconds, 0.02)), LONGEST_ISSUE / 2)
    ranges = RANGES | {"issue": (least, 0.0, 1.6 * least)} | (EAGER_RANGES if "floor" in fixed else {})
    names = [n for n in ranges if n not in fixed]
    start, low, high = np.array([ranges[n] for n in names]).T

    def constants(unit: Array) -> tuple[Constants, float, float]:
        values = dict(zip(names, (low + (high - low) * unit).tolist())) | fixed
        host, issue = values.pop("host"), values.pop("issue")
        return Constants(**values), host, issue

    def errors(unit: Array) -> Array:
        made, host, issue = constants(unit)
        return np.log(in_table(law_seconds(made, hw, candidates, dims), host, issue) / seconds)

    at = (start - low) / (high - low)
    for step in (0.02, 0.004):
        solution = least_squares(
            errors, at, bounds=(0, 1), loss="soft_l1", f_scale=0.05, diff_step=np.array(step), max_nfev=25
        )
        at = solution.x
    return constants(at)


def _choose_correction(dims: Array, left: Array, weights: Array, edges: bool = False) -> Correction:
    """The correction of the candidate that predicts a quarter of the rows best from the other three."""
    inner = (np.arange(len(dims)) % 4 > 0)[np.random.default_rng(1).permutation(len(dims))]
    best, chosen = np.inf, None
    for axes, stiffness, gap in _candidates(dims, edges):
        table = smooth_table(axes, dims[inner], left[inner], weights[inner], stiffness, gap)
        errors = abs(factors(table, dims[~inner]) * np.exp(-left[~inner]) - 1)
        error = float((np.sqrt(weights[~inner]) * errors).mean())  # an error of the kernel counts by its share
        if error < best:
            best, chosen = error, (axes, stiffness, gap)
    assert chosen is not None, "the errors of all candidates are finite"
    return smooth_table(chosen[0], dims, left, weights, *chosen[1:])


def _candidates(dims: Array, edges: bool) -> Iterator[tuple[tuple[Array, ...], float, float]]:
    """Axes, stiffness and least gap of the corrections to try."""
    for counts in NODES:
        axes = tuple(_nodes(x, count) for x, count in zip(dims.T, counts))
        yield from ((axes, stiffness, 0.0) for stiffness in STIFFNESS)
    if edges:
        batches, m, n, k = dims.T
        jumps = (_nodes(batches, EDGE_NODES[0]), _edge_nodes(m), _edge_nodes(n), _nodes(k, EDGE_NODES[1]))
        yield from ((jumps, stiffness, LEAST_GAP) for stiffness in EDGE_STIFFNESS)


def _edge_nodes(values: Array) -> Array:
    """Both sides of each tile edge, powers of two elsewhere, and the least and the largest of the values."""
    low, high = values.min(), values.max()
    sides = np.array([x for edge in EDGES for x in (edge, edge + 1)], float)
    wide = 2.0 ** np.arange(17)
    picked = np.unique(np.concatenate([sides, wide[(wide < EDGES[0] / 1.5) | (wide > EDGES[-1])], [low, high]]))
    nodes: Array = np.log(picked[(picked >= low) & (picked <= high)])
    return nodes


def _nodes(values: Array, count: int) -> Array:
    """At most `count` of the values, spread evenly in their logs, with the least and the largest."""
    unique = np.unique(np.log(values))
    if len(unique) <= count:
        return unique
    targets = np.linspace(unique[0], unique[-1], count)
    nearest = np.unique(abs(unique[None, :] - targets[:, None]).argmin(axis=1))
    picked: Array = np.log(np.unique(np.rint(np.exp(unique[nearest]))))
    apart: Array = picked[np.concatenate([[True], np.diff(picked) > 0.04])]
    return apart


def smooth_table(
    axes: tuple[Array, ...], dims: Array, left: Array, weights: Array, stiffness: float, gap: float = 0.0
) -> Correction:
    """The table that is near `left` and smooth: weighted squares plus `stiffness` times the squared slopes between
    neighbouring nodes (three times that along n and k, where tables are coarser), large residuals counted linearly.
    Nodes nearer than `gap` (ln units) count as that far apart."""
    indices, shares = corners(axes, np.log(dims))
    rows = np.repeat(np.arange(len(dims)), indices.shape[1])
    size = int(np.prod([len(a) for a in axes]))
    matrix = sparse.csr_matrix((shares.ravel(), (rows, indices.ravel())), shape=(len(dims), size))
    rough = _roughness(axes, tuple(stiffness * f for f in (1, 1, 3, 3)), gap) + 0.05 * sparse.identity(size)
    values, robust = np.zeros(size), np.ones(len(dims))
    for _ in range(2):
        scale = sparse.diags(weights * robust)
        system = (matrix.T @ scale @ matrix + rough).tocsr()
        target = np.asarray(matrix.T @ (weights * robust * left))
        values, _ = cg(system, target, x0=values, rtol=1e-4, maxiter=400)
        robust = 1 / np.maximum(1.0, abs(left - matrix @ values) / 0.08)
    return Correction(axes, values)


def _roughness(axes: tuple[Array, ...], stiffness: tuple[float, ...], gap: float) -> Any:
    """Sum over axes of stiffness times the squared slope in the log of that axis."""
    total: Any = 0
    for i, axis in enumerate(axes):
        if len(axis) == 1:
            continue
        width = np.sqrt(np.maximum(np.diff(axis), gap))
        slope: Any = sparse.diags_array((-1 / width, 1 / width), offsets=(0, 1), shape=(len(axis) - 1, len(axis)))
        term: Any = sparse.identity(1)
        for j, other in enumerate(axes):
            factor = stiffness[i] * (slope.T @ slope) if i == j else sparse.identity(len(other))
            term = sparse.kron(term, factor)
        total = total + term
    return total


def predictions(fitted: Fit, dims: Array) -> tuple[Array, Array]:
    """Measured times that the bare law, and the law with its correction, expect: the eager launch included."""
    bare = law_seconds(fitted.constants, fitted.hardware, fitted.menu, dims)
    corrected = bare * factors(fitted.correction, dims)
    return in_table(bare, fitted.host, fitted.issue), in_table(corrected, fitted.host, fitted.issue)


def section_values(table: Table, fitted: Fit, mask: Mask) -> dict[str, Any]:
    """The section of a kernels file: constants, menu, range, errors on the held-out half, correction."""
    stored = section_of(fitted.correction)
    rounded = replace(fitted, correction=correction_from(stored) or fitted.correction)
    held, seconds = table.dims[~mask], table.seconds[~mask]
    errors = abs(predictions(rounded, held)[1] / seconds - 1)
    region = np.searchsorted(REGIONS, held[:, 1], side="right")
    calibration = table.dims[mask]
    return {
        "data": table.data,
        "rows": int(mask.sum()),
        "held_out": len(held),
        "error": float(errors.mean()),
        "errors": [float((errors[region == r] if (region == r).any() else errors).mean()) for r in range(4)],
        "tiles": fitted.tiles,
        "splits": fitted.splits,
        **asdict(fitted.constants),
        **({"host_in_table": fitted.host, "issue_in_table": fitted.issue} if table.eager else {}),
        "low": calibration.min(axis=0).tolist(),
        "high": calibration.max(axis=0).tolist(),
        **stored,
    }
