"""Calibrates this machine: one TOML file with the laws of its ops, its host overheads, and its gloo collectives.

Measured only on models and micro-benchmarks of `validation/calibrate_*.py`, never on a plan or a model that is scored.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodels import tomlfile
from costmodels.cluster import CollectiveTable, tables_data
from costmodels.device import BRIEF_STEP, Device, device_data, local_path
from costmodels.families import family
from costmodels.features import FORMS, form_of, touched
from costmodels.ops import OpShape, signature
from costmodels.signature import Signature
from validation.anchor import Beat, over
from validation.calibrate_fit import fit_ops, step_errors
from validation.calibrate_host import host_of
from validation.environment import RANK_ENV, available_cores

if TYPE_CHECKING:
    from validation.calibrate_record import Sample

Progress = Callable[[str, float], None]
ROOT = Path(__file__).resolve().parent.parent
ROOM = 3 * 2**30  # bytes of free memory per rank below which the models that hold 200 to 400 MB are left out
MOST_RANKS = 8  # of the op measurement: more ranks than this would only repeat each other
AFTER_ROUNDS = 42.0  # seconds kept for collectives of 2 and 4 ranks (31 to 46 on two cores) and for fitting (3 to 4)
PER_WORLD, FITTING = 18.0, 6.0  # seconds kept for each further group size (start, one pass), and for what follows
OWN_SECONDS = 90.0  # for calibration's own models and the collectives
DRAWN, DRAWN_SECONDS, STARTING = 60, 75.0, 12.0  # further models measured at once; seconds: for them, to start and end
DRAWN_SMALL = 40  # models of a few milliseconds a step beside them
USUAL_BUDGET = OWN_SECONDS + 2 * DRAWN_SECONDS
SAMPLE_SECONDS = 2e-5  # shorter ops are not stored one by one: their law is as good and the file stays small
OUT_OF_CONTEXT = 2e-4  # seconds: below, a law that knows what runs before an op is nearer than the op's own time was


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found and where it wrote it. fit_error: by family and dtype, the held-out mean absolute relative
    error, the same weighted by seconds, and the number of held-out ops."""

    device: Device
    tables: tuple[CollectiveTable, ...]
    path: Path
    fit_error: dict[str, tuple[float, float, int]]
    seconds: float
    rounds: int


def calibrate(
    out: Path | None = None,
    budget_seconds: float = USUAL_BUDGET,
    progress: Progress = lambda what, fraction: None,
    models: Sequence[str] = (),
    worlds: Sequence[int] = (),
) -> Calibration:
    """Measures this machine and writes its device file to `out` (default: `costmodels.device.local_path()`).

    `models` names a part of the calibration models and `worlds` the group sizes of the collectives (tests use few);
    by default all models, and groups of 2, 4 and as many as there are cores. Every `DRAWN_SECONDS` of the budget beyond
    `OWN_SECONDS` go to ops of `DRAWN` further models (`validation.calibrate_drawn`).
    """
    import psutil

    if budget_seconds <= 0:
        raise ValueError(f"the budget is {budget_seconds:g} s; it must be more than 0, and {USUAL_BUDGET:g} is usual")
    began, started = time.monotonic(), time.time()
    groups = max(int((budget_seconds - OWN_SECONDS) // DRAWN_SECONDS), 0)
    budget_seconds -= groups * DRAWN_SECONDS
    cores = available_cores()
    ranks = max(min(cores, MOST_RANKS), 2)
    sizes = sorted(set(worlds) or {2, 4, ranks})
    short = bool(models)
    common = {"timeout": 300, "sizes": _sizes(short), "seconds_per_point": 0.02 if short else 0.2}
    results: dict[int, list[dict[str, Any]]] = {}
    parts = 1 + groups * DRAWN_SECONDS / budget_seconds  # of the progress bar: what is no drawn group is one
    with tempfile.TemporaryDirectory(prefix="parplan-calibrate-") as folder:
        in_order = [ranks, *(size for size in sizes if size != ranks)]
        for i, world in enumerate(in_order):
            main = world == ranks
            job = {
                **common, "ranks": world, "store": str(Path(folder) / f"store-{world}"), "anchor": 8 if short else 40,
                "kinds": _kinds(world) if world in sizes else [], "runtime": main,
                "models": list(models) if main else None, "least_rounds": 3,
                "room": psutil.virtual_memory().available >= ROOM * ranks,
                "until": started + max(budget_seconds - AFTER_ROUNDS, 0.0),
                "collectives_until": started + budget_seconds - FITTING - PER_WORLD * (len(in_order) - 1 - i),
                "reference": 0.0 if main else results[ranks][0]["reference"],
            }  # fmt: skip
            low, high = (0.0, 0.75) if main else (0.75 + 0.2 * (i - 1) / len(sizes), 0.75 + 0.2 * i / len(sizes))
            results[world] = run_ranks(job, Path(folder), _between(progress, low / parts, high / parts))
        job = {**common, "ranks": ranks, "anchor": 8, "models": [], "least_rounds": 3}
        shares = [(1 + i * (parts - 1) / max(groups, 1)) / parts for i in range(groups + 1)]
        further = [
            _at_pace_of(results[ranks], _drawn_group(i, job, Path(folder), _between(progress, *shares[i : i + 2])))
            for i in range(groups)
        ]
    progress("fitting laws", 0.97)
    device, errors = _device(results, further, ranks, cores)
    tables = _tables(r for world in sizes for r in results[world][0]["collectives"])
    path = Path(out) if out is not None else local_path()
    data = device_data(device)
    data["loopback"] = _loopback(tables)
    data["collectives"] = tables_data(tables)
    tomlfile.write_toml(path, data)
    progress("done", 1.0)
    return Calibration(device, tables, path, errors, time.monotonic() - began, results[ranks][0]["rounds"])


def _tables(rows: Iterable[dict[str, Any]]) -> tuple[CollectiveTable, ...]:
    return tuple(
        CollectiveTable(r["kind"], r["ranks"], tuple(r["bytes"]), tuple(r["seconds"]), tuple(r["demand"]), r["error"])
        for r in rows
    )


def _between(progress: Progress, low: float, high: float) -> Progress:
    return lambda what, fraction: progress(what, low + (high - low) * fraction)


def _sizes(short: bool) -> list[int]:
    from validation.calibrate_gloo import SIZES

    return list(SIZES[1:5:3] if short else SIZES)


def _kinds(world: int) -> list[str]:
    from validation.calibrate_gloo import KINDS

    return [k for k in KINDS if k != "send" or world == 2]


def run_ranks(
    job: dict[str, Any], folder: Path, progress: Progress, worker: str = "validation.calibrate_worker"
) -> list[Any]:
    """Runs a job on all its ranks, each `python -m WORKER`; whatever happens, no rank outlives this call."""
    path = folder / f"job-{job['ranks']}.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, **RANK_ENV, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = []
    try:
        for rank in range(job["ranks"]):
            with (folder / f"log-{job['ranks']}-{rank}").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", worker, str(path), str(rank)],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE if rank == 0 else log, stderr=log,
                        env=environment, start_new_session=True,
                    )
                )  # fmt: skip
        threading.Thread(target=_listen, args=(processes[0], progress), daemon=True).start()
        _wait(processes, job, folder)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    files = [folder / f"result-{job['ranks']}-{rank}" for rank in range(job["ranks"])]
    return [pickle.loads(f.read_bytes()) for f in files]


def _listen(process: subprocess.Popen[bytes], progress: Progress) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            what, fraction = json.loads(line)
        except ValueError:
            continue
        progress(str(what), float(fraction))


def _wait(processes: list[subprocess.Popen[bytes]], job: dict[str, Any], folder: Path) -> None:
    """Until all ranks have ended well, or one has not."""
    deadline = time.monotonic() + job["timeout"] + max(job["until"] - time.time(), 0.0)
    while any(p.poll() is None for p in processes):
        failed = next((r for r, p in enumerate(processes) if p.poll()), None)
        if failed is None and time.monotonic() < deadline:
            time.sleep(0.05)
            continue
        break
    died = next((r for r, p in enumerate(processes) if p.poll()), None)
    failed = died if died is not None else next((r for r, p in enumerate(processes) if p.poll() != 0), None)
    if failed is not None:
        log = (folder / f"log-{job['ranks']}-{failed}").read_text().strip().splitlines()
        how = (
            "did not finish in time"
            if processes[failed].poll() is None
            else f"died: {log[-1] if log else 'no message'}"
        )
        raise RuntimeError(f"calibration rank {failed} of {job['ranks']} {how}")


# -- from measurements to a device ---------------------------------------------------------------------------


def _drawn_group(number: int, job: dict[str, Any], folder: Path, progress: Progress) -> list[Any]:
    """What the ranks measure of one group of drawn models."""
    own = {"store": str(folder / f"store-drawn-{number}"), "drawn": [number * DRAWN, (number + 1) * DRAWN],
           "small": [number * DRAWN_SMALL, (number + 1) * DRAWN_SMALL]}  # fmt: skip
    return run_ranks({**job, **own, "until": time.time() + DRAWN_SECONDS - STARTING}, folder, progress)


def _at_pace_of(main: list[dict[str, Any]], further: list[dict[str, Any]]) -> list[Sample]:
    """The ops that each rank measured later, at the pace to which those of the first models were brought."""
    from validation.calibrate_record import part_of

    found: list[Sample] = []
    for first, then in zip(main, further):
        ratios = over(Beat(**first["parts"]), Beat(**then["parts"]))._asdict()
        parts = [part_of(s.shape) for s in then["samples"]]
        found += [replace(s, seconds=s.seconds * ratios[part]) for s, part in zip(then["samples"], parts)]
    return found


def _device(
    results: dict[int, list[dict[str, Any]]], further: list[list[Sample]], ranks: int, cores: int
) -> tuple[Device, dict[str, tuple[float, float, int]]]:
    import psutil

    main = results[ranks]
    merged = _merged([s for r in main for s in r["samples"]] + [s for group in further for s in group])
    laws, neighbours, errors = fit_ops(merged)
    whole, brief = _steps(main)
    of_steps = step_errors(merged, whole | brief)
    steps, brief_steps = ({name: e for name, e in of_steps.items() if name in of} for of in (whole, brief))
    host = host_of(main, results, cores)
    rates = [s.flops / t for s, t in merged if family(s.name) in ("gemm", "conv") and s.dtype == "float32"]
    half = [s.flops / t for s, t in merged if family(s.name) == "gemm" and s.dtype == "bfloat16"]
    streams = [touched(s) / t for s, t in merged if family(s.name) == "pointwise" and touched(s) > 2**22]
    peaks = {"float32": float(np.quantile(rates, 0.98))}
    if half:
        peaks["bfloat16"] = float(np.quantile(half, 0.98))
    note = "measured in place inside training steps of calibration models, one thread per rank, all cores busy"
    device = Device(
        name=f"{_processor()} (one core of {cores})",
        kind="cpu",
        peak_flops=peaks,
        memory_bytes=int(psutil.virtual_memory().total),
        memory_bandwidth=float(np.median(streams)) if streams else 1e10,
        units=1,
        floor_seconds=1e-6,
        laws=laws,
        samples=_known(merged),
        neighbours=neighbours,
        host=host,
        anchor_seconds=main[0]["anchor"],
        step_error=_rms(steps.values()),
        brief_error=_rms(brief_steps.values()),
        sources=(f"parplan calibrate on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M')}",),
        notes=(note,),
    )
    for name, found, of in (("whole steps", steps, whole), ("brief steps", brief_steps, brief)):
        if found:
            absolute, weights = np.abs(list(found.values())), [of[step][1] for step in found]
            errors[name] = float(absolute.mean()), float(np.average(absolute, weights=weights)), len(found)
    return device, errors


def _rms(errors: Collection[float]) -> float:
    return float(np.sqrt(np.mean(np.square(list(errors))))) if errors else 0.0


Steps = dict[str, tuple[Sequence[OpShape], float]]


def _steps(main: list[dict[str, Any]]) -> tuple[Steps, Steps]:
    """Every calibration step's ops and what they took together, mean over the ranks; steps below `BRIEF_STEP` apart, as
    their errors are not those of longer ones (both are these where there are no others)."""
    found: dict[str, tuple[Sequence[OpShape], list[float], list[float]]] = {}
    for o in (o for result in main for o in result["overheads"]):
        _, ops, all_of_it = found.setdefault(o.name, (o.shapes, [], []))
        ops.append(sum(seconds for _, seconds, _ in o.parts.values()))
        all_of_it.append(sum(seconds for seconds, _, _ in o.parts.values()))
    steps = {name: (shapes, statistics.fmean(ops)) for name, (shapes, ops, _) in found.items()}
    brief = {name: steps[name] for name, (_, _, whole) in found.items() if statistics.fmean(whole) < BRIEF_STEP}
    return {name: step for name, step in steps.items() if name not in brief} or brief, brief


def _merged(samples: Sequence[Sample]) -> list[tuple[OpShape, float]]:
    """Every distinct op in every context with the mean of the ranks' medians (on two ranks; the median on more)."""
    from validation.calibrate_record import Placed, placed

    times: dict[Placed, list[float]] = {}
    shapes: dict[Placed, OpShape] = {}
    for sample in samples:
        key = placed(sample.shape)
        shapes.setdefault(key, sample.shape)
        times.setdefault(key, []).append(sample.seconds)
    return [(shapes[k], statistics.median(v)) for k, v in times.items()]


def _known(merged: list[tuple[OpShape, float]]) -> dict[Signature, float]:
    """`Device.samples`: the longer ops, each at the median of its contexts."""
    times: dict[Signature, list[float]] = {}
    least: dict[Signature, float] = {}
    for shape, seconds in merged:
        key = signature(shape)
        times.setdefault(key, []).append(seconds)
        least[key] = OUT_OF_CONTEXT if "swept" in FORMS[form_of(shape.name)] else SAMPLE_SECONDS
    usual = {key: statistics.median(found) for key, found in times.items()}
    return {key: seconds for key, seconds in usual.items() if seconds >= least[key]}


def _loopback(tables: tuple[CollectiveTable, ...]) -> dict[str, Any]:
    """The link that the formulas use where there is no table, from the smallest and the largest send."""
    sends = next((t for t in tables if t.kind == "send"), None)
    if sends is None:
        return {"name": "loopback (assumed)", "bandwidth": 1e9, "latency": 5e-5, "source": "assumption"}
    latency = min(sends.seconds[0], 0.5 * sends.seconds[-1])
    bandwidth = sends.bytes[-1] / (sends.seconds[-1] - latency)
    return {"name": "loopback", "bandwidth": bandwidth, "latency": latency, "source": "measured send of two ranks"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"
