"""The GPU suite's sweeps: seconds of every op, of the host by kind of launch, and of copies to and from it.

Rows go to ops.json; an op that a device or a torch does not have is a row with the reason.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from validation.gpu_environment import clocks
from validation.gpu_files import Budget, Row, Rows, sentence, write_json
from validation.gpu_ops import algorithm_of, build, kernel_names, out_of_memory, precision
from validation.gpu_shapes import Case, cases, held_back
from validation.gpu_time import CpuEngine, CudaEngine, Engine, sample

NEEDED = 20.0  # seconds that must be left for another case: the slowest take about 2
HOST_OPS = 200  # of a chain whose launches are timed: 400 launches at most wait in the stream, which holds 1,000
COPIES = tuple(2**i for i in range(12, 31, 2))  # bytes


def engine_for(device: str) -> Engine:
    import torch

    return CudaEngine(torch.cuda) if device == "cuda" else CpuEngine()


def sweep(
    out: Path, device: str, budget: Budget, quick: bool, say: Callable[[str], None], chosen: Sequence[Case] = ()
) -> int:
    """Measures what is not in ops.json yet; returns how many cases are left."""
    import torch

    cache = cache_bytes(device)
    engine, rows = engine_for(device), Rows(out / "ops.json", every=25)
    waiting = [c for c in (chosen or cases(quick)) if c.key not in rows.rows]
    seconds, batches = (0.0002, 3) if quick else (0.004, 5)
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for i, case in enumerate(waiting):
            if budget.left < (1.0 if quick else NEEDED):
                return len(waiting) - i
            if i % 200 == 0:
                say(f"{len(waiting) - i} ops to measure; {budget.left:.0f} s left; {clocks()}")
            rows.add(measured_row(case, device, cache, engine, seconds, batches))
            if device == "cuda" and (i % 100 == 0 or "reason" in rows.rows[case.key]):
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        rows.save()
    return 0


def measured_row(case: Case, device: str, cache: int, engine: Engine, seconds: float, batches: int) -> Row:
    """One case: its sample and shape, or the reason why there is none."""
    row: Row = {"key": case.key, **asdict(case), "held_back": held_back(case)}
    try:
        with precision(case.dtype, device):
            built = build(case, device, cache)
            found = sample(engine, built.call, seconds, batches)
            row |= asdict(found) | {"copies": built.copies, "shape": asdict(built.shape)}
            if case.group == "conv" and case.dtype == "float32" and not case.dims[7]:
                row["algorithm"] = algorithm_of(kernel_names(built.call, device))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if device_lost(error):
            raise
        row["reason"] = "out of memory" if out_of_memory(error) else sentence(error)
    return row


def device_lost(error: BaseException) -> bool:
    """Errors after which no kernel of this process runs any more."""
    said = str(error).lower()
    return any(words in said for words in ("illegal memory access", "device-side assert", "launch failure", "ecc"))


def cache_bytes(device: str) -> int:
    """Bytes of the last cache; of a CPU 1 MiB, a core's own: the others are shared with who knows whom."""
    import torch

    return int(torch.cuda.get_device_properties(0).L2_cache_size) if device == "cuda" else 2**20


def measure_host(out: Path, device: str) -> dict[str, float]:
    """Seconds that Python, autograd and the dispatcher take by kind of launch, medians of five; to host.json."""
    found = host_seconds(device)
    write_json(out / "host.json", found)
    return found


def host_seconds(device: str, repeats: int = 5) -> dict[str, float]:
    """op: an op under autograd that launches a kernel; backward: its backward; view: an op that launches none; module:
    a call of an nn.Module. On a CPU the ops' own work (one element) is inside."""
    import torch
    from torch import nn

    x = torch.ones(1, device=device, requires_grad=True)
    same, count = nn.Identity(), HOST_OPS

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(run: Callable[[], Any]) -> float:
        wait()
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) / count

    def chain() -> Any:
        y: Any = x
        for _ in range(count):
            y = y + 1.0
        return y

    def views() -> Any:
        y: Any = x
        for _ in range(count):
            y = y.view(1)

    def modules() -> Any:
        for _ in range(count):
            same(x)

    def once() -> dict[str, float]:
        held: list[Any] = []
        forward = timed(lambda: held.append(chain()))
        backward = timed(lambda: held[0].backward())
        return {"op": forward, "backward": backward, "view": timed(views), "module": timed(modules)}

    once()
    rounds = [once() for _ in range(repeats)]
    return {kind: statistics.median(r[kind] for r in rounds) for kind in rounds[0]}


def measure_copies(out: Path, device: str, quick: bool) -> list[Row]:
    """Seconds of copies between pinned host memory and the device, in both directions, by size; to copies.json.

    On a CPU: of copies inside its memory, which say nothing of a link and serve to run this code.
    """
    import torch

    rows: list[Row] = []
    engine = engine_for(device)
    for size in COPIES[:4] if quick else COPIES:
        host, there = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=device)
        host = host.pin_memory() if device == "cuda" else host
        for direction, target, source in (("to_device", there, host), ("to_host", host, there)):
            one = sample(engine, lambda i, t=target, s=source: t.copy_(s, non_blocking=True), 0.002)  # type: ignore[misc]
            rows.append({"bytes": size, "direction": direction, **asdict(one)})
    write_json(out / "copies.json", {"rows": rows})
    return rows


def copy_bandwidth(rows: Sequence[Row]) -> float:
    """bytes/s of the largest copies, the slower direction."""
    largest = max(row["bytes"] for row in rows)
    return float(min(row["bytes"] / row["seconds"] for row in rows if row["bytes"] == largest))
