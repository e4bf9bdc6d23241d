"""The block allocator: lazy rings, nothing lost, and every block that changes hands reported for zeroing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.blocks import UNBOUNDED, BlockAllocator
from tramontane.stages.kv_layout import KVLayout, blocks_held

LAYOUT = KVLayout(block=4, chunk=4, windows=(8, None), rings=(4, 16), pool_blocks=(6, 20))


def test_a_ring_grows_lazily_and_then_rolls_over():
    blocks = BlockAllocator(LAYOUT)
    rings = blocks.new_rings()
    held = []
    for tokens in (1, 4, 5, 16, 17, 64):
        assert blocks.grow(rings, tokens)
        held.append([len(ring) for ring in rings.blocks])
    assert held == [[1, 1], [1, 1], [2, 2], [4, 4], [4, 5], [4, 16]]
    assert rings.room == UNBOUNDED
    assert blocks.used == (4, 16)
    assert blocks.free == (2, 4)


def test_growing_takes_all_that_is_needed_or_nothing():
    blocks = BlockAllocator(LAYOUT)
    first, second = blocks.new_rings(), blocks.new_rings()
    assert blocks.grow(first, 16)
    assert blocks.reach(second) == 8  # two blocks of class 0 are left; class 1 has sixteen
    assert not blocks.grow(second, 9)
    assert blocks.used == (4, 4)
    assert [len(ring) for ring in second.blocks] == [0, 0]
    assert blocks.grow(second, 8)
    assert blocks.free == (0, 14)
    assert blocks.reach(first) == UNBOUNDED  # its ring of class 0 is full, and class 1 has enough for all of it


def test_blocks_are_reported_fresh_once_and_again_when_they_change_hands():
    blocks = BlockAllocator(LAYOUT)
    first, second = blocks.new_rings(), blocks.new_rings()
    blocks.grow(first, 5)
    assert blocks.take_fresh() == [first.blocks[0].tolist(), first.blocks[1].tolist()]
    assert blocks.take_fresh() == [[], []]
    blocks.release(first)
    blocks.grow(second, 4)
    assert blocks.take_fresh() == [second.blocks[0].tolist(), second.blocks[1].tolist()]


def test_a_block_given_back_before_a_microbatch_left_is_fresh_for_its_next_owner_only():
    blocks = BlockAllocator(LAYOUT)
    first, second = blocks.new_rings(), blocks.new_rings()
    blocks.grow(first, 16)
    blocks.release(first)
    blocks.grow(second, 4)
    assert blocks.take_fresh() == [second.blocks[0].tolist(), second.blocks[1].tolist()]


def test_giving_back_a_block_twice_is_noticed():
    blocks = BlockAllocator(LAYOUT)
    rings = blocks.new_rings()
    blocks.grow(rings, 4)
    copy = blocks.new_rings()
    copy.blocks[0].extend(rings.blocks[0])
    blocks.release(rings)
    with pytest.raises(AssertionError, match=r"0 blocks held \+ 7 free, of 6"):
        blocks.release(copy)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 70)), max_size=60))
def test_every_block_is_free_or_held_by_one(events):
    """Against a plain count: who holds what after any growing (a length) and releasing (-1)."""
    blocks = BlockAllocator(LAYOUT)
    rings = [blocks.new_rings() for _ in range(5)]
    lengths = [0] * 5
    for who, tokens in events:
        if tokens < 0:
            blocks.release(rings[who])
            lengths[who] = 0
        else:
            wanted = [max(tokens, length) if who == index else length for index, length in enumerate(lengths)]
            fits = all(
                sum(blocks_held(length, 4, ring) for length in wanted) <= total
                for ring, total in zip(LAYOUT.rings, LAYOUT.pool_blocks, strict=True)
            )
            assert blocks.grow(rings[who], tokens) == fits
            if fits:
                lengths = wanted
        for index, (ring, total) in enumerate(zip(LAYOUT.rings, LAYOUT.pool_blocks, strict=True)):
            held = [block for each in rings for block in each.blocks[index]]
            assert len(set(held)) == len(held) == sum(blocks_held(length, 4, ring) for length in lengths)
            assert set(held) <= set(range(total))
            assert blocks.used[index] + blocks.free[index] == total
