"""How a tensor lies in memory, read from its shape and strides as torch reads them."""

from __future__ import annotations

Shape = tuple[int, ...]
PAGE = 4096


def up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


def contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether the last dim is dense and every dim lies right outside the next; dims of one entry do not count.

    >>> contiguous((4, 1, 3), (3, 99, 1))
    True
    """
    running = 1
    for n, s in zip(reversed(shape), reversed(strides)):
        if n != 1 and s != running:
            return False
        running *= n
    return True


def channels_last(shape: Shape, strides: Shape) -> bool:
    """Whether torch takes images or volumes to have their channels last (c10/core/MemoryFormat.h
    `is_channels_last_strides`): strides grow over channels, then pixels, then images.

    >>> channels_last((8, 3, 4, 4), (48, 1, 12, 3)), channels_last((8, 3, 4, 4), (48, 16, 4, 1))
    (True, False)
    """
    if len(shape) not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(1, shape[dim])
    return True


def as_channels_last(shape: Shape) -> Shape:
    """The dims in the order in which a tensor with channels last stores them."""
    return (shape[0], *shape[2:], shape[1])
