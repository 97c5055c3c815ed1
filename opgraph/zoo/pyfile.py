"""Functions of users' Python files, and where in the file it went wrong."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any


def check_path(path: Path, name: str) -> None:
    """ValueError where there is no such file, or no name of a function."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give file.py:factory")
    if not name:
        raise ValueError(f"{path} is a file without the name of a function in it: give {path}:factory")


def load_function(path: Path, name: str) -> Callable[[], Any]:
    """The function `name` of the Python file `path`, which may import its neighbours."""
    check_path(path, name)
    module_name = f"_parplan_{path.stem}_{abs(hash(path.resolve()))}"
    description = importlib.util.spec_from_file_location(module_name, path)
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[module_name] = module
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    try:
        description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"{_place(error, path)} while {path} was imported: mend the file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}: it has {', '.join(_functions(module)) or 'none'}")
    return function


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps a factory that was called before from saying it all again: libraries log pages when a model is made."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def call(factory: Callable[[], Any], path: Path) -> Any:
    try:
        return factory()
    except Exception as error:
        raise ValueError(f"{_place(error, path)} in the factory: it must work without arguments") from error


def _place(error: Exception, path: Path) -> str:
    """Where in `path` an error came from, and what it says."""
    said = " ".join(str(error).split()) or "no message"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {said}"


def _functions(module: ModuleType) -> list[str]:
    return [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and callable(v)]
