"""The router's KV block allocator: one pool of block ids a window class, and the rings that sequences hold.

Stages never allocate: a block id means the same place at every stage, and order protects its bytes. A block that is
given back may be taken again at once, since every stage works through the microbatches in the order they were made.

    class of ring 3, block 4: a sequence of 9 tokens holds 3 blocks, and one of 100 tokens too; it grows no more
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from tramontane.stages.kv_layout import KVLayout, blocks_held

UNBOUNDED = sys.maxsize
"""How far full rings reach: they roll over in place."""


@dataclass(eq=False, slots=True)
class Rings:
    """What one sequence holds: `blocks[c]` are its block ids of class c, in the order of their ring places."""

    blocks: tuple[array[int], ...]
    room: int = 0
    """Positions that the rings have room for; UNBOUNDED once all of them are full."""


@dataclass(eq=False, slots=True)
class _Pool:
    """The blocks of one class: each is free or held. `fresh` were taken since the last microbatch left."""

    total: int
    free: list[int] = field(init=False)
    held: set[int] = field(default_factory=set)
    fresh: dict[int, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.total - 1, -1, -1))

    def take(self, count: int) -> list[int]:
        """The blocks given back last come first: what was touched lately is warm, and the rest may never be."""
        taken = self.free[-count:][::-1]
        del self.free[-count:]
        self.held.update(taken)
        self.fresh.update(dict.fromkeys(taken))
        return taken

    def give_back(self, blocks: array[int]) -> None:
        """A block that was taken and given back before any microbatch left needs no zeros."""
        for block in blocks:
            self.fresh.pop(block, None)
        self.held.difference_update(blocks)
        self.free.extend(reversed(blocks))
        held, free = len(self.held), len(self.free)
        assert held + free == self.total, f"{held} blocks held + {free} free, of {self.total}"


class BlockAllocator:
    """Hands out blocks of every class, lazily, as sequences grow.

    >>> blocks = BlockAllocator(KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(10,)))
    >>> rings = blocks.new_rings()
    >>> blocks.grow(rings, 9), rings.blocks[0].tolist(), rings.room, blocks.used
    (True, [0, 1, 2], 12, (3,))
    >>> blocks.grow(rings, 1000), blocks.used, blocks.take_fresh()
    (True, (4,), [[0, 1, 2, 3]])
    >>> blocks.release(rings)
    >>> blocks.used
    (0,)
    """

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._pools = tuple(_Pool(total) for total in layout.pool_blocks)

    @property
    def total(self) -> tuple[int, ...]:
        """Blocks of each class."""
        return tuple(pool.total for pool in self._pools)

    @property
    def used(self) -> tuple[int, ...]:
        """Blocks of each class that sequences hold."""
        return tuple(len(pool.held) for pool in self._pools)

    @property
    def free(self) -> tuple[int, ...]:
        """Blocks of each class that nobody holds."""
        return tuple(len(pool.free) for pool in self._pools)

    def new_rings(self) -> Rings:
        """Empty rings, for a sequence that starts."""
        return Rings(tuple(array("i") for _ in self._pools))

    def needed(self, tokens: int) -> list[int]:
        """Blocks of each class that a sequence of so many cached tokens holds."""
        return [blocks_held(tokens, self._layout.block, ring) for ring in self._layout.rings]

    def reach(self, rings: Rings) -> int:
        """Positions that these rings could have room for, if they took all the blocks that are free."""
        reach = UNBOUNDED
        for pool, ring, held in zip(self._pools, self._layout.rings, rings.blocks, strict=True):
            blocks = len(held) + len(pool.free)
            if blocks < ring:
                reach = min(reach, blocks * self._layout.block)
        return reach

    def grow(self, rings: Rings, tokens: int) -> bool:
        """Take the blocks that so many positions need: all of them, or none and False."""
        if tokens <= rings.room:
            return True
        if tokens > self.reach(rings):
            return False
        block, room = self._layout.block, UNBOUNDED
        for pool, ring, held in zip(self._pools, self._layout.rings, rings.blocks, strict=True):
            needed = blocks_held(tokens, block, ring)
            if needed > len(held):
                held.extend(pool.take(needed - len(held)))
            if needed < ring:
                room = min(room, needed * block)
        rings.room = room
        return True

    def release(self, rings: Rings) -> None:
        """Give everything back, at once: microbatches in flight still read it before its next owner writes."""
        for pool, held in zip(self._pools, rings.blocks, strict=True):
            pool.give_back(held)
            del held[:]
        rings.room = 0

    def take_fresh(self) -> list[Sequence[int]]:
        """The blocks of each class taken since the last call and still held; the stages fill them with zeros."""
        fresh: list[Sequence[int]] = [list(pool.fresh) for pool in self._pools]
        for pool in self._pools:
            pool.fresh.clear()
        return fresh
