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


def plan_kv(
    config: ModelConfig,
    spans: Sequence[range],
    *,
    kv_memory_bytes: int,
    chunk: int,
    context: int,
    dtype: str,
    block: int = 32,
    kv_length: int | None = None,
) -> KVLayout:
    """Share each stage's `kv_memory_bytes` among the window classes, in the ratio that a sequence of `kv_length` needs.

    `spans` are the stages' layers. `kv_length` defaults to the largest finite window, else the context. A class gets
    the least that any stage with layers of it can give.

    Raises:
        ValueError: a class could not hold one sequence of full context.
    """
    windows = config.window_classes
    rings = tuple(ring_blocks(window, chunk, block, context) for window in windows)
    length = kv_length or max((window for window in windows if window is not None), default=context)
    wanted = [blocks_held(min(length, context), block, ring) for ring in rings]
    layer_block_bytes = 2 * config.kv_heads * config.head_dim * block * DTYPE_BYTES[dtype]

    def share(span: range, index: int) -> int | None:
        """Blocks of class `index` that the stage of these layers affords; None where it has no layer of the class."""
        layers = [sum(config.windows[layer] == window for layer in span) for window in windows]
        if not layers[index]:
            return None
        bytes_for_one = sum(count * need for count, need in zip(layers, wanted, strict=True)) * layer_block_bytes
        return kv_memory_bytes * wanted[index] // bytes_for_one

    pools = []
    for index, (window, ring) in enumerate(zip(windows, rings, strict=True)):
        pool = min(blocks for span in spans if (blocks := share(span, index)) is not None)
        if pool < ring:
            least = -(-kv_memory_bytes * ring // max(pool, 1))
            raise ValueError(
                f"kv-memory is {kv_memory_bytes} bytes a stage, which holds {pool} blocks of {block} tokens for window "
                f"{window or 'none'}; one sequence of {context} tokens needs {ring}, about {least} bytes"
            )
        pools.append(pool)
    return KVLayout(block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=tuple(pools))
