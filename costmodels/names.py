"""Which device of the catalogue a published table, a driver or a person means."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from costmodels import tomlfile as toml
from costmodels.device import CATALOGUE, Device, load_device, unknown_device

# Words that say who makes or sells it: "NVIDIA Tesla T4", "Tesla T4" and "T4" are one device. "Quadro" stays, because
# a Quadro RTX 6000 is no RTX 6000 Ada.
_MAKERS = re.compile(r"\b(nvidia|amd|intel|google|aws|amazon|apple|huawei|tesla|geforce|instinct|habana|cloud)\b")


def device_named(text: str) -> Device:
    """The device that a name stands for: of the catalogue ("h100-sxm"), as data sheets, published tables and
    `torch.cuda.get_device_name` write it, whatever its case, spaces, dashes and maker.

    >>> device_named("NVIDIA A100-SXM4-80GB").name
    'A100 SXM4 80GB'
    >>> device_named("Tesla K80 (one of the 2 GPUs of a board)").units
    13
    """
    return load_device(catalogue_name(text))


def catalogue_name(text: str) -> str:
    """The name of the device's file in the catalogue ("t4"), or a ValueError that names the nearest ones.

    >>> catalogue_name("nvidia tesla T4")
    't4'
    """
    known = names()
    name = known.get(plain(text))
    if name is None:
        near = [known[match] for match in get_close_matches(plain(text), known, n=4, cutoff=0.5)]
        raise unknown_device(text, dict.fromkeys(near))
    return name


def plain(text: str) -> str:
    """A name without its maker, case, spaces and signs.

    >>> plain("NVIDIA GeForce RTX 4090")
    'rtx4090'
    """
    words = re.sub(r"[^a-z0-9]+", " ", text.lower())
    return (_MAKERS.sub("", words).strip() or words).replace(" ", "")


@lru_cache(maxsize=1)
def names() -> dict[str, str]:
    """Every plain name of every device of the catalogue -> name of its file; no two devices share one."""
    found: dict[str, str] = {}
    for path in sorted((CATALOGUE / "devices").glob("*.toml")):
        for name in {plain(n) for n in (path.stem, *_names_in(path))}:
            if found.setdefault(name, path.stem) != path.stem:
                raise ValueError(f"{path}: the name '{name}' is taken by {found[name]}.toml; give it to one of them")
    return found


def _names_in(path: Path) -> tuple[str, ...]:
    data = toml.read_toml(path)
    return toml.text(data, "name", str(path)), *toml.strings(data, "aliases", str(path))
