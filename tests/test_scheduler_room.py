"""Who gets KV blocks, and who has to give them back: admission, preemption, cancel and restart, rings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_stages import FakePipeline, FakeStages, layout_of, prompt_of

from tramontane.cluster.admission import OutputReserve, RefusalReason, Refused
from tramontane.cluster.messages import EndReason
from tramontane.cluster.sequence import Phase
from tramontane.stages.kv_layout import KVLayout, ring_blocks


def raised_by(call: Callable[[], object]) -> str:
    """What an assertion in the call says; empty if none fails."""
    try:
        call()
    except AssertionError as error:
        return str(error)
    return ""


# Admission


def test_what_could_never_run_is_refused_with_its_numbers():
    pipeline = FakePipeline(layout_of((None,), pool=0.5))  # 8 blocks of 4
    with pytest.raises(ValueError, match=r"60 prompt tokens \+ max_tokens 5 = 65, and the context is 64"):
        pipeline.add(0, prompt_of(60), max_tokens=5)
    with pytest.raises(ValueError, match=r"30 prompt tokens \+ max_tokens 3 = 33 need \[9\] KV blocks.*\[8\]"):
        pipeline.add(0, prompt_of(30), max_tokens=3)
    stream = pipeline.add(0, prompt_of(30), max_tokens=2)
    pipeline.run()
    assert stream.end is EndReason.LENGTH


def test_the_queue_is_bounded_and_the_preempted_do_not_count():
    pipeline = FakePipeline(layout_of((None,), pool=0.5), max_waiting=2)
    first, second = (pipeline.add(index, prompt_of(4, index), max_tokens=20) for index in range(2))
    while not pipeline.scheduler.preemptions:
        pipeline.fill()
        pipeline.deliver()
    assert (first.sequence.phase, second.sequence.phase) == (Phase.DECODE, Phase.WAITING)
    pipeline.add(2, prompt_of(20))
    pipeline.add(3, prompt_of(20))
    with pytest.raises(Refused, match=r"2 requests wait, and the limit \(max-waiting\) is 2") as refusal:
        pipeline.add(4, prompt_of(20))
    assert (refusal.value.reason, refusal.value.retry_after_s) == (RefusalReason.QUEUE_FULL, None)
    assert pipeline.scheduler.waiting == 3
    pipeline.cancel(3)
    pipeline.add(5, prompt_of(3))
    pipeline.run()


def test_the_head_of_the_queue_is_not_overtaken():
    pipeline = FakePipeline(layout_of((None,), pool=1))
    pipeline.add(0, prompt_of(40), max_tokens=20)
    pipeline.fill()
    long = pipeline.add(1, prompt_of(30), max_tokens=20)
    short = pipeline.add(2, prompt_of(1), max_tokens=1)
    while not short.tokens:
        pipeline.fill()
        assert not (short.sequence.computed and not long.sequence.computed)
        pipeline.deliver()
    pipeline.run()


def test_no_more_run_than_have_a_place_in_the_decode_groups():
    """Two groups of at most three rows; the others wait, and are served in their turn."""
    pipeline = FakePipeline(layout_of((8,), pool=20), stages=2, max_batch_tokens=3)
    for index in range(10):
        pipeline.add(index, [index], max_tokens=6)
    pipeline.fill()
    assert (pipeline.scheduler.running, pipeline.scheduler.waiting) == (6, 4)
    pipeline.run()
    assert max(pipeline.groups) == 3


def test_blocks_are_kept_back_for_the_known_tokens_of_the_running():
    """The first one's chunks are still to come: of 16 blocks it holds 1 and needs 10, so 7 do not fit beside it."""
    pipeline = FakePipeline(layout_of((None,), pool=1), stages=1)
    pipeline.add(0, prompt_of(40), max_tokens=1)
    pipeline.schedule()
    waiting = pipeline.add(1, prompt_of(27), max_tokens=1)
    pipeline.schedule()
    assert waiting.sequence.phase is Phase.WAITING
    pipeline.run()
    assert pipeline.scheduler.preemptions == 0


def test_a_share_of_the_possible_output_is_kept_back():
    """Half of 40 tokens after a prompt of 4: 6 blocks each, of 16. Two run, and the third would be one too many."""
    for careless, running in ((False, 2), (True, 3)):
        pipeline = FakePipeline(layout_of((None,), pool=1))
        pipeline.careless = careless
        for index in range(3):
            pipeline.add(index, prompt_of(4), max_tokens=40)
        pipeline.fill()
        assert pipeline.scheduler.running == running
        pipeline.run()


def test_the_share_rises_with_each_preemption_and_decays():
    reserve = OutputReserve()
    for _ in range(350):
        reserve.decay()
    assert reserve.share == pytest.approx(0.25, rel=0.01)
    shares = []
    for _ in range(3):
        reserve.rise()
        shares.append(reserve.share)
    assert shares == pytest.approx([0.625, 0.8125, 0.90625], rel=0.01)
    for _ in range(5000):
        reserve.decay()
    assert reserve.share == OutputReserve.LEAST


def test_a_full_ring_needs_nothing_kept_back():
    """Ring of 4 blocks, pool of 8: two long outputs run together, and neither is ever preempted."""
    pipeline = FakePipeline(layout_of((8,), pool=2))
    streams = [pipeline.add(index, prompt_of(20), max_tokens=40) for index in range(2)]
    pipeline.fill()
    assert [stream.sequence.phase for stream in streams] == [Phase.PREFILL] * 2
    pipeline.run()
    assert pipeline.scheduler.preemptions == 0


# Preemption, cancel, restart


def test_the_youngest_gives_way_and_its_stream_goes_on():
    pipeline = FakePipeline(layout_of((None,), pool=1))
    streams = [pipeline.add(index, prompt_of(4, index), max_tokens=40, score=True) for index in range(4)]
    pipeline.run()
    assert pipeline.scheduler.preemptions > 0
    assert pipeline.scheduler._reserve.share > OutputReserve.START
    assert streams[0].sequence.incarnation == 1  # its end
    assert streams[3].sequence.incarnation > 1
    assert all(len(stream.tokens) == 40 for stream in streams)


def test_who_is_youngest_waits_for_room_and_keeps_what_it_has():
    """8 blocks of 4. The older one holds 4 to its end; the younger one decodes into a fifth."""
    pipeline = FakePipeline(layout_of((None,), pool=0.5), stages=1)
    pipeline.add(9, [1], max_tokens=1)
    pipeline.run()  # the share of output that admission keeps back has decayed a little: nothing of 2 tokens
    old, young = pipeline.add(0, prompt_of(15), max_tokens=2), pipeline.add(1, prompt_of(16), max_tokens=2)
    while not young.tokens:
        pipeline.fill()
        pipeline.deliver()
    microbatch = pipeline.schedule()
    assert pipeline.scheduler.used_blocks == pipeline.scheduler.total_blocks == (8,)
    assert (microbatch.sequence.tolist(), pipeline.schedule()) == ([0], None)
    pipeline.run()
    assert pipeline.scheduler.preemptions == 0
    assert [stream.sequence.incarnation for stream in (old, young)] == [1, 1]


def test_a_piece_that_is_preempted_in_the_making_leaves_nothing_behind():
    """The younger one has its decode row and a new block in the microbatch when the older one needs that block."""
    pipeline = FakePipeline(layout_of((None,), pool=0.375), stages=1)  # 6 blocks of 4
    roster = pipeline.scheduler._roster
    take_back, in_the_making = roster.take_back, []

    def spy(sequence):
        in_the_making.append(bool(set(sequence.rings.blocks[0]) & set(roster.blocks._pools[0].fresh)))
        take_back(sequence)

    roster.take_back = spy
    pipeline.add(0, prompt_of(2), max_tokens=8)
    pipeline.add(1, prompt_of(7, 3), max_tokens=8)
    pipeline.run()
    assert in_the_making == [True]


def test_cancel_frees_every_block_before_the_next_step():
    """One that prefills, one that decodes and one that waits, cancelled while their microbatches are in flight."""
    pipeline = FakePipeline(layout_of((8, None), pool=2), stages=2)
    decodes = pipeline.add(0, prompt_of(3), max_tokens=20)
    pipeline.fill()
    pipeline.deliver()
    prefills, waits = (pipeline.add(number, prompt_of(30), max_tokens=20) for number in (1, 2))
    pipeline.fill()
    phases = [stream.sequence.phase for stream in (decodes, prefills, waits)]
    assert phases == [Phase.DECODE, Phase.PREFILL, Phase.WAITING]
    for number in (1, 2, 0):
        assert any(pipeline.scheduler.used_blocks)
        pipeline.cancel(number)
        pipeline.check()
    assert pipeline.scheduler.in_flight > 0
    assert pipeline.scheduler.used_blocks == (0, 0)
    pipeline.run()


@pytest.mark.parametrize("restarts", [0, 1])
def test_cancel_and_take_the_id_again_while_three_microbatches_are_in_flight(restarts):
    pipeline = FakePipeline(layout_of((8, None), pool=1), stages=2)
    pipeline.add(7, prompt_of(40), max_tokens=20)
    pipeline.fill()
    assert pipeline.scheduler.in_flight == 3
    pipeline.cancel(7)
    assert pipeline.scheduler.used_blocks == (0, 0)
    again = pipeline.add(7, prompt_of(5, 9), max_tokens=20)
    pipeline.deliver()
    pipeline.fill()
    if restarts:
        pipeline.restart()
    pipeline.run()
    assert len(again.tokens) == 20


def test_a_token_in_flight_for_an_older_incarnation_is_dropped():
    """Cancelled with its sampled row in flight, and back under its id before the result is."""
    pipeline = FakePipeline(layout_of((8,)))
    pipeline.add(7, prompt_of(4), max_tokens=20)
    pipeline.fill()
    pipeline.cancel(7)
    again = pipeline.add(7, prompt_of(6, 9), max_tokens=20)
    pipeline.fill()
    assert pipeline.deliver() == []
    pipeline.run()
    assert len(again.tokens) == 20


def test_after_a_restart_every_stream_goes_on_with_the_same_tokens():
    calm, shaken = (FakePipeline(layout_of((8, None), pool=2)) for _ in range(2))
    for pipeline in (calm, shaken):
        for index in range(6):
            pipeline.add(index, prompt_of(3 + 5 * index, index), max_tokens=12, seed=index, score=True)
    calm.run()
    for _ in range(8):
        for _ in range(5):
            shaken.fill()
            if shaken.pipe:
                shaken.deliver()
        shaken.fill()
        order = [stream.arrival for stream in shaken.live.values()]
        shaken.restart()
        assert not any(shaken.scheduler.used_blocks)
        assert [*shaken.scheduler._roster.waiting] == order
    shaken.run()
    assert [stream.tokens for stream in shaken.streams] == [stream.tokens for stream in calm.streams]


# Rings


@pytest.mark.parametrize("window", range(1, 10))
def test_rings_against_a_full_cache(window):
    """Every chunk and block in 1..9: the fake looks for every position in the window, in its place."""
    for chunk in range(1, 10):
        for block in range(1, 10):
            layout = layout_of((window,), chunk=chunk, block=block, context=64, pool=1.5)
            pipeline = FakePipeline(layout, max_batch_tokens=12)
            pipeline.add(0, prompt_of(window + 2 * chunk + block % 4), max_tokens=block + 3)
            pipeline.add(1, prompt_of(chunk + 1), max_tokens=3)
            pipeline.run()


def test_a_ring_one_block_shorter_would_not_do():
    """So the rings are no longer than they must be, and the fake would notice."""
    for window, chunk, block in [(6, 5, 3), (9, 9, 1), (7, 3, 2), (5, 2, 1), (1, 9, 1), (2, 9, 3)]:
        ring = ring_blocks(window, chunk, block, 64) - 1
        layout = KVLayout(block=block, chunk=chunk, windows=(window,), rings=(ring,), pool_blocks=(2 * ring,))
        for length in range(window + 1, window + 30):
            pipeline = FakePipeline(layout)
            pipeline.add(0, prompt_of(length), max_tokens=1)
            found = raised_by(pipeline.run)
            if found:
                break
        assert "finds" in found


def test_the_fake_notices_a_block_that_was_not_zeroed():
    pipeline = FakePipeline(layout_of((8,)))
    pipeline.add(0, prompt_of(3))
    microbatch = pipeline.schedule()
    object.__setattr__(microbatch.tables[0], "fresh", np.empty(0, np.int32))
    with pytest.raises(AssertionError, match="never zeroed"):
        FakeStages(pipeline.layout, epoch=1).step(microbatch)
