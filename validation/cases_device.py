"""The device of a row whose cell names no published one: a device file, or this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from costmodels.cluster import Cluster, local_cluster


def device_file(text: str, folder: Path) -> Path | None:
    """The device file that a cell names, beside the cases (`folder`) or where the command runs; None for other names.
    ValueError where there is no such file."""
    if not text.lower().endswith(".toml"):
        return None
    path = Path(text).expanduser()
    for found in (folder / path, path):
        if found.is_file():
            return found
    raise ValueError(f"gpu {text!r} is no file, neither in {folder} nor in the current folder; give the path of one")


def this_machine(devices: int) -> Cluster:
    """The cores of this machine as devices, calibrated where it was. ValueError where it has fewer."""
    found = local_cluster()
    if devices > found.size:
        raise ValueError(f"gpu is 'local', but this machine has {found.size} cores and num_gpus is {devices}")
    note = "cores of this machine are predicted as devices of their own: what they share is not; see parplan simulate"
    return replace(found, notes=(*found.notes, note))
