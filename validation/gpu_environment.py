"""What a GPU run ran on: the card as torch and nvidia-smi see it, the software, the commit, the clocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from validation.gpu_files import read_json, utc

NEEDED = ("torch", "numpy", "scipy", "pandas", "networkx", "numba", "psutil")
FIELDS = (
    "name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "temperature.gpu", "persistence_mode", "compute_mode", "ecc.mode.current", "mig.mode.current",
)  # fmt: skip


def check_modules() -> None:
    """ValueError that names the Python packages that the suite needs and this Python lacks."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"{sys.executable} has no {', '.join(missing)}; install what is missing and start again")


def check_device(device: str) -> None:
    """ValueError where the device is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; run this on a machine with one, or add --device cpu --quick")


def check_same(path: Path, device: str) -> None:
    """ValueError where the folder's run was begun on another device: one folder holds one machine's measurements."""
    import torch

    if not path.is_file():
        return
    about = read_json(path)
    name = torch.cuda.get_device_properties(0).name if device == "cuda" else _processor()
    if (about["device"], about["name"]) != (device, name):
        raise ValueError(f"{path.parent} holds a run on {about['name']}, but this is {name}; give another folder")


def environment(device: str, command: str) -> dict[str, Any]:
    """All that describes the machine and the software."""
    import torch

    cuda: Any = torch.backends.cuda
    found: dict[str, Any] = {
        "device": device, "at": utc(), "command": command, "commit": commit(), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": _cudnn(device), "system": platform.platform(),
        "cores": os.cpu_count(), "host_processor": _processor(), "name": _processor(), "nvidia_smi": smi(FIELDS),
    }  # fmt: skip
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name, "memory_bytes": p.total_memory, "units": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size, "capability": f"{p.major}.{p.minor}",
            "attention": {
                "flash": cuda.flash_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled(),
                "efficient": cuda.mem_efficient_sdp_enabled(),
            },
        }  # fmt: skip
    return found


def smi(fields: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of the first card, by field; empty where there is no nvidia-smi. It is only asked: no
    setting is ever changed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [part.strip() for part in done.stdout.strip().split(",")]
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def clocks() -> str:
    """Clock, power and temperature now, in words."""
    found = smi(("clocks.sm", "power.draw", "temperature.gpu"))
    return ", ".join(found.values()) if found else "clocks unknown"


def commit() -> str:
    """The commit that runs, with a plus where files differ from it; "unknown" outside a repository."""
    where = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if head else "unknown"
    except OSError:
        return "unknown"


def _cudnn(device: str) -> int | None:
    import torch

    cudnn: Any = torch.backends.cudnn
    return cudnn.version() if device == "cuda" else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
