"""Rings are exactly as large as they must be, and a stage's memory is shared as promised, to the byte."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.stages.config import EXAMPLE
from tramontane.stages.kv_layout import KVLayout, blocks_held, plan_kv, ring_blocks
from tramontane.stages.split import split_as

UNIT = 2 * 2 * 8 * 4  # bytes of one position of one layer of EXAMPLE, float32: K and V, 2 KV heads, head_dim 8


def survives(window, chunk, block, ring, tokens):
    """Whether a ring of so many places still holds every block that a query sees, written chunk by chunk before read.

    A dumb simulation: a place remembers the last logical block that was put there, and a block that rolls in takes the
    place whole. Chunks start anywhere: a first piece of every length up to `chunk`, then full chunks.
    """
    for first in range(1, chunk + 1):
        at_place: dict[int, int] = {}
        start, stop = 0, first
        while start < tokens:
            for position in range(start, stop):
                at_place[position // block % ring] = position // block
            seen = {position // block for position in range(max(0, start - window + 1), stop)}
            if any(at_place[logical % ring] != logical for logical in seen):
                return False
            start, stop = stop, stop + chunk
    return True


def test_rings_are_large_enough_and_no_larger():
    """Exhaustively for window, chunk and block in 1..9."""
    for window, chunk, block in itertools.product(range(1, 10), repeat=3):
        tokens = 3 * (window + chunk + block)
        ring = ring_blocks(window, chunk, block, context=10 * tokens)
        assert survives(window, chunk, block, ring, tokens), (window, chunk, block)
        if ring > 1:
            assert not survives(window, chunk, block, ring - 1, tokens), (window, chunk, block)


def test_a_ring_never_exceeds_the_context():
    assert ring_blocks(window=100, chunk=50, block=8, context=40) == 5
    assert ring_blocks(window=None, chunk=50, block=8, context=41) == 6


def test_blocks_are_taken_lazily_up_to_the_ring():
    assert [blocks_held(tokens, block=4, ring=3) for tokens in (0, 1, 4, 5, 8, 9, 12, 13, 99)] == [
        0, 1, 1, 2, 2, 3, 3, 3, 3,
    ]  # fmt: skip


def test_one_class_takes_the_whole_memory():
    layout = plan_kv(
        EXAMPLE, split_as(EXAMPLE, [3, 1]), kv_memory_bytes=10_000 * UNIT, chunk=4, context=64, dtype="float32", block=4
    )
    assert layout == KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(10_000 // (3 * 4),))
    assert layout.capacity_tokens() == 833 * 4
    half = plan_kv(EXAMPLE, [range(4)], kv_memory_bytes=1600 * UNIT, chunk=4, context=64, dtype="bfloat16", block=4)
    assert half.pool_blocks == (200,)


def test_classes_share_in_the_ratio_of_the_length():
    config = dataclasses.replace(EXAMPLE, windows=(None, 8, 8, 8), context=4096)
    options = {"kv_memory_bytes": 100_000 * UNIT, "chunk": 4, "context": 4096, "dtype": "float32", "block": 4}
    # Of 400 tokens, the full class holds 100 blocks in one layer, the window 4 blocks in each of three.
    layout = plan_kv(config, [range(4)], kv_length=400, **options)
    full, windowed = layout.pool_blocks
    assert full / windowed == pytest.approx(100 / 4, rel=0.01)
    assert 0.99 < (full + 3 * windowed) * 4 / 100_000 <= 1
    # By default the length is the largest finite window: 2 blocks of each.
    full, windowed = plan_kv(config, [range(4)], **options).pool_blocks
    assert full == windowed


def test_a_class_under_its_ring_is_filled_from_the_others():
    """Full attention over 1,024 tokens next to a window of 8: the default ratio would leave it too little."""
    config = dataclasses.replace(EXAMPLE, windows=(None, 8, 8, 8))
    layout = plan_kv(config, [range(4)], kv_memory_bytes=1400 * UNIT, chunk=4, context=1024, dtype="float32", block=4)
    assert layout.rings == (256, 4)
    assert layout.pool_blocks == (256, (1400 - 1024) // 12)
    assert layout.fits(1024)


def test_the_stage_with_least_room_decides():
    config = dataclasses.replace(EXAMPLE, windows=(8, 8, None, None))
    options = {"kv_memory_bytes": 10_000 * UNIT, "chunk": 4, "context": 64, "dtype": "float32", "block": 4}
    apart = plan_kv(config, [range(2), range(2, 4)], **options)
    mixed = plan_kv(config, [range(1), range(1, 3), range(3, 4)], **options)
    assert apart.pool_blocks == (1250, 1250)
    assert mixed.pool_blocks == (1250, 1250)
    assert plan_kv(config, [range(3), range(3, 4)], **options).pool_blocks == (833, 833)


@given(
    windows=st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=6),
    cut=st.integers(0, 5),
    chunk=st.integers(1, 20),
    context=st.integers(1, 200),
    block=st.integers(1, 16),
    kv_length=st.none() | st.integers(1, 300),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    extra=st.integers(0, 10**6),
)
def test_memory_is_enough_exactly_when_it_holds_one_sequence(
    windows, cut, chunk, context, block, kv_length, dtype, extra
):
    config = dataclasses.replace(EXAMPLE, windows=tuple(windows))
    cut = min(cut, len(windows) - 1)
    spans = [span for span in (range(cut), range(cut, len(windows))) if span]
    options = {"chunk": chunk, "context": context, "dtype": dtype, "block": block, "kv_length": kv_length}
    with pytest.raises(
        ValueError, match=r"--kv-memory is 1 bytes a stage; one sequence of \d+ tokens needs"
    ) as refusal:
        plan_kv(config, spans, kv_memory_bytes=1, **options)
    least = int(str(refusal.value).removesuffix(" bytes").rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match=f"--kv-memory is {least - 1} bytes .* needs {least} bytes"):
        plan_kv(config, spans, kv_memory_bytes=least - 1, **options)

    for memory in (least, least + extra):
        layout = plan_kv(config, spans, kv_memory_bytes=memory, **options)
        assert all(pool >= ring for pool, ring in zip(layout.pool_blocks, layout.rings, strict=True))
        assert layout.fits(context)
        unit = UNIT if dtype == "float32" else UNIT // 2
        for span in spans:
            pool_of = dict(zip(layout.windows, layout.pool_blocks, strict=True))
            used = sum(pool_of[config.windows[layer]] * block * unit for layer in span)
            assert used <= memory


@pytest.mark.parametrize("option", ["chunk", "context", "kv_length", "block"])
def test_options_below_one_are_refused(option):
    options = {"chunk": 4, "context": 64, "kv_length": 8, "block": 4} | {option: 0}
    flag = {"kv_length": "--kv-length", "context": "--max-context"}.get(option, f"--{option}")
    with pytest.raises(ValueError, match=f"{flag} is 0; it must be at least 1"):
        plan_kv(EXAMPLE, [range(4)], kv_memory_bytes=10**9, dtype="float32", **options)


def test_what_fits_an_empty_pool():
    layout = KVLayout(block=4, chunk=4, windows=(None, 8), rings=(16, 4), pool_blocks=(10, 4))
    assert layout.fits(40)
    assert not layout.fits(41)
