"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def assembled(target: Path, marker: str) -> Iterator[Path]:
    """An empty folder beside `target` to fill; it takes the place of `target` at the end, or vanishes on any exception.

    An existing folder is only replaced if it is empty or holds the file `marker`, which says that it is one of ours.
    """
    target = Path(target)
    check_replaceable(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        assert (folder / marker).is_file(), f"the folder was assembled without {marker}"
        folder.chmod(0o755)
        _swap(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_replaceable(target: Path, marker: str) -> None:
    """ValueError where something stands at `target` that we did not write."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise ValueError(f"{target} holds other files (and no {marker}); give a new or an empty folder")
    check_writable(target)


def check_writable(target: Path) -> None:
    """ValueError where nothing can be made at `target`, or in the nearest folder above it that exists: found out by a
    temporary file, so that nobody waits for a result that cannot be kept."""
    folder = Path(target).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, so {target} cannot be made in it; give a path in a folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"nothing can be written into {folder} ({error.strerror}); give another path than {target}") \
            from None


def _swap(folder: Path, target: Path) -> None:
    """Puts `folder` where `target` is or was; the old one comes back if that fails."""
    if not target.exists():
        os.replace(folder, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    os.replace(target, old)
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to, with the same suffix; it becomes `target` at the end."""
    target = Path(target)
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} into; make it first")
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp lets only the owner read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """`value` as strict JSON allows it: nan and infinities become null, tuples lists, keys strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
