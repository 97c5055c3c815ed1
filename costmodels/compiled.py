"""Compilation of the laws' inner loops, so that one op is priced in microseconds as it is among thousands.

What is compiled takes and gives numbers and arrays only, and calls only functions of its own file: numba's cache
notices changes of that file alone. Where numba is missing, the same functions run as plain Python, some hundred times
as slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function, fastmath: bool | set[str] = False) -> Function:
    """The function compiled by numba, kept on disk where that can be written; itself where there is no numba.
    `fastmath`: which liberties LLVM may take with floats (none; see numba's `njit`)."""
    try:
        from numba import njit
    except ImportError:
        return function
    found: object
    try:
        found = njit(cache=True, error_model="numpy", fastmath=fastmath)(function)
    except RuntimeError:  # no place to keep it
        found = njit(error_model="numpy", fastmath=fastmath)(function)
    return cast(Function, found)
