"""The caching allocator: sequences worked out by hand from its rules, and what must hold for any sequence."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from costmodels.allocator import MIB, Block, CachingAllocator, OutOfMemoryError, replay

KIB = 1024


def test_requests_are_rounded_to_512_bytes_in_segments_of_2_mib() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(1)
    assert (first.size, allocator.allocated, allocator.reserved) == (512, 512, 2 * MIB)
    second = allocator.malloc(513)
    assert second.address == first.address + 512 and second.size == 1024
    third = allocator.malloc(MIB)  # 1 MiB is still small and fits behind them
    assert third.address == first.address + 1536 and allocator.reserved == 2 * MIB
    allocator.malloc(MIB)  # 2 MiB - 1536 - 1 MiB are too few
    assert allocator.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("size", "segment"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB),
     (10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB)],
)  # fmt: skip
def test_segments(size: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(size)
    assert allocator.reserved == segment


def test_a_large_block_is_split_only_for_more_than_1_mib() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(30 * MIB)
    allocator.free(block)
    block = allocator.malloc(29 * MIB)  # 1 MiB would remain: not split, counts whole
    assert (block.size, allocator.allocated, allocator.reserved) == (30 * MIB, 30 * MIB, 30 * MIB)
    allocator.free(block)
    block = allocator.malloc(29 * MIB - 512)
    assert (block.size, allocator.allocated) == (29 * MIB - 512, 29 * MIB - 512)


def test_the_smallest_fitting_block_is_taken_and_neighbours_are_merged() -> None:
    allocator = CachingAllocator()
    a, b, c, d = (allocator.malloc(4 * MIB) for _ in range(4))  # one segment of 20 MiB: 4 MiB are left
    allocator.free(a)
    allocator.free(c)
    allocator.free(d)  # c, d and the rest become 12 MiB; a stays 4 MiB
    e = allocator.malloc(3 * MIB - 512)
    assert e.address == a.address and e.size == 3 * MIB - 512
    f = allocator.malloc(12 * MIB)
    assert f.address == c.address and allocator.reserved == 20 * MIB
    for block in (b, e, f):
        allocator.free(block)
    assert [len(p.free) for p in allocator.pools.values()] == [0, 1]
    assert allocator.pools[False].free == [(20 * MIB, a.address)]


def test_fragments_raise_the_reserved_bytes() -> None:
    """Alternating blocks that are freed leave holes which a larger request cannot use."""
    blocks, sizes = [], []
    for i in range(8):
        blocks.append(i)
        sizes.append(10 * MIB)
    for i in range(0, 8, 2):
        blocks.append(i)
        sizes.append(-10 * MIB)
    blocks.append(99)
    sizes.append(12 * MIB)
    found = replay(blocks, sizes)
    assert found.peak_reserved == 92 * MIB and found.requested[-1] == 52 * MIB
    assert replay(blocks, sizes, CachingAllocator(expandable=True)).peak_reserved == 100 * MIB  # 80 and one more page


def test_expandable_segments_grow_by_pages_and_fill_holes_of_any_size() -> None:
    allocator = CachingAllocator(expandable=True)
    a = allocator.malloc(15 * MIB)
    b = allocator.malloc(15 * MIB)  # behind it: 5 MiB are there, one page of 20 MiB is added
    assert b.address == a.address + 15 * MIB and allocator.reserved == 40 * MIB
    allocator.free(a)
    allocator.free(b)
    c = allocator.malloc(50 * MIB)  # the freed 40 MiB and one page more
    assert c.address == a.address and allocator.reserved == 60 * MIB
    plain = CachingAllocator()
    for size in (15 * MIB, 15 * MIB):
        plain.free(plain.malloc(size))
    plain.malloc(50 * MIB)
    assert plain.reserved == 66 * MIB
    allocator.free(c)
    allocator.release_cached()
    assert allocator.reserved == 0
    assert allocator.malloc(MIB + 1).address == a.address and allocator.reserved == 20 * MIB


def test_a_full_device_gives_cached_segments_back_and_asks_again() -> None:
    allocator = CachingAllocator(capacity=40 * MIB)
    first = allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.malloc(38 * MIB)
    assert allocator.retries == 1 and allocator.reserved == 38 * MIB
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(4 * MIB)
    found = replay([0, 1], [30 * MIB, 20 * MIB], CachingAllocator(capacity=40 * MIB))
    assert found.failed == 1 and len(found.reserved) == 1 and found.retries == 1


def test_no_block_over_max_split_is_split() -> None:
    allocator = CachingAllocator(max_split=64 * MIB)
    allocator.free(allocator.malloc(100 * MIB))
    assert allocator.malloc(30 * MIB).size == 30 * MIB and allocator.reserved == 130 * MIB
    assert allocator.malloc(90 * MIB).size == 100 * MIB  # a large request may take a block up to 20 MiB larger
    assert allocator.reserved == 130 * MIB


def events(seed: int, count: int, largest: float) -> tuple[list[int], list[int], dict[int, int]]:
    draw = random.Random(seed)
    blocks, sizes, live = [], [], dict[int, int]()
    for i in range(count):
        if live and draw.random() < 0.49:
            key = draw.choice(list(live)) if len(live) < 200 else next(iter(live))
            blocks.append(key)
            sizes.append(-live.pop(key))
        else:
            live[i] = int(10 ** draw.uniform(0, largest))
            blocks.append(i)
            sizes.append(live[i])
    return blocks, sizes, live


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence(seed: int, expandable: bool) -> None:
    blocks, sizes, _ = events(seed, 1500, 8)
    allocator = CachingAllocator(expandable=expandable, capacity=0)
    held: dict[int, Block] = {}
    for key, size in zip(blocks, sizes):
        if size > 0:
            held[key] = allocator.malloc(size)
        else:
            allocator.free(held.pop(key))
        assert allocator.allocated == sum(b.size for b in held.values()) <= allocator.reserved
    spans = sorted((b.address, b.address + b.size) for b in held.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "blocks overlap"
    for first, size in allocator.segments.values():
        block, total = first, 0
        while block is not None:
            total += block.size
            assert block.after is None or block.after.address == block.address + block.size
            block = block.after  # type: ignore[assignment]
        assert total == size
    assert replay(blocks, sizes, CachingAllocator(expandable=expandable)).reserved[-1] == allocator.reserved
    for block in held.values():
        allocator.free(block)
    for first, _ in allocator.segments.values():
        assert not first.requested and first.mapped
        assert first.after is None or (expandable and not first.after.mapped and first.after.after is None)
    allocator.release_cached()
    assert allocator.reserved == 0 == allocator.allocated


@pytest.mark.parametrize("seed", range(4))
def test_expandable_segments_waste_less_than_a_page_where_everything_fits_in_order(seed: int) -> None:
    """What is never freed lies without gaps."""
    draw = random.Random(seed)
    sizes = [int(10 ** draw.uniform(6.1, 8)) for _ in range(100)]
    found = replay(range(100), sizes, CachingAllocator(expandable=True))
    assert found.reserved[-1] - found.allocated[-1] < 20 * MIB
    assert found.allocated[-1] - found.requested[-1] < 100 * 512
