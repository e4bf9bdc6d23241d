"""The scheduler with a pipeline that one can compute by hand: exact microbatches, exact streams."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_stages import POISON, FakePipeline, FakeStages, expect_scores, layout_of

from tramontane.cluster.messages import EndReason, Submit
from tramontane.cluster.pacing import OutputReserve
from tramontane.cluster.scheduler import QueueFull
from tramontane.cluster.sequence import Phase, Sequence
from tramontane.stages.kv_layout import KVLayout, ring_blocks
from tramontane.stages.microbatch import StepResult


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + index * 7) % POISON for index in range(length)]


def raised_by(call: Callable[[], object]) -> str:
    """What an assertion in the call says; empty if none fails."""
    try:
        call()
    except AssertionError as error:
        return str(error)
    return ""


# One request


def test_one_sequence_microbatch_by_microbatch():
    """Window 8, chunk 4, block 4: a prompt of 6 in two chunks that are in flight together, then one decode token."""
    pipeline = FakePipeline(layout_of((8,)))
    stream = pipeline.add(5, [10, 11, 12, 13, 14, 15], max_tokens=2, seed=3)
    first, second = pipeline.schedule(), pipeline.schedule()
    assert pipeline.schedule() is None
    assert (first.tokens.tolist(), first.first.tolist(), first.length.tolist()) == ([10, 11, 12, 13], [0], [4])
    assert (first.tables[0].held.tolist(), len(first.tables[0].fresh), len(first.sampled.row)) == ([1], 1, 0)
    assert (second.tokens.tolist(), second.first.tolist(), second.length.tolist()) == ([14, 15], [4], [2])
    assert second.tables[0].blocks.tolist() == [first.tables[0].blocks[0], second.tables[0].fresh[0]]
    assert (second.sampled.row.tolist(), second.sampled.seed.tolist()) == ([1], [3])
    assert [pipeline.deliver(), pipeline.schedule()] == [[], None]
    (emitted,) = pipeline.deliver()
    assert (emitted.sequence, emitted.token, emitted.offset, emitted.end) == (5, stream.expected[0][0], 0, None)
    third = pipeline.schedule()
    assert (third.tokens.tolist(), third.first.tolist()) == ([emitted.token], [6])
    assert third.tables[0].fresh.tolist() == []
    (emitted,) = pipeline.deliver()
    assert (emitted.offset, emitted.end) == (1, EndReason.LENGTH)
    pipeline.run(deliveries=1)
    scheduler = pipeline.scheduler
    assert (scheduler.microbatches, scheduler.tokens) == (3, 7)
    assert (scheduler.prompt_tokens, scheduler.completion_tokens, scheduler.preemptions) == (6, 2, 0)


def test_sampled_rows_carry_what_was_asked():
    pipeline = FakePipeline(layout_of((None,)))
    submit = Submit(
        request=1,
        request_id="r",
        tokens=np.array([1, 2, 3], np.int32),
        max_tokens=4,
        min_tokens=2,
        stop_ids=np.array([4, 9], np.int32),
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.25,
        seed=2**64 - 1,
        remaining_ms=None,
    )
    pipeline.scheduler.add(Sequence.from_submit(3, submit))
    sampled = pipeline.scheduler.schedule(1, 0).sampled
    asked = sampled.row, sampled.temperature, sampled.top_k, sampled.top_p, sampled.min_p, sampled.seed
    assert [column.tolist() for column in asked] == [[2], [0.5], [7], [0.75], [0.25], [2**64 - 1]]
    assert (sampled.banned.tolist(), sampled.banned_count.tolist()) == ([4, 9], [2])


def test_stop_ids_end_it_from_min_tokens_on():
    everything = list(range(15))
    for min_tokens in range(5):
        pipeline = FakePipeline(layout_of((8,)))
        stream = pipeline.add(0, prompt_of(5), max_tokens=30, min_tokens=min_tokens, stop_ids=everything)
        pipeline.run()
        assert stream.end is EndReason.STOP_TOKEN
        assert stream.tokens[-1] in everything
        assert len(stream.tokens) > min_tokens
        assert not set(stream.tokens[:-1]) & set(everything)


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_request_that_turns_to_nan_ends_alone(place):
    pipeline = FakePipeline(layout_of((None,)))
    prompt = prompt_of(12)
    prompt[place] = POISON
    streams = [pipeline.add(0, prompt_of(9)), pipeline.add(1, prompt), pipeline.add(2, prompt_of(7))]
    pipeline.run()
    assert [(stream.end, len(stream.tokens)) for stream in streams] == [
        (EndReason.LENGTH, 8),
        (EndReason.NOT_FINITE, 0),
        (EndReason.LENGTH, 8),
    ]


def test_a_score_that_is_nan_ends_it_before_its_first_token():
    """The poison is out of the window when the first token is sampled; the scores have seen it."""
    pipeline = FakePipeline(layout_of((2,)))
    stream = pipeline.add(0, [POISON, *prompt_of(11)], score_prompt=True)
    stream.expected = [], EndReason.NOT_FINITE
    other = pipeline.add(1, prompt_of(11), score_prompt=True)
    pipeline.run()
    assert other.sequence.scores == expect_scores(prompt_of(11), (2,))


def test_every_prompt_token_is_scored_once_and_in_order():
    for chunk in (1, 3, 4, 20):
        pipeline = FakePipeline(layout_of((5, None), chunk=chunk))
        streams = [pipeline.add(index, prompt_of(length), 1, score_prompt=True) for index, length in enumerate((1, 9))]
        pipeline.run()
        assert [len(stream.sequence.scores) for stream in streams] == [0, 8]


# Many requests


def test_consecutive_chunks_fill_the_pipe():
    pipeline = FakePipeline(layout_of((8,)), stages=3)
    pipeline.add(0, prompt_of(40))
    pipeline.fill()
    assert [m.tokens.tolist() for m, _ in pipeline.pipe] == [prompt_of(40)[at : at + 4] for at in (0, 4, 8, 12)]


def test_prompts_that_have_the_pipe_for_themselves_are_shared_out_over_the_stages():
    pipeline = FakePipeline(layout_of((None,), chunk=256, context=512), stages=2, max_batch_tokens=1024, context=512)
    for index in range(4):
        pipeline.add(index, prompt_of(150))
    pipeline.fill()
    assert [len(m.tokens) for m, _ in pipeline.pipe] == [300, 300]


def test_prefill_is_spread_thinner_where_others_decode():
    pipeline = FakePipeline(layout_of((None,), chunk=256, context=512), stages=2, max_batch_tokens=1024, context=512)
    pipeline.add(0, [1], max_tokens=40)
    pipeline.fill()
    pipeline.deliver()
    for index in range(4):
        pipeline.add(1 + index, prompt_of(150))
    pipeline.fill()
    assert [len(m.tokens) for m, _ in pipeline.pipe] == [1 + 150, 150, 150]


def test_a_huge_prompt_neither_starves_decode_nor_is_starved():
    context = 2048
    layout = layout_of((16,), chunk=8, context=context, pool=40)
    pipeline = FakePipeline(layout, stages=2, max_batch_tokens=8, context=context)
    decoders = [pipeline.add(index, [index], max_tokens=400) for index in range(14)]
    for _ in range(40):
        pipeline.fill()
        pipeline.deliver()
    huge = pipeline.add(99, prompt_of(600))
    before = [len(stream.tokens) for stream in decoders]
    rounds = 0
    while not huge.tokens:
        pipeline.fill()
        pipeline.deliver()
        rounds += 1
    gained = [len(stream.tokens) - count for stream, count in zip(decoders, before, strict=True)]
    assert rounds < 3 * 150  # a round of three microbatches has at least one row free in each group, and one for itself
    assert min(gained) > rounds // 4
    assert max(gained) - min(gained) <= 1
    pipeline.run()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("burst", [1, 3, 10, 23])
def test_decode_groups_are_even_two_rounds_after_a_burst(stages, burst):
    pipeline = FakePipeline(layout_of((8,), pool=30), stages=stages, max_batch_tokens=64)
    for index in range(burst):
        pipeline.add(index, prompt_of(1 + index % 5), max_tokens=40)
    while any(not stream.tokens for stream in pipeline.streams):
        pipeline.fill()
        pipeline.deliver()
    settled = len(pipeline.groups) + 2 * stages
    while len(pipeline.groups) < settled + 4 * stages:
        pipeline.fill()
        pipeline.deliver()
    groups = pipeline.groups[settled:]
    assert max(groups) - min(groups) <= 1
    for at in range(len(groups) - stages):
        assert sum(groups[at : at + stages]) == max(burst, stages if burst >= stages else sum(groups[:stages]))


def test_a_burst_joins_the_groups_that_are_there():
    pipeline = FakePipeline(layout_of((8,), pool=40), stages=4, max_batch_tokens=64)
    for index in range(12):
        pipeline.add(index, [index], max_tokens=40)
    for _ in range(20):
        pipeline.fill()
        pipeline.deliver()
    assert set(pipeline.groups[-4:]) == {3}
    for index in range(20, 33):
        pipeline.add(index, [1], max_tokens=40)
    while any(not stream.tokens for stream in pipeline.streams):
        pipeline.fill()
        pipeline.deliver()
    for _ in range(16):
        pipeline.fill()
        pipeline.deliver()
    assert sorted(pipeline.groups[-4:]) == [6, 6, 6, 7]


def test_a_token_is_sent_only_when_the_one_before_is_back():
    pipeline = FakePipeline(layout_of((8,)), stages=3)
    stream = pipeline.add(0, [1, 2], max_tokens=5)
    pipeline.fill()
    assert len(pipeline.pipe) == 1
    pipeline.deliver()
    pipeline.fill()
    assert len(pipeline.pipe) == 1
    assert len(stream.tokens) == 1


def test_no_more_than_stages_plus_one_microbatches():
    for stages in (1, 2, 4):
        pipeline = FakePipeline(layout_of((8,)), stages=stages)
        pipeline.add(0, prompt_of(50))
        while pipeline.schedule() is not None:
            pass
        assert pipeline.scheduler.in_flight == stages + 1
        pipeline.run()


def test_results_must_come_in_order():
    pipeline = FakePipeline(layout_of((8,)))
    empty = np.empty(0, np.float32)
    result = StepResult(
        epoch=1,
        step=1,
        token=np.empty(0, np.int32),
        log_probability=empty,
        finite=np.empty(0, np.bool_),
        score=empty,
    )
    with pytest.raises(AssertionError, match="nothing is in flight"):
        pipeline.scheduler.update(result)
    pipeline.add(0, prompt_of(20))
    pipeline.fill()
    with pytest.raises(AssertionError, match="due is 1, 0"):
        pipeline.scheduler.update(result)


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
    with pytest.raises(QueueFull, match=r"2 requests wait, and the limit \(max-waiting\) is 2") as refusal:
        pipeline.add(4, prompt_of(20))
    assert (refusal.value.waiting, refusal.value.limit) == (2, 2)
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
    streams = [pipeline.add(index, prompt_of(4, index), max_tokens=40, score_prompt=True) for index in range(4)]
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
            pipeline.add(index, prompt_of(3 + 5 * index, index), max_tokens=12, seed=index, score_prompt=True)
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
