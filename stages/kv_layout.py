"""Where keys and values live: rings of blocks, and how many blocks a memory budget holds.

A window class has a pool of blocks of `block` positions each. A sequence holds a *ring* of blocks of its class:
position p belongs to logical block p // block, which lies at ring place (p // block) % ring. The router's allocator
fills the places lazily, in order; once all are taken, the ring rolls over in place and the sequence grows no more.

    block 4, ring 3, position 13: logical block 3, place 0 (rolled over once), row 1 of the block at that place
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tramontane.stages.config import DTYPE_BYTES, ModelConfig

BLOCK = 32
"""Positions in a block."""


def ring_blocks(window: int | None, chunk: int, block: int, context: int) -> int:
    """Blocks in a full ring: a chunk's queries see window - 1 positions before it and the chunk itself.

    That span of window + chunk - 1 positions touches at most ceil((window + chunk - 2) / block) + 1 blocks, wherever
    it starts; more than the context is never needed.

    >>> ring_blocks(window=8, chunk=4, block=4, context=64)
    4
    >>> ring_blocks(window=None, chunk=4, block=4, context=64)
    16
    """
    whole = -(-context // block)
    if window is None:
        return whole
    return min(whole, -(-(window + chunk - 2) // block) + 1)


def blocks_held(tokens: int, block: int, ring: int) -> int:
    """Blocks that a sequence of so many cached tokens holds.

    >>> [blocks_held(tokens, block=4, ring=3) for tokens in (0, 1, 4, 5, 100)]
    [0, 1, 1, 2, 3]
    """
    return min(-(-tokens // block), ring)


@dataclass(frozen=True)
class KVLayout:
    """What router and stages must agree on about KV blocks. One entry a window class, in the model's order.

    `pool_blocks[c]` is the size of class c's pool, the same at every stage. A block id means the same place in every
    layer of its class at every stage.
    """

    block: int
    chunk: int
    windows: tuple[int | None, ...]
    rings: tuple[int, ...]
    pool_blocks: tuple[int, ...]

    def capacity_tokens(self) -> int:
        """Tokens that the pools hold together when each sequence is shorter than its windows: the least of any class.

        >>> KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(10,)).capacity_tokens()
        40
        """
        return min(self.pool_blocks) * self.block

    def fits(self, tokens: int) -> bool:
        """Whether empty pools could hold a sequence of so many tokens."""
        return all(
            blocks_held(tokens, self.block, ring) <= pool
            for ring, pool in zip(self.rings, self.pool_blocks, strict=True)
        )


def block_bytes(config: ModelConfig, spans: Sequence[range], *, dtype: str, block: int = BLOCK) -> list[list[int]]:
    """The bytes that a block of a window class takes in all layers of a stage: a list for each stage, a number for each
    class in it."""
    layer = 2 * config.kv_heads * config.head_dim * block * DTYPE_BYTES[dtype]
    return [
        [layer * sum(config.windows[index] == window for index in span) for window in config.window_classes]
        for span in spans
    ]


def least_kv_bytes(
    config: ModelConfig, spans: Sequence[range], *, chunk: int, context: int, dtype: str, block: int = BLOCK
) -> int:
    """The bytes of one sequence of full context, in the stage where it takes most."""
    rings = [ring_blocks(window, chunk, block, context) for window in config.window_classes]
    return max(_dot(costs, rings) for costs in block_bytes(config, spans, dtype=dtype, block=block))


def kv_bytes(config: ModelConfig, spans: Sequence[range], layout: KVLayout, dtype: str) -> list[int]:
    """The bytes that the pools of a layout take in each stage."""
    costs = block_bytes(config, spans, dtype=dtype, block=layout.block)
    return [_dot(stage, layout.pool_blocks) for stage in costs]


def plan_kv(
    config: ModelConfig,
    spans: Sequence[range],
    *,
    kv_memory_bytes: int,
    chunk: int,
    context: int,
    dtype: str,
    block: int = BLOCK,
    kv_length: int | None = None,
) -> KVLayout:
    """Share each stage's `kv_memory_bytes` among the window classes, in the ratio that a sequence of `kv_length` needs.

    `spans` are the stages' layers. `kv_length` defaults to the largest finite window, else the context. Each class
    holds at least one full ring, taken from the others' shares where its own is smaller. A class gets the least that
    any stage with layers of it can give.

    Raises:
        ValueError: a stage's memory cannot hold one sequence of full context, or an option is below 1.
    """
    for option, value in (("chunk", chunk), ("max-context", context), ("kv-length", kv_length), ("block", block)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} is {value}; it must be at least 1")
    windows = config.window_classes
    rings = [ring_blocks(window, chunk, block, context) for window in windows]
    length = kv_length or max((window for window in windows if window is not None), default=context)
    wanted = [blocks_held(min(length, context), block, ring) for ring in rings]
    least = least_kv_bytes(config, spans, chunk=chunk, context=context, dtype=dtype, block=block)
    if kv_memory_bytes < least:
        raise ValueError(
            f"--kv-memory is {kv_memory_bytes} bytes a stage; one sequence of {context} tokens needs {least} bytes"
        )
    costs = block_bytes(config, spans, dtype=dtype, block=block)
    shares = [_share(kv_memory_bytes, stage, rings, wanted) for stage in costs]
    pools = [min(share[index] for share in shares if index in share) for index in range(len(windows))]
    return KVLayout(block=block, chunk=chunk, windows=windows, rings=tuple(rings), pool_blocks=tuple(pools))


def _dot(costs: Sequence[int], blocks: Sequence[int]) -> int:
    return sum(cost * count for cost, count in zip(costs, blocks, strict=True))


def _share(memory: int, costs: Sequence[int], rings: Sequence[int], wanted: Sequence[int]) -> dict[int, int]:
    """Blocks of each class that one stage affords, by class; classes that cost it nothing are left out.

    Classes whose share in the ratio `wanted` is below their ring get the ring first; the others share what is left,
    which may put a further class below its ring, and so on. `memory` must hold every ring.

    Two classes at 10 bytes a block, wanted 1 : 9 of 100 bytes; the first needs a ring of 4:

    >>> _share(100, [10, 10], rings=[4, 2], wanted=[1, 9])
    {0: 4, 1: 6}
    """
    sharing = {index for index, cost in enumerate(costs) if cost}
    blocks: dict[int, int] = {}
    while True:
        left = memory - sum(costs[index] * rings[index] for index in blocks)
        one = sum(costs[index] * wanted[index] for index in sharing)
        shares = {index: left * wanted[index] // one for index in sorted(sharing)}
        below = {index for index, share in shares.items() if share < rings[index]}
        if not below:
            blocks |= shares
            return dict(sorted(blocks.items()))
        blocks |= {index: rings[index] for index in below}
        sharing -= below
