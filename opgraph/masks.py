"""Attention masks of Hugging Face's transformers under fake tensors, as the model makes them when it runs.

Its decoders look at the positions that they counted themselves: only where these restart (several sequences packed into
a row) is a mask made, and keys repeated to the heads of the queries. Of fake tensors it cannot look at values, takes
the other way, and the step is another one than what runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FINDER = "find_packed_sequence_indices"


@contextmanager
def masks_as_run() -> Iterator[None]:
    """While the context lasts, positions that are one row for the whole batch count up: nothing is packed. Positions
    that the batch brings along, a row for each sample, keep their masks."""
    library = sys.modules.get("transformers.masking_utils")
    find: Any = getattr(library, FINDER, None)
    if find is None:
        yield
        return

    def found(position_ids: Any, *rest: Any, **more: Any) -> Any:
        mask = find(position_ids, *rest, **more)
        return None if position_ids.stride(0) == 0 else mask

    setattr(library, FINDER, found)
    try:
        yield
    finally:
        setattr(library, FINDER, find)
