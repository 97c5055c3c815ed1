"""Workloads by name: the model zoo, Hugging Face configurations, and Python files. Importing this needs no torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from opgraph.workload import Workload
from opgraph.zoo.huggingface import read_config
from opgraph.zoo.names import ZOO
from opgraph.zoo.overrides import parse_overrides, with_overrides
from opgraph.zoo.pyfile import check_path
from opgraph.zoo.sizes import Sizes


def zoo_names() -> list[str]:
    """The names of the models that Parplan builds itself."""
    return list(ZOO)


def load_workload(spec: str) -> Workload:
    """The workload that `spec` names.

    `gpt2`, `gpt2:layers=4,hidden=256` (a zoo name with overrides), `path/config.json` or its directory (Hugging
    Face's, of the model types in `opgraph.zoo.huggingface.READERS`; same overrides), `file.py:factory` (see
    `opgraph.zoo.factory`; `file.py:factory:batch=8`).
    """
    sizes = check_spec(spec)
    if sizes is not None:
        return import_module(f"opgraph.zoo.{sizes.family}").workload(spec, sizes)
    from opgraph.zoo.factory import factory_workload

    head, _, rest = spec.strip().partition(":")
    name, _, overrides = rest.partition(":")
    return factory_workload(Path(head), name, parse_overrides(overrides, spec))


def check_spec(spec: str) -> Sizes | None:
    """The sizes that `spec` names, None where a Python file makes them. ValueError for what is no name, no path and no
    dimension; imports no torch, so that a slip shows at once."""
    head, _, rest = spec.strip().partition(":")
    if not head:
        raise ValueError(f"{spec!r} names no model: give a zoo name, a config.json or file.py:factory")
    if head in ZOO:
        return with_overrides(ZOO[head], parse_overrides(rest, spec), head)
    if head.endswith(".py"):
        check_path(Path(head), rest.partition(":")[0])
        return None
    path = Path(head)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{head} is a directory without a config.json: give a zoo name, a config.json or file.py:name")
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return with_overrides(read_config(path), parse_overrides(rest, spec), head)
    if "/" in head:
        raise ValueError(f"there is no file {head}: give a zoo name, a config.json or file.py:factory")
    close = get_close_matches(head, ZOO, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(ZOO)}"
    raise ValueError(f"there is no model {head!r} in the zoo: {hint}")


def with_length(spec: str, tokens: int) -> Workload:
    """The workload that `spec` names, of sequences of `tokens` tokens; ValueError as of `at_length`."""
    return load_workload(at_length(spec, tokens))


def at_length(spec: str, tokens: int) -> str:
    """`spec` with this length of its sequences. ValueError for what has none to set: models of other data, and Python
    files, whose factories choose it themselves."""
    head, _, rest = spec.strip().partition(":")
    if head.endswith(".py"):
        raise ValueError(
            f"{head} makes its own inputs, whose prompt cannot be set; give a zoo name or a config.json, or predict "
            "its step with parplan simulate"
        )
    if head in ZOO and not hasattr(ZOO[head], "seq"):
        raise ValueError(f"{head} takes no sequence of tokens, so it has no prompt; give a language model such as gpt2")
    others = [part for part in rest.split(",") if part.partition("=")[0].strip() not in ("", "seq")]
    return f"{head}:{','.join([*others, f'seq={tokens}'])}"
