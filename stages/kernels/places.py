"""Ring arithmetic in numpy: which row of a pool holds a position, and what a query may see.

Letters: T rows of the microbatch, S pieces.
"""

from __future__ import annotations

import numpy as np

from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int64Array, Microbatch


class Places:
    """The places of one window class in one microbatch. A place is `block id * block + row in the block`.

    Ring 3, block 4, one piece of 2 tokens at position 13 that holds the blocks 7, 2 and 5: position 13 lies in block
    `[7, 2, 5][(13 // 4) % 3] = 7`, row 1, and position 14 beside it:

        written = [29, 30]
    """

    def __init__(self, microbatch: Microbatch, layout: KVLayout, index: int) -> None:
        table = microbatch.tables[index]
        self.window = layout.windows[index]
        self._block = layout.block
        self._ring = layout.rings[index]
        self._blocks = table.blocks.astype(np.int64)
        self._held_S = table.held.astype(np.int64)
        self._offset_S = np.cumsum(self._held_S) - self._held_S
        self._zero = layout.pool_blocks[index] * layout.block
        self.written: Int64Array = self.of(microbatch.piece.astype(np.int64), microbatch.position.astype(np.int64))
        """Where each row's key and value go. [T]"""

    @property
    def zero(self) -> int:
        """The first place after the pool: a kernel set that keeps a row of zeros there may point padding at it."""
        return self._zero

    def of(self, piece: Int64Array, position: Int64Array) -> Int64Array:
        """Places of positions that the pieces hold; both arguments of one shape, or broadcast."""
        logical = position // self._block
        in_ring = logical % self._ring
        held = self._held_S[piece]
        assert (in_ring < held).all(), f"places {in_ring.max()} of rings that hold {held.min()} blocks"
        block: Int64Array = self._blocks[self._offset_S[piece] + in_ring]
        return block * self._block + (position - logical * self._block)

    def first_visible(self, position: Int64Array) -> Int64Array:
        """The first position that a query at `position` sees: window - 1 before it, or all."""
        if self.window is None:
            return np.zeros_like(position)
        return np.maximum(position - (self.window - 1), 0)

    def first_visible_to(self, position: int) -> int:
        """`first_visible` of one position."""
        return 0 if self.window is None else max(position - (self.window - 1), 0)
