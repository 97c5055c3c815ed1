"""torch's CUDA caching allocator, simulated: reserved memory from a sequence of allocations and frees.

Rules and constants: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, torch 2.9 to 2.13 (the same since
1.0 but for expandable segments, 2.1). One stream: a freed block can be used again at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MIB = 2**20
ROUND = 512  # kMinBlockSize: every request is rounded up to a multiple
SMALL = MIB  # kSmallSize: requests up to this come from the pool of small blocks
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size: for requests below LARGE
LARGE = 10 * MIB  # kMinLargeAlloc: from here on a segment of its own, rounded up to ROUND_LARGE
ROUND_LARGE = 2 * MIB  # kRoundLarge
# Bytes that cuBLAS gets for its handle on a stream, once: aten/src/ATen/cuda/CublasHandlePool.cpp (":4096:2:16:8";
# 32 MiB from Hopper on).
CUBLAS_WORKSPACE = 2 * 4 * MIB + 8 * 16 * 1024
CUBLAS_WORKSPACE_HOPPER = 32 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment: `size` bytes at `address`. `requested`: what was asked for; 0 while it is free.

    Blocks of one segment are linked in the order of addresses. An expandable segment ends in blocks without memory
    behind them (`mapped` is False).
    """

    address: int
    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    requested: int = 0
    mapped: bool = True


@dataclass(slots=True)
class _Pool:
    """Free blocks by (size, address); of an expandable segment also those without memory, by address."""

    small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)  # address -> free block
    unmapped: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]
        del self.blocks[block.address]


class OutOfMemoryError(Exception):
    """The device has no room for a request, even without cached blocks."""


class CachingAllocator:
    """One device's allocator.

    capacity: bytes that the device gives at most (0: no end). expandable: `expandable_segments:True`.
    max_split: blocks from this size on are never split (`max_split_size_mb`; 0: no such limit).
    allocated, reserved: bytes now, as `torch.cuda.memory_allocated` and `memory_reserved` count them (a block that is
    not split counts whole). retries: how often all cached segments were given back because the device was full.
    """

    def __init__(self, capacity: int = 0, expandable: bool = False, max_split: int = 0) -> None:
        self.capacity, self.expandable, self.max_split = capacity, expandable, max_split
        self.allocated = self.reserved = self.retries = 0
        self.pools = {True: _Pool(True), False: _Pool(False)}
        self.segments: dict[int, tuple[Block, int]] = {}  # address -> its first block, its size
        self._next_address = 2 * MIB

    def malloc(self, size: int) -> Block:
        """The block that serves a request of `size` bytes. OutOfMemoryError where the capacity does not allow it."""
        rounded = max(ROUND, -(-size // ROUND) * ROUND)
        pool = self.pools[rounded <= SMALL]
        block = self._fitting(pool, rounded) or self._new(pool, rounded)
        if block is None:
            self.retries += 1
            self.release_cached()
            block = self._new(pool, rounded)
        if block is None:
            raise OutOfMemoryError(f"{size} bytes asked for, {self.reserved} of {self.capacity} reserved")
        if self._splits(block, rounded):
            rest = Block(block.address + rounded, block.size - rounded, pool.small, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, rounded
            pool.add(rest)
        block.requested = max(size, 1)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Gives a block back; it is merged with free neighbours and kept."""
        assert block.requested, "the block was free already"
        pool = self.pools[block.small]
        self.allocated -= block.size
        block.requested = 0
        for other in (block.before, block.after):
            if other is not None and not other.requested and other.mapped:
                pool.remove(other)
                block = _merged(block, other)
                self._renamed(block)
        pool.add(block)

    def release_cached(self) -> None:
        """Gives segments without any used block back to the device, as `torch.cuda.empty_cache` does."""
        for pool in self.pools.values():
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size
                    del self.segments[block.address]

    # -- finding a block ------------------------------------------------------------------------------------
    def _fitting(self, pool: _Pool, size: int) -> Block | None:
        """The smallest free block that is large enough, the lowest address among equals."""
        at = bisect_left(pool.free, (size, 0))
        if at == len(pool.free):
            return None
        block = pool.blocks[pool.free[at][1]]
        if self.expandable:  # what counts as its size is what the segment can grow to there
            while at + 1 < len(pool.free):
                other = pool.blocks[pool.free[at + 1][1]]
                if _room(other) >= _room(block):
                    break
                block, at = other, at + 1
        elif self.max_split and (
            (size < self.max_split <= block.size) or (size >= self.max_split and block.size >= size + LARGE_SEGMENT)
        ):
            return None
        pool.remove(block)
        return block

    def _splits(self, block: Block, size: int) -> bool:
        if block.small or self.expandable:
            return block.size - size >= ROUND
        return block.size - size > SMALL and not (self.max_split and size >= self.max_split)

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """A block in memory that the device gives now; None where it has no more."""
        if self.expandable:
            return self._grown(pool, size)
        if size <= SMALL:
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity and self.reserved + segment > self.capacity:
            return None
        block = Block(self._next_address, segment, pool.small)
        self._next_address += segment
        self.segments[block.address] = (block, segment)
        self.reserved += segment
        return block

    def _renamed(self, block: Block) -> None:
        """A segment's first block may be another object after merging."""
        if block.before is None:
            self.segments[block.address] = (block, self.segments[block.address][1])

    # -- expandable segments --------------------------------------------------------------------------------
    def _grown(self, pool: _Pool, size: int) -> Block | None:
        """Memory is mapped behind the lowest free addresses that are long enough, page by page."""
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        if not pool.unmapped:
            space = 2**46  # of addresses, more than any device has memory
            start = LARGE_SEGMENT * 2**22 * (1 if pool.small else 2)  # a whole number of pages
            tail = Block(start, space, pool.small, mapped=False)
            self.segments[tail.address] = (tail, space)
            pool.unmapped.append(tail)
        block = self._candidate(pool, size)
        while not block.mapped or block.size < size:
            empty = block if not block.mapped else block.after
            assert empty is not None and not empty.mapped
            wanted = min(size - (block.size if block.mapped else 0), empty.size)
            mapped = min(-(-wanted // page) * page, empty.size)
            if self.capacity and self.reserved + mapped > self.capacity:
                return None
            block = self._map(pool, empty, mapped)
        pool.remove(block)
        return block

    @staticmethod
    def _candidate(pool: _Pool, size: int) -> Block:
        for empty in pool.unmapped:
            first = empty.before if empty.before is not None and not empty.before.requested else empty
            room, block = 0, first
            while block is not None and not block.requested and room < size:
                room, block = room + block.size, block.after  # type: ignore[assignment]
            if room >= size:
                return first
        raise AssertionError("the last unmapped block has room for everything")

    def _map(self, pool: _Pool, empty: Block, size: int) -> Block:
        """Puts memory behind the first `size` bytes of an unmapped block and frees it into the pool."""
        at = pool.unmapped.index(empty)
        if size < empty.size:
            rest = Block(empty.address + size, empty.size - size, pool.small, empty, empty.after, mapped=False)
            if empty.after is not None:
                empty.after.before = rest
            empty.after, empty.size = rest, size
            pool.unmapped[at] = rest
        else:
            del pool.unmapped[at]
        empty.mapped = True
        self.reserved += size
        block = empty
        for other in (empty.before, empty.after):
            if other is not None and not other.requested and other.mapped:
                pool.remove(other)
                block = _merged(block, other)
                self._renamed(block)
        pool.add(block)
        return block

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Takes the memory away from behind the whole pages of a free block."""
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        first, last = -(-block.address // page) * page, (block.address + block.size) // page * page
        if last <= first:
            return
        pool.remove(block)
        pieces = [(block.address, first, True), (first, last, False), (last, block.address + block.size, True)]
        made = [Block(a, b - a, pool.small, mapped=m) for a, b, m in pieces if b > a]
        before, after = block.before, block.after
        for piece in made:
            piece.before = before
            if before is not None:
                before.after = piece
            before = piece
            if piece.mapped:
                pool.add(piece)
        made[-1].after = after
        if after is not None:
            after.before = made[-1]
        self._renamed(made[0])
        self.reserved -= last - first
        hole = next(p for p in made if not p.mapped)
        for other in (hole.before, hole.after):
            if other is not None and not other.mapped:
                pool.unmapped.remove(other)
                hole = _merged(hole, other)
                self._renamed(hole)
        insort(pool.unmapped, hole, key=lambda b: b.address)


def _room(block: Block) -> int:
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _merged(block: Block, other: Block) -> Block:
    """One block of two neighbours."""
    low, high = (other, block) if other.address < block.address else (block, other)
    low.size += high.size
    low.after = high.after
    if high.after is not None:
        high.after.before = low
    return low


@dataclass(frozen=True, slots=True)
class AllocatorReplay:
    """What a sequence of events does to the allocator, bytes after every event.

    requested: sum of what tensors asked for; allocated: of their blocks; reserved: of the segments. blocks: address of
    the block of every event (-1: an empty tensor). failed: index of the event that ran out of memory, or -1; then the
    arrays end there.
    """

    requested: NDArray[np.int64]
    allocated: NDArray[np.int64]
    reserved: NDArray[np.int64]
    addresses: NDArray[np.int64]
    retries: int
    failed: int

    @property
    def peak_reserved(self) -> int:
        return int(self.reserved.max(initial=0))

    @property
    def peak_allocated(self) -> int:
        return int(self.allocated.max(initial=0))


def replay(blocks: Sequence[int], sizes: Sequence[int], allocator: CachingAllocator | None = None) -> AllocatorReplay:
    """Runs events through an allocator: event i allocates block `blocks[i]` of `sizes[i]` bytes if that is positive,
    and frees it if it is negative. Tensors of 0 bytes get no block."""
    allocator = allocator or CachingAllocator()
    held: dict[int, Block] = {}
    requested, failed = 0, -1
    rows: list[tuple[int, int, int, int]] = []
    for i, (key, size) in enumerate(zip(blocks, sizes)):
        address = -1
        if size > 0:
            assert key not in held, "a block is allocated twice"
            try:
                held[key] = block = allocator.malloc(size)
            except OutOfMemoryError:
                failed = i
                break
            address = block.address
        elif size < 0:
            block = held.pop(key)
            address = block.address
            allocator.free(block)
        requested += size
        rows.append((requested, allocator.allocated, allocator.reserved, address))
    table = np.array(rows, np.int64).reshape(-1, 4)
    asked, allocated, reserved, addresses = (table[:, c].copy() for c in range(4))
    return AllocatorReplay(asked, allocated, reserved, addresses, allocator.retries, failed)
